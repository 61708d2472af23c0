"""The cheap defence: its noise, its average, and what it does not promise."""

import copy
import math
import pickle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_bulwark import blocks_used, gaussian, key_from_seed
from mlx_bulwark.smoothing import SmoothedModel, defence, perturb
from scipy import special


def test_perturb_is_fresh_secure_noise(monkeypatch):
    x = mx.zeros((100, 7))
    assert not bool((perturb(x, 0.5) == perturb(x, 0.5)).any())
    key = key_from_seed(1)
    expected = gaussian((1, 100, 7), 0.5, key, 9, domain="smoothing")[0]
    np.testing.assert_allclose(np.array(perturb(x, 0.5, key=key, counter=9)), np.array(expected), atol=1e-6)
    clipped = perturb(x, 5.0, bounds=(-1, 1))
    assert clipped.min().item() == -1
    assert clipped.max().item() == 1
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"\[perturb\] sigma must"):
            perturb(x, sigma)
    with pytest.raises(ValueError, match="x must"):
        perturb(mx.zeros(3, mx.int32), 0.5)


def test_the_average_is_of_probabilities(monkeypatch):
    key = key_from_seed(2)
    monkeypatch.setattr(defence, "random_key", lambda: key)
    inner = nn.Linear(4, 3)
    model = SmoothedModel(inner, 0.5, copies=6)
    x = mx.array(np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32))
    for call in range(2):
        noise = gaussian((6, 5, 4), 0.5, key, call * blocks_used((6, 5, 4)), domain="smoothing")
        p = special.softmax(np.array(inner(x + noise), np.float64), axis=-1).mean(0)
        np.testing.assert_allclose(np.exp(np.array(model(x))), p, rtol=1e-4)


def test_the_key_is_no_parameter_and_does_not_travel(tmp_path):
    model = SmoothedModel(nn.Linear(4, 3), 0.5)
    model(mx.zeros((1, 4)))
    assert {name for name, _ in tree_flatten(model.parameters())} == {"model.weight", "model.bias"}
    model.save_weights(str(tmp_path / "w.safetensors"))
    assert set(mx.load(str(tmp_path / "w.safetensors"))) == {"model.weight", "model.bias"}
    for f in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="secret key"):
            f(model)


def test_compiled_with_its_state_it_does_not_repeat_its_noise():
    model = SmoothedModel(nn.Linear(4, 3), 0.5)
    run = mx.compile(model, inputs=model.state, outputs=model.state)
    found = [np.array(run(mx.zeros((1, 4)))) for _ in range(3)]
    assert not (found[0] == found[1]).any()
    assert not (found[1] == found[2]).any()
    assert model._counter.tolist() == [3 * blocks_used((8, 1, 4)), 0]


def test_gradients_pass_through_as_eot_wants_them():
    model = SmoothedModel(nn.Linear(4, 3), 0.5, copies=64)
    gradient = mx.grad(lambda x: model(x)[:, 0].sum())(mx.zeros((2, 4)))
    assert bool(mx.isfinite(gradient).all())
    assert bool((mx.abs(gradient).sum(axis=1) > 0).all())


def test_wrong_arguments_are_refused():
    inner = nn.Linear(4, 3)
    for arguments, words in [((inner, 0.0), "sigma"), ((inner, 0.5, 0), "copies"), ((inner, "x"), "sigma")]:
        with pytest.raises(ValueError, match=rf"\[SmoothedModel\] {words} must"):
            SmoothedModel(*arguments)
    with pytest.raises(ValueError, match=r"\[SmoothedModel\] x must"):
        SmoothedModel(inner, 0.5)(mx.zeros(4))
