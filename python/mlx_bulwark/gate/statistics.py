"""Statistics of the channels of a field: on the device in one pass, in float64 on the host where the device rounds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..ops.tails import column_stats

Array = NDArray[Any]
Float64 = NDArray[np.float64]

CHUNK_BYTES = 8 << 20  # what fits a cache is read once
_LANES = 64  # a single channel is laid out in so many columns, which all threads share
_EXACT = ("float32", "float16", "uint8", "int8", "uint16", "int16", "bool")  # in float32


@dataclass
class ChannelStatistics:
    """Statistics of channels, float64 ``[c]``; only finite values count but for ``nans`` and ``infs``."""

    count: Float64
    mean: Float64
    m2: Float64
    minimum: Float64
    maximum: Float64
    nans: Float64
    infs: Float64

    @property
    def std(self) -> Float64:
        """Standard deviation, with n - 1."""
        return np.asarray(np.sqrt(self.m2 / np.maximum(self.count - 1, 1)))

    def merged(self, other: "ChannelStatistics") -> "ChannelStatistics":
        """Statistics of both; Chan, Golub and LeVeque (1979)."""
        count = self.count + other.count
        weight = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        return ChannelStatistics(
            count,
            self.mean + weight * delta,
            self.m2 + other.m2 + delta**2 * self.count * weight,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            self.nans + other.nans,
            self.infs + other.infs,
        )

    def together(self) -> "ChannelStatistics":
        """All channels as one."""
        total = ChannelStatistics(*(np.zeros(1) for _ in range(7)))
        total.minimum, total.maximum = np.full(1, np.inf), np.full(1, -np.inf)
        total.count, total.nans, total.infs = (a.sum(keepdims=True) for a in (self.count, self.nans, self.infs))
        if len(self.count):
            share = self.count / max(total.count[0], 1)
            total.mean = (self.mean * share).sum(keepdims=True)
            total.m2 = (self.m2 + self.count * (self.mean - total.mean) ** 2).sum(keepdims=True)
            total.minimum, total.maximum = self.minimum.min(keepdims=True), self.maximum.max(keepdims=True)
        return total


def channels(a: Array, axis: int | None) -> int:
    """How many channels a field has."""
    return 1 if axis is None else int(a.shape[axis + 1])


def laid_out(a: Any, axis: int | None) -> Any:
    """Rows as a matrix ``[values, channels]``; one channel is a column. NumPy or MLX."""
    if axis is None:
        return a.reshape(-1, 1)
    if axis != a.ndim - 2:
        a = (mx if isinstance(a, mx.array) else np).moveaxis(a, axis + 1, -1)
    return a.reshape(-1, a.shape[-1])


def by_row(a: Any, rows: int) -> Any:
    """All values of a row beside each other, also where there are none."""
    return a.reshape(rows, a.size // max(1, rows))


def pieces(a: Any) -> Iterator[slice]:
    """Rows in slices of some megabytes."""
    step = max(1, CHUNK_BYTES // max(1, a.nbytes // max(1, len(a))))
    for start in range(0, len(a), step):
        yield slice(start, min(start + step, len(a)))


def channel_statistics(a: Array, axis: int | None, device: mx.array | None = None) -> ChannelStatistics:
    """Statistics of a numeric field.

    Args:
        a: ``[n, ...]``, real numbers.
        axis: Axis of one row along which channels run; None for one channel.
        device: The same as an MLX array, where there is one.

    Returns:
        ChannelStatistics: Of each channel. Types that float32 holds are read on the device, others in float64.
    """
    exact = a.dtype.name in _EXACT
    total: ChannelStatistics | None = None
    if exact and device is not None and device.dtype in (mx.float32, mx.float16, mx.bfloat16):
        return _on_device(device, axis)
    for part in pieces(a):
        stats = _on_device(_for_device(a[part]), axis) if exact else _on_host(a[part], axis)
        total = stats if total is None else total.merged(stats)
    return total if total is not None else _empty(channels(a, axis))


def _for_device(a: Array) -> mx.array:
    return mx.array(a if a.dtype in (np.float32, np.float16) else a.astype(np.float32))


def _on_device(a: mx.array, axis: int | None) -> ChannelStatistics:
    x = laid_out(a, axis)
    if x.shape[1] > 1:
        return _from_device(column_stats(x))
    whole = len(x) // _LANES * _LANES
    parts = [column_stats(x[:whole].reshape(-1, _LANES)), column_stats(x[whole:])]
    mx.eval(parts)
    head, tail = (_from_device(p).together() for p in parts)
    return head.merged(tail)


def _from_device(stats: Any) -> ChannelStatistics:
    mx.eval(stats)
    count, mean, m2, low, high, nans, infs, rest = (np.asarray(s, np.float64) for s in stats)
    return ChannelStatistics(count, mean + rest, m2, low, high, nans, infs)


def _on_host(a: Array, axis: int | None) -> ChannelStatistics:
    x = laid_out(a, axis).astype(np.float64)
    if not len(x):
        return _empty(x.shape[1])
    finite, nan = np.isfinite(x), np.isnan(x)
    count = finite.sum(0).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.where(finite, x, 0).sum(0) / np.maximum(count, 1)
        m2 = (np.where(finite, x - mean, 0) ** 2).sum(0)
    nans = nan.sum(0).astype(np.float64)
    low, high = np.where(finite, x, np.inf).min(0), np.where(finite, x, -np.inf).max(0)
    return ChannelStatistics(count, mean, m2, low, high, nans, len(x) - count - nans)


def _empty(width: int) -> ChannelStatistics:
    zeros = np.zeros(width)
    return ChannelStatistics(zeros, zeros, zeros, np.full(width, np.inf), np.full(width, -np.inf), zeros, zeros)
