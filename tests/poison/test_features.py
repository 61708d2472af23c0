"""Features before the last layer: read as they pass, by any way a model is built."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_bulwark.poison import features_and_logits, penultimate_features


class Reversed(nn.Module):
    """Its last layer is its first attribute."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.norm = nn.BatchNorm(6)
        self.drop = nn.Dropout(0.5)
        self.body = nn.Linear(4, 6)

    def __call__(self, x):
        return self.head(self.drop(nn.relu(self.norm(self.body(x)))))


class Convolutional(nn.Module):
    """Its last layer is a 1 x 1 convolution whose outputs are averaged."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 5, 3)
        self.gate = nn.Linear(5, 5)
        self.last = nn.Conv2d(5, 3, 1)

    def __call__(self, x):
        x = nn.relu(self.first(x))
        x = x * mx.sigmoid(self.gate(x.mean(axis=(1, 2))))[:, None, None]
        return self.last(x).mean(axis=(1, 2))


def body(model, x):
    """The features of `Reversed`, in NumPy float64."""
    p = {name: np.array(a, np.float64) for name, a in tree_flatten(model.parameters())}
    h = x @ p["body.weight"].T + p["body.bias"]
    h = (h - p["norm.running_mean"]) / np.sqrt(p["norm.running_var"] + 1e-5) * p["norm.weight"] + p["norm.bias"]
    h = np.maximum(h, 0)
    return h, h @ p["head.weight"].T + p["head.bias"]


@pytest.fixture
def model():
    mx.random.seed(0)
    model = Reversed()
    model.norm.update({"running_mean": mx.arange(6) / 10, "running_var": mx.arange(1, 7) / 3})
    model.eval()
    return model


@pytest.mark.parametrize("rows", [0, 1, 31, 33])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_features_and_logits_are_those_of_the_forward_pass(model, rows, batch_size):
    x = np.random.default_rng(rows).normal(size=(rows, 4))
    found = features_and_logits(model, x, batch_size=batch_size)
    features, logits = body(model, x)
    assert found.features.dtype == found.logits.dtype == np.float32
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-5)
    assert found.layer == "head"


def test_the_layer_that_runs_last_counts_not_the_last_attribute(model):
    x = mx.random.normal((9, 4))
    assert penultimate_features(model, x).shape == (9, 6)
    np.testing.assert_array_equal(penultimate_features(model, x, layer="body"), np.array(x))


def test_a_convolution_at_the_end_gives_the_mean_over_places():
    model = Convolutional()
    model.eval()
    x = mx.random.normal((4, 8, 8, 1))
    found = features_and_logits(model, x)
    assert found.layer == "last"
    p = {name: np.array(a, np.float64) for name, a in tree_flatten(model.last.parameters())}
    np.testing.assert_allclose(found.logits, found.features @ p["weight"][:, 0, 0].T + p["bias"], rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_is(model):
    before = tree_flatten(model.parameters())
    classes = [type(m) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    model.drop.rate = 0.5
    penultimate_features(model, mx.ones((3, 4)))
    assert [type(m) for m in model.modules()] == classes
    assert [m.training for m in model.modules()] == modes
    for (name, a), (other, b) in zip(before, tree_flatten(model.parameters()), strict=True):
        assert name == other
        np.testing.assert_array_equal(np.array(a), np.array(b))


def test_the_model_stays_as_it_is_when_it_fails(model):
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="must match second"):
        penultimate_features(model, mx.ones((3, 5)))
    assert [type(m) for m in model.modules()] == classes


def test_training_mode_is_refused_with_the_layer_that_shows_it(model):
    model.drop.train()
    with pytest.raises(ValueError, match=r"\[penultimate_features\] model must be in evaluation mode.*Dropout drop"):
        penultimate_features(model, mx.ones((3, 4)))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(dtype):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    wide = penultimate_features(model, x)
    model.set_dtype(dtype)
    found = penultimate_features(model, mx.array(x).astype(dtype))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wide, atol=0.05)


def test_quantized_last_layer_and_tokens():
    embedding, head = nn.Embedding(11, 64), nn.Linear(64, 4)
    model = nn.Sequential(embedding, head, lambda x: x.mean(axis=1))
    nn.quantize(model, class_predicate=lambda _, m: m is head)
    tokens = np.random.default_rng(0).integers(0, 11, (5, 7))
    expected = np.array(embedding.weight)[tokens].mean(axis=1)
    np.testing.assert_allclose(penultimate_features(model, tokens), expected, rtol=1e-5, atol=1e-7)


def test_a_layer_of_two_names_and_of_two_calls():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = mx.random.normal((5, 4))
    found = features_and_logits(model, x)
    np.testing.assert_allclose(found.features, np.array(nn.relu(shared(x))), rtol=1e-6)


def test_refusals(model):
    x = mx.ones((3, 4))
    with pytest.raises(TypeError, match=r"model must be a mlx.nn.Module.* but is function"):
        penultimate_features(lambda x: x, x)
    with pytest.raises(ValueError, match=r"layer must be in model.named_modules\(\) but is 'heed'; near it are head"):
        penultimate_features(model, x, layer="heed")
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1 but is 0"):
        penultimate_features(model, x, batch_size=0)
    with pytest.raises(ValueError, match=r"x must be an array of numbers .* but has type list"):
        penultimate_features(model, [[1.0]])
    with pytest.raises(
        ValueError, match=r"must have a linear layer or a convolution but has none; name one of layers\.0"
    ):
        penultimate_features(nn.Sequential(nn.ReLU()), x)
    with pytest.raises(
        ValueError, match=r"must be given one row for each of the 3 inputs .* but is given shape \[6, 2\]"
    ):
        penultimate_features(nn.Sequential(lambda x: x.reshape(-1, 2), nn.Linear(2, 2)), x)
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="must run when the model does but did not"):
        penultimate_features(model, x, layer="unused")
    with pytest.raises(ValueError, match=r"model must return \[b, c\].* but returned \[3\]"):
        features_and_logits(nn.Sequential(nn.Linear(4, 1), lambda x: x.squeeze(1)), x)
    with pytest.raises(ValueError, match=r"layer layers.0 must be given floats.* but is given dtype mlx.core.int64"):
        penultimate_features(
            nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)), np.zeros((3, 2), int), layer="layers.0"
        )
