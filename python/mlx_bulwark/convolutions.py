"""A model's convolutions by `convolve`, which on the CPU takes a fraction of the time of MLX's own."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .ops.ghost import convolve


class _Convolved(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        layer: Any = self
        if x.dtype != layer.weight.dtype:  # MLX promotes one of them
            return mx.array(super().__call__(x))
        groups = getattr(layer, "groups", 1)
        how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": groups}
        return convolve(x, layer.weight, layer.get("bias"), **how)


class _Pooled(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        layer: Any = self
        sizes = layer._kernel_size
        tiles = sizes == layer._stride and not any(p[0] for p in layer._padding) and x.ndim == len(sizes) + 2
        if (
            mx.default_device() == mx.gpu
            or not tiles
            or x.size == 0
            or any(n % k for n, k in zip(x.shape[1:-1], sizes, strict=True))
        ):
            return mx.array(super().__call__(x))
        for axis, k in enumerate(sizes, start=1):  # each reads what lies side by side
            shape = (*x.shape[:axis], x.shape[axis] // k, *x.shape[axis + 1 :])
            x = x.reshape(-1, k, math.prod(shape[axis + 1 :])).max(axis=1).reshape(shape)
        return x


_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS: tuple[type[nn.Module], ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_FASTER = {
    t: type(t.__name__, (base, t), {})
    for base, types in ((_Convolved, _CONVOLUTIONS), (_Pooled, _POOLS))
    for t in types
}


@contextmanager
def faster_convolutions(model: Any) -> Iterator[None]:
    """Let the plain convolutions of a model run by ``convolve`` inside, and its max pools axis by axis.

    On the CPU a pass takes a fraction of the time, forward and backward; on Metal nothing changes. Where elements of a
    window tie, the gradient of a pool is shared otherwise. Certificates, attacks and ``training.fit`` do it on their
    own; in a loop of one's own it goes around the calls, or around what ``mx.compile`` traces.

    Args:
        model: ``nn.Module`` whose convolutions and max pools change their class inside, and change it back; a subclass
            of them keeps what it does. Anything else is left as it is.

    Returns:
        A context manager.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark import faster_convolutions
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
        >>> with faster_convolutions(model):
        ...     y = model(mx.ones((4, 5, 5, 1)))
        >>> y.shape
        (4, 3, 3, 2)

    Source:
        As of ``convolve``.
    """
    found = [m for m in model.modules() if type(m) in _FASTER] if isinstance(model, nn.Module) else []
    try:
        for m in found:
            m.__class__ = _FASTER[type(m)]
        yield
    finally:
        for m in found:
            m.__class__ = type(m).__mro__[2]
