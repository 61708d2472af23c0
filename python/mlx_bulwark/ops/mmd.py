"""Maximum mean discrepancy: whether two samples come from one distribution, without their kernel matrix in memory.

Values of the kernel come in tiles, from products of centred rows; a tile adds to the statistic and to that of every
permutation at once, as its product with a matrix of zeros and ones that tells which rows a permutation calls ``x``.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .. import _native
from .._native import Stream
from .neighbors import _largest, _power_of_two
from .noise import FLOATS, _on

NumpyArray = np.ndarray[Any, np.dtype[Any]]

_TILE = 512  # rows of a tile of the reference
_DIFFERENCES = 1 << 22  # that the reference has in memory at once
_SAMPLE = 1000  # rows whose distances give the bandwidth
_LOSS = 2.0**-10  # of a binary logarithm: above, distances of near rows are computed again in subtracted form
_TIES = 4e-6  # of the mean of the kernel, over the root of the rows: nearer statistics are equal up to rounding


class MMD(NamedTuple):
    """How far two samples are apart.

    Attributes:
        statistic: The unbiased estimate of the squared maximum mean discrepancy; around 0, and below it as often as
            above, where both samples come from one distribution.
        p_value: How often rows that are dealt anew are as far apart, (1 + those) / (1 + permutations); None without
            permutations.
        bandwidths: Of the kernels that were summed, in the unit of the data.
        permuted: ``[permutations]``, float64: the statistic of each permutation.
    """

    statistic: float
    p_value: float | None
    bandwidths: tuple[float, ...]
    permuted: NumpyArray


def mmd(
    x: mx.array,
    y: mx.array,
    *,
    bandwidth: float | Sequence[float] | None = None,
    permutations: int = 0,
    seed: int = 0,
    stream: Stream = None,
) -> MMD:
    """The squared maximum mean discrepancy of two samples by Gaussian kernels, and its permutation test.

    The kernel of two rows at the distance D is the sum of ``exp(-D^2 / (2 bandwidth^2))`` over the bandwidths. Its
    values are never in memory as a whole; beside the rows, a permutation takes a bit a row. The result does not depend
    on the number of threads, and is there when the function returns: it is not differentiable.

    Under the null hypothesis the p-value is at most ``a`` with a probability of at most ``a``. Rows must be drawn
    independently of each other: rows of a time series, or several of one source, make it too small.

    Args:
        x: ``[n, d]``, float32, float16 or bfloat16; 2 rows or more.
        y: ``[m, d]``, the same.
        bandwidth: One or several, positive, in the unit of the data; by default the median of the distances between
            1,000 rows of both samples, those that are 0 left out where it would be 0.
        permutations: Number of random permutations; without them there is no p-value.
        seed: Of the permutations, and of the rows that give the bandwidth.
        stream: Stream or device.

    Returns:
        MMD: Statistic, p-value, bandwidths, and the statistics of the permutations.

    Raises:
        ValueError: A shape, dtype or number is not as above, or a value is NaN or infinite.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> x = mx.random.normal((200, 3), key=mx.random.key(0))
        >>> y = mx.random.normal((300, 3), key=mx.random.key(1))
        >>> bw.mmd(x, y, permutations=99).p_value > 0.05
        True
        >>> bw.mmd(x, y + 0.5, permutations=99).p_value
        0.01

    Source:
        Gretton, Borgwardt, Rasch, Schoelkopf and Smola, "A Kernel Two-Sample Test" (JMLR 2012), the unbiased estimate,
        the median heuristic; Phipson and Smyth, "Permutation P-values Should Never Be Zero" (2010).
    """
    _check(x, y, permutations)
    given = _given(bandwidth)
    few, many = (x, y) if len(x) <= len(y) else (y, x)
    n, m = len(few), len(many)
    generator = np.random.default_rng(seed)
    with _on(stream):
        pooled = mx.concatenate([few.astype(mx.float32), many.astype(mx.float32)])
        rows, bandwidths, rates = _prepared(pooled, given, generator)
        words = mx.array(_assignments(n, n + m, permutations, generator))
    sums = _sums(rows, words, n, permutations, rates, stream)
    statistic, permuted, mean = _statistics(np.array(sums).astype(np.float64).sum(0), n, m)
    p = (1 + int((permuted >= statistic - _TIES * mean / math.sqrt(n + m)).sum())) / (1 + permutations)
    return MMD(statistic, p if permutations else None, bandwidths, permuted)


def mmd_reference(rows: mx.array, words: mx.array, n: int, permutations: int, rates: list[float]) -> mx.array:
    """Sums of kernels over rows that are prepared, in plain MLX ops, tile by tile.

    ``[2, 3 + 2 permutations]``, float32, sums and what their rounding lost: over the first n rows, between these and
    the others, and over the others; then of each permutation over its rows, and between these and all.
    """
    half = 0.5 * rows.square().sum(axis=1)
    exact = not _products_suffice(float(mx.max(half)), rows.shape[1], max(rates))
    starts = [*range(0, n, _TILE), *range(n, len(rows), _TILE)]
    blocks = [(i, min(i + _TILE, n if i < n else len(rows))) for i in starts]
    total = lost = mx.zeros(3 + 2 * permutations)
    for a, (i, i_end) in enumerate(blocks):
        mine = _unpacked(words[i:i_end], permutations)
        for j, j_end in blocks[a:]:
            if exact:
                exponent = -0.5 * _sq_distances(rows[i:i_end], rows[j:j_end])
            else:
                exponent = rows[i:i_end] @ rows[j:j_end].T - half[i:i_end, None] - half[j:j_end]
                exponent = mx.minimum(exponent, mx.array(0.0))
            kernel = mx.zeros_like(exponent)
            for rate in rates:
                kernel = kernel + mx.exp(exponent * (math.log(2) * rate))
            if i == j:
                kernel = mx.where(mx.eye(i_end - i, dtype=mx.bool_), mx.array(0.0), kernel)
            product = kernel @ _unpacked(words[j:j_end], permutations)
            by_row = kernel.sum(axis=1)
            times = 1.0 if i == j else 2.0
            group = (i >= n) + (j >= n)
            parts = mx.where(mx.arange(3) == group, by_row.sum() * (1.0 if group == 1 else times), mx.array(0.0))
            inside = times * (mine * product).sum(axis=0)
            across = by_row @ mine + (product.sum(axis=0) if i != j else mx.array(0.0))
            total, lost = _added(total, lost, mx.concatenate([parts, inside, across]))
            mx.eval(total, lost)
    return mx.stack([total, lost])


@_native.reference("mmd")
def _(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    given = json.loads(parameters)
    with _on(stream):
        return [mmd_reference(arrays[0], arrays[1], given["n"], given["permutations"], given["rates"])]


def _sums(rows: mx.array, words: mx.array, n: int, permutations: int, rates: list[float], stream: Stream) -> mx.array:
    if _native.runs_native(stream):
        return _native.ext.mmd(rows, words, n, permutations, rates, stream)
    with _on(stream):
        return mmd_reference(rows, words, n, permutations, rates)


def _prepared(
    rows: mx.array, bandwidths: tuple[float, ...] | None, generator: np.random.Generator
) -> tuple[mx.array, tuple[float, ...], list[float]]:
    """Rows around 0 and near 1, the bandwidths, and of each what to multiply half a squared distance of such rows by.

    Neither the power of two nor the centre, a multiple of the unit of the largest values, costs a digit: rows that are
    near each other and far from the others keep their distance.
    """
    scale = _power_of_two(_largest(rows))
    rows = rows * scale
    rows = rows - mx.round(rows.mean(axis=0) * 2.0**23) * 2.0**-23
    unit = 1 / float(scale)
    if bandwidths is None:
        chosen = np.sort(generator.permutation(len(rows))[:_SAMPLE]).astype(np.uint32)
        bandwidths = (_median_distance(np.array(rows[mx.array(chosen)]).astype(np.float64)) * unit,)
    rates = [math.log2(math.e) / max(b / unit, 1e-15) ** 2 for b in bandwidths]
    return rows, bandwidths, rates


def _median_distance(rows: NumpyArray) -> float:
    half = 0.5 * np.square(rows).sum(1)
    squares = (half[:, None] + half - rows @ rows.T)[~np.tri(len(rows), dtype=bool)]
    same = squares <= 0.5e-12 * half.max()
    if 2 * np.count_nonzero(same) >= len(squares):  # the median is 0
        squares = squares[~same]
        return math.sqrt(2 * float(np.median(squares))) if len(squares) else 1.0
    squares[same] = 0.0
    return math.sqrt(2 * float(np.median(squares)))


def _assignments(n: int, rows: int, permutations: int, generator: np.random.Generator) -> NumpyArray:
    """``[rows, words]``, uint32: bit b of a row tells whether it is among the n of permutation b."""
    words = np.zeros((math.ceil(permutations / 32), rows), np.uint32)
    for b in range(permutations):
        words[b // 32, generator.choice(rows, n, replace=False, shuffle=False)] |= np.uint32(1 << b % 32)
    return np.ascontiguousarray(words.T)


def _statistics(sums: NumpyArray, n: int, m: int) -> tuple[float, NumpyArray, float]:
    """The statistic, that of each permutation, and the mean of the kernel."""
    permutations = (len(sums) - 3) // 2
    inside, across = sums[3 : 3 + permutations], sums[3 + permutations :]
    whole = sums[0] + 2 * sums[1] + sums[2]

    def unbiased(within: Any, between: Any, others: Any) -> Any:
        return within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * between / (n * m)

    permuted = unbiased(inside, across - inside, whole - 2 * across + inside)
    return float(unbiased(*sums[:3])), permuted, whole / ((n + m) * (n + m - 1))


def _products_suffice(half: float, d: int, rate: float) -> bool:
    """Whether products of rows, of at most this half square, are right to what is asked of a power of two."""
    return 2 * half * (math.sqrt(d) + 8) * 2.0**-23 * rate <= _LOSS


def _sq_distances(x: mx.array, y: mx.array) -> mx.array:
    step = max(1, _DIFFERENCES // (len(y) * y.shape[1]))
    return mx.concatenate([(x[i : i + step, None] - y).square().sum(axis=-1) for i in range(0, len(x), step)])


def _unpacked(words: mx.array, permutations: int) -> mx.array:
    """Bits as zeros and ones, ``[rows, permutations]``."""
    if not permutations:
        return mx.zeros((len(words), 0))
    ones = mx.right_shift(words[:, :, None], mx.arange(32, dtype=mx.uint32)) % 2
    return ones.reshape(len(words), -1)[:, :permutations].astype(mx.float32)


def _added(total: mx.array, lost: mx.array, more: mx.array) -> tuple[mx.array, mx.array]:
    new = total + more
    part = new - total
    return new, lost + ((total - (new - part)) + (more - part))


def _given(bandwidth: float | Iterable[float] | None) -> tuple[float, ...] | None:
    if bandwidth is None:
        return None
    bandwidths = tuple(float(b) for b in (bandwidth if isinstance(bandwidth, Iterable) else [bandwidth]))
    if not bandwidths or not all(b > 0 and math.isfinite(b) for b in bandwidths):
        raise ValueError(f"[mmd] bandwidth must be positive, one or several, but is {bandwidth!r}")
    return bandwidths


def _check(x: mx.array, y: mx.array, permutations: int) -> None:
    for name, a in (("x", x), ("y", y)):
        if a.ndim != 2 or a.dtype not in FLOATS or len(a) < 2 or a.shape[1] < 1:
            raise ValueError(
                f"[mmd] {name} must have shape [n, d], of 2 rows or more, and dtype float32, float16 or bfloat16 "
                f"but has shape {list(a.shape)} and dtype {a.dtype}"
            )
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"[mmd] y must have {x.shape[1]} columns, as x has, but has {y.shape[1]}")
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 0:
        raise ValueError(f"[mmd] permutations must be a number from 0 on but is {permutations!r}")
    for name, a in (("x", x), ("y", y)):
        bad = np.flatnonzero(~np.array(mx.isfinite(a).all(axis=1)))
        if len(bad):
            raise ValueError(f"[mmd] {name} must be finite but {len(bad)} of its rows are not, row {bad[0]} first")
