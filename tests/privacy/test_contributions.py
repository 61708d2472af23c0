"""What one unit adds to a step, through the engine and its batches: never more than the sensitivity."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from oracle import one_by_one_grads

MODES = {
    "flat": {"max_grad_norm": 0.7},
    "automatic": {"max_grad_norm": 0.7, "clipping": "automatic"},
    "per_layer": {"max_grad_norm": 0.7, "clipping": "per_layer"},
    "per_group": {"max_grad_norm": {"*.bias": 0.3, "*": 0.6}, "clipping": "per_group"},
    "adaptive": {"max_grad_norm": 0.7, "clipping": "adaptive"},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)]

    def __call__(self, x):
        for layer in self.layers:
            x = mx.sin(layer(x))
        return x


def loss_fn(model, x, scale):
    return scale * model(x).reshape(x.shape[0], -1).sum(axis=1)


def net(seed=0):
    mx.random.seed(seed)
    return Net()


def rows_of(n, seed, spread=2.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 4, 3)).astype(np.float32), rng.lognormal(0, spread, n).astype(np.float32)


def engine(N, **more):
    more = {"batch_size": N, "noise_multiplier": 1.3, "max_grad_norm": 1.0, **more}
    return bw.PrivacyEngine(N, **more)


def norm_of(sums):
    return np.sqrt(sum((np.array(s).astype(np.float64) ** 2).sum() for s in sums.values()))


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.sampled_from(list(MODES)),
    st.sampled_from(["mean", "sum"]),
    st.integers(0, 100),
)
def test_a_unit_moves_the_sums_by_at_most_the_sensitivity(ids, mode, reduction, seed):
    ids = np.unique(ids, return_inverse=True)[1]
    x, scale = rows_of(len(ids), seed)
    e, model = engine(1 + ids.max(), **MODES[mode]), net(seed)
    f = e.value_and_grad(model, loss_fn)

    def sums(mask):
        data = mx.array(x), mx.array(scale)
        return f(model, *data, mask=mx.array(mask), units=mx.array(ids), unit_reduction=reduction)[1]._sums

    everybody = sums(np.ones(len(ids), bool))
    for unit in set(ids.tolist()):
        without = sums(ids != unit)
        moved = norm_of({k: np.array(s) - np.array(without[k]) for k, s in everybody.items()})
        # float32 sums of up to six units of at most C: rounding of a few parts in a million
        assert moved <= e.sensitivity.add_or_remove_one * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_physical_batches_of_units_are_one_batch(backend, mode, reduction):
    # 30 people in pieces of 9 rows and in one batch of all rows: the same update, without noise
    ids = np.repeat(np.arange(30), np.random.default_rng(0).integers(1, 5, 30))
    x, scale = rows_of(len(ids), 3)
    updates = []
    for size in (9, len(ids)):
        e, model = engine(30, **{**MODES[mode], "noise_multiplier": 0.0}), net()
        optimizer, f = e.wrap(optim.SGD(1.0)), e.value_and_grad(model, loss_fn)
        before = {k: np.array(p) for k, p in tree_flatten(model.parameters())}
        batches = e.batches(
            (x, scale), units=ids, max_rows_per_unit=4, unit_reduction=reduction, steps=2, microbatch_size=size
        )
        for b in batches:
            optimizer.update(model, f(model, b)[1])
        assert e.steps == 2
        updates.append({k: np.array(p) - before[k] for k, p in tree_flatten(model.parameters())})
    for k in updates[0]:
        np.testing.assert_allclose(updates[0][k], updates[1][k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [{"units": np.arange(30) // 3, "max_rows_per_unit": 2}, {"augment": lambda *a: a, "multiplicity": 2}],
)
def test_rows_of_a_unit_without_their_ids_are_refused(backend, more):
    x, scale = rows_of(30, 1)
    e, model = engine(10 if "units" in more else 30), net()
    f, optimizer = e.value_and_grad(model, loss_fn), e.wrap(optim.SGD(0.1))
    (b,) = e.batches((x, scale), steps=1, microbatch_size=60, **more)
    with pytest.raises(bw.PrivacyError, match=r"units must be given, as batch.units"):
        f(model, *b.data, mask=b.mask)
    optimizer.update(model, f(model, *b.data, mask=b.mask, units=b.units)[1])
    assert e.steps == 1


def test_copies_are_averaged_before_the_clip(backend):
    x, scale = rows_of(12, 5)
    shifts = np.linspace(-1, 1, 3, dtype=np.float32)

    def augment(x, scale):
        copy = mx.arange(x.shape[0]) % 3
        return x + mx.array(shifts)[copy][:, None, None], scale

    e, model = engine(12, max_grad_norm=0.9, noise_multiplier=0.0), net()
    before = {k: np.array(p) for k, p in tree_flatten(model.parameters())}
    copies = mx.array((x[:, None] + shifts[None, :, None, None]).reshape(36, 4, 3))
    grads = one_by_one_grads(model, loss_fn, (copies, mx.array(np.repeat(scale, 3))))
    expected = {k: np.zeros(p.shape) for k, p in before.items()}
    for i in range(12):
        mean = {k: sum(g[k] for g in grads[3 * i : 3 * i + 3]) / 3 for k in expected}
        norm = np.sqrt(sum((g**2).sum() for g in mean.values()))
        for k, g in mean.items():
            expected[k] += min(1.0, 0.9 / (norm + 1e-6)) * g
    optimizer, f = e.wrap(optim.SGD(1.0)), e.value_and_grad(model, loss_fn)
    for b in e.batches((x, scale), steps=1, augment=augment, multiplicity=3, microbatch_size=10):
        optimizer.update(model, f(model, b)[1])
    for k, p in tree_flatten(model.parameters()):
        np.testing.assert_allclose((before[k] - np.array(p)) * 12, expected[k], rtol=1e-4, atol=2e-5)


class Counted:
    """A loss that counts its traces and forward passes, by shape."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, x, scale):
        self.calls += 1
        return loss_fn(model, x, scale)


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_step_is_traced_for_the_first_batches_alone(backend, mode):
    # Poisson draws of every size, in one piece or several: after a middle and both kinds of a last piece, no trace more
    ids = np.repeat(np.arange(60), np.random.default_rng(0).integers(1, 5, 60))
    x, scale = rows_of(len(ids), 3)
    e, model, loss = engine(60, batch_size=12, **MODES[mode]), net(), Counted()
    optimizer = e.wrap(optim.Adam(0.01))
    step = e.compiled_step(model, optimizer, loss)
    kinds, late, alone = set(), 0, True
    for b in e.batches((x, scale), units=ids, max_rows_per_unit=3, steps=15, microbatch_size=24):
        before = loss.calls
        mx.eval(step(b), model.state, optimizer.state, e.state)
        kind = ("last, alone" if alone else "last of several") if b.last else "middle"
        late += loss.calls - before if kind in kinds else 0
        kinds.add(kind)
        alone = b.last
    assert e.steps == 15
    assert len(kinds) == 3
    assert late == 0
    assert loss.calls <= 2 + 3  # two dry runs that learn the shapes, and a trace of each kind
