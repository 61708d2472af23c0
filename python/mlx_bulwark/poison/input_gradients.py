"""A model's convolutions so that gradients of its inputs take a fraction of MLX's time on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..ops.ghost import convolve

# Unlike those of `faster_convolutions`, these have a derivative as fast as they are, by the inputs alone.


class _InputGradient(nn.Conv2d):
    def __call__(self, x: mx.array) -> mx.array:
        layer: Any = self
        parent: Any = super()
        plain = layer.dilation in (1, (1, 1)) and getattr(layer, "groups", 1) == 1
        if x.dtype != mx.float32 or layer.weight.dtype != mx.float32 or not plain:
            return mx.array(parent.__call__(x))
        return _convolved(x, layer.weight, layer.get("bias"), layer.stride, layer.padding)


@contextmanager
def faster_input_gradients(model: Any) -> Iterator[None]:
    """Let plain two-dimensional convolutions be quick under ``mx.grad`` by inputs; weights get no gradient inside."""
    found = [m for m in model.modules() if type(m) is nn.Conv2d] if isinstance(model, nn.Module) else []
    try:
        for m in found:
            m.__class__ = _InputGradient
        yield
    finally:
        for m in found:
            m.__class__ = nn.Conv2d


def _convolved(x: mx.array, weight: mx.array, bias: Any, stride: Any, padding: Any) -> mx.array:
    weight = mx.stop_gradient(weight)
    bias = None if bias is None else mx.stop_gradient(bias)

    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        return convolve(x, weight, bias, stride=stride, padding=padding)

    @forward.vjp
    def backward(x: Any, cotangent: Any, _: Any) -> Any:
        return _transposed(cotangent, weight, _pair(stride), _pair(padding), x.shape[1:3])

    found: Any = forward(x)
    return mx.array(found)


def _transposed(
    dy: mx.array, weight: mx.array, stride: tuple[int, int], padding: tuple[int, int], space: tuple[int, ...]
) -> mx.array:
    """The convolution's transpose: zeros between positions, then the kernel turned around."""
    b, h, w, p = dy.shape
    spread = mx.pad(dy[:, :, None, :, None], [(0, 0), (0, 0), (0, stride[0] - 1), (0, 0), (0, stride[1] - 1), (0, 0)])
    spread = spread.reshape(b, h * stride[0], w * stride[1], p)
    for axis in (0, 1):
        kernel, length = weight.shape[1 + axis], space[axis]
        before = kernel - 1 - padding[axis]
        spread = _fitted(spread, 1 + axis, before, length + kernel - 1)
    return convolve(spread, weight[:, ::-1, ::-1].transpose(3, 1, 2, 0))


def _fitted(x: mx.array, axis: int, before: int, length: int) -> mx.array:
    """Zeros before, or values cut off there, and either at the end, to a length."""
    if before < 0:
        x, before = mx.take(x, mx.arange(-before, x.shape[axis]), axis=axis), 0
    after = length - before - x.shape[axis]
    if after < 0:
        x, after = mx.take(x, mx.arange(x.shape[axis] + after), axis=axis), 0
    return mx.pad(x, [(before, after) if i == axis else (0, 0) for i in range(x.ndim)])


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
