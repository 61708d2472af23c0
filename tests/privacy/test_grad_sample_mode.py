"""A backward pass for each row: the same as ghost norms, and for models that these refuse."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_bulwark.privacy.gradients import clipped_sums
from models import make
from oracle import assert_sums_close, numpy64, one_by_one

IDS = mx.array([0, 1, 1, 4, 0, 0, 5])


def looped(model, loss_fn, batch, mask=None, max_grad_norm=1.0, clipping="flat", units=None, reduction="mean"):
    return clipped_sums(model, loss_fn, batch, mask, max_grad_norm, clipping, {}, units, reduction, "loop")


@pytest.mark.parametrize("B", [0, 1, 7])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "embedding", "layer norm", "generic", "lstm"])
def test_equal_to_a_float64_loop(backend, name, B):
    model, loss_fn, batch, rtol = make(name, B)
    norms, sums, C = one_by_one(model, loss_fn, batch, max_grad_norm=None)
    ours = looped(model, loss_fn, batch, max_grad_norm=C)
    np.testing.assert_allclose(np.sqrt(numpy64(ours.sq_norms)), norms, rtol=rtol)
    assert_sums_close(ours.sums, sums, rtol)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_units_and_masks_as_with_ghost_norms(backend, clipping, reduction):
    model, loss_fn, batch, rtol = make("mlp", 7)
    mask = mx.array([True, True, False, True, True, True, True])
    engine = bw.PrivacyEngine(
        100, batch_size=10, noise_multiplier=1.0, max_grad_norm=0.3, clipping=clipping, grad_sample_mode="loop"
    )
    args = (mask, 0.3, engine._clipping)
    ghost = clipped_sums(model, loss_fn, batch, *args, {}, IDS, reduction)
    loop = looped(model, loss_fn, batch, *args, IDS, reduction)
    np.testing.assert_allclose(np.array(loop.sq_norms), np.array(ghost.sq_norms), rtol=rtol, atol=1e-9)
    assert_sums_close(loop.sums, {k: np.array(v, np.float64) for k, v in ghost.sums.items()}, rtol)


class TiedByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 8)

    def __call__(self, tokens):
        return self.layer(self.table(tokens)) @ self.table.weight.T


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 11)

    def __call__(self, x):
        return self.second(nn.relu(nn.utils.checkpoint(self.first)(x)))


def tokens_loss(model, tokens):
    return nn.losses.cross_entropy(model(tokens)[:, :-1], tokens[:, 1:], reduction="none").mean(axis=1)


def label_loss(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="none")


REFUSED = {
    "tied by hand": lambda: (TiedByHand(), tokens_loss, (mx.random.randint(0, 11, (5, 6)),)),
    "checkpointed": lambda: (Checkpointed(), label_loss, (mx.random.normal((5, 8)), mx.random.randint(0, 11, (5,)))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_ghost_refuses(name):
    model, loss_fn, batch = REFUSED[name]()
    settings = {"batch_size": 5, "noise_multiplier": 1.0, "max_grad_norm": 0.1, "steps": 4}
    with pytest.raises(bw.PrivacyError, match="grad_sample_mode='loop'"):
        bw.PrivacyEngine(100, **settings).value_and_grad(model, loss_fn)(model, *batch)
    engine = bw.PrivacyEngine(100, **settings, grad_sample_mode="loop")
    assert engine.validate(model).is_valid
    engine.check(model, batch, loss_fn)
    _, sums, C = one_by_one(model, loss_fn, batch, max_grad_norm=None)
    assert_sums_close(looped(model, loss_fn, batch, max_grad_norm=C).sums, sums, 1e-4)


def test_a_compiled_step_trains():
    mx.random.seed(0)
    model, loss_fn, _ = REFUSED["tied by hand"]()
    tokens = np.random.default_rng(0).integers(0, 11, (40, 6)).astype(np.int32)
    engine = bw.PrivacyEngine(
        40, batch_size=4, noise_multiplier=0.1, max_grad_norm=1.0, steps=3, grad_sample_mode="loop"
    )
    optimizer = engine.wrap(optim.SGD(0.1))
    before = dict(tree_flatten(model.parameters()))
    step = engine.compiled_step(model, optimizer, loss_fn)
    for batch in engine.batches(tokens, microbatch_size=5):
        mx.eval(step(batch), model.state, optimizer.state, engine.state)
    assert engine.steps == 3
    assert all(not mx.array_equal(a, before[k]) for k, a in tree_flatten(model.parameters()))


def test_discrete_noise_too():
    model, loss_fn, batch = REFUSED["tied by hand"]()
    engine = bw.PrivacyEngine(
        100, batch_size=5, noise_multiplier=1.0, max_grad_norm=0.1, noise="discrete", grad_sample_mode="loop"
    )
    losses, gradients = engine.value_and_grad(model, loss_fn)(model, *batch)
    assert losses.shape == (5,)
    engine.wrap(optim.SGD(0.1)).update(model, gradients)


def test_what_no_mode_can_bound_stays_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm(4))
    engine = bw.PrivacyEngine(100, batch_size=5, noise_multiplier=1.0, max_grad_norm=0.1, grad_sample_mode="loop")
    assert [r.type for r in engine.validate(model).refused] == ["BatchNorm"]
    with pytest.raises(bw.PrivacyError, match="couples the examples"):
        engine.value_and_grad(model, label_loss)(model, mx.ones((3, 4)), mx.zeros(3, mx.int32))


def test_a_wrong_mode_is_refused():
    with pytest.raises(ValueError, match="grad_sample_mode must be 'ghost' or 'loop' but is 'hooks'"):
        bw.PrivacyEngine(10, batch_size=5, noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode="hooks")


def test_trainable_quantized_tables():
    table = nn.QuantizedEmbedding(12, 32, 32, 4)
    table.unfreeze(keys=["scales", "biases"], recurse=False)
    model = nn.Sequential(table, nn.Linear(32, 12))
    engine = bw.PrivacyEngine(100, batch_size=5, noise_multiplier=1.0, max_grad_norm=0.1, grad_sample_mode="loop")
    engine.check(model, (mx.random.randint(0, 12, (4, 6)),), tokens_loss)
