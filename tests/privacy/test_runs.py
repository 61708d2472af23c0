"""Whole runs of small models: the same on every backend, and plain training where there is no clipping and no noise."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_bulwark import _native
from mlx_bulwark.privacy import state
from models import MODELS, problem
from oracle import numpy64

RUNS = [
    "cnn",
    "transformer",
    "lstm",
    "gru",
    "tied table",
    "lora of 4 bits",
    "dora embedding, tied",
    "transposed conv2d",
]


def engine(noise_multiplier, max_grad_norm):
    return bw.PrivacyEngine(12, batch_size=6, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)


def trained(name, noise_multiplier, max_grad_norm, steps=3):
    """Trained parameters after some steps of SGD."""
    model, loss_fn, batch = problem(MODELS[name][0], MODELS[name][1], 6)
    e = engine(noise_multiplier, max_grad_norm)
    optimizer = e.wrap(optim.SGD(0.002))
    loss_and_grad = e.value_and_grad(model, loss_fn)
    for _ in range(steps):
        _, gradients = loss_and_grad(model, *batch)
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
    return {k: numpy64(p) for k, p in tree_flatten(model.trainable_parameters())}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_seeds_give_the_same_run_on_every_backend(backend, monkeypatch, name):
    monkeypatch.setattr(state, "random_key", lambda: bw.key_from_seed(7))
    ours = trained(name, 0.5, 1.0)
    _native.use("reference")
    reference = trained(name, 0.5, 1.0)
    start = {k: numpy64(p) for k, p in tree_flatten(problem(*MODELS[name][:2], 6)[0].trainable_parameters())}
    moved = max(np.abs(reference[k] - start[k]).max() for k in start)
    assert moved > 1e-4
    for k, p in reference.items():
        # 1e-4 of the way: sums over other blocks, and noise that differs by a few ulp, over three steps
        np.testing.assert_allclose(ours[k], p, rtol=1e-6, atol=1e-4 * moved)


@pytest.mark.parametrize("name", RUNS)
def test_without_clipping_and_noise_it_is_plain_training(backend, name):
    ours = trained(name, 0.0, np.inf)
    model, loss_fn, batch = problem(MODELS[name][0], MODELS[name][1], 6)
    optimizer = optim.SGD(0.002)
    grad = nn.value_and_grad(model, lambda *b: loss_fn(model, *b).sum() / 6)
    start = {k: numpy64(p) for k, p in tree_flatten(model.trainable_parameters())}
    for _ in range(3):
        optimizer.update(model, grad(*batch)[1])
        mx.eval(model.parameters())
    plain = {k: numpy64(p) for k, p in tree_flatten(model.trainable_parameters())}
    moved = max(np.abs(plain[k] - start[k]).max() for k in start)
    for k, p in plain.items():
        np.testing.assert_allclose(ours[k], p, rtol=1e-6, atol=1e-4 * moved)


@pytest.mark.parametrize("name", RUNS)
def test_engines_check_passes_on_every_kind_of_layer(backend, name):
    model, loss_fn, batch = problem(MODELS[name][0], MODELS[name][1], 4)
    e = engine(1.0, 0.3)
    assert e.validate(model).is_valid
    report = e.check(model, batch, loss_fn, rtol=1e-3)
    assert max(report.norm_error, report.sum_error, report.coupling_error) < 1e-3


@pytest.mark.parametrize("clipping", ["per_layer", "automatic", "adaptive"])
def test_engines_check_knows_the_clipping(backend, clipping):
    model, loss_fn, batch = problem(MODELS["transformer"][0], MODELS["transformer"][1], 4)
    e = bw.PrivacyEngine(12, batch_size=6, noise_multiplier=1.0, max_grad_norm=0.3, clipping=clipping)
    report = e.check(model, batch, loss_fn, rtol=1e-3)
    assert report.noise_steps == 8
    assert e.steps == 0
