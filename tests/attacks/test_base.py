"""What all attacks share: refusals, judgement, masks, and the batch that shrinks."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark.attacks import FGSM, PGD, Normalized
from mlx_bulwark.attacks.base import Remaining, distance

WEIGHT = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)


def linear(x):
    return x.reshape(len(x), -1) @ mx.array(WEIGHT.T).astype(x.dtype)


@pytest.fixture
def case():
    x = mx.array(np.random.default_rng(1).random((40, 2, 3)).astype(np.float32))
    return x, mx.argmax(linear(x), axis=1)


X, Y = mx.full((2, 4), 0.5), mx.array([0, 1])


def first_three(x):
    return x[:, :3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PGD(-1.0), "eps must be a finite number >= 0"),
        (lambda: PGD(None), "eps must be"),
        (lambda: PGD(mx.array([0.1, -0.1])), "eps must be a number or float32"),
        (lambda: PGD(mx.array([1])), "eps must be a number or float32"),
        (lambda: PGD(0.1, norm="l3"), "norm must be"),
        (lambda: PGD(0.1, bounds=(1, 0)), "bounds must be finite and increase"),
        (lambda: PGD(0.1, bounds=3), "bounds must be two numbers"),
        (lambda: PGD(0.1, steps=0), "steps must be an integer >= 1"),
        (lambda: PGD(0.1, restarts=True), "restarts must be an integer >= 1"),
        (lambda: PGD(0.1, alpha=-1), "alpha must be"),
        (lambda: PGD(0.1, loss="hinge"), "loss must be 'cross_entropy', 'margin', 'dlr' or a function"),
        (lambda: PGD(0.1, seed=-1), "seed must be"),
        (lambda: PGD(mx.array([0.1]))(first_three, X, Y), "eps must have one radius an input, 2, but has 1"),
        (lambda: PGD(0.1)(first_three, X + 1, Y), r"within the bounds \(0.0, 1.0\) but has 2 inputs that are not"),
        (lambda: PGD(0.1)(first_three, X * mx.array([[1.0], [mx.nan]]), Y), "has 1 inputs that are not, first input 1"),
        (lambda: PGD(0.1)(first_three, X.astype(mx.int32), Y), "x must be a float32, float16 or bfloat16 array"),
        (lambda: PGD(0.1)(first_three, mx.zeros(4), Y), "x must be a float32, float16 or bfloat16 array"),
        (lambda: PGD(0.1)(first_three, X, mx.array([0, 3])), r"y must be in \[0, 3\) but has labels from 0 to 3"),
        (lambda: PGD(0.1)(first_three, X, mx.array([-1, 0])), r"y must be in \[0, 3\)"),
        (lambda: PGD(0.1)(first_three, X, mx.array([0.0, 1.0])), "y must be an integer array"),
        (lambda: PGD(0.1)(first_three, X, mx.array([0])), r"y must be an integer array of shape \(2,\)"),
        (lambda: PGD(0.1)(first_three, X, [0, 1]), "y must be an integer array"),
        (lambda: PGD(0.1)(first_three, X, Y, targets=Y), "targets must be given to a targeted attack"),
        (lambda: PGD(0.1, targeted=True)(first_three, X, Y), "targets must be given to a targeted attack"),
        (lambda: PGD(0.1, targeted=True)(first_three, X, Y, targets=Y), "targets must differ from y but has 2"),
        (lambda: PGD(0.1, targeted=True)(first_three, X, Y, targets=Y + 2), r"targets must be in \[0, 3\)"),
        (lambda: PGD(0.1)(lambda x: x[:, :1], X, Y), "2 classes or more but has 1"),
        (lambda: PGD(0.1)(lambda x: x[0], X, Y), "model must return floating logits"),
        (lambda: PGD(0.1)(lambda x: x[:1], X, Y), "model must return floating logits"),
        (lambda: PGD(0.1, loss="dlr")(lambda x: x[:, :2], X[:1], Y[:1]), "logits must have 3 classes or more"),
        (lambda: PGD(0.1, loss=lambda z, y: z.sum())(first_three, X[:1], Y[:1]), "loss must return one value an input"),
        (lambda: Normalized(first_three, 0.0, 0.0), "std must be > 0"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refused_without_a_model():
    with pytest.raises(TypeError, match="model must be callable"):
        PGD(0.1)(None, X, Y)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm(4)])
def test_training_mode_is_refused_where_it_matters(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
    for candidate in (model, Normalized(model, 0.0, 1.0)):
        with pytest.raises(ValueError, match="model must be in evaluation mode"):
            PGD(0.1)(candidate, X, Y)
        candidate.eval()
        PGD(0.1, compile=False)(candidate, X, Y)
        candidate.train()
    PGD(0.1, compile=False)(nn.Linear(4, 3), X, Y)


def test_no_inputs():
    result = PGD(0.1)(linear, mx.zeros((0, 2, 3)), mx.zeros(0, mx.int32))
    assert [a.shape for a in result] == [(0, 2, 3), (0,), (0,), (0,), (0,)]


@pytest.mark.parametrize("attack", [FGSM, PGD])
def test_radius_0_returns_the_inputs(case, attack):
    x, y = case
    result = attack(0.0)(linear, x, y)
    assert (result.adversarial == x).all().item()
    assert not result.success.any().item()
    assert (result.distances == 0).all().item()


def test_masks(case):
    """Half of the labels are wrong: those inputs are not attacked and count for nothing."""
    x, y = case
    wrong = mx.arange(40) % 2 == 0
    result = PGD(2.0, bounds=(-5, 5))(linear, x, mx.where(wrong, (y + 1) % 3, y))
    assert (result.correct == mx.logical_not(wrong)).all().item()
    assert (result.success == mx.logical_not(wrong)).all().item()
    assert (result.adversarial == x).all(axis=(1, 2)).tolist() == wrong.tolist()
    assert (np.array(result.queries)[np.array(wrong)] == 1).all()


def test_targets(case):
    x, y = case
    targets = (y + 1) % 3
    result = PGD(2.0, bounds=(-5, 5), targeted=True)(linear, x, y, targets=targets)
    assert result.success.all().item()
    assert (mx.argmax(linear(result.adversarial), axis=1) == targets).all().item()


def test_an_input_that_is_the_target_already_is_left_alone(case):
    x, y = case
    result = PGD(2.0, bounds=(-5, 5), targeted=True)(linear, x, (y + 1) % 3, targets=y)
    assert not result.correct.any().item()
    assert not result.success.any().item()
    assert (result.adversarial == x).all().item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_inside_the_ball_and_the_bounds_in_the_own_dtype(case, dtype, norm):
    x = case[0].astype(dtype)
    y = mx.argmax(linear(x), axis=1)
    eps = mx.array(np.random.default_rng(2).random(40).astype(np.float32))
    result = PGD(eps, norm=norm, steps=7)(linear, x, y)
    assert result.adversarial.dtype == dtype
    wide = np.array(result.adversarial.astype(mx.float32), np.float64)
    moved = abs(wide - np.array(x.astype(mx.float32), np.float64)).reshape(40, -1)
    length = {"linf": moved.max(1), "l2": np.sqrt((moved**2).sum(1)), "l1": moved.sum(1)}[norm]
    assert (length <= np.array(eps) + 1e-6).all()
    assert wide.min() >= 0
    assert wide.max() <= 1
    assert np.allclose(length, result.distances, atol=1e-5)
    fooled = np.array(mx.argmax(linear(result.adversarial), axis=1) != y)
    assert (fooled == np.array(result.success)).all()
    assert fooled.any()
    assert not fooled.all()


def test_queries_are_forward_passes(case):
    x, y = case
    rows = []

    def counting(x):
        rows.append(len(x))
        return linear(x)

    result = PGD(1e-6, steps=5, restarts=3)(counting, x, y)
    assert (result.queries == 1 + 3 * 5 + 2 + 1).all().item()
    assert sum(rows) == result.queries.sum().item()


def test_nan_of_one_input_harms_no_other(case):
    x, y = case

    def model(x):
        return linear(x) + mx.where(x[:, 0, 0] > 2, mx.nan, 0.0)[:, None]

    bounds = (-3.0, 3.0)
    sick = mx.array(x)
    sick[7, 0, 0] = 2.5
    want, found = (PGD(0.3, steps=5, random_start=False, bounds=bounds)(model, a, y) for a in (x, sick))
    assert not found.correct[7].item()
    others = np.arange(40) != 7
    for a, b in zip(want, found, strict=True):
        assert (np.array(a)[others] == np.array(b)[others]).all()


def test_nan_gradients_move_nothing(case):
    x, y = case

    def model(x):
        hollow = mx.sqrt(x[:, :1, 0] - x[:, :1, 0])  # its derivative is not a number
        return linear(x) + mx.where(mx.arange(len(x)) == 3, 1.0, 0.0)[:, None] * hollow

    result = PGD(0.3, steps=5, random_start=False, early_stop=False)(model, x, y)
    assert mx.isfinite(result.adversarial).all().item()
    assert result.success.sum().item() > 5


def test_normalized_attacks_in_the_bounds(case):
    x, y = case
    model = Normalized(lambda x: linear(x * mx.array([0.2, 0.4, 0.6]) + 0.5), 0.5, [0.2, 0.4, 0.6])
    assert mx.allclose(model(x), linear(x), atol=1e-5).item()
    results = [PGD(0.2, steps=5, compile=False)(m, x, y) for m in (model, linear)]
    assert (results[0].success == results[1].success).all().item()


def test_remaining_shrinks_to_few_sizes():
    rng, remaining, sizes = np.random.default_rng(0), Remaining(100), set()
    values = mx.arange(100)
    done = np.zeros(100, bool)
    while remaining:
        sizes.add(len(values))
        assert (np.array(values) == remaining.rows).all()
        assert sorted(remaining.rows[remaining.alive]) == sorted(np.flatnonzero(~done))
        leave = (rng.random(len(values)) < 0.1) & remaining.alive
        done[remaining.rows[leave]] = True
        if (taken := remaining.retire(leave)) is not None:
            values = values[taken]
    assert len(sizes) > 4
    assert sizes <= {13, 26, 39, 52, 65, 78, 91, 100}


def test_distances_of_many_values_are_exact():
    x = np.random.default_rng(0).random((3, 100_003), np.float32)
    for norm, want in (("l1", abs(x).sum(1, np.float64)), ("l2", np.sqrt((x.astype(np.float64) ** 2).sum(1)))):
        assert np.allclose(distance(mx.array(x), mx.zeros(x.shape), norm), want, rtol=1e-5)
