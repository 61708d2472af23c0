"""Statistics of the channels of a field: on the device in one pass, in float64 on the host where the device rounds."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..ops.tails import column_stats

Array = NDArray[Any]
Float64 = NDArray[np.float64]

_CHUNK_BYTES = 2 << 20  # what stays in a core's cache is read from memory once, copied or not
_HOST_BYTES = 4 << 20  # NumPy's calls cost more than a farther cache
_WIDE = 1024  # values in a row that NumPy goes along
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

    def channel(self, j: int) -> "ChannelStatistics":
        """One channel of several."""
        return ChannelStatistics(*(getattr(self, f.name)[j : j + 1] for f in fields(self)))


def _pooled(parts: list[ChannelStatistics], width: int) -> ChannelStatistics:
    """Statistics of parts that hold all channels one or several times; Chan, Golub and LeVeque (1979)."""
    joined = ([getattr(p, f.name).reshape(-1, width) for p in parts] for f in fields(ChannelStatistics))
    counts, means, m2, low, high, nans, infs = (np.concatenate([np.zeros((0, width)), *j]) for j in joined)
    count = counts.sum(0)
    mean = (means * (counts / np.maximum(count, 1))).sum(0)
    m2 = m2.sum(0) + (counts * (means - mean) ** 2).sum(0)
    extremes = low.min(0, initial=np.inf), high.max(0, initial=-np.inf)
    return ChannelStatistics(count, mean, m2, *extremes, nans.sum(0), infs.sum(0))


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


def pieces(a: Any, most: int = _CHUNK_BYTES) -> Iterator[slice]:
    """Rows in slices of some megabytes."""
    step = max(1, most // max(1, a.nbytes // max(1, len(a))))
    if step > _LANES:
        step -= step % _LANES
    for start in range(0, len(a), step):
        yield slice(start, min(start + step, len(a)))


def channel_statistics(
    a: Array, axis: int | None, device: mx.array | None = None, *, moments: bool = True
) -> ChannelStatistics:
    """Statistics of a numeric field.

    Args:
        a: ``[n, ...]``, real numbers.
        axis: Axis of one row along which channels run; None for one channel.
        device: The same as an MLX array, where there is one.
        moments: Whether mean and m2 are asked for. Without, NumPy arrays are read where they lie, which is quicker, and
            both may be NaN.

    Returns:
        ChannelStatistics: Of each channel. Moments of types that float32 holds come from the device, others are in
            float64.
    """
    if device is not None and device.dtype in (mx.float32, mx.float16, mx.bfloat16):
        found: Iterable[ChannelStatistics] = _on_device([device], axis)
    elif a.dtype == np.float16 or (moments and a.dtype.name in _EXACT):  # NumPy's own float16 is slow
        found = _on_device((_for_device(a[part]) for part in pieces(a)), axis)
    elif moments:
        found = (_of_columns(x, moments) for x in _matrices(a, axis, _HOST_BYTES))
    else:
        found = _extremes(_matrices(a, axis, _CHUNK_BYTES), channels(a, axis))
    return _pooled(list(found), channels(a, axis))


def neighbours(name: str, arrays: dict[str, Array]) -> tuple[list[str], Array] | None:
    """The columns that lie beside a column in memory, and the matrix that they are: a table made from one.

    Read one by one, each of them would draw all of the matrix through the cache.
    """
    first = arrays[name]
    if first.ndim != 1 or len(first) < 2 or first.strides[0] <= first.itemsize:
        return None
    width = first.strides[0]
    at = {
        _address(a): n
        for n, a in arrays.items()
        if a.ndim == 1 and (a.dtype, a.strides, len(a)) == (first.dtype, first.strides, len(first))
    }
    low = high = _address(first)
    at[low] = name
    while low - first.itemsize in at and high - low + first.itemsize < width:
        low -= first.itemsize
    while high + first.itemsize in at and high + first.itemsize - low < width:
        high += first.itemsize
    names = [at[place] for place in range(low, high + 1, first.itemsize)]
    shape, strides = (len(first), len(names)), (width, first.itemsize)
    return names, np.lib.stride_tricks.as_strided(arrays[names[0]], shape, strides, writeable=False)


def _address(a: Array) -> int:
    return int(a.__array_interface__["data"][0])


def _for_device(a: Array) -> mx.array:
    wide = a if a.dtype in (np.float32, np.float16) else a.astype(np.float32)
    return mx.array(np.ascontiguousarray(wide))  # of anything else MLX takes one number at a time


def _on_device(parts: Iterable[mx.array], axis: int | None) -> Iterator[ChannelStatistics]:
    """Statistics of each part; while one is read the next is copied."""
    before: Any = None
    for a in parts:
        x = laid_out(a, axis)
        if axis is None:
            whole = len(x) // _LANES * _LANES
            if whole < len(x):
                yield _of_columns(np.asarray(x[whole:].astype(mx.float32)), True)
            x = x[:whole].reshape(-1, _LANES)
        stats = column_stats(x)
        mx.async_eval(stats)
        if before is not None:
            yield _from_device(before)
        before = stats
    if before is not None:
        yield _from_device(before)


def _from_device(stats: Any) -> ChannelStatistics:
    mx.eval(stats)
    count, mean, m2, low, high, nans, infs, rest = (np.asarray(s, np.float64) for s in stats)
    return ChannelStatistics(count, mean + rest, m2, low, high, nans, infs)


def _matrices(a: Array, axis: int | None, most: int) -> Iterator[Array]:
    """Pieces of a field; NumPy is slow over short rows, so some rows stand beside each other in one."""
    width = channels(a, axis)
    rows = min(_LANES, max(1, _WIDE // width)) if width > 1 else 1
    for piece in pieces(a, most):
        x = laid_out(a[piece], axis)
        whole = len(x) // rows * rows
        if whole:
            yield np.ascontiguousarray(x[:whole]).reshape(-1, rows * width)
        if whole < len(x):
            yield x[whole:]


def _extremes(matrices: Iterable[Array], width: int) -> Iterator[ChannelStatistics]:
    """Least and largest values; where one is not finite there are others, and they are counted."""
    count, lows, highs = 0, [], []
    for x in matrices:
        with np.errstate(invalid="ignore"):
            low, high = np.minimum.reduce(x, 0), np.maximum.reduce(x, 0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            yield _of_columns(x, moments=False)
            continue
        count += x.size // width
        lows.append(low.reshape(-1, width).min(0))
        highs.append(high.reshape(-1, width).max(0))
    if count:
        none, unknown = np.zeros(width), np.full(width, np.nan)
        low, high = np.min(lows, 0).astype(np.float64), np.max(highs, 0).astype(np.float64)
        yield ChannelStatistics(none + count, unknown, unknown, low, high, none, none)


def _of_columns(x: Array, moments: bool) -> ChannelStatistics:
    n, width = x.shape
    nans, infs = np.zeros(width), np.zeros(width)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.minimum.reduce(x, 0), np.maximum.reduce(x, 0)
        clean = bool(np.isfinite(low).all() and np.isfinite(high).all())
        finite: Any = True
        if not clean:
            finite, nan = np.isfinite(x), np.isnan(x)
            nans, infs = nan.sum(0, dtype=np.float64), (n - finite.sum(0) - nan.sum(0)).astype(np.float64)
            low = np.minimum.reduce(x, 0, where=finite, initial=np.inf)
            high = np.maximum.reduce(x, 0, where=finite, initial=-np.inf)
        count = n - nans - infs
        mean = m2 = np.full(width, np.nan)
        if moments:
            wide = x.astype(np.float64)
            mean = np.sum(wide, 0, where=finite) / np.maximum(count, 1)
            m2 = np.sum(np.square(np.subtract(wide, mean, out=wide), out=wide), 0, where=finite)
    return ChannelStatistics(count, mean, m2, low.astype(np.float64), high.astype(np.float64), nans, infs)
