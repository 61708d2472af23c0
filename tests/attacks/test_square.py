"""Square: its schedule and windows against numbers computed here, its result by the rules of all attacks."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_bulwark.attacks import FGSM, Square
from mlx_bulwark.attacks.square import tables

RNG = np.random.default_rng(0)
SHAPE = (6, 7, 2)
WEIGHT = RNG.standard_normal((math.prod(SHAPE), 3)).astype(np.float32)
X = RNG.random((12, *SHAPE), dtype=np.float32)
Y = (X.reshape(12, -1) @ WEIGHT).argmax(1)


@mx.custom_function
def no_gradient(x):
    return x


@no_gradient.vjp
def no_gradient_vjp(*_):
    raise AssertionError("a black-box attack asked for a gradient")


def model(x):
    return no_gradient(x).astype(mx.float32).reshape(len(x), -1) @ mx.array(WEIGHT)


def test_published_schedule():
    """Of 28 x 28 pixels: the sides of AutoAttack's windows at either side of each halving."""
    at = [0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 6000, 6001, 8000, 8001, 9999]
    want = [25, 25, 18, 18, 13, 13, 9, 9, 6, 6, 4, 4, 3, 3, 2, 2, 2, 2, 1, 1]
    assert [Square(0.1)._sides(i, 28, 28) for i in at] == [(side, side) for side in want]
    rescaled = Square(0.1, queries=5000, rescale_schedule=True)
    assert [rescaled._sides(i, 28, 28)[0] for i in (5, 6, 25, 26, 4000, 4001)] == [25, 18, 18, 13, 2, 1]
    odd = [max(side, 3) + (max(side, 3) % 2 == 0) for side in want]
    assert [Square(0.1, norm="l2")._sides(i, 28, 28)[0] for i in at] == odd
    assert Square(0.1)._sides(0, 1, 100) == (1, 80)


def test_table_of_a_small_window():
    """3 x 3 of L2: one row of a bump above two rows of a dent, each of norm 1, then both together."""
    upper = np.array([[0.25, 1.25, 0.25]])
    lower = np.array([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25]])
    want = np.concatenate([upper / np.linalg.norm(upper), -lower / np.linalg.norm(lower)]) / math.sqrt(2)
    assert np.allclose(tables(3, 3, "l2"), [want, want.T], atol=1e-6)
    assert np.allclose(np.abs(tables(5, 4, "l1")).sum((1, 2)), 1)


def asked(norm, **options):
    """All that the model sees while one input that cannot be fooled is attacked."""
    seen = []

    def record(x):
        seen.append(np.array(x))
        return mx.stack([mx.abs(x).sum(axis=(1, 2, 3)), mx.full((len(x),), -1.0)], axis=1)

    Square(0.1, norm=norm, queries=60, **options)(record, mx.full((1, 28, 28, 3), 0.5), mx.array([0]))
    return np.concatenate(seen)


def test_linf_starts_from_stripes_and_tries_one_square():
    seen = asked("linf")
    first = seen[1, ...] - 0.5
    assert np.allclose(np.abs(first), 0.1)
    assert (first == first[:1]).all()
    assert len(np.unique(first[0], axis=0)) > 2
    best, loss = seen[1], seen[1].sum()
    for i, tried in enumerate(seen[2:-1]):
        changed = np.argwhere((tried != best).any(axis=2))
        side = 25 if i <= 10 else 18 if i <= 50 else 13
        if len(changed):
            assert (np.ptp(changed, axis=0) < side).all()
        assert np.allclose(np.abs(tried - 0.5), 0.1)
        if tried.sum() < loss:
            best, loss = tried, tried.sum()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_l2_and_l1_use_the_whole_ball(norm):
    moved = (asked(norm)[1:-1] - 0.5).reshape(58, -1)
    length = np.linalg.norm(moved, axis=1) if norm == "l2" else np.abs(moved).sum(1)
    assert np.allclose(length, 0.1, rtol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("l2", 1.0), ("l1", 8.0)])
def test_in_the_ball_and_the_bounds(norm, eps, dtype):
    x = mx.array(X).astype(dtype)
    y = model(x).argmax(axis=1)
    found = Square(eps, norm=norm, queries=150)(model, x, y)
    wide = np.array(found.adversarial.astype(mx.float32), np.float64)
    moved = np.abs(wide - np.array(x.astype(mx.float32), np.float64)).reshape(12, -1)
    length = {"linf": moved.max(1), "l2": np.sqrt((moved**2).sum(1)), "l1": moved.sum(1)}[norm]
    assert (length <= eps + 1e-6).all()
    assert wide.min() >= 0
    assert wide.max() <= 1
    assert (np.array(model(found.adversarial).argmax(axis=1) != y) == np.array(found.success)).all()
    assert found.success.sum().item() >= 6
    assert (found.queries <= 150).all().item()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_inputs_that_are_done_change_nothing_for_others(norm):
    """Once with half of them fooled early, once with all of them in small balls."""
    x = mx.array(X)
    eps = np.full(12, {"linf": 0.02, "l2": 0.1, "l1": 0.4}[norm], np.float32)
    small = Square(mx.array(eps), norm=norm, queries=40)(model, x, mx.array(Y))
    eps[::2] = {"linf": 0.5, "l2": 4.0, "l1": 40.0}[norm]
    large = Square(mx.array(eps), norm=norm, queries=40)(model, x, mx.array(Y))
    assert large.success[::2].sum().item() >= 4
    assert (large.adversarial[1::2] == small.adversarial[1::2]).all().item()
    assert (large.queries[1::2] == small.queries[1::2]).all().item()


@pytest.mark.parametrize("shape", [(84,), (12, 7), (3, 4, 7), (2, 3, 7, 2), (1, 84, 1)])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_shapes(shape, norm):
    x = mx.array(X.reshape(12, *shape))
    eps = {"linf": 0.2, "l2": 1.5, "l1": 12.0}[norm]
    found = Square(eps, norm=norm, queries=100)(model, x, mx.array(Y))
    assert found.adversarial.shape == x.shape
    assert found.success.sum().item() >= 6


def test_targets():
    targets = (Y + 1) % 3
    found = Square(0.4, queries=200, targeted=True)(model, mx.array(X), mx.array(Y), targets=mx.array(targets))
    assert found.success.sum().item() >= 10
    hit = np.array(model(found.adversarial).argmax(axis=1)) == targets
    assert (hit == np.array(found.success)).all()


def test_same_seed_same_result():
    one, two, other = (Square(0.05, queries=20, seed=s)(model, mx.array(X), mx.array(Y)) for s in (0, 0, 1))
    assert (one.adversarial == two.adversarial).all().item()
    assert (one.queries == two.queries).all().item()
    assert not (one.queries == other.queries).all().item() or not (one.adversarial == other.adversarial).all().item()


def test_gradients_of_these_models_raise():
    with pytest.raises(AssertionError, match="asked for a gradient"):
        FGSM(0.1)(model, mx.array(X), mx.array(Y))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Square(None), "eps must be"),
        (lambda: Square(0.1, queries=2), "queries must be an integer >= 3"),
        (lambda: Square(0.1, p_init=0), "p_init must be"),
        (lambda: Square(0.1, p_init=1.5), "p_init must be"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
