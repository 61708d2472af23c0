"""Rows of one unit are put together before the one clip."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_bulwark.privacy.gradients import clipped_sums
from models import MODELS, make
from oracle import assert_sums_close, numpy64, one_by_one_grads

IDS = np.array([5, 0, 5, 2, 0, 5, 3])  # three rows, two, one and one; 1, 4 and 6 have none
MASK = np.array([True, True, False, True, True, True, False])


def by_unit(grads, ids, mask, reduction):
    """Gradients of the units [B] in float64; None for a unit without rows."""
    units = []
    for unit in range(len(ids)):
        rows = [g for g, i, m in zip(grads, ids, mask, strict=True) if i == unit and m]
        over = len(rows) if reduction == "mean" else 1
        units.append({k: sum(g[k] for g in rows) / over for k in rows[0]} if rows else None)
    return units


def clipped(units, C):
    norms = np.array([np.sqrt(sum((g**2).sum() for g in u.values())) if u else 0.0 for u in units])
    factors = np.minimum(1.0, C / (norms + 1e-6))
    kept = [(f, u) for f, u in zip(factors, units, strict=True) if u]
    return norms, {k: sum(f * u[k] for f, u in kept) for k in kept[0][1]}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_a_float64_loop(backend, name, reduction):
    model, loss_fn, batch, rtol = make(name, 7)
    units = by_unit(one_by_one_grads(model, loss_fn, batch), IDS, MASK, reduction)
    norms, _ = clipped(units, 1.0)
    C = float(np.median(norms[norms > 0]))
    norms, sums = clipped(units, C)
    sums = {k: sums[k] for k, _ in tree_flatten(model.trainable_parameters())}
    ours = clipped_sums(model, loss_fn, batch, mx.array(MASK), C, "flat", {}, mx.array(IDS), reduction)
    np.testing.assert_allclose(np.sqrt(numpy64(ours.sq_norms)), norms, rtol=rtol, atol=rtol * norms.max())
    assert ours.mask.tolist() == [u is not None for u in units]
    assert_sums_close(ours.sums, sums, rtol)


@pytest.mark.parametrize("name", ["mlp", "cnn", "generic"])
def test_a_bad_row_refuses_its_unit_alone(backend, name):
    model, loss_fn, (x, scale), _ = make(name, 7)
    bad = np.array(x)
    bad[4].flat[0] = np.nan  # of unit 0
    ours = clipped_sums(model, loss_fn, (mx.array(bad), scale), None, 1.0, "flat", {}, mx.array(IDS))
    assert ours.num_refused.item() == 1
    without = clipped_sums(model, loss_fn, (x, scale), mx.array(IDS != 0), 1.0, "flat", {}, mx.array(IDS))
    for k, s in without.sums.items():
        np.testing.assert_allclose(np.array(ours.sums[k]), np.array(s), rtol=1e-5, atol=1e-6)


def test_units_of_one_row_change_nothing(backend):
    model, loss_fn, batch, rtol = make("cnn", 7)
    ours = clipped_sums(model, loss_fn, batch, None, 1.0, "flat", {}, mx.array(np.random.default_rng(0).permutation(7)))
    plain = clipped_sums(model, loss_fn, batch, None, 1.0, "flat", {})
    assert_sums_close(ours.sums, {k: numpy64(s) for k, s in plain.sums.items()}, rtol)


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "adaptive"])
def test_a_unit_is_bounded_however_many_rows_it_has(backend, clipping):
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=0.1, clipping=clipping)
    f = engine.value_and_grad(model, lambda m, x: 1e3 * m(x).sum(axis=1))
    x = mx.array(np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32))
    _, grads = f(model, x, units=mx.zeros(64, mx.int32), unit_reduction="sum")
    sums = [s for name, s in grads._sums.items() if s.ndim]
    assert np.sqrt(sum((numpy64(s) ** 2).sum() for s in sums)) <= 0.1 * (1 + 1e-5)
    _, grads = f(model, x)
    sums = [s for name, s in grads._sums.items() if s.ndim]
    assert np.sqrt(sum((numpy64(s) ** 2).sum() for s in sums)) > 0.5  # each row by itself would pass the bound


def test_steps_take_the_units_of_a_batch(backend):
    """Eager and compiled, without noise: the update of units is that of their loop."""
    rng = np.random.default_rng(0)
    x, y = mx.array(rng.standard_normal((7, 4)).astype(np.float32)), mx.array(rng.integers(0, 3, 7))
    batch = bw.Batch((x, y), mx.array(MASK), True, mx.array(IDS), "mean")

    def loss_fn(model, x, y):
        return nn.losses.cross_entropy(model(x), y, reduction="none")

    weights = []
    for compiled in (False, True):
        mx.random.seed(1)
        model = nn.Linear(4, 3)
        engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=0.0, max_grad_norm=0.3)
        optimizer = engine.wrap(optim.SGD(1.0))
        before = numpy64(model.weight)
        units = by_unit(one_by_one_grads(model, loss_fn, (x, y)), IDS, MASK, "mean")
        if compiled:
            step = engine.compiled_step(model, optimizer, loss_fn)
            mx.eval(step(batch), model.state, engine.state)
        else:
            _, grads = engine.value_and_grad(model, loss_fn)(model, batch)
            optimizer.update(model, grads)
        weights.append(before - numpy64(model.weight))
        np.testing.assert_allclose(weights[-1], clipped(units, 0.3)[1]["weight"] / 10, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("units", "says"),
    [
        (mx.zeros(6, mx.int32), r"units must have shape \(7,\)"),
        (mx.zeros(7), "an integer dtype"),
        (mx.array([0, 1, 2, 3, 4, 5, 7]), "numbers from 0 to 6, one for each row, but lie between 0 and 7"),
        (mx.array([0, 1, 2, -1, 4, 5, 6]), "between -1 and 6"),
    ],
)
def test_wrong_units_are_refused(backend, units, says):
    model, loss_fn, batch, _ = make("mlp", 7)
    engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
    with pytest.raises(bw.PrivacyError, match=says):
        engine.value_and_grad(model, loss_fn)(model, *batch, units=units)
