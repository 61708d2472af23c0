"""Nearest neighbours: distances and the k smallest of them fused, so that no n x m matrix stands in memory.

Candidates come from products of centred rows; what is returned is computed again from the rows themselves in
subtracted form, so that near-duplicates are right to float32, and no true neighbour is lost to the rounding of a
product. Neighbours are ordered by the distance that is returned; ties go to the lower index.
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .. import _native
from .._native import Stream
from .noise import FLOATS, _on

METRICS = ("euclidean", "sqeuclidean", "cosine", "inner_product")
MOST_NEIGHBORS = 1024

_TILE = 1 << 22  # differences that the reference has in memory at once
_CHUNK_BYTES = 64 << 20  # of a NumPy array that is streamed
_FAR = 3.2e38  # a key of nobody
_NOBODY = (0x7FFFFFFF << 32) + 0x7FFFFFFF  # sorts behind every neighbour

NumpyArray = np.ndarray[Any, np.dtype[Any]]
Chunk = mx.array | NumpyArray


class Neighbors(NamedTuple):
    """The nearest rows of y, of every row of x.

    Attributes:
        distances: ``[n, k]``, float32, the nearest first.
        indices: ``[n, k]``, int32, into the rows of y.
    """

    distances: mx.array
    indices: mx.array


def knn(
    x: mx.array,
    y: Chunk | Iterable[Chunk] | None = None,
    k: int = 5,
    metric: str = "euclidean",
    *,
    exclude: mx.array | None = None,
    stream: Stream = None,
) -> Neighbors:
    """The k nearest rows of y, of every row of x.

    Neighbours are ordered by the distance that is returned, and ties go to the lower index, whatever the backend, the
    number of threads, and the chunks of y. A row that holds NaN or infinity is nobody's neighbour, and its own
    neighbours are -1 at a distance of NaN; so is what is left where a row has fewer than k neighbours. The cosine
    distance of a row of zeros is 1. Squared distances and products beyond the range of float32 are infinite, and tie.

    A NumPy array or memory map, and an iterable of chunks, is streamed: y is never in memory as a whole, and the
    result, which equals that of the whole, is computed when the function returns. Elements of float64 are rounded to
    float32.

    Args:
        x: ``[n, d]``, float32, float16 or bfloat16.
        y: ``[m, d]``, float32, float16 or bfloat16; by default ``x``, whose rows are then no neighbours of themselves.
            Or a NumPy array, such as ``np.load(file, mmap_mode="r")``, or an iterable of arrays ``[m_i, d]``.
        k: Neighbours a row, 1 to 1024 and at most as many as there are.
        metric: ``"euclidean"``, ``"sqeuclidean"``, ``"cosine"`` (1 - cosine of the angle) or ``"inner_product"``, where
            the largest product comes first and is returned as the distance.
        exclude: ``[n]``, int32: for each row of x the row of y that is not its neighbour, or -1. Only with ``y``.
        stream: Stream or device.

    Returns:
        Neighbors: Distances, differentiable in ``x`` and ``y``, and indices.

    Raises:
        ValueError: A shape, dtype, ``k`` or ``metric`` is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> x = mx.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [9.0, 9.0]])
        >>> distances, indices = bw.knn(x, k=1)
        >>> indices.flatten().tolist()
        [2, 2, 0, 1]
        >>> bw.knn(mx.array([[0.0, 2.0]]), x, k=2, metric="sqeuclidean").distances
        array([[1, 4]], dtype=float32)

    Source:
        Johnson, Douze and Jegou, "Billion-scale similarity search with GPUs" (2017), for exact search by products and
        selection in tiles.
    """
    _check(x, k, metric)
    n = x.shape[0]
    if y is None:
        if exclude is not None:
            raise ValueError("[knn] exclude must be given with y but y is None: rows of x then exclude themselves")
        _check_count(n, k, n - 1)
        return _knn([x], k, metric, stream)
    excluded = [] if exclude is None else [_excluded(exclude, n, stream)]
    if not isinstance(y, mx.array):
        return _streamed(x, y, k, metric, excluded, stream)
    _check_y(y, x.shape[1])
    _check_count(n, k, y.shape[0])
    return _knn([x, y, *excluded], k, metric, stream)


def knn_reference(arrays: list[mx.array], k: int, metric: str) -> Neighbors:
    """``knn`` of [x], [x, y] or [x, y, exclude] in plain MLX ops, tile by tile in subtracted form."""
    x, y, exclude = arrays[0], arrays[min(1, len(arrays) - 1)], arrays[2] if len(arrays) == 3 else None
    if len(arrays) == 1:
        exclude = mx.arange(x.shape[0], dtype=mx.int32)
    if x.shape[0] == 0:
        return Neighbors(mx.zeros((0, k)), mx.zeros((0, k), mx.int32))
    u, v, unit = _prepared(x.astype(mx.float32), y.astype(mx.float32), metric)
    valid = [mx.stop_gradient(mx.isfinite(a).all(axis=1)) for a in (x, y)]
    columns = max(1, min(y.shape[0], 1024, _TILE // max(1, x.shape[1])))
    rows = max(1, min(x.shape[0], _TILE // (columns * max(1, x.shape[1]))))
    distances, indices = [], []
    for i in range(0, x.shape[0], rows):
        part = u[i : i + rows]
        best = mx.full((part.shape[0], k), _NOBODY, mx.int64)
        for j in range(0, y.shape[0], columns):
            other = v[j : j + columns]
            found = mx.stop_gradient(_distances(part[:, None], other[None], unit, metric))
            index = mx.arange(j, j + other.shape[0], dtype=mx.int32)
            # not by `&`: where one side is batched alone, vmap gets it wrong
            mine = mx.logical_and(valid[0][i : i + rows, None], valid[1][j : j + columns])
            if exclude is not None:
                mine = mx.logical_and(mine, index != exclude[i : i + rows, None])
            best = _nearest(mx.concatenate([best, _keys(found, index, mine, metric)], axis=1), k)
        _, index = _decoded(best, metric)
        again = _distances(part[:, None], v[mx.maximum(index, 0)], unit, metric)
        distances.append(mx.where(index < 0, mx.array(float("nan")), again))
        indices.append(index)
    return Neighbors(mx.concatenate(distances), mx.concatenate(indices))


@_native.reference("knn")
def _(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    given = json.loads(parameters)
    with _on(stream):
        return list(knn_reference(arrays[: given["inputs"]], given["k"], given["metric"]))


def _knn(arrays: list[mx.array], k: int, metric: str, stream: Stream) -> Neighbors:
    if _native.runs_native(stream):
        prepared = _for_metal(arrays, metric, stream) if _native.ext.on_metal(stream) else []
        return Neighbors(*_native.ext.knn(arrays, prepared, k, metric, stream))
    with _on(stream):
        return knn_reference(arrays, k, metric)


def _for_metal(arrays: list[mx.array], metric: str, stream: Stream) -> list[mx.array]:
    """What the kernels read: rows near 1 and the same centred, and bounds of the rounding of their products."""
    with _on(stream):
        x, y = (mx.stop_gradient(arrays[i].astype(mx.float32)) for i in (0, min(1, len(arrays) - 1)))
        u, v, unit = _prepared(x, y, metric)
        valid = [mx.isfinite(a).all(axis=1, keepdims=True) for a in (x, y)]
        u, v = (mx.where(ok, a, mx.array(0.0)) for ok, a in zip(valid, (u, v), strict=True))
        center = v.sum(axis=0) / mx.maximum(valid[1].astype(mx.float32).sum(), mx.array(1.0))
        product = metric == "inner_product"
        s, t = u if product else u - center, v - center
        rounding = (x.shape[1] + 32) * 2.0**-23
        halves = [0.5 * a.square().sum(axis=1) for a in (s, t)]
        lengths = [mx.sqrt(2 * h) * (1 + rounding) for h in halves]
        if metric == "cosine":
            halves = [h + 0.5 * (a == 0).all(axis=1) for h, a in zip(halves, (u, v), strict=True)]
        constant = -(u * center).sum(axis=1) if product else halves[0]
        low = mx.zeros_like(halves[1]) if product else halves[1] * (1 - 2 * rounding)
        constant, low = (
            mx.where(ok.squeeze(1), a, mx.array(_FAR)) for ok, a in zip(valid, (constant, low - 1e-30), strict=True)
        )
        itself = [mx.arange(x.shape[0], dtype=mx.int32)] if len(arrays) == 1 else []
        return [u, v, s, t, rounding * lengths[0], constant, lengths[1], low, unit.reshape(1), *itself]


def _prepared(x: mx.array, y: mx.array, metric: str) -> tuple[mx.array, mx.array, mx.array]:
    """Rows whose distances neither overflow nor vanish, and what to multiply them by; unit rows for the cosine."""
    if metric == "cosine":
        return _unit_rows(x), _unit_rows(y), mx.array(1.0)
    largest = mx.maximum(_largest(x), _largest(y))
    scale = _power_of_two(largest)
    return x * scale, y * scale, 1 / scale


def _largest(x: mx.array, **axis: Any) -> mx.array:
    if x.size == 0:
        return mx.zeros((x.shape[0], 1) if axis else ())
    x = mx.stop_gradient(x)
    return mx.where(mx.isfinite(x), mx.abs(x), mx.array(0.0)).max(**axis)


def _power_of_two(largest: mx.array) -> mx.array:
    """What brings a magnitude near 1, exactly."""
    exponent = mx.floor(mx.log2(mx.where(largest > 0, largest, mx.array(1.0))))
    return mx.power(mx.array(2.0), -mx.clip(exponent, -126.0, 126.0))


def _unit_rows(x: mx.array) -> mx.array:
    x = x * _power_of_two(_largest(x, axis=1, keepdims=True))
    squares = x.square().sum(axis=1, keepdims=True)
    return x * mx.where(squares > 0, mx.rsqrt(mx.where(squares > 0, squares, mx.array(1.0))), mx.array(0.0))


def _distances(x: mx.array, y: mx.array, unit: mx.array, metric: str) -> mx.array:
    """Between rows, the last axis, of what ``_prepared`` returned."""
    if metric == "inner_product":
        return (x * y).sum(axis=-1) * unit * unit
    squares = (x - y).square().sum(axis=-1)
    if metric == "cosine":
        zero = [mx.stop_gradient((a == 0).all(axis=-1)).astype(mx.float32) for a in (x, y)]
        return 0.5 * (squares + zero[0] + zero[1])
    if metric == "sqeuclidean":
        return squares * unit * unit
    apart = squares > 0  # the root has no derivative at 0: there it is 0
    return mx.where(apart, mx.sqrt(mx.where(apart, squares, mx.array(1.0))), mx.array(0.0)) * unit


# A neighbour is an integer: its distance as sortable bits above, its index below. The smallest is the nearest, and of
# equal distances the one with the lowest index.


def _keys(distances: mx.array, indices: mx.array, valid: mx.array, metric: str) -> mx.array:
    value = -distances if metric == "inner_product" else distances
    bits = (value + 0.0).view(mx.int32)  # no negative zero
    bits = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    return mx.where(valid, (bits << 32) + indices.astype(mx.int64), mx.array(_NOBODY, mx.int64))


def _nearest(keys: mx.array, k: int) -> mx.array:
    if keys.shape[1] > k:
        keys = mx.partition(keys, k - 1, axis=1)[:, :k]
    return mx.sort(keys, axis=1)


def _decoded(keys: mx.array, metric: str) -> Neighbors:
    nobody = keys == _NOBODY
    bits = (keys >> 32).astype(mx.int32)
    distances = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(mx.float32)
    distances = -distances if metric == "inner_product" else distances
    indices = (keys & 0x7FFFFFFF).astype(mx.int32)
    return Neighbors(
        mx.where(nobody, mx.array(float("nan")), distances + 0.0), mx.where(nobody, mx.array(-1, mx.int32), indices)
    )


def _streamed(
    x: mx.array, y: NumpyArray | Iterable[Chunk], k: int, metric: str, exclude: list[mx.array], stream: Stream
) -> Neighbors:
    """The nearest of each chunk, merged with those of the chunks before."""
    n, seen = x.shape[0], 0
    with _on(stream):
        best = mx.full((n, k), _NOBODY, mx.int64)
        for chunk in _chunks(y):
            _check_y(chunk, x.shape[1])
            rows = chunk.shape[0]
            if rows and n:
                own = [mx.where((e >= seen) & (e < seen + rows), e - seen, -1) for e in exclude]
                found = _knn([x, chunk, *own], min(k, rows), metric, stream)
                keys = _keys(found.distances, found.indices + seen, found.indices >= 0, metric)
                best = _nearest(mx.concatenate([best, keys], axis=1), k)
                mx.eval(best)
            seen += rows
        _check_count(n, k, seen)
        return _decoded(best, metric)


def _chunks(y: NumpyArray | Iterable[Chunk]) -> Iterator[mx.array]:
    if isinstance(y, np.ndarray):
        step = max(1, _CHUNK_BYTES // max(1, math.prod(y.shape[1:]) * 4))
        y = [y] if y.ndim < 2 else [y[i : i + step] for i in range(0, len(y), step)]
    for chunk in y:
        if isinstance(chunk, np.ndarray):
            if chunk.dtype.kind != "f":
                raise ValueError(f"[knn] y must be of floats but has dtype {chunk.dtype}")
            chunk = mx.array(np.ascontiguousarray(chunk, np.float16 if chunk.dtype == np.float16 else np.float32))
        yield chunk


def _check(x: mx.array, k: int, metric: str) -> None:
    if x.ndim != 2 or x.dtype not in FLOATS:
        raise ValueError(
            f"[knn] x must have shape [n, d] and dtype float32, float16 or bfloat16 "
            f"but has shape {list(x.shape)} and dtype {x.dtype}"
        )
    if metric not in METRICS:
        raise ValueError(f"[knn] metric must be one of {', '.join(METRICS)} but is {metric!r}")
    if not 1 <= k <= MOST_NEIGHBORS:
        raise ValueError(f"[knn] k must be from 1 to {MOST_NEIGHBORS} but is {k}")


def _check_y(y: mx.array, width: int) -> None:
    if y.ndim != 2 or y.shape[1] != width or y.dtype not in FLOATS:
        raise ValueError(
            f"[knn] y must have shape [m, {width}] and dtype float32, float16 or bfloat16 "
            f"but has shape {list(y.shape)} and dtype {y.dtype}"
        )


def _check_count(n: int, k: int, most: int) -> None:
    if n and k > most:
        raise ValueError(f"[knn] k must be at most the {most} rows that can be neighbours but is {k}")


def _excluded(exclude: mx.array, n: int, stream: Stream) -> mx.array:
    if exclude.shape != (n,) or not mx.issubdtype(exclude.dtype, mx.integer):
        raise ValueError(
            f"[knn] exclude must have shape [{n}] and an integer dtype "
            f"but has shape {list(exclude.shape)} and dtype {exclude.dtype}"
        )
    with _on(stream):
        return exclude.astype(mx.int32)
