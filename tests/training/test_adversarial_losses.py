"""Losses against NumPy and SciPy in float64, their cost in passes, and what their attack leaves alone."""

import functools

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_bulwark.training import (
    adversarial_inputs,
    adversarial_loss,
    fast_adversarial_loss,
    label_smoothing_loss,
    mart_loss,
    trades_loss,
)
from scipy import special, stats

EPS = 0.1
ATTACKED = {"madry": adversarial_loss, "trades": trades_loss, "mart": mart_loss}


def network(*, normed=False):
    middle = [nn.BatchNorm(8), nn.Dropout(0.5)] if normed else []
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 4))


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    x = mx.array(rng.uniform(0, 1, (7, 5)).astype(np.float32))
    return network(), x, mx.array(rng.integers(0, 4, 7))


def logits64(weights, x):
    hidden = np.tanh(x @ weights["layers.0.weight"].T + weights["layers.0.bias"])
    return hidden @ weights["layers.2.weight"].T + weights["layers.2.bias"]


def weights64(model):
    return {path: np.array(a).astype(np.float64) for path, a in tree_flatten(model.parameters())}


def madry_oracle(clean, attacked, y):
    return -special.log_softmax(attacked, axis=1)[np.arange(len(y)), y]


def trades_oracle(clean, attacked, y, beta=6.0):
    p, q = special.softmax(clean, axis=1), special.softmax(attacked, axis=1)
    return madry_oracle(None, clean, y) + beta * stats.entropy(p, q, axis=1)


def mart_oracle(clean, attacked, y, beta=5.0):
    rows = np.arange(len(y))
    p, q = special.softmax(clean, axis=1), special.softmax(attacked, axis=1)
    rival = q.copy()
    rival[rows, y] = -1
    boosted = -np.log(q[rows, y]) - np.log1p(-rival.max(axis=1))
    return boosted + beta * special.rel_entr(p, q).sum(axis=1) * (1 - p[rows, y])


ORACLES = {"madry": madry_oracle, "trades": trades_oracle, "mart": mart_oracle}


@pytest.mark.parametrize("name", ATTACKED)
def test_values_and_gradients_are_those_of_float64(case, name):
    """The gradient by central differences of the float64 oracle, at adversarial inputs that are held."""
    model, x, y = case
    worst = adversarial_inputs(model, x, y, EPS, key=mx.random.key(1))
    loss_fn = functools.partial(ATTACKED[name], adversarial=worst)
    each = loss_fn(model, x, y, EPS, reduction="none")
    weights = weights64(model)
    xs, ys = np.array(x).astype(np.float64), np.array(y)

    def oracle(weights):
        clean, attacked = (logits64(weights, a) for a in (xs, np.array(worst).astype(np.float64)))
        return ORACLES[name](clean, attacked, ys)

    np.testing.assert_allclose(np.array(each), oracle(weights), rtol=1e-5)
    loss, gradients = nn.value_and_grad(model, loss_fn)(model, x, y, EPS)
    assert loss.item() == pytest.approx(oracle(weights).mean(), rel=1e-5)
    for path, gradient in tree_flatten(gradients):
        numeric = np.zeros(gradient.shape)
        for index in np.ndindex(*gradient.shape):
            sides = []
            for h in (1e-6, -1e-6):
                moved = {k: w.copy() for k, w in weights.items()}
                moved[path][index] += h
                sides.append(oracle(moved).mean())
            numeric[index] = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(np.array(gradient), numeric, rtol=1e-4, atol=1e-6)


def test_label_smoothing_is_cross_entropy_against_soft_labels(case):
    model, x, y = case
    soft = 0.8 * np.eye(4)[np.array(y)] + 0.2 / 4
    log_p = special.log_softmax(logits64(weights64(model), np.array(x).astype(np.float64)), axis=1)
    ours = label_smoothing_loss(model, x, y, smoothing=0.2, reduction="none")
    np.testing.assert_allclose(np.array(ours), -(soft * log_p).sum(axis=1), rtol=1e-5)


def test_mart_stays_finite_where_a_rival_is_certain():
    model = nn.Linear(3, 3, bias=False)
    model.weight = 200 * mx.eye(3)
    loss, gradients = nn.value_and_grad(model, mart_loss)(model, mx.eye(3), mx.array([0, 1, 1]), 0.01, steps=1)
    assert np.isfinite(loss.item())
    assert bool(mx.isfinite(gradients["weight"]).all())


def by_hand(model, x, start, objective, eps, alpha, steps):
    """Madry's loop in NumPy, the gradient by MLX."""
    origin, found = np.array(x), np.array(start)
    for _ in range(steps):
        gradient = np.array(mx.grad(lambda z: objective(model(z)).sum())(mx.array(found)))
        found = np.clip(np.clip(found + alpha * np.sign(gradient), origin - eps, origin + eps), 0, 1)
    return found


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_attack_is_madrys_loop(backend, case, per_sample):
    model, x, y = case
    eps = np.linspace(0, 0.3, 7, dtype=np.float32) if per_sample else np.float32(EPS)
    ours = adversarial_inputs(
        model, x, y, mx.array(eps) if per_sample else EPS, steps=4, alpha=0.03, random_start=False
    )
    limit = eps[:, None] if per_sample else eps
    want = by_hand(model, x, x, lambda z: nn.losses.cross_entropy(z, y, reduction="none"), limit, np.float32(0.03), 4)
    np.testing.assert_allclose(np.array(ours), want, atol=1e-6)
    if per_sample:
        assert mx.array_equal(ours[0], x[0])


def test_trades_moves_away_from_the_clean_prediction(case):
    model, x, y = case
    seen = []

    def recording(inputs):
        seen.append(inputs)
        return model(inputs)

    trades_loss(recording, x, y, EPS, steps=3, alpha=0.04, key=mx.random.key(2))
    p = mx.softmax(model(x), axis=1)

    def kl(logits):
        return (p * (mx.log(p) - nn.log_softmax(logits, axis=1))).sum(axis=1)

    want = by_hand(model, x, seen[1], kl, np.float32(EPS), np.float32(0.04), 3)
    np.testing.assert_allclose(np.array(seen[-1]), want, atol=1e-6)


class Counting(nn.Module):
    """Counts forward passes by the mode that they were made in."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.passes = {True: 0, False: 0}

    def __call__(self, x):
        self.passes[self.training] += 1
        return self.model(x)


@pytest.mark.parametrize(("name", "training"), [("madry", 1), ("trades", 2), ("mart", 2)])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_costs_its_attack_and_one_training_pass(case, name, training, steps):
    model, x, y = Counting(case[0]), *case[1:]
    model.passes = {True: 0, False: 0}
    loss = nn.value_and_grad(model, lambda m, *a: ATTACKED[name](m, *a, EPS, steps=steps))
    mx.eval(loss(model, x, y))
    assert model.passes == {True: training, False: steps}


def test_a_fast_step_costs_two_passes(case):
    model, x, y = Counting(case[0]), *case[1:]
    mx.eval(nn.value_and_grad(model, fast_adversarial_loss)(model, x, y, EPS))
    assert model.passes == {True: 1, False: 1}


def test_fast_is_one_step_of_125_percent(case):
    model, x, y = case
    key = mx.random.key(5)
    fast = fast_adversarial_loss(model, x, y, EPS, key=key)
    assert fast.item() == adversarial_loss(model, x, y, EPS, steps=1, alpha=1.25 * EPS, key=key).item()


@pytest.mark.parametrize("name", ATTACKED)
def test_attack_passes_leave_batch_statistics_and_modes_alone(case, name):
    _, x, y = case
    model = network(normed=True)
    model.layers[2].eval()  # a mode of its own, which must come back
    modes = [m.training for m in model.modules()]
    statistics = []
    for steps in (1, 5):
        model.layers[1].running_mean = mx.zeros(8)
        model.layers[1].running_var = mx.ones(8)
        loss = functools.partial(ATTACKED[name], steps=steps)
        mx.eval(nn.value_and_grad(model, loss)(model, x, y, 0.0))  # without a radius the training passes are the same
        statistics.append((model.layers[1].running_mean, model.layers[1].running_var))
    assert mx.array_equal(statistics[0][0], statistics[1][0])
    assert mx.array_equal(statistics[0][1], statistics[1][1])
    assert mx.abs(statistics[0][0]).max().item() > 0  # the training passes did move them
    assert [m.training for m in model.modules()] == modes


def test_modes_come_back_after_an_error(case):
    _, x, y = case
    model = network(normed=True)
    with pytest.raises(ValueError, match="eps must"):
        adversarial_inputs(model, x, y, -1.0, alpha=0.1, random_start=False)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("name", [n if n == "trades" else pytest.param(n, marks=pytest.mark.slow) for n in ATTACKED])
@pytest.mark.parametrize("normed", [False, True])
def test_compiled_steps_train_as_plain_ones(case, name, normed):
    _, x, y = case
    model = network(normed=normed)
    if normed:
        model.layers[2] = nn.Dropout(0.0)
    start = tree_unflatten(tree_flatten(model.parameters()))
    after = []
    for compiled in (False, True):
        model.update(start)
        mx.random.seed(5)
        optimizer = optim.SGD(0.1)
        optimizer.init(model.trainable_parameters())
        loss_and_grad = nn.value_and_grad(model, functools.partial(ATTACKED[name], steps=3))

        def step(x, y, eps, loss_and_grad=loss_and_grad, optimizer=optimizer):
            loss, gradients = loss_and_grad(model, x, y, eps)
            optimizer.update(model, gradients)
            return loss

        state = [model.state, optimizer.state, mx.random.state]
        run = mx.compile(step, inputs=state, outputs=state) if compiled else step
        losses = []
        for _ in range(3):
            losses.append(run(x, y, mx.full((7,), EPS)))
            mx.eval(state, losses)
        after.append([loss.item() for loss in losses])
    np.testing.assert_allclose(after[0], after[1], rtol=1e-4)
    assert len(set(after[0])) == 3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(case, dtype):
    model, x, y = case
    model.set_dtype(dtype)
    x = x.astype(dtype)
    worst = adversarial_inputs(model, x, y, EPS)
    assert worst.dtype == dtype
    assert mx.abs(worst.astype(mx.float32) - x.astype(mx.float32)).max().item() <= EPS + 1e-6
    for loss in ATTACKED.values():
        value, gradients = nn.value_and_grad(model, loss)(model, x, y, EPS)
        assert value.dtype == mx.float32
        assert all(bool(mx.isfinite(g).all()) for _, g in tree_flatten(gradients))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": mx.zeros((7, 5), mx.int32)}, r"\[adversarial_loss\] x must be a float32.* but has mlx.core.int32"),
        ({"x": mx.zeros(7)}, "x must be"),
        ({"y": mx.zeros(6, mx.int32)}, "y must be 7 integers, one for each row of x, but has"),
        ({"y": mx.zeros(7)}, "y must be"),
        ({"eps": -0.1}, "eps must be"),
        ({"eps": mx.zeros(6)}, "eps must be"),
        ({"norm": "l3"}, "norm must be"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"bounds": (1, 0)}, "bounds must be"),
        ({"reduction": "sum"}, "reduction must be 'mean' or 'none'"),
        ({"adversarial": mx.zeros((7, 4))}, r"adversarial must be an array of x's shape \(7, 5\)"),
    ],
)
def test_wrong_arguments_are_refused(case, change, says):
    model, x, y = case
    arguments = {"x": x, "y": y, "eps": EPS} | change
    with pytest.raises(ValueError, match=says):
        adversarial_loss(model, **arguments)


def test_wrong_weights_are_refused(case):
    model, x, y = case
    for loss in (trades_loss, mart_loss):
        with pytest.raises(ValueError, match="beta must be a finite number >= 0"):
            loss(model, x, y, EPS, beta=-1.0)
    with pytest.raises(ValueError, match=r"smoothing must be a number in \[0, 1\]"):
        label_smoothing_loss(model, x, y, smoothing=1.5)
