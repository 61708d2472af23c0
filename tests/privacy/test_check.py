import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_bulwark.privacy import check_noise, rules, state, steps

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
        right = result.sq_norms
        result.sq_norms = lambda units: right(units) * 0.25
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


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_sound_noise_passes(backend, steps):
    # checks of 8 steps refuse sound noise once in a million
    for e in (engine(), bw.PrivacyEngine(60, batch_size=6, noise_multiplier=0.3, max_grad_norm=7.0)):
        report = e.check(model(), (X, Y), cross_entropy, noise_steps=steps)
        assert report.noise_steps == steps
        assert 0 < report.noise_error < 1
        assert e.steps == 0
        assert (np.array(e.state["noise"]["counter"]) == 0).all()


def test_no_noise_is_not_checked(backend):
    e = bw.PrivacyEngine(60, batch_size=6, noise_multiplier=0.0, max_grad_norm=1.0)
    assert e.check(model(), (X, Y), cross_entropy).noise_steps == 0


def refused(says, **more):
    with pytest.raises(bw.PrivacyError, match=rf"(?s)\[check\].*{says}"):
        engine(**more).check(model(), (X, Y), cross_entropy)


def test_a_layer_without_clipping_is_caught(backend, monkeypatch):
    name = "mlx.nn.layers.linear.Linear"
    sound = rules.RULES[name]

    def unclipped(site, calls):
        result = sound.per_sample(site, calls)
        if site.path == "layers.2" and result.weighted_sums:
            weighted = result.weighted_sums
            result.weighted_sums = lambda factors: weighted(mx.ones_like(factors))
        return result

    monkeypatch.setitem(rules.RULES, name, sound._replace(per_sample=unclipped))
    refused("layers.2.weight")
    e = bw.PrivacyEngine(60, batch_size=6, noise_multiplier=1.0, max_grad_norm=1e6)  # which clips none of these
    with pytest.raises(bw.PrivacyError, match=r"clipped sum of layers\.2\.weight"):
        e.check(model(), (X, Y), cross_entropy)


def test_a_layer_left_out_of_the_norm_is_caught(backend, monkeypatch):
    name = "mlx.nn.layers.linear.Linear"
    sound = rules.RULES[name]

    def unseen(site, calls):
        result = sound.per_sample(site, calls)
        if site.path == "layers.2" and result.sq_norms is not None:
            result.sq_norms = lambda units: mx.zeros(X.shape[0])
        return result

    monkeypatch.setitem(rules.RULES, name, sound._replace(per_sample=unseen))
    refused("gradient norm")


def test_a_counter_that_stands_still_is_caught(backend, monkeypatch):
    monkeypatch.setattr(steps, "advance_counter", lambda counter, blocks: counter + 0)
    refused("noise must")


def test_a_counter_that_moves_too_little_is_caught(backend, monkeypatch):
    advance = steps.advance_counter
    monkeypatch.setattr(steps, "advance_counter", lambda counter, blocks: advance(counter, 1))
    refused("never repeat")


def test_one_key_for_two_engines_is_caught(backend, monkeypatch):
    monkeypatch.setattr(state, "random_key", lambda: bw.key_from_seed(1))
    refused("noise must never repeat")


def without_noise_on(path, scale=0.0):
    sound = steps.add_gaussian

    def add_gaussian(sums, sigma, key, counter):
        noisy = sound(sums, sigma, key, counter)
        return {**noisy, path: sums[path] + scale * (noisy[path] - sums[path])}

    return add_gaussian


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("path", ["layers.0.weight", "layers.2.weight", "layers.0.bias"])
def test_wrong_noise_on_one_leaf_is_caught(backend, monkeypatch, path, scale):
    monkeypatch.setattr(steps, "add_gaussian", without_noise_on(path, scale))
    refused(f"accounted standard deviation on {path}")


def test_noise_divided_by_the_batch_is_caught(backend, monkeypatch):
    sound = steps.add_gaussian
    monkeypatch.setattr(steps, "add_gaussian", lambda sums, sigma, key, counter: sound(sums, sigma / 6, key, counter))
    refused("accounted standard deviation")


def test_the_same_noise_on_two_leaves_is_caught(backend, monkeypatch):
    sound = steps.add_gaussian

    def add_gaussian(sums, sigma, key, counter):
        return {path: sound({path: s}, sigma, key, counter)[path] for path, s in sums.items()}

    monkeypatch.setattr(steps, "add_gaussian", add_gaussian)
    refused("noise must")


def test_noise_that_drags_on_is_caught(backend, monkeypatch):
    sound, last = steps.add_gaussian, {}

    def add_gaussian(sums, sigma, key, counter):  # half of the last step's noise, with the right variance
        fresh = sound(sums, sigma, key, counter)
        if state.is_traced(counter):
            return fresh
        mixed = {k: 0.8 * f + 0.6 * last.get(k, 1.2 * f) for k, f in fresh.items()}
        last.update(fresh)
        return mixed

    monkeypatch.setattr(steps, "add_gaussian", add_gaussian)
    with pytest.raises(bw.PrivacyError, match="independent"):
        engine().check(nn.Linear(5, 300), (X, Y), cross_entropy)


@pytest.mark.slow
def test_alarms_are_as_rare_as_stated(monkeypatch):
    # At a rate of 1 in 20, more than 16 refusals of sound noise in 100 happen once in 100,000 runs of this test.
    monkeypatch.setattr(check_noise, "FALSE_ALARM_RATE", 0.05)
    refusals = 0
    for _ in range(100):
        try:
            check_noise.check_noise(engine(), {"a": (40, 30), "b": (1,), "c": (7,)}, 6)
        except bw.PrivacyError:
            refusals += 1
    assert refusals <= 16
