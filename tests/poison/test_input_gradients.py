"""Gradients by inputs through the faster convolutions are MLX's."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark.poison.input_gradients import faster_input_gradients


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel", "how"),
    [
        ((7, 9), 3, {}),
        ((7, 9), 3, {"padding": 1}),
        ((8, 11), 5, {"stride": 2, "padding": 2}),
        ((8, 11), (3, 2), {"stride": (3, 2), "padding": (0, 1)}),
        ((5, 5), 1, {"stride": 3}),
        ((4, 6), 1, {"padding": 2}),
        ((6, 6), 2, {"stride": 4}),
        ((9, 9), 3, {"dilation": 2}),
        ((6, 6), 3, {"bias": False}),
    ],
)
def test_gradient_is_that_of_mlx(size, kernel, how, compiled):
    layer = nn.Conv2d(3, 4, kernel, **how)
    x = mx.random.normal((2, *size, 3))
    weights = mx.random.normal(layer(x).shape)

    def loss(x):
        return (layer(x) * weights).sum()

    wanted, value = mx.grad(loss)(x), layer(x)
    with faster_input_gradients(layer):
        assert type(layer) is not nn.Conv2d
        found = (mx.compile(mx.grad(loss)) if compiled else mx.grad(loss))(x)
        np.testing.assert_allclose(np.array(layer(x)), np.array(value), rtol=1e-4, atol=1e-5)
        mx.eval(found)
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-4, atol=1e-4)
    assert type(layer) is nn.Conv2d


def test_other_models_stay_as_they_are():
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(Own(1, 2, 3), nn.Linear(2, 2))
    with faster_input_gradients(model):
        assert type(model.layers[0]) is Own
    with faster_input_gradients(lambda x: x):
        pass
