"""HopSkipJump on models that show their decisions alone; on linear ones the least change is known."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_bulwark.attacks import FGSM, HopSkipJump
from mlx_bulwark.attacks.hop_skip_jump import Decisions

RNG = np.random.default_rng(0)
B, D, C = 12, 20, 3
WEIGHT = RNG.standard_normal((D, C))
X = (0.3 + 0.4 * RNG.random((B, D))).astype(np.float32)
BIAS = -np.full(D, 0.5) @ WEIGHT
Z = X @ WEIGHT + BIAS
Y = Z.argmax(1)


@mx.custom_function
def no_gradient(x):
    return x


@no_gradient.vjp
def no_gradient_vjp(*_):
    raise AssertionError("a black-box attack asked for a gradient")


def logits(x):
    return no_gradient(x).astype(mx.float32).reshape(len(x), -1) @ mx.array(WEIGHT.astype(np.float32)) + mx.array(
        BIAS.astype(np.float32)
    )


def labels(x):
    return logits(x).argmax(axis=1).astype(mx.int32)


def least(order):
    changes = np.full((B, C), np.inf)
    for k in range(C):
        size = np.linalg.norm(WEIGHT[:, k] - WEIGHT[:, Y].T, order, axis=1)
        changes[:, k] = (Z[np.arange(B), Y] - Z[:, k]) / np.where(size > 0, size, 1)
    changes[np.arange(B), Y] = np.inf
    return changes.min(1)


@pytest.mark.parametrize(("norm", "order", "near"), [("l2", 2, 1.1), ("linf", 1, 1.3)])
def test_nears_the_least_change(norm, order, near):
    found = HopSkipJump(norm=norm, queries=4000, bounds=(-2, 3))(labels, mx.array(X), mx.array(Y))
    assert found.success.all().item()
    ratio = np.array(found.distances) / least(order)
    assert ratio.min() >= 1 - 1e-4
    assert np.median(ratio) < near
    assert (found.queries <= 4000).all().item()
    assert (found.queries > 3900).all().item()


def test_logits_give_nothing_but_their_largest():
    results = [
        HopSkipJump(queries=300)(m, mx.array(X), mx.array(Y)) for m in (labels, logits, lambda x: logits(x) ** 3)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a == b).all().item()


def test_what_is_seen_is_the_place_of_the_largest_logit():
    z = mx.array([[0.1, 5.0, 2.0], [-1.0, -2.0, -3.0], [mx.nan, 1.0, 0.0]])
    seen = np.array(Decisions(lambda x: x, 2)(z))
    assert np.array_equal(seen, [[0, 1, 0], [1, 0, 0], [np.nan] * 3], equal_nan=True)
    assert np.array(Decisions(lambda x: mx.array([2, 0]), 2)(z[:2])).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("queries", [3, 4, 10, 105, 140, 777])
def test_budget(queries):
    asked = []

    def counting(x):
        asked.append(len(x))
        return labels(x)

    found = HopSkipJump(queries=queries, batch_size=50)(counting, mx.array(X), mx.array(Y))
    assert (found.queries <= queries).all().item()
    assert sum(asked) == found.queries.sum().item()
    assert max(asked) <= 50


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_in_the_ball_and_the_bounds(norm, dtype):
    x = mx.array(X).astype(dtype).reshape(B, 4, 5)
    y = logits(x).argmax(axis=1)
    eps = np.linspace(0, 1.5 if norm == "l2" else 0.4, B, dtype=np.float32)
    found = HopSkipJump(mx.array(eps), norm=norm, queries=600)(logits, x, y)
    wide = np.array(found.adversarial.astype(mx.float32), np.float64)
    moved = np.abs(wide - np.array(x.astype(mx.float32), np.float64)).reshape(B, -1)
    length = moved.max(1) if norm == "linf" else np.linalg.norm(moved, axis=1)
    assert found.adversarial.dtype == dtype
    assert (length <= eps + 1e-6).all()
    assert wide.min() >= 0
    assert wide.max() <= 1
    assert (np.array(logits(found.adversarial).argmax(axis=1) != y) == np.array(found.success)).all()
    assert 3 <= found.success.sum().item() < B


def test_inputs_that_are_done_change_nothing_for_others():
    eps = np.full(B, 1e-6, np.float32)
    small = HopSkipJump(mx.array(eps), queries=400)(labels, mx.array(X), mx.array(Y))
    eps[::2] = 10.0
    large = HopSkipJump(mx.array(eps), queries=400)(labels, mx.array(X), mx.array(Y))
    assert large.success[::2].all().item()
    assert (large.queries[::2] < 150).all().item()
    assert (large.queries[1::2] == small.queries[1::2]).all().item()


def test_one_input_alone_is_attacked_as_the_first_of_many():
    many = HopSkipJump(queries=300)(labels, mx.array(X), mx.array(Y))
    one = HopSkipJump(queries=300)(labels, mx.array(X[:1]), mx.array(Y[:1]))
    assert (many.adversarial[0] == one.adversarial[0]).all().item()


def test_targets():
    targets = (Y + 1) % C
    found = HopSkipJump(queries=800, targeted=True)(labels, mx.array(X), mx.array(Y), targets=mx.array(targets))
    assert found.success.sum().item() >= B - 2
    assert ((np.array(labels(found.adversarial)) == targets) == np.array(found.success)).all()


def test_starts_from_other_inputs_where_noise_does_not_fool():
    """Only inputs far out in a corner have the other class: noise never is one."""

    def corner(x):
        return (x.mean(axis=1) > 0.95).astype(mx.int32)

    x = mx.array(np.concatenate([X, np.ones((1, D), np.float32)]))
    found = HopSkipJump(queries=400)(corner, x, corner(x))
    assert found.success.all().item()


def test_gradients_of_these_models_raise():
    with pytest.raises(AssertionError, match="asked for a gradient"):
        FGSM(0.1)(logits, mx.array(X), mx.array(Y))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HopSkipJump(norm="l1"), "norm must be 'l2' or 'linf'"),
        (lambda: HopSkipJump(queries=2), "queries must be an integer >= 3"),
        (lambda: HopSkipJump(initial_estimates=1), "initial_estimates must be"),
        (lambda: HopSkipJump(batch_size=0), "batch_size must be"),
        (lambda: HopSkipJump()(lambda x: x, mx.array(X).reshape(B, 4, 5), mx.array(Y)), "model must return"),
        (lambda: HopSkipJump()(lambda x: x[:, :1], mx.array(X), mx.array(Y)), "2 classes or more"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
