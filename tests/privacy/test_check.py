import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_bulwark.privacy import rules

RNG = np.random.default_rng(0)
X = mx.array(RNG.standard_normal((6, 5)).astype(np.float32))
Y = mx.array(RNG.integers(0, 3, 6))


def engine(**more):
    return bw.PrivacyEngine(60, batch_size=6, noise_multiplier=1.0, max_grad_norm=0.5, **more)


def cross_entropy(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="none")


def model(*before):
    mx.random.seed(1)
    return nn.Sequential(nn.Linear(5, 8), *before, nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_a_sound_model_passes(backend, clipping):
    report = engine(clipping=clipping).check(model(nn.LayerNorm(8), nn.Dropout(0.5)), (X, Y), cross_entropy)
    assert report.examples == 6
    assert max(report.loss_error, report.norm_error, report.sum_error, report.coupling_error) < 1e-5


class Centred(nn.Module):
    """Couples the batch."""

    def __call__(self, x):
        return x - x.mean(axis=0, keepdims=True)


class Neighbour(nn.Module):
    """Lets an example see the next one."""

    def __call__(self, x):
        return x + 0.1 * mx.roll(x, 1, axis=0)


def test_coupling_layers_are_caught(backend):
    for layer in (Centred(), Neighbour()):
        with pytest.raises(bw.PrivacyError, match=r"\[check\]"):
            engine().check(model(layer), (X, Y), cross_entropy)


def test_coupling_losses_are_caught(backend):
    def normalised(m, x, y):  # as mlx-lm's default loss: divided by what the whole batch holds
        return cross_entropy(m, x, y) / (1 + y.sum())

    def contrastive(m, x, y):
        z = m(x)
        return nn.losses.cross_entropy(z @ z.T, mx.arange(z.shape[0]), reduction="none")

    for loss in (normalised, contrastive):
        with pytest.raises(bw.PrivacyError, match=r"\[check\]"):
            engine().check(model(), (X, Y), loss)


def test_coupling_that_spares_single_examples_is_caught(backend):
    def only_among_others(m, x, y):  # alone or not, the example itself is at its place: only the others differ
        others = mx.stop_gradient(x.sum()) - x.sum(axis=1)
        return cross_entropy(m, x, y) * mx.where(mx.abs(others) > 0, 1 + 0.5 * mx.tanh(others), 1.0)

    with pytest.raises(bw.PrivacyError, match=r"\[check\]"):
        engine().check(model(), (X, Y), only_among_others)


def test_a_wrong_rule_is_caught(backend, monkeypatch):
    name = "mlx.nn.layers.linear.Linear"
    sound = rules.RULES[name]

    def half(site, calls):
        result = sound.per_sample(site, calls)
        result.sq_norms = result.sq_norms * 0.25
        return result

    monkeypatch.setitem(rules.RULES, name, sound._replace(per_sample=half))
    with pytest.raises(bw.PrivacyError, match="gradient norm of example"):
        engine().check(model(), (X, Y), cross_entropy)


def test_layers_are_left_as_they_were(backend):
    m = model(nn.Dropout(0.5))
    engine().check(m, (X, Y), cross_entropy)
    assert m.layers[1].training
    assert type(m.layers[0]) is nn.Linear


def test_one_array_and_a_batch(backend):
    e = engine()
    for one in (X, np.array(X)):
        assert e.check(nn.Linear(5, 2), one, lambda m, x: m(x).sum(axis=1)).examples == 6
    (batch,) = e.batches((np.array(X).repeat(10, 0),), steps=1)
    assert e.check(nn.Linear(5, 2), batch, lambda m, x: m(x).sum(axis=1)).examples == batch.mask.size
