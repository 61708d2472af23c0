"""Max pooling over windows that lie side by side."""

import json
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from .. import _native
from .._native import Stream
from .ghost import Size, _runs_kernel, _sizes
from .noise import FLOATS, _on


def max_pool(x: mx.array, kernel_size: Size, *, stream: Stream = None) -> mx.array:
    """The largest value of each window; windows lie side by side, and what no whole window holds is left out.

    On the CPU it takes a fraction of the time of MLX's own reduction, forward and backward: one pass over the input, on
    all cores. NaN in a window is its largest. Where values tie, the gradient is shared by them. Half precision, and
    everything on Metal, is left to MLX.

    Args:
        x: Inputs ``[B, *space, c]`` with 1, 2 or 3 axes of space; float32, float16 or bfloat16.
        kernel_size: Of the windows along each axis of space, or along all.
        stream: Stream or device.

    Returns:
        array: ``[B, *(space // kernel_size), c]``, of the dtype of ``x``.

    Raises:
        ValueError: A shape or dtype is not as above, or no window fits.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> bw.max_pool(mx.arange(12.0).reshape(1, 3, 4, 1), 2).tolist()
        [[[[5.0], [7.0]]]]

    Source:
        As ``mlx.nn.MaxPool2d`` with stride ``kernel_size``.
    """
    kernel = _kernel(x, kernel_size)
    if x.dtype == mx.float32 and _runs_kernel(stream):
        return _native.ext.max_pool(x, list(kernel), stream)
    with _on(stream):
        return _largest(x, kernel)


def max_pool_reference(x: mx.array, kernel_size: Size, *, stream: Stream = None) -> mx.array:
    """Compute ``max_pool`` by plain MLX ops."""
    with _on(stream):
        return _largest(x, _kernel(x, kernel_size))


def _kernel(x: mx.array, kernel_size: Size) -> tuple[int, ...]:
    if x.ndim not in (3, 4, 5) or x.dtype not in FLOATS:
        raise ValueError(
            "[max_pool] x must be float32, float16 or bfloat16 with 1, 2 or 3 axes of space, [B, *space, c], but has "
            f"dtype {x.dtype} and shape {list(x.shape)}"
        )
    kernel = _sizes("max_pool", "kernel_size", kernel_size, x.ndim - 2)
    if any(n < k for n, k in zip(x.shape[1:-1], kernel, strict=True)):
        raise ValueError(f"[max_pool] x must reach over the kernel {kernel} in each axis but has shape {list(x.shape)}")
    return kernel


def _windows(x: mx.array, kernel: tuple[int, ...]) -> mx.array:
    """Axes of windows and inside of them by turns: [B, windows, kernel, ..., c]."""
    whole = [n // k for n, k in zip(x.shape[1:-1], kernel, strict=True)]
    x = x[tuple(slice(n * k) for n, k in zip([len(x), *whole], [1, *kernel], strict=True))]
    return x.reshape(len(x), *(s for pair in zip(whole, kernel, strict=True) for s in pair), x.shape[-1])


def _inside(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(2, 2 + 2 * len(kernel), 2))


def _largest(x: mx.array, kernel: tuple[int, ...]) -> mx.array:
    return _windows(x, kernel).max(axis=_inside(kernel))


def _shared(x: mx.array, dy: mx.array, kernel: tuple[int, ...]) -> mx.array:
    """Gradient of ``_largest``."""
    windows, inside = _windows(x, kernel), _inside(kernel)
    chosen = (windows == windows.max(axis=inside, keepdims=True)).astype(dy.dtype)
    part = mx.expand_dims(dy, inside) / chosen.sum(axis=inside, keepdims=True)
    whole = [n // k * k for n, k in zip(x.shape[1:-1], kernel, strict=True)]
    dx = (chosen * part).reshape(len(x), *whole, x.shape[-1])
    return mx.pad(dx, [(0, 0), *((0, n - w) for n, w in zip(x.shape[1:-1], whole, strict=True)), (0, 0)])


def _differentiable(kernel: tuple[int, ...], stream: Any) -> Callable[..., mx.array]:
    """``_largest`` whose gradient is the kernel's: MLX's would compute the maxima again, on one core."""
    pool = mx.custom_function(lambda x: _largest(x, kernel))

    @pool.vjp
    def gradient(x: mx.array, dy: mx.array, _: mx.array) -> mx.array:
        return _native.ext.max_pool_gradient(x, dy, list(kernel), stream)

    return cast(Callable[..., mx.array], pool)


@_native.reference("max_pool")
def _max_pool(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    with _on(stream):
        return [_differentiable(tuple(json.loads(parameters)["kernel"]), stream)(*arrays)]


@_native.reference("max_pool_gradient")
def _max_pool_gradient(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    with _on(stream):
        x, dy = arrays
        return [_shared(x, dy, tuple(json.loads(parameters)["kernel"]))]
