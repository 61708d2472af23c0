"""Adversarial training under the privacy engine: one unit of two rows, nothing coupled, the rest refused."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_bulwark.attacks import UniversalPatch
from mlx_bulwark.training import (
    AdversarialWeightPerturbation,
    FreeAdversarialTraining,
    adversarial_inputs,
    adversarial_twins,
    fit,
    trades_loss,
)

EPS, NORM, N = 0.1, 0.2, 12


def per_example(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="none")


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.uniform(0, 1, (N, 5)).astype(np.float32), rng.integers(0, 3, N).astype(np.int32)


def network():
    mx.random.seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def engine(noise=0.0, **settings):
    return bw.PrivacyEngine(N, sampling="full", noise_multiplier=noise, max_grad_norm=NORM, **settings)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_private_step_is_the_loop_over_examples(backend, data, compiled):
    """Clean and adversarial gradient averaged, clipped once, added up, over the number of examples."""
    model, other, ours = network(), network(), engine()
    optimizer = ours.wrap(optim.SGD(1.0))
    twins = adversarial_twins(model, EPS, steps=3, random_start=False)
    before = dict(tree_flatten(other.parameters()))
    sums = {path: 0.0 for path in before}
    clipped = 0
    for x, y in zip(*data, strict=True):
        x, y = mx.array(x[None]), mx.array(y[None])
        worst = adversarial_inputs(other, x, y, EPS, steps=3, random_start=False)
        grads = []
        for row in (x, worst):
            tree = nn.value_and_grad(other, lambda m, x, y: per_example(m, x, y).sum())(other, row, y)[1]
            grads.append({path: np.array(g).astype(np.float64) for path, g in tree_flatten(tree)})
        mean = {path: (grads[0][path] + grads[1][path]) / 2 for path in before}
        norm = np.sqrt(sum((g**2).sum() for g in mean.values()))
        clipped += norm > NORM
        sums = {path: s + min(1, NORM / norm) * mean[path] for path, s in sums.items()}
    assert clipped > 0
    batches = ours.batches(data, steps=1, augment=twins, multiplicity=2)
    (batch,) = batches
    assert len(batch.mask) == 2 * N
    if compiled:
        step = ours.compiled_step(model, optimizer, per_example)
        mx.eval(step(batch), model.state, ours.state)
    else:
        optimizer.update(model, ours.value_and_grad(model, per_example)(model, batch)[1])
    for path, weight in tree_flatten(model.parameters()):
        np.testing.assert_allclose(np.array(before[path] - weight), sums[path] / N, rtol=1e-3, atol=1e-6)


def test_every_second_row_is_attacked_with_the_weights_of_now(data):
    model = network()
    x, y = (mx.array(np.repeat(a, 2, axis=0)) for a in data)
    twins = adversarial_twins(model, EPS, steps=3, random_start=False)
    for scale in (1.0, -1.0):
        model.layers[2].weight = scale * model.layers[2].weight
        both, classes = twins(x, y)
        assert mx.array_equal(both[::2], x[::2])
        assert mx.array_equal(classes, y)
        want = adversarial_inputs(model, x[1::2], y[1::2], EPS, steps=3, random_start=False)
        np.testing.assert_allclose(np.array(both[1::2]), np.array(want), atol=1e-6)
    assert mx.abs(both - x).max().item() == pytest.approx(EPS, rel=1e-5)


def test_starts_are_fresh_and_each_rows_own(data):
    x, y = (mx.array(np.repeat(a[:1], 8, axis=0)) for a in data)
    twins = adversarial_twins(network(), EPS, steps=1, alpha=0.0)
    first, second = (np.array(twins(x, y)[0])[1::2] for _ in range(2))
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 8


def attacked_loss(twin):
    """The adversarial row made inside of the loss, so that the engine's check sees all that it depends on."""

    def loss_fn(model, x, y):
        worst = adversarial_inputs(twin, x, y, EPS, steps=3, random_start=False)
        return per_example(model, x, y) + per_example(model, worst, y)

    return loss_fn


def test_the_engine_finds_no_coupling_in_the_attack(data):
    x, y = (mx.array(a) for a in data)
    twin = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm(8), nn.Tanh(), nn.Linear(8, 3))  # in training mode
    assert engine(1.0).check(network(), (x, y), attacked_loss(twin), noise_steps=0).coupling_error < 1e-4


def test_the_engine_does_find_an_attack_that_couples(data):
    """A universal perturbation: the sum of all rows' gradients moves each of them."""
    x, y = (mx.array(a) for a in data)
    twin = network()

    def loss_fn(model, x, y):
        gradient = mx.grad(lambda z: per_example(twin, z, y).sum())(x).sum(axis=0)
        return per_example(model, mx.stop_gradient(x + EPS * mx.sign(gradient)), y)

    with pytest.raises(bw.PrivacyError, match=r"couples|one-by-one"):
        engine(1.0).check(network(), (x, y), loss_fn, noise_steps=0)


def test_private_trades_holds_both_inputs_in_one_row(data):
    model = network()
    x, y = (mx.array(a) for a in data)
    worst = adversarial_inputs(model, x, y, EPS, steps=3)

    def loss_fn(model, x, worst, y):
        return trades_loss(model, x, y, EPS, adversarial=worst, reduction="none")

    report = engine(1.0).check(model, (x, worst, y), loss_fn, noise_steps=0)
    assert max(report.loss_error, report.norm_error, report.sum_error, report.coupling_error) < 1e-4


@pytest.mark.parametrize("of", ["apply", "itself"])
def test_a_universal_perturbation_is_refused_with_the_reason(data, of):
    patch = UniversalPatch((2, 2))
    with pytest.raises(
        bw.PrivacyError, match=r"\[batches\] augment must not be a universal.*changes the rows of the o"
    ):
        engine(1.0).batches(data, steps=1, augment=patch.apply if of == "apply" else patch)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_couples_examples_is_refused_with_the_reason(wrapped):
    model, private = network(), engine(1.0)
    optimizer = private.wrap(optim.SGD(0.1)) if wrapped else private
    with pytest.raises(bw.PrivacyError, match=r"carries the perturbation of one batch to the next.*adversarial_twins"):
        FreeAdversarialTraining(model, optimizer, EPS)
    with pytest.raises(bw.PrivacyError, match="made from the whole batch without noise"):
        AdversarialWeightPerturbation(model, optimizer, lambda m, x: m(x).sum())
    with pytest.raises(bw.PrivacyError, match=r"engine\.batches"):
        fit(model, lambda m, x: m(x).sum(), (mx.zeros((200, 5)),), optimizer, 1)
