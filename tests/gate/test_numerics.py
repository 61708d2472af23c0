"""The probe: planted faults at their layers, sound networks without any, figures against NumPy."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_bulwark.gate import probe_numerics


class NaiveSoftmax(nn.Module):
    def __call__(self, x):
        e = mx.exp(x)
        return e / e.sum(axis=-1, keepdims=True)


class Logarithm(nn.Module):
    def __call__(self, x):
        return mx.log(nn.relu(x))


class Length(nn.Module):
    def __call__(self, x):
        return mx.sqrt(mx.square(nn.relu(x)).sum(axis=-1, keepdims=True))


@mx.custom_function
def doubled(x):
    return 2 * x


@doubled.vjp
def doubled_vjp(primals, cotangent, _):
    return 1.9 * cotangent


class WrongGradient(nn.Module):
    def __call__(self, x):
        return doubled(x)


class Steep(nn.Module):
    def __call__(self, x):
        return mx.tanh((x - 0.5) * 1e6)


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), inner

    def __call__(self, x):
        return self.inner(self.first(x))


def identity(layer, scale=1.0):
    layer.weight, layer.bias = scale * mx.eye(4), mx.zeros(4)
    return layer


def planted(inner, scale=1.0):
    block = Block(inner)
    identity(block.first, scale)
    return nn.Sequential(nn.ReLU(), block, nn.Linear(4, 2) if not isinstance(inner, Length) else nn.Linear(1, 2))


X = mx.array(np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))


@pytest.mark.parametrize(
    ("model", "x", "layer", "words"),
    [
        (planted(NaiveSoftmax(), 20.0), mx.abs(X).astype(mx.float16), "layers.1.inner (NaiveSoftmax)", "NaN"),
        (planted(Logarithm()), X, "layers.1.inner (Logarithm)", "values are infinite"),
        (planted(Length()), mx.concatenate([X, mx.zeros((1, 4))]), "layers.1.inner (Length)", "gradient is not finite"),
        (planted(WrongGradient()), X, "layers.1.inner (WrongGradient)", "gradient is wrong: finite differences"),
        (planted(Steep()), mx.full((5, 4), 0.5), "layers.1.inner (Steep)", "relative change grows"),
        (planted(nn.Identity(), 3e4), mx.abs(X).astype(mx.float16), "layers.1.first (Linear)", "near overflow"),
    ],
)
def test_a_planted_fault_is_found_at_its_layer(model, x, layer, words):
    if x.dtype == mx.float16:
        model.set_dtype(mx.float16)
    report = probe_numerics(model, x)
    assert not report.ok
    assert all(fault.startswith(layer) for fault in report.faults), report.faults
    assert any(words in fault for fault in report.faults), report.faults


def test_a_function_in_a_sequence_is_a_layer():
    model = nn.Sequential(nn.Linear(4, 4), lambda x: mx.log(x - x))
    (fault,) = probe_numerics(model, X, gradients=False).faults
    assert fault.startswith("layers.1 (<lambda>): 20 of 20 values are infinite")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiHeadAttention(8, 2)
        self.norm = nn.LayerNorm(8)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        return self.norm(x + self.attention(x, x, x))


def convolutional():
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm(4)]
    return nn.Sequential(*layers, lambda x: x.reshape(len(x), -1), nn.Linear(36, 3))


def perceptron():
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3), nn.Softmax())


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("make", [perceptron, convolutional, Attention])
def test_a_sound_network_is_not_accused(make, seed, dtype):
    mx.random.seed(seed)
    model = make()
    model.eval()
    model.set_dtype(dtype)
    rng = np.random.default_rng(seed)
    if make is Attention:
        x = mx.array(rng.integers(0, 11, (3, 6)))
    else:
        x = mx.array(rng.normal(size=(3, 4) if make is perceptron else (3, 8, 8, 1)).astype(np.float32)).astype(dtype)
    report = probe_numerics(model, x, seed=seed)
    assert report.ok, report.faults
    assert all(p.dtype == dtype for _, p in tree_flatten(model.parameters()))
    assert sum(layer.gradient_error is not None for layer in report.layers) > 3


def test_zeros_at_the_kink_are_not_accused():
    assert probe_numerics(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), mx.zeros((3, 4))).ok


def test_figures_are_those_of_numpy():
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 3), mx.exp)
    report = probe_numerics(model, X * 4)
    first, second, whole = report.layers
    hidden = np.array(X * 4) @ np.array(model.layers[0].weight).T + np.array(model.layers[0].bias)
    assert (first.name, first.kind, second.kind, whole.name) == ("layers.0", "Linear", "exp", "")
    assert first.largest == pytest.approx(np.abs(hidden).max(), rel=1e-5)
    assert second.largest == pytest.approx(np.exp(hidden).max(), rel=1e-4)
    assert second.range_share == pytest.approx(np.exp(hidden).max() / np.finfo(np.float32).max, rel=1e-4)
    slope = np.sqrt(np.square(np.exp(hidden) * hidden).sum() / np.square(np.exp(hidden)).sum())
    assert 0.1 * slope < second.amplification < 3 * slope


def test_underflow_is_what_float32_still_has():
    model = nn.Sequential(nn.Identity(), mx.exp)
    x = mx.array([[-1.0, -5.0, -15.0, -20.0]]).astype(mx.float16)  # e^-9.7 is the smallest normal number
    assert probe_numerics(model, x).layers[1].underflow == 0.5
    assert probe_numerics(model, x.astype(mx.float32)).layers[1].underflow == 0
    assert probe_numerics(nn.Sequential(nn.ReLU()), x).layers[0].underflow == 0


def test_the_model_is_left_as_it_was():
    model = planted(WrongGradient())
    layers, before = list(model.layers), [np.array(p) for p in (model.layers[1].first.weight, model.layers[2].weight)]
    kinds = [type(m) for _, m in model.named_modules()]
    probe_numerics(model, X)
    assert [type(m) for _, m in model.named_modules()] == kinds
    assert all(a is b for a, b in zip(model.layers, layers, strict=True))
    for old, new in zip(before, (model.layers[1].first.weight, model.layers[2].weight), strict=True):
        np.testing.assert_array_equal(old, np.array(new))

    class Fails(nn.Module):
        def __call__(self, x):
            raise KeyError("own")

    failing = nn.Sequential(nn.ReLU(), Fails())
    with pytest.raises(KeyError):
        probe_numerics(failing, X)
    assert type(failing.layers[1]) is Fails


def test_report_and_misuse():
    report = probe_numerics(planted(Logarithm()), X)
    content = json.loads(report.to_json())
    assert content["ok"] is False
    assert content["faults"] == list(report.faults)
    assert "Logarithm" in report.table()
    assert report.table().endswith(report.faults[-1])
    assert str(probe_numerics(nn.Linear(4, 2), X)).endswith("no fault found")
    for model, x, words in (
        (lambda x: x, X, "Module"),
        (nn.Linear(4, 2), X / 0, "finite"),
        (nn.Sequential(nn.Linear(4, 2), nn.Dropout()), X, "evaluation mode"),
    ):
        with pytest.raises(ValueError, match=words):
            probe_numerics(model, x)
    with pytest.raises(ValueError, match="directions"):
        probe_numerics(nn.Linear(4, 2), X, directions=0)
