"""Scores by columns: statistics, frozen quantiles and histograms, and the distances that start from them.

Higher is more abnormal everywhere. Tables are frozen: what a row scores never depends on the rows beside it.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from .. import _native
from .._native import Stream
from .clip import _row_sums
from .noise import FLOATS, _on

METHODS = ("ecod", "copod")
AGGREGATIONS = ("per_feature", "paper")
MAD_SCALE = 1.4826022185056018  # 1 / Phi^-1(3/4): a normal column's MAD times this is its standard deviation
MOST_SOLVED = 224  # columns that the Metal kernel of mahalanobis holds
_KINDS = (*METHODS, "paper", "sides")  # in the order of the native enum
OVERSAMPLING = 8  # directions that spectral_scores follows beyond those that it is asked for
# `&` and `|` of a mapped and an unmapped array are wrong under vmap in MLX; logical_and and logical_or are not.
_RUN = 32  # MLX adds float32 in sequence on the CPU: the reference splits longer sums


class ColumnStats(NamedTuple):
    """Statistics of columns; those of a column without finite values are 0, 0, 0, infinity and -infinity.

    Attributes:
        count: ``[d]``, int32: how many values are finite. Only they count below.
        mean: ``[d]``, float32.
        m2: ``[d]``, float32: sum of squared differences from the mean; over ``count`` it is the variance.
        minimum: ``[d]``, float32.
        maximum: ``[d]``, float32.
        nans: ``[d]``, int32: how many values are NaN.
        infs: ``[d]``, int32: how many values are infinite.
        mean_rest: ``[d]``, float32: what rounding took from the mean; ``mean + mean_rest`` in float64 is good to
            1e-12 of the mean and 1e-7 of the spread around it.
    """

    count: mx.array  # type: ignore[assignment]  # hides the method of tuples
    mean: mx.array
    m2: mx.array
    minimum: mx.array
    maximum: mx.array
    nans: mx.array
    infs: mx.array
    mean_rest: mx.array


class QuantileTable(NamedTuple):
    """The columns of a reference set, sorted: an empirical distribution for each.

    Attributes:
        values: ``[d, b]``, float32, ascending; NaN stand last, and nothing counts them.
        counts: ``[d]``, int32: how many values of the column are not NaN.
        skewness: ``[d]``, float32, of the finite values; 0 where they are all equal.
        ranks: ``[d, b]``, int32: where each value stands in its sorted column, counted from 0; None where all are kept.
    """

    values: mx.array
    counts: mx.array
    skewness: mx.array
    ranks: mx.array | None = None


class HistogramTable(NamedTuple):
    """A histogram of bins of equal width for every column.

    Attributes:
        edges: ``[d, bins + 1]``, float32, ascending.
        counts: ``[d, bins]``, int32: finite values of the reference set in each bin; the last bin holds its right edge.
        scores: ``[d, bins]``, float32: ``-log2(density + alpha)``.
        widths: ``[d]``, float32: width of the bins.
    """

    edges: mx.array
    counts: mx.array
    scores: mx.array
    widths: mx.array


class RobustScale(NamedTuple):
    """Where the middle of each column is, and how far values are from it.

    Attributes:
        center: ``[d]``, float32: the median.
        scale: ``[d]``, float32: 1.4826 times the median absolute deviation from the median.
    """

    center: mx.array
    scale: mx.array


def column_stats(x: mx.array, *, stream: Stream = None) -> ColumnStats:
    """Count, mean, M2, minimum and maximum of the finite values of every column, and how many are not, in one pass.

    Mean and M2 are those of float64 to the rounding of float32, also far from 0: differences are taken from means of
    short blocks, and blocks are put together in float64 (on a GPU in pairs of float32).

    Args:
        x: ``[n, d]``, float32, float16 or bfloat16; n below 2^31.
        stream: Stream or device.

    Returns:
        ColumnStats: Arrays ``[d]``; ``merge_column_stats`` puts those of several chunks together.

    Raises:
        ValueError: ``x`` is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> stats = bw.column_stats(mx.array([[1.0, 5.0], [2.0, float("nan")], [6.0, 7.0]]))
        >>> stats.count.tolist(), stats.mean.tolist(), stats.m2.tolist(), stats.nans.tolist()
        ([3, 2], [3.0, 6.0], [14.0, 2.0], [0, 1])

    Source:
        Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979).
    """
    _check_rows("column_stats", x)
    if _native.runs_native(stream):
        return ColumnStats(*_native.ext.column_stats(x, stream))
    return column_stats_reference(x, stream=stream)


def column_stats_reference(x: mx.array, *, stream: Stream = None) -> ColumnStats:
    """The same as ``column_stats`` in plain MLX ops."""
    with _on(stream):
        x = x.astype(mx.float32)
        finite, nan = mx.isfinite(x), mx.isnan(x)
        count = _count(finite)
        share = 1 / mx.maximum(count, 1).astype(mx.float32)
        first = _sum(mx.where(finite, x, 0.0) * share)
        half = mx.where(finite, 0.5 * x - 0.5 * first, 0.0)  # halves: the difference of two floats may overflow
        off = 2 * _sum(half * share)
        squares = _sum(mx.square(2 * half))
        m2 = mx.where(squares == math.inf, math.inf, squares - count.astype(mx.float32) * mx.square(off))
        mean, rest = _two_sum(first, off)
        low = _extreme(mx.where(finite, x, math.inf), mx.min, math.inf)
        high = _extreme(mx.where(finite, x, -math.inf), mx.max, -math.inf)
        constant = low == high
        return ColumnStats(
            count,
            mx.where(constant, low, mean),
            mx.where(mx.logical_or(constant, m2 < 0), 0.0, m2),
            low,
            high,
            _count(nan),
            _count(mx.logical_not(mx.logical_or(finite, nan))),
            mx.where(constant, 0.0, rest),
        )


def merge_column_stats(a: ColumnStats, b: ColumnStats, *, stream: Stream = None) -> ColumnStats:
    """Statistics of two chunks of rows together.

    Args:
        a: Statistics of some rows.
        b: Statistics of others, of the same columns.
        stream: Stream or device.

    Returns:
        ColumnStats: As ``column_stats`` gives them for all rows, but for rounding.

    Raises:
        ValueError: ``a`` and ``b`` have different numbers of columns.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> halves = [bw.column_stats(mx.array(rows)) for rows in ([[1.0], [2.0]], [[6.0]])]
        >>> stats = bw.merge_column_stats(*halves)
        >>> stats.mean.item(), stats.m2.item()
        (3.0, 14.0)

    Source:
        Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979).
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"[merge_column_stats] a and b must have the same columns but have {a.mean.shape[0]} and {b.mean.shape[0]}"
        )
    with _on(stream):
        count = a.count + b.count
        weight = b.count.astype(mx.float32) / mx.maximum(count, 1).astype(mx.float32)
        far = mx.abs(a.mean) > 1e38  # the difference of such means may overflow
        delta = mx.where(far, 0.0, (b.mean - a.mean) + (b.mean_rest - a.mean_rest))
        step, lost = _two_sum(a.mean_rest, weight * delta)
        mean, rest = _two_sum(a.mean, step)
        mean = mx.where(far, a.mean * (1 - weight) + b.mean * weight, mean)
        rest = mx.where(far, 0.0, rest + lost)
        spread = mx.where(far, 2 * (0.5 * b.mean - 0.5 * a.mean), delta)
        between = mx.where(weight * (1 - weight) > 0, mx.square(spread) * (a.count.astype(mx.float32) * weight), 0.0)
        return ColumnStats(
            count,
            mx.where(a.count == 0, b.mean, mean),
            a.m2 + b.m2 + between,
            mx.minimum(a.minimum, b.minimum),
            mx.maximum(a.maximum, b.maximum),
            a.nans + b.nans,
            a.infs + b.infs,
            mx.where(a.count == 0, b.mean_rest, rest),
        )


def quantile_table(x: mx.array, bins: int | None = None, *, stream: Stream = None) -> QuantileTable:
    """Freeze the distribution of every column of a reference set.

    Args:
        x: ``[n, d]``, float32, float16 or bfloat16; n below 2^31. NaN are left out; infinities are values as others.
        bins: How many values of each column are kept, 4 at least; None keeps all, and scores are exact. Kept are the
            extremes and ranks in geometric steps from both ends, so that a tail probability is off by a factor of
            ``(n / 2) ** (2 / bins)`` at most, however far out.
        stream: Stream or device.

    Returns:
        QuantileTable: What ``tail_scores`` and ``robust_scale`` take.

    Raises:
        ValueError: ``x`` or ``bins`` is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> table = bw.quantile_table(mx.array([[3.0], [1.0], [1.0]]))
        >>> table.values.tolist(), table.counts.item(), round(table.skewness.item(), 4)
        ([[1.0, 1.0, 3.0]], 3, 0.7071)

    Source:
        Li et al., "ECOD: Unsupervised Outlier Detection Using Empirical Cumulative Distribution Functions" (2022).
    """
    _check_rows("quantile_table", x)
    if bins is not None and bins < 4:
        raise ValueError(f"[quantile_table] bins must be 4 or more but is {bins}")
    if _on_cpu(stream):
        table = QuantileTable(*_native.ext.quantile_table(x, stream))
    else:
        table = quantile_table_reference(x, stream=stream)
    return table if bins is None or bins >= x.shape[0] else _compressed(table, bins, stream)


def quantile_table_reference(x: mx.array, *, stream: Stream = None) -> QuantileTable:
    """The same as ``quantile_table`` without ``bins`` in plain MLX ops."""
    with _on(stream):
        x = x.astype(mx.float32)
        columns = mx.contiguous(x.T)
        values = mx.sort(columns, axis=1) if x.size else columns
        return QuantileTable(values, _count(~mx.isnan(x)), _skewness(x))


def tail_scores(
    x: mx.array,
    table: QuantileTable,
    method: str = "ecod",
    aggregation: str = "per_feature",
    per_column: bool = False,
    *,
    stream: Stream = None,
) -> mx.array:
    """How far out in the tails of a frozen reference set each row lies.

    With n values in a column of the table, the left tail of x is ``max(#{values <= x}, 1) / n`` and the right tail
    ``max(#{values >= x}, 1) / n``: rows of the reference set get their own tails, and what lies beyond all of it stays
    finite. L and R are their negative logarithms; the skewness of the column chooses S: L where it is negative, R
    where it is positive.

    Args:
        x: ``[n, d]``, float32, float16 or bfloat16. A row with NaN scores NaN.
        table: From ``quantile_table``.
        method: ``"ecod"`` or ``"copod"``.
        aggregation: ``"per_feature"`` adds one number a column, as PyOD does: max(L, R) for ECOD, max(S, (L + R) / 2)
            for COPOD; where the skewness is exactly 0, L + R. ``"paper"`` takes the largest of the sums of L, of R and
            of S (R at skewness 0), which is the same for both methods.
        per_column: Return what each column adds to the score.
        stream: Stream or device.

    Returns:
        array: ``[n]``, float32, or ``[n, d]``. It has no derivative.

    Raises:
        ValueError: ``x`` does not have the columns of the table, or another argument is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> table = bw.quantile_table(mx.array([[1.0], [2.0], [3.0], [9.0]]))
        >>> [round(s, 4) for s in bw.tail_scores(mx.array([[9.0], [2.5], [1000.0]]), table).tolist()]
        [1.3863, 0.6931, 1.3863]

    Source:
        Li et al., "COPOD: Copula-Based Outlier Detection" (2020); Li et al., "ECOD: Unsupervised Outlier Detection
        Using Empirical Cumulative Distribution Functions" (2022).
    """
    _check_rows("tail_scores", x, table.values.shape[0])
    _choice("tail_scores", "method", method, METHODS)
    _choice("tail_scores", "aggregation", aggregation, AGGREGATIONS)
    if not _native.runs_native(stream):
        return tail_scores_reference(x, table, method, aggregation, per_column, stream=stream)
    inputs = (x, table.values, table.counts, table.skewness, [] if table.ranks is None else [table.ranks])
    if not per_column:
        kind = "paper" if aggregation == "paper" else method
        score: mx.array = _native.ext.tail_scores(*inputs, _KINDS.index(kind), stream)[0]
        return score
    with _on(stream):
        left, right = _native.ext.tail_scores(*inputs, _KINDS.index("sides"), stream)
        return _combined(left, right, table.skewness, method, aggregation, per_column)


def tail_scores_reference(
    x: mx.array,
    table: QuantileTable,
    method: str = "ecod",
    aggregation: str = "per_feature",
    per_column: bool = False,
    *,
    stream: Stream = None,
) -> mx.array:
    """The same as ``tail_scores`` in plain MLX ops."""
    with _on(stream):
        if not x.size:
            return _nothing(x, per_column)
        left, right = _tails(x, table)
        return _combined(left, right, table.skewness, method, aggregation, per_column)


def histogram_table(x: mx.array, bins: int = 10, alpha: float = 0.1, *, stream: Stream = None) -> HistogramTable:
    """Histogram every column of a reference set in bins of equal width, from its least to its largest finite value.

    Args:
        x: ``[n, d]``, float32, float16 or bfloat16; n below 2^31. NaN and infinities are left out.
        bins: Number of bins, 1 to 4096.
        alpha: Density that is added to that of every bin, above 0: what keeps an empty bin's score finite.
        stream: Stream or device.

    Returns:
        HistogramTable: What ``histogram_scores`` takes. A constant column gets bins around its value, as in NumPy.

    Raises:
        ValueError: An argument is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> table = bw.histogram_table(mx.array([[0.0], [1.0], [1.5], [4.0]]), bins=2)
        >>> table.edges.tolist(), table.counts.tolist()
        ([[0.0, 2.0, 4.0]], [[3, 1]])

    Source:
        Goldstein and Dengel, "Histogram-Based Outlier Score (HBOS)" (2012).
    """
    _check_rows("histogram_table", x)
    if not 1 <= bins <= 4096:
        raise ValueError(f"[histogram_table] bins must be from 1 to 4096 but is {bins}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"[histogram_table] alpha must be positive and finite but is {alpha}")
    if not _on_cpu(stream):
        return histogram_table_reference(x, bins, alpha, stream=stream)
    with _on(stream):
        stats = column_stats(x, stream=stream)
        edges, widths = _edges(stats, bins)
        counts = _native.ext.histogram_counts(x, edges, stream)
        return _histogram(edges, widths, counts, stats.count, alpha)


def histogram_table_reference(
    x: mx.array, bins: int = 10, alpha: float = 0.1, *, stream: Stream = None
) -> HistogramTable:
    """The same as ``histogram_table`` in plain MLX ops."""
    with _on(stream):
        stats = column_stats_reference(x)
        edges, widths = _edges(stats, bins)
        return _histogram(edges, widths, _bin_counts(x, edges), stats.count, alpha)


def histogram_scores(
    x: mx.array, table: HistogramTable, tol: float = 0.5, per_column: bool = False, *, stream: Stream = None
) -> mx.array:
    """Histogram-based outlier scores of rows under a frozen histogram.

    A value scores as its bin (left-open, right-closed, as PyOD looks them up). A value outside by at most ``tol`` bins
    scores as the bin beside it, and one farther outside as the least dense bin.

    Args:
        x: ``[n, d]``, float32, float16 or bfloat16. A row with NaN scores NaN.
        table: From ``histogram_table``.
        tol: How far outside, in widths of a bin, a value still counts as in the bin beside it; 0 or more.
        per_column: Return what each column adds to the score.
        stream: Stream or device.

    Returns:
        array: ``[n]``, float32, or ``[n, d]``. It has no derivative.

    Raises:
        ValueError: ``x`` does not have the columns of the table, or ``tol`` is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> table = bw.histogram_table(mx.array([[0.0], [1.0], [1.5], [4.0]]), bins=2)
        >>> [round(s, 4) for s in bw.histogram_scores(mx.array([[1.0], [3.0], [50.0]]), table).tolist()]
        [1.074, 2.152, 2.152]

    Source:
        Goldstein and Dengel, "Histogram-Based Outlier Score (HBOS)" (2012).
    """
    _check_rows("histogram_scores", x, table.edges.shape[0])
    if not tol >= 0:
        raise ValueError(f"[histogram_scores] tol must be 0 or more but is {tol}")
    if _native.runs_native(stream):
        with _on(stream):
            reach = tol * table.widths
        scores: mx.array = _native.ext.histogram_scores(x, table.edges, table.scores, reach, per_column, stream)
        return scores
    return histogram_scores_reference(x, table, tol, per_column, stream=stream)


def histogram_scores_reference(
    x: mx.array, table: HistogramTable, tol: float = 0.5, per_column: bool = False, *, stream: Stream = None
) -> mx.array:
    """The same as ``histogram_scores`` in plain MLX ops."""
    with _on(stream):
        return _histogram_scores(x, table.edges, table.scores, tol * table.widths, per_column)


def robust_scale(table: QuantileTable, *, stream: Stream = None) -> RobustScale:
    """Median and 1.4826 times the median absolute deviation of the columns of a table.

    Args:
        table: From ``quantile_table``, with all values (``bins=None``).
        stream: Stream or device.

    Returns:
        RobustScale: ``center`` and ``scale`` ``[d]`` float32; NaN for a column without values.

    Raises:
        ValueError: The table has kept only some of the values.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> center, scale = bw.robust_scale(bw.quantile_table(mx.array([[1.0], [2.0], [3.0], [5.0], [100.0]])))
        >>> center.item(), round(scale.item(), 4)
        (3.0, 2.9652)

    Source:
        Hampel, "The Influence Curve and Its Role in Robust Estimation" (1974).
    """
    if table.ranks is not None:
        raise ValueError("[robust_scale] table must hold all values but was made with bins")
    with _on(stream):
        values, counts = table.values, table.counts
        if not values.shape[1]:
            nothing = mx.full(counts.shape, math.nan)
            return RobustScale(nothing, nothing)
        lower, upper = mx.maximum(counts - 1, 0) // 2, mx.minimum(counts // 2, mx.maximum(counts - 1, 0))
        center = _middle(_at(values, lower), _at(values, upper))
        mad = _middle(_deviation(values, counts, center, lower), _deviation(values, counts, center, upper))
        empty = counts == 0
        return RobustScale(mx.where(empty, math.nan, center), mx.where(empty, math.nan, MAD_SCALE * mad))


def robust_zscore(x: mx.array, center: mx.array, scale: mx.array, *, stream: Stream = None) -> mx.array:
    """Robust z-scores: the difference from a column's center, over its scale.

    Args:
        x: ``[n, d]``, float32, float16 or bfloat16.
        center: ``[d]``, float32, as of ``robust_scale``.
        scale: ``[d]``, float32, not negative. Where it is 0, a value at the center scores 0 and any other infinity.
        stream: Stream or device.

    Returns:
        array: ``[n, d]``, float32, with sign; NaN where x is NaN.

    Raises:
        ValueError: A shape or dtype is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> bw.robust_zscore(mx.array([[4.0], [1.0]]), mx.array([2.0]), mx.array([0.5])).tolist()
        [[4.0], [-2.0]]

    Source:
        Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (1993).
    """
    d = _check_rows("robust_zscore", x)
    _check_vector("robust_zscore", "center", center, d)
    _check_vector("robust_zscore", "scale", scale, d)
    if _native.runs_native(stream):
        scores: mx.array = _native.ext.robust_zscore(x, center, scale, stream)
        return scores
    return robust_zscore_reference(x, center, scale, stream=stream)


def robust_zscore_reference(x: mx.array, center: mx.array, scale: mx.array, *, stream: Stream = None) -> mx.array:
    """The same as ``robust_zscore`` in plain MLX ops."""
    with _on(stream):
        difference = x.astype(mx.float32) - center
        exact = mx.logical_and(difference == 0, scale == 0)
        return mx.where(exact, 0.0, difference / mx.where(exact, 1.0, scale))


def mahalanobis(x: mx.array, mean: mx.array, cholesky: mx.array, *, stream: Stream = None) -> mx.array:
    """Squared Mahalanobis distances of rows, by forward substitution and row norms in one pass.

    Args:
        x: ``[n, d]``, float32, float16 or bfloat16.
        mean: ``[d]``, float32.
        cholesky: ``[d, d]``, float32, the lower triangle L of a covariance ``L L^T``, with a positive diagonal; what
            stands above the diagonal is not looked at.
        stream: Stream or device.

    Returns:
        array: ``[n]``, float32: ``|L^-1 (x - mean)|^2``; a row with NaN scores NaN.

    Raises:
        ValueError: A shape or dtype is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> bw.mahalanobis(mx.array([[3.0, 5.0]]), mx.array([1.0, 1.0]), mx.array([[2.0, 0.0], [1.0, 1.0]])).tolist()
        [10.0]

    Source:
        Mahalanobis, "On the Generalised Distance in Statistics" (1936).
    """
    d = _check_rows("mahalanobis", x)
    _check_vector("mahalanobis", "mean", mean, d)
    if cholesky.shape != (d, d) or cholesky.dtype != mx.float32:
        raise ValueError(
            f"[mahalanobis] cholesky must have shape [{d}, {d}] and dtype float32 "
            f"but has shape {list(cholesky.shape)} and dtype {cholesky.dtype}"
        )
    if _on_cpu(stream) or (_native.runs_native(stream) and d <= MOST_SOLVED):
        distances: mx.array = _native.ext.mahalanobis(x, mean, cholesky, stream)
        return distances
    return mahalanobis_reference(x, mean, cholesky, stream=stream)


def mahalanobis_reference(x: mx.array, mean: mx.array, cholesky: mx.array, *, stream: Stream = None) -> mx.array:
    """The same as ``mahalanobis`` in plain MLX ops."""
    with _on(stream):
        if not x.size:
            return _nothing(x, per_column=False)
        solved = _forward(cholesky, (x.astype(mx.float32) - mean).T)
        return _row_sums(mx.square(solved).T)


def spectral_scores(x: mx.array, k: int = 1, iterations: int = 16, *, stream: Stream = None) -> mx.array:
    """Spectral signatures: squared projections of the centred rows on their top singular directions.

    The directions are found by subspace iteration from a fixed start, with eight directions more than asked for, and
    settled by Rayleigh and Ritz: the same rows give the same scores.

    Args:
        x: ``[n, d]``, float32, float16 or bfloat16; finite, for a NaN reaches all scores. Where there are
            labels, the rows of one class.
        k: Number of directions, 1 to d.
        iterations: Steps of the iteration, 1 or more; a step multiplies by ``X^T X``.
        stream: Stream or device.

    Returns:
        array: ``[n]``, float32. It has no derivative here.

    Raises:
        ValueError: An argument is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> [round(s, 4) for s in bw.spectral_scores(mx.array([[4.0, 0.0], [0.0, 0.0], [-4.0, 0.0]])).tolist()]
        [16.0, 0.0, 16.0]

    Source:
        Tran, Li and Madry, "Spectral Signatures in Backdoor Attacks" (2018); Halko, Martinsson and Tropp, "Finding
        Structure with Randomness" (2011).
    """
    d = _check_rows("spectral_scores", x)
    if not 1 <= k <= max(d, 1):
        raise ValueError(f"[spectral_scores] k must be from 1 to {d}, the number of columns, but is {k}")
    if iterations < 1:
        raise ValueError(f"[spectral_scores] iterations must be 1 or more but is {iterations}")
    return spectral_scores_reference(x, k, iterations, stream=stream)


def spectral_scores_reference(x: mx.array, k: int = 1, iterations: int = 16, *, stream: Stream = None) -> mx.array:
    """The same as ``spectral_scores`` in plain MLX ops."""
    with _on(stream):
        if not x.size:
            return _nothing(x, per_column=False)
        stats = column_stats_reference(x)
        scores: mx.array = _without_derivative("spectral_scores", lambda x: _spectral(x, stats, k, iterations))(x)
        return scores


# Sums and counts of columns.


def _sum(x: mx.array) -> mx.array:
    while x.shape[0] > _RUN:
        x = mx.concatenate([x, mx.zeros((-x.shape[0] % _RUN, *x.shape[1:]))])
        x = mx.unflatten(x, 0, (x.shape[0] // _RUN, _RUN)).sum(1)
    return x.sum(0) if x.size else mx.zeros(x.shape[1:])


def _count(holds: mx.array) -> mx.array:
    return mx.sum(holds.astype(mx.int32), axis=0) if holds.size else mx.zeros(holds.shape[1:], mx.int32)


def _extreme(x: mx.array, of: Callable[..., mx.array], empty: float) -> mx.array:
    return of(x, axis=0) if x.shape[0] else mx.full(x.shape[1:], empty)


def _nothing(x: mx.array, per_column: bool) -> mx.array:
    """Scores of no rows or of no columns: MLX's sums of transposed arrays without columns take seconds."""
    return mx.zeros(x.shape if per_column else x.shape[:1])


def _two_sum(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """The sum, and what rounding took from it."""
    total = a + b
    kept = total - a
    return total, (a - (total - kept)) + (b - kept)


def _centred(x: mx.array, stats: ColumnStats) -> mx.array:
    return (x - stats.mean) - stats.mean_rest


def _skewness(x: mx.array) -> mx.array:
    stats = column_stats_reference(x)
    # Powers of differences would leave float32: they are taken over the largest one.
    span = mx.maximum(0.5 * stats.maximum - 0.5 * stats.mean, 0.5 * stats.mean - 0.5 * stats.minimum)
    constant = mx.logical_not(stats.maximum > stats.minimum)
    finite = mx.logical_and(mx.isfinite(x), mx.logical_not(constant))
    half = (0.5 * x - 0.5 * stats.mean) - 0.5 * stats.mean_rest
    z = mx.where(finite, half / mx.where(constant, 1.0, span), 0.0)
    count = mx.maximum(stats.count, 1).astype(mx.float32)
    second, third = _sum(mx.square(z)) / count, _sum(z * mx.square(z)) / count
    flat = second == 0
    return mx.where(flat, 0.0, third / mx.where(flat, 1.0, second * mx.sqrt(second)))


# Tails.


def _tails(x: mx.array, table: QuantileTable) -> tuple[mx.array, mx.array]:
    """Negative logarithms of both tails, ``[n, d]`` each."""

    def tails(x: mx.array, values: mx.array, counts: mx.array, *ranks: mx.array) -> tuple[mx.array, mx.array]:
        query = x.astype(mx.float32).T
        below = _positions(values, query, mx.less)
        up_to = _positions(values, query, mx.less_equal)
        if ranks:
            below, up_to = (_ranked(ranks[0], p) for p in (below, up_to))
        n = mx.expand_dims(mx.maximum(counts, 1), 1)
        nan = mx.isnan(query)
        left, right = (
            mx.where(nan, math.nan, mx.log(n.astype(mx.float32) / mx.maximum(c, 1).astype(mx.float32))).T
            for c in (up_to, mx.expand_dims(counts, 1) - below)
        )
        return left, right

    ranks = () if table.ranks is None else (table.ranks,)
    left, right = _without_derivative("tail_scores", tails)(x, table.values, table.counts, *ranks)
    return left, right


def _positions(values: mx.array, query: mx.array, holds: Callable[[mx.array, mx.array], mx.array]) -> mx.array:
    """How many leading values of each row hold against the query: a binary search. NaN at the end never hold."""
    size = values.shape[1]
    at = mx.zeros(query.shape, mx.int32)
    for bit in reversed(range(size.bit_length())):
        candidate = at + (1 << bit)
        value = mx.take_along_axis(values, mx.minimum(candidate, size) - 1, axis=1)
        at = mx.where(mx.logical_and(candidate <= size, holds(value, query)), candidate, at)
    return at


def _ranked(ranks: mx.array, position: mx.array) -> mx.array:
    """Positions in the whole column for those among kept values."""
    rank = mx.take_along_axis(ranks, mx.maximum(position, 1) - 1, axis=1) + 1
    return mx.where(position == 0, 0, rank)


def _combined(
    left: mx.array, right: mx.array, skewness: mx.array, method: str, aggregation: str, per_column: bool
) -> mx.array:
    if aggregation == "paper":
        auto = mx.where(skewness < 0, left, right)
        sums = [_row_sums(side) for side in (left, right, auto)]
        score = mx.maximum(mx.maximum(sums[0], sums[1]), sums[2])
        if not per_column:
            return score
        chosen = mx.where(mx.expand_dims(sums[1] == score, 1), right, auto)
        return mx.where(mx.expand_dims(sums[0] == score, 1), left, chosen)
    both = left + right
    if method == "ecod":
        scores = mx.where(skewness == 0, both, mx.maximum(left, right))
    else:
        chosen = mx.where(skewness < 0, left, mx.where(skewness > 0, right, both))
        scores = mx.maximum(chosen, 0.5 * both)
    return scores if per_column else _row_sums(scores)


def _compressed(table: QuantileTable, bins: int, stream: Stream) -> QuantileTable:
    """Keep values at ranks in geometric steps from both ends."""
    with _on(stream):
        last = mx.expand_dims(mx.maximum(table.counts - 1, 0), 1).astype(mx.float32)
        half = bins // 2
        steps = mx.arange(half).astype(mx.float32) / (half - 1)
        out = mx.floor(mx.exp(steps * mx.log(0.5 * last + 1)) - 1 + 1e-3).astype(mx.int32)
        # Steps below one rank repeat ranks at the ends: the next one in order takes their place.
        out = mx.minimum(mx.maximum(out, mx.arange(half)), mx.maximum(table.counts - 1, 0)[:, None])
        ranks = mx.sort(mx.concatenate([out, mx.maximum(table.counts - 1, 0)[:, None] - out], axis=1), axis=1)
        return table._replace(values=mx.take_along_axis(table.values, ranks, axis=1), ranks=ranks)


# Histograms.


def _edges(stats: ColumnStats, bins: int) -> tuple[mx.array, mx.array]:
    empty = stats.count == 0
    low, high = mx.where(empty, 0.0, stats.minimum), mx.where(empty, 0.0, stats.maximum)
    # NumPy takes half of one on both sides of a constant; float32 has no such neighbours of large values.
    aside = mx.where(high > low, 0.0, mx.maximum(0.5, mx.abs(low) * 2.0**-20))
    low, high = low - aside, high + aside
    part = mx.arange(bins + 1).astype(mx.float32) / bins
    edges = mx.expand_dims(low, 1) * (1 - part) + mx.expand_dims(high, 1) * part
    edges = mx.cummax(edges, axis=1)
    return edges, 2 * ((0.5 * high - 0.5 * low) / bins)


def _bin_counts(x: mx.array, edges: mx.array) -> mx.array:
    bins = edges.shape[1] - 1
    if not x.size:
        return mx.zeros((x.shape[1], bins), mx.int32)

    def count(x: mx.array, edges: mx.array) -> mx.array:
        columns = x.astype(mx.float32).T
        at = mx.minimum(_positions(edges, columns, mx.less_equal), bins)  # the last bin holds its right edge
        at = mx.where(mx.isfinite(columns), at, 0)
        return mx.stack([mx.sum(at == k + 1, axis=1).astype(mx.int32) for k in range(bins)], axis=1)

    counts: mx.array = _without_derivative("histogram_table", count)(x, edges)
    return counts


def _histogram(edges: mx.array, widths: mx.array, counts: mx.array, total: mx.array, alpha: float) -> HistogramTable:
    share = counts.astype(mx.float32) / mx.expand_dims(mx.maximum(total, 1), 1).astype(mx.float32)
    scores = -mx.log2(share / mx.expand_dims(widths, 1) + alpha)
    return HistogramTable(edges, counts, scores, widths)


def _histogram_scores(x: mx.array, edges: mx.array, scores: mx.array, reach: mx.array, per_column: bool) -> mx.array:
    if not x.size:
        return _nothing(x, per_column)

    def score(x: mx.array, edges: mx.array, scores: mx.array, reach: mx.array) -> mx.array:
        columns, bins = x.astype(mx.float32).T, scores.shape[1]
        at = _positions(edges, columns, mx.less)  # bin k holds edges[k] < x <= edges[k + 1]
        found = mx.take_along_axis(scores, mx.clip(at - 1, 0, bins - 1), axis=1)
        far = mx.expand_dims(reach, 1)
        outside = mx.logical_or(edges[:, :1] - columns > far, columns - edges[:, -1:] > far)
        found = mx.where(outside, mx.max(scores, axis=1, keepdims=True), found)
        return mx.where(mx.isnan(columns), math.nan, found).T

    columns: mx.array = _without_derivative("histogram_scores", score)(x, edges, scores, reach)
    return columns if per_column else _row_sums(columns)


# Medians from sorted columns.


def _at(values: mx.array, position: mx.array) -> mx.array:
    return mx.take_along_axis(values, mx.expand_dims(position, 1), axis=1).squeeze(1)


def _middle(a: mx.array, b: mx.array) -> mx.array:
    return mx.where(a == b, a, 0.5 * a + 0.5 * b)


def _deviation(values: mx.array, counts: mx.array, center: mx.array, position: mx.array) -> mx.array:
    """The value at a position among the sorted differences from the center.

    The values nearest to the center are a window of the sorted column: the largest start whose left end is farther from
    the center than the value right of the window, and one behind it, are all that can be the best.
    """
    last = mx.maximum(counts - 1, 0) - position  # of all starts
    start = mx.zeros_like(position)
    for bit in reversed(range(values.shape[1].bit_length())):
        candidate = start + (1 << bit)
        left = _at(values, mx.minimum(candidate - 1, last))
        right = _at(values, mx.minimum(candidate + position, mx.maximum(counts - 1, 0)))
        nearer = mx.logical_and(candidate <= last, center - left > right - center)
        start = mx.where(nearer, candidate, start)

    def largest(start: mx.array) -> mx.array:
        return mx.maximum(_away(center, _at(values, start)), _away(_at(values, start + position), center))

    return largest(start)


def _away(a: mx.array, b: mx.array) -> mx.array:
    return mx.where(a == b, 0.0, a - b)  # infinities are at no distance from themselves


# Linear algebra.


def _forward(lower: mx.array, b: mx.array) -> mx.array:
    """``lower^-1 b`` by halves: on a GPU too, and with every derivative."""
    d = lower.shape[0]
    if d == 1:
        return b / lower
    h = d // 2
    top = _forward(lower[:h, :h], b[:h])
    return mx.concatenate([top, _forward(lower[h:, h:], b[h:] - lower[h:, :h] @ top)])


def _spectral(x: mx.array, stats: ColumnStats, k: int, iterations: int) -> mx.array:
    centred = _centred(x.astype(mx.float32), stats)
    largest = mx.abs(centred).max()
    scale = mx.where(largest > 0, largest, 1.0)
    centred = centred / scale
    size = min(k + OVERSAMPLING, *x.shape)
    basis = mx.random.normal((x.shape[1], size), key=mx.random.key(0))
    for _ in range(iterations):
        basis, _ = mx.linalg.qr(centred.T @ (centred @ basis), stream=mx.cpu)
    projected = centred @ basis
    _, rotation = mx.linalg.eigh(projected.T @ projected, stream=mx.cpu)  # ascending
    top = (projected @ rotation[:, -k:]) * scale
    return mx.square(top).sum(1)


# What the primitives call.


@_native.reference("column_stats")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    return list(column_stats_reference(*arrays, stream=stream))


@_native.reference("quantile_table")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    return list(quantile_table_reference(*arrays, stream=stream)[:3])


@_native.reference("tail_scores")
def _(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    x, *parts = arrays
    table = QuantileTable(*parts)
    kind = _KINDS[json.loads(parameters)["kind"]]
    if kind in METHODS:
        return [tail_scores_reference(x, table, kind, stream=stream)]
    if kind == "paper":
        return [tail_scores_reference(x, table, aggregation="paper", stream=stream)]
    with _on(stream):
        return list(_tails(x, table))


@_native.reference("histogram_counts")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    with _on(stream):
        return [_bin_counts(*arrays)]


@_native.reference("histogram_scores")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    x, edges, scores, reach = arrays
    with _on(stream):
        return [_histogram_scores(x, edges, scores, reach, per_column=False)]


@_native.reference("histogram_column_scores")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    x, edges, scores, reach = arrays
    with _on(stream):
        return [_histogram_scores(x, edges, scores, reach, per_column=True)]


@_native.reference("robust_zscore")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    return [robust_zscore_reference(*arrays, stream=stream)]


@_native.reference("mahalanobis")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    return [mahalanobis_reference(*arrays, stream=stream)]


def _on_cpu(stream: Stream) -> bool:
    return _native.runs_native(stream) and not _native.ext.on_metal(stream)


# Arguments.


def _without_derivative(op: str, f: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse derivatives of what is a step function, rather than return zeros."""

    def refuse(*_: Any) -> Any:
        raise ValueError(f"[{op}] has no derivative")

    wrapped = mx.custom_function(f)
    wrapped.vjp(refuse)
    wrapped.jvp(refuse)
    return wrapped


def _check_rows(op: str, x: Any, columns: int | None = None) -> int:
    if not isinstance(x, mx.array):
        raise ValueError(f"[{op}] x must be an array but is {type(x).__name__}")
    if x.ndim != 2 or (columns is not None and x.shape[1] != columns):
        raise ValueError(f"[{op}] x must have shape [n, {columns or 'd'}] but has shape {list(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"[{op}] x must be float32, float16 or bfloat16 but has dtype {x.dtype}")
    return int(x.shape[1])


def _check_vector(op: str, name: str, v: mx.array, d: int) -> None:
    if v.shape != (d,) or v.dtype != mx.float32:
        raise ValueError(
            f"[{op}] {name} must have shape [{d}] and dtype float32 but has shape {list(v.shape)} and dtype {v.dtype}"
        )


def _choice(op: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"[{op}] {name} must be one of {', '.join(known)} but is {value!r}")
