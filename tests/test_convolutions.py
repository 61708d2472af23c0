import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx_bulwark import convolutions as faster
from mlx_bulwark.attacks import PGD
from mlx_bulwark.ops import ghost
from mlx_bulwark.smoothing import Smooth
from mlx_bulwark.training import fit


class Doubled(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, (3, 2), stride=2, dilation=2, groups=2, bias=False),
        Doubled(6, 4, 1),
        lambda x: x.mean(axis=2),
        nn.Conv1d(4, 3, 2),
        lambda x: x.mean(axis=1),
    )


def calls(monkeypatch):
    seen = []

    def counted(*args, **how):
        seen.append(args[1].shape)
        return ghost.convolve(*args, **how)

    monkeypatch.setattr(faster, "convolve", counted)
    return seen


def test_same_outputs_and_the_model_as_it_was(backend, monkeypatch):
    mx.random.seed(0)
    model, x, seen = network(), mx.random.normal((5, 9, 9, 2)), calls(monkeypatch)
    plain, types = model(x), [type(m) for m in model.modules()]
    with faster.faster_convolutions(model):
        inside = model(x)
    np.testing.assert_allclose(np.array(inside), np.array(plain), atol=1e-5)
    assert seen == [(4, 3, 3, 2), (6, 3, 2, 2), (3, 2, 4)]  # a subclass keeps what it does
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.MaxPool1d(3), (2, 9, 5)),
        (nn.MaxPool2d((2, 3)), (3, 8, 9, 4)),
        (nn.MaxPool2d(2), (3, 9, 8, 4)),  # what is left over
        (nn.MaxPool2d(3, stride=2, padding=1), (3, 9, 8, 4)),
        (nn.MaxPool3d(2), (1, 4, 4, 6, 3)),
        (nn.MaxPool2d(2), (0, 4, 4, 3)),
    ],
)
def test_pools(pool, shape):
    model, x = nn.Sequential(pool), np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x[:1, :2] = np.nan
    plain = model(mx.array(x))
    with faster.faster_convolutions(model):
        assert mx.array_equal(model(mx.array(x)), plain, equal_nan=True)
        inside = mx.grad(lambda z: model(z).square().sum())(mx.array(x[1:]))
    assert mx.array_equal(inside, mx.grad(lambda z: model(z).square().sum())(mx.array(x[1:])))


def test_an_error_inside_leaves_the_model_as_it_was():
    model = network()
    with pytest.raises(KeyError), faster.faster_convolutions(model):
        raise KeyError
    assert type(model.layers[0]) is nn.Conv2d


def test_weights_of_another_dtype_are_left_to_mlx(monkeypatch):
    model, seen = nn.Conv2d(2, 4, 3), calls(monkeypatch)
    model.set_dtype(mx.float16)
    x = mx.ones((1, 4, 4, 2))
    plain = model(x)
    with faster.faster_convolutions(model):
        assert mx.array_equal(model(x), plain)
    assert seen == []


def test_certificates_use_them(monkeypatch):
    mx.random.seed(0)
    model, seen = network(), calls(monkeypatch)
    found = Smooth(model, num_classes=3, sigma=0.1).certify(mx.random.normal((2, 9, 9, 2)), n0=10, n=100)
    assert len(seen) >= 3
    assert (found.votes <= 100).all()


def test_attacks_and_training_use_them(monkeypatch):
    mx.random.seed(0)
    model, seen = network(), calls(monkeypatch)
    x, y = mx.random.uniform(shape=(4, 9, 9, 2)), mx.array([0, 1, 2, 0])
    PGD(0.1, steps=2)(model, x, y)
    assert len(seen) >= 9  # before, two steps, after
    del seen[:]

    def loss(model, x, y):
        return nn.losses.cross_entropy(model(x), y, reduction="mean")

    fit(model, loss, (x, y), optim.SGD(0.1), 1, batch_size=4, progress=False)
    assert seen == [(4, 3, 3, 2), (6, 3, 2, 2), (3, 2, 4)]
    assert type(model.layers[0]) is nn.Conv2d


def test_functions_pass_through():
    with faster.faster_convolutions(lambda x: x):
        pass
