import os
import subprocess
import sys

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mlx_bulwark import _native

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
SIZES = [0, 1, 31, 33, 1000003]
NAN, INF = float("nan"), float("inf")
SIMULATED = {1000003: 2003, 20011: 1501, 5003: 603}  # what the simulator runs in place of what takes it seconds
METHODS = [("ecod", "per_feature"), ("copod", "per_feature"), ("ecod", "paper"), ("copod", "paper")]


def sized(backend, n):
    return SIMULATED.get(n, n) if backend == "metal-sim" else n


def rand(shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def skewed(shape, dtype=mx.float32, seed=0):
    """Columns with skewness far from 0 on both sides."""
    x = np.random.default_rng(seed).exponential(size=shape) * np.where(np.arange(shape[-1]) % 2, -1, 1)
    return mx.array(x.astype(np.float32)).astype(dtype)


def np64(x):
    with np.errstate(invalid="ignore"):
        return np.array(x.astype(mx.float32)).astype(np.float64)


def bits(x):
    x = np.array(x)
    return x.shape, x.tobytes()


# ---- column_stats


def stats64(x):
    """The statistics in float64, column by column."""
    with np.errstate(over="ignore"):
        for column in np64(x).T:
            v = column[np.isfinite(column)]
            mean = v.mean() if len(v) else 0.0
            yield (
                len(v),
                mean,
                ((v - mean) ** 2).sum(),
                v.min(initial=INF),
                v.max(initial=-INF),
                np.isnan(column).sum(),
                np.isinf(column).sum(),
            )


def assert_stats(got, x, rtol=2e-6):
    """Counts and extremes to the bit; means within 4e-7 of the largest difference from them, M2 within rtol."""
    want = np.array(list(stats64(x)), np.float64).reshape(-1, 7).T
    assert [a.dtype for a in got] == [mx.int32, *[mx.float32] * 4, mx.int32, mx.int32, mx.float32]
    assert {a.shape for a in got} == {(x.shape[1],)}
    for i in (0, 3, 4, 5, 6):
        np.testing.assert_array_equal(np.array(got[i]), want[i])
    span = np.where(want[0] > 0, want[4] / 2 - want[3] / 2, 0)
    mean = np64(got.mean) + np64(got.mean_rest)
    assert (abs(mean - want[1]) <= 4e-7 * span + 2.0**-39 * abs(want[1]) + 2.0**-126).all()
    np.testing.assert_allclose(np64(got.mean), want[1], rtol=1e-7 + 2.0**-24, atol=4e-7 * max([0, *span]) + 2.0**-126)
    m2 = np.where(want[2] > np.finfo(np.float32).max, INF, want[2])
    np.testing.assert_allclose(np64(got.m2), m2, rtol=rtol, atol=2.0**-126 * max(1, x.shape[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_stats_of_sizes(backend, dtype, n):
    assert_stats(bw.column_stats(rand((sized(backend, n), 3), dtype)), rand((sized(backend, n), 3), dtype))


@pytest.mark.parametrize("shape", [(7, 0), (0, 5), (1, 1), (300, 64), (129, 65), (50, 1000), (20011, 1), (3, 2049)])
def test_stats_of_shapes(backend, shape):
    shape = (sized(backend, shape[0]), shape[1])
    assert_stats(bw.column_stats(rand(shape)), rand(shape))


@pytest.mark.parametrize("offset", [1e3, 1e6, -1e6])
@pytest.mark.parametrize("n", [257, 20011])
def test_stats_far_from_zero(backend, offset, n):
    x = rand((sized(backend, n), 5)) + offset
    assert_stats(bw.column_stats(x), x)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e25])
def test_stats_of_huge_and_tiny_values(backend, scale):
    x = rand((1000, 3)) * scale
    assert_stats(bw.column_stats(x), x)


def test_stats_of_the_largest_values(backend):
    x = mx.array([[3.4e38, -3.4e38], [3.4e38, 3.4e38], [-3.4e38, 3.3e38], [3.4e38, 0.0]])
    got = bw.column_stats(x)
    want = np64(x).mean(0)
    np.testing.assert_allclose(np64(got.mean), want, rtol=1e-6, atol=1e32)
    assert got.m2.tolist() == [INF, INF]


def test_stats_with_an_outlier_first(backend):
    x = np.random.default_rng(0).standard_normal((1000, 2)).astype(np.float32)
    x[0] = 1e6
    assert_stats(bw.column_stats(mx.array(x)), mx.array(x))


def holes(shape, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    kind = rng.integers(0, 12, shape)
    x[kind == 0], x[kind == 1], x[kind == 2] = NAN, INF, -INF
    return x


@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_count_nan_and_infinity(backend, dtype):
    x = holes((1031, 7))
    x[:, 2], x[:, 3], x[:, 4] = NAN, INF, 5.0
    x = mx.array(x).astype(dtype)
    got = bw.column_stats(x)
    assert_stats(got, x)
    assert got.m2[4].item() == 0
    assert got.nans[2].item() == 1031


VIEWS = {
    "transposed": lambda x: x.T,
    "strided": lambda x: x[::2, 1::2],
    "offset": lambda x: x[5:, 3:],
    "broadcast": lambda x: mx.broadcast_to(x[:1], (7, x.shape[1])),
    "reversed": lambda x: x[::-1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_non_contiguous(backend, view):
    x = VIEWS[view](skewed((37, 41)))
    assert_stats(bw.column_stats(x), x)
    table = bw.quantile_table(x)
    assert bits(table.values) == bits(np.sort(np.array(x).T, axis=1))
    copy = mx.contiguous(x + 0)
    assert bits(bw.tail_scores(x, table)) == bits(bw.tail_scores(copy, table))
    histogram = bw.histogram_table(x)
    assert [bits(a) for a in histogram] == [bits(a) for a in bw.histogram_table(copy)]
    assert bits(bw.histogram_scores(x, histogram)) == bits(bw.histogram_scores(copy, histogram))
    d = x.shape[1]
    center, scale = rand((2 * d,))[::2], mx.broadcast_to(mx.array(2.0), (d,))
    np.testing.assert_allclose(np64(bw.robust_zscore(x, center, scale)), (np64(x) - np64(center)) / 2, rtol=1e-6)
    lower = mx.array(np.tril(np.ones((d, d), np.float32)).T).T
    want = np.square(scipy.linalg.solve_triangular(np64(lower), (np64(x) - np64(center)).T, lower=True)).sum(0)
    np.testing.assert_allclose(np64(bw.mahalanobis(x, center, lower)), want, rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_merged_stats_are_those_of_all_rows(backend, offset):
    x = mx.concatenate([rand((n, 4), seed=n) + offset for n in (1, 500, 33, 1000)])
    x[5, 1] = NAN
    parts = [bw.column_stats(c) for c in (x[:0], x[:1], x[1:501], x[501:534], x[534:534], x[534:])]
    merged = parts[0]
    for part in parts[1:]:
        merged = bw.merge_column_stats(merged, part)
    assert_stats(merged, x)
    with pytest.raises(ValueError, match=r"\[merge_column_stats\] a and b must have the same columns but have 4 and 2"):
        bw.merge_column_stats(merged, bw.column_stats(x[:, :2]))


def test_merging_the_largest_values(backend):
    x = mx.array([[3.4e38], [-3.4e38], [3.4e38], [0.0]])
    merged = bw.merge_column_stats(bw.column_stats(x[:1]), bw.column_stats(x[1:]))
    np.testing.assert_allclose(np64(merged.mean), np64(x).mean(0), rtol=1e-6)
    assert merged.m2.item() == INF


@settings(max_examples=40)
@given(
    x=hnp.arrays(np.float32, st.tuples(st.integers(0, 40), st.integers(1, 5)), elements=st.floats(-1e6, 1e6, width=32)),
    at=st.integers(0, 40),
)
def test_stats_of_any_chunks(backend, x, at):
    x = mx.array(x)
    assert_stats(bw.column_stats(x), x)
    got = bw.merge_column_stats(bw.column_stats(x[:at]), bw.column_stats(x[at:]))
    assert_stats(got, x)


def test_derivatives_of_stats(backend):
    x, w = rand((9, 3)), rand((3,), seed=1)
    got = mx.grad(lambda x: (bw.column_stats(x).m2 * w).sum())(x)
    centred = np64(x) - np64(x).mean(0)
    np.testing.assert_allclose(np64(got), 2 * centred * np64(w), rtol=1e-4, atol=1e-5)
    got = mx.grad(lambda x: (bw.column_stats(x).mean * w).sum())(x)
    np.testing.assert_allclose(np64(got), np.broadcast_to(np64(w) / 9, (9, 3)), rtol=1e-5)


# ---- tails


def sides64(x, train):
    """Negative logarithms of both frozen tails by counting, in float64."""
    left, right = np.empty(x.shape), np.empty(x.shape)
    for c in range(x.shape[1]):
        values = np.sort(train[:, c][~np.isnan(train[:, c])])
        n = max(len(values), 1)
        left[:, c] = -np.log(np.maximum(np.searchsorted(values, x[:, c], "right"), 1) / n)
        right[:, c] = -np.log(np.maximum(len(values) - np.searchsorted(values, x[:, c], "left"), 1) / n)
    return left, right


def skew64(train):
    """As PyOD calls scipy; constant columns, which scipy warns of, are 0."""
    return np.array([scipy.stats.skew(c) if np.ptp(c) > 0 else 0.0 for c in train.T if len(c)] or [0.0])


def tails64(x, train, method, aggregation):
    """The formulas of PyOD's ECOD and COPOD (skewness by scipy.stats.skew) and of the papers, in float64."""
    left, right = sides64(x, train)
    skew = np.sign(skew64(train))
    if aggregation == "paper":
        auto = np.where(skew < 0, left, right)
        return np.maximum(np.maximum(left.sum(1), right.sum(1)), auto.sum(1))
    chosen = left * -np.sign(skew - 1) + right * np.sign(skew + 1)
    other = np.maximum(left, right) if method == "ecod" else (left + right) / 2
    return np.maximum(chosen, other).sum(1)


def assert_scores(got, want):
    assert got.dtype == mx.float32
    np.testing.assert_allclose(np64(got), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "aggregation"), METHODS)
def test_scores_of_training_rows(backend, dtype, method, aggregation):
    """16-bit values have many ties."""
    x = skewed((sized(backend, 5003), 9), dtype)
    got = bw.tail_scores(x, bw.quantile_table(x), method, aggregation)
    assert_scores(got, tails64(np64(x), np64(x), method, aggregation))


@pytest.mark.parametrize(("method", "aggregation"), METHODS)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 5, 3), (2, 7, 1), (16, 33, 17), (33, 1, 64), (257, 100, 40)])
def test_scores_of_other_rows(backend, method, aggregation, n, m, d):
    train, x = skewed((n, d)), skewed((m, d), seed=1) * 1.5
    got = bw.tail_scores(x, bw.quantile_table(train), method, aggregation)
    assert_scores(got, tails64(np64(x), np64(train), method, aggregation))


@pytest.mark.parametrize(("method", "aggregation"), METHODS)
def test_ties_constants_and_no_skew(backend, method, aggregation):
    rng = np.random.default_rng(0)
    train = rng.integers(0, 4, (100, 6)).astype(np.float32)
    train[:, 0] = 7
    train[:, 1] = np.repeat([-1, 1], 50)
    train[:, 2] = np.tile([-1, 0, 0, 1], 25)
    x = np.concatenate([train, rng.integers(-2, 7, (60, 6)) / np.float32(2)])
    x[-1] = -0.0
    got = bw.tail_scores(mx.array(x), bw.quantile_table(mx.array(train)), method, aggregation)
    assert_scores(got, tails64(x.astype(np.float64), train.astype(np.float64), method, aggregation))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tails_do_not_depend_on_scale(backend, scale):
    x = skewed((301, 5))
    want = tails64(np64(x), np64(x), "copod", "per_feature")
    assert_scores(bw.tail_scores(x * scale, bw.quantile_table(x * scale), "copod"), want)


@pytest.mark.parametrize(("method", "aggregation"), METHODS)
def test_a_score_does_not_depend_on_the_rows_beside_it(backend, method, aggregation):
    table, x = bw.quantile_table(skewed((400, 7))), skewed((300, 7), seed=1)
    together = bw.tail_scores(x, table, method, aggregation)
    for rows in (slice(5, 6), slice(0, 17), slice(299, 300)):
        assert bits(bw.tail_scores(x[rows], table, method, aggregation)) == bits(together[rows])
    copies = bw.tail_scores(mx.repeat(x[3:4], 500, axis=0), table, method, aggregation)
    assert bits(copies) == bits(mx.broadcast_to(together[3], (500,)))


def test_scores_of_columns_of_every_kind(backend):
    """Where values lie evenly a search begins near them; where they crowd, at ties and beyond the ends it must not."""
    n, rng = sized(backend, 4099), np.random.default_rng(0)
    normal = rng.standard_normal(n)
    kinds = {
        "even": np.arange(n),
        "normal": normal,
        "exponential": np.exp(normal),
        "heavy": normal / rng.standard_normal(n) ** 3,
        "crowded": np.where(rng.random(n) < 0.99, normal, 1e6 * normal),
        "few crowded": np.where(np.arange(n) < n // 600, 0.5 + 1e-6 * normal, 100 * rng.random(n)),
        "ties": rng.integers(0, 300, n),
        "two": rng.integers(0, 2, n),
        "constant": np.ones(n),
        "huge": 3e38 * np.tanh(normal),
        "tiny": 1e-34 * normal,
        "missing": np.where(rng.random(n) < 0.3, NAN, normal),
        "empty": np.full(n, NAN),
    }
    train = np.stack(list(kinds.values()), axis=1).astype(np.float32)
    x = np.concatenate([rng.permutation(train), train * np.float32(1.1), np.nextafter(train, np.float32(INF))])
    x[:3] = [[INF], [-INF], [NAN]]
    left, right = sides64(x, train)
    got = np64(bw.tail_scores(mx.array(x), bw.quantile_table(mx.array(train)), per_column=True))
    skew = np.sign(np64(bw.quantile_table(mx.array(train)).skewness))
    want = np.where(skew == 0, left + right, np.maximum(left, right))
    want[np.isnan(x)] = NAN
    for c, kind in enumerate(kinds):
        np.testing.assert_allclose(got[:, c], want[:, c], rtol=2e-6, atol=2e-6, err_msg=kind)


def test_nan_and_infinity_in_tails(backend):
    train = holes((200, 4))
    train[:, 3] = NAN
    x = skewed((20, 4), seed=3)
    x[0], x[1, 2] = INF, -INF
    table = bw.quantile_table(mx.array(train))
    assert table.counts.tolist() == (~np.isnan(train)).sum(0).tolist()
    for c, column in enumerate(np.sort(train.T, axis=1)):
        np.testing.assert_array_equal(np.array(table.values)[c], column)
    finite = [scipy.stats.skew(c[np.isfinite(c)].astype(np.float64)) for c in train.T[:3]]
    np.testing.assert_allclose(np64(table.skewness), [*finite, 0], rtol=1e-5, atol=1e-6)
    left, right = sides64(np64(x), train.astype(np.float64))
    assert_scores(bw.tail_scores(x, table), np.maximum(left, right).sum(1))
    x[7, 1] = NAN
    for method, aggregation in METHODS:
        got = np.array(bw.tail_scores(x, table, method, aggregation))
        assert np.flatnonzero(np.isnan(got)).tolist() == [7]
        by_column = np.array(bw.tail_scores(x, table, method, aggregation, per_column=True))
        assert np.isnan(by_column[7, 1])
        assert np.isfinite(np.delete(by_column, 7, 0)).all()


@pytest.mark.parametrize(("method", "aggregation"), METHODS)
def test_columns_add_up_to_the_score(backend, method, aggregation):
    table, x = bw.quantile_table(skewed((211, 23))), skewed((50, 23), seed=1)
    columns = bw.tail_scores(x, table, method, aggregation, per_column=True)
    assert columns.shape == (50, 23)
    assert_scores(bw.tail_scores(x, table, method, aggregation), np64(columns).sum(1))


@pytest.mark.parametrize("bins", [4, 64, 65, 400])
def test_compressed_tables(backend, bins):
    """Each tail is off by a factor of one geometric step at most, besides that a rank is whole."""
    n = 3000
    train, x = skewed((n, 3)), skewed((500, 3), seed=1)
    table = bw.quantile_table(train, bins=bins)
    kept = 2 * (bins // 2)
    assert table.values.shape == table.ranks.shape == (3, kept)
    np.testing.assert_array_equal(
        np.array(table.values), np.take_along_axis(np.sort(np64(train).T), np.array(table.ranks), 1)
    )
    step = np.log(n / 2 + 1) / (kept / 2 - 1) + 2 / max(kept / 2, 1)
    left, right = sides64(np64(x), np64(train))
    got = np64(bw.tail_scores(x, table, per_column=True))
    assert abs(got - np.maximum(left, right)).max() <= step
    assert bw.quantile_table(train, bins=n).ranks is None
    for column in ([1.0] * 9, [NAN] * 9, [1.0, NAN, 2.0, NAN, NAN, 5.0, NAN, NAN, NAN]):
        few = mx.array(column)[:, None]
        got = bw.tail_scores(mx.array([[1.0], [5.0]]), bw.quantile_table(few, bins=8))
        assert_scores(
            got, tails64(np.array([[1.0], [5.0]]), np64(few)[~np.isnan(np64(few))][:, None], "ecod", "per_feature")
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_tables_of_sizes(backend, dtype, n):
    x = skewed((sized(backend, n), 2), dtype)
    table = bw.quantile_table(x)
    assert bits(table.values) == bits(np.sort(np64(x).T, axis=1).astype(np.float32))
    assert table.counts.tolist() == [x.shape[0]] * 2
    if n > 2:
        np.testing.assert_allclose(np64(table.skewness), scipy.stats.skew(np64(x)), rtol=3e-5)
    scores = bw.tail_scores(x[:50], table)
    if n:
        assert_scores(scores, tails64(np64(x[:50]), np64(x), "ecod", "per_feature"))


def test_skewness_is_good_far_from_zero(backend):
    x = skewed((sized(backend, 20011), 4)) + 1e4
    np.testing.assert_allclose(np64(bw.quantile_table(x).skewness), scipy.stats.skew(np64(x)), rtol=3e-5)


def test_empty_inputs(backend):
    table = bw.quantile_table(mx.zeros((0, 3)))
    assert bw.tail_scores(mx.ones((2, 3)), table).tolist() == [0.0, 0.0]
    assert bw.tail_scores(mx.zeros((0, 3)), bw.quantile_table(mx.ones((4, 3)))).shape == (0,)
    assert bw.tail_scores(mx.zeros((4, 0)), bw.quantile_table(mx.zeros((4, 0)))).tolist() == [0.0] * 4
    assert bw.tail_scores(mx.zeros((0, 3)), table, per_column=True).shape == (0, 3)
    histogram = bw.histogram_table(mx.zeros((0, 3)))
    assert histogram.counts.tolist() == [[0] * 10] * 3
    assert bw.histogram_scores(mx.zeros((0, 3)), histogram).shape == (0,)
    assert bw.histogram_scores(mx.zeros((2, 0)), bw.histogram_table(mx.zeros((2, 0)))).tolist() == [0.0] * 2
    assert bw.robust_zscore(mx.zeros((0, 3)), mx.zeros(3), mx.ones(3)).shape == (0, 3)
    assert bw.mahalanobis(mx.zeros((0, 3)), mx.zeros(3), mx.eye(3)).shape == (0,)
    assert bw.mahalanobis(mx.zeros((2, 0)), mx.zeros(0), mx.zeros((0, 0))).tolist() == [0.0] * 2
    assert bw.spectral_scores(mx.zeros((0, 3))).shape == (0,)
    assert np.isnan(np.array(bw.robust_scale(table))).all()


@settings(max_examples=40)
@given(
    train=hnp.arrays(np.float32, (17, 3), elements=st.floats(width=32, allow_nan=False)),
    x=hnp.arrays(np.float32, (9, 3), elements=st.floats(width=32, allow_nan=False)),
    method=st.sampled_from(METHODS),
)
def test_any_tails(backend, train, x, method):
    """Any values, denormal ones but for GPUs, with rows of the table among them."""
    if backend in ("metal", "metal-sim"):
        train, x = (np.where(abs(a) < 2.0**-126, 0, a).astype(np.float32) for a in (train, x))
    table = bw.quantile_table(mx.array(train))
    x = np.concatenate([x, train])
    left, right = sides64(x.astype(np.float64), train.astype(np.float64))
    skew = np.array(table.skewness)
    got = bw.tail_scores(mx.array(x), table, *method)
    if method[1] == "paper":
        sums = [side.sum(1) for side in (left, right, np.where(skew < 0, left, right))]
        return assert_scores(got, np.max(sums, axis=0))
    chosen = np.where(skew < 0, left, np.where(skew > 0, right, left + right))
    other = np.maximum(left, right) if method[0] == "ecod" else (left + right) / 2
    return assert_scores(got, np.maximum(chosen, other).sum(1))


# ---- histograms


def edges64(x, bins):
    return np.histogram_bin_edges(x, bins)


def hbos64(x, edges, counts, widths, alpha=0.1, tol=0.5):
    """PyOD's loop over values (pyod.models.hbos), in float64, on our edges and counts."""
    scores = np.zeros(x.shape)
    bins = counts.shape[1]
    for c in range(x.shape[1]):
        density = counts[c] / max(counts[c].sum(), 1) / widths[c]
        out = np.log2(density + alpha)
        at = np.digitize(x[:, c], edges[c], right=True)
        for i, k in enumerate(at):
            if k == 0:
                near = edges[c][0] - x[i, c] <= widths[c] * tol
                scores[i, c] = out[0] if near else out.min()
            elif k == bins + 1:
                near = x[i, c] - edges[c][-1] <= widths[c] * tol
                scores[i, c] = out[-1] if near else out.min()
            else:
                scores[i, c] = out[k - 1]
    return -scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bins", [1, 2, 10, 33, 500])
def test_histograms(backend, dtype, bins):
    if backend == "metal-sim" and bins == 33:
        pytest.skip("the simulator takes 10 and 500")
    train, x = skewed((sized(backend, 5003), 5), dtype), skewed((401, 5), dtype, 1) * 2
    table = bw.histogram_table(train, bins)
    edges, counts = np64(table.edges), np.array(table.counts)
    assert edges.shape == (5, bins + 1)
    for c, column in enumerate(np64(train).T):
        np.testing.assert_allclose(edges[c], np.histogram_bin_edges(column, bins), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(counts[c], np.histogram(column, edges[c])[0])
        np.testing.assert_allclose(table.widths[c].item(), (edges[c][-1] - edges[c][0]) / bins, rtol=1e-6)
    want = hbos64(np64(x), edges, counts, np64(table.widths))
    columns = bw.histogram_scores(x, table, per_column=True)
    np.testing.assert_allclose(np64(columns), want, rtol=2e-6, atol=2e-6)
    assert_scores(bw.histogram_scores(x, table), want.sum(1))
    own = hbos64(np64(train), edges, counts, np64(table.widths)).sum(1)
    assert_scores(bw.histogram_scores(train, table), own)


@pytest.mark.parametrize(("alpha", "tol"), [(1e-6, 0.0), (0.5, 3.0)])
def test_histogram_parameters(backend, alpha, tol):
    train, x = skewed((300, 3)), skewed((300, 3), seed=1) * 2
    table = bw.histogram_table(train, 7, alpha)
    want = hbos64(np64(x), np64(table.edges), np.array(table.counts), np64(table.widths), alpha, tol)
    assert_scores(bw.histogram_scores(x, table, tol), want.sum(1))


def test_histograms_of_constants_and_holes(backend):
    train = holes((500, 6))
    train[:, 1], train[:, 2], train[:, 3], train[:, 4] = 3.5, 1e7, NAN, -2e-30
    table = bw.histogram_table(mx.array(train))
    edges = np64(table.edges)
    np.testing.assert_allclose(edges[1], np.histogram_bin_edges([3.5], 10), rtol=1e-6)
    assert (np.diff(edges, axis=1) > 0).all()
    finite = np.isfinite(train)
    assert np.array(table.counts).sum(1).tolist() == finite.sum(0).tolist()
    for c in range(6):
        want = np.histogram(train[:, c][finite[:, c]].astype(np.float64), edges[c])[0]
        np.testing.assert_array_equal(np.array(table.counts)[c], want)
    x = mx.array(np.where(finite, train, 0))
    want = hbos64(np64(x), edges, np.array(table.counts), np64(table.widths))
    assert_scores(bw.histogram_scores(x, table), want.sum(1))
    x = mx.array([[INF] * 6, [-INF] * 6, [0.0, 0.0, NAN, 0.0, 0.0, 0.0]])
    got = bw.histogram_scores(x, table)
    np.testing.assert_allclose(np64(got)[:2], np64(table.scores).max(1).sum(), rtol=1e-6)
    assert np.isnan(got[2].item())


@pytest.mark.parametrize("scale", [1e-30, 1e6, 2e38])
def test_histograms_of_huge_and_tiny_values(backend, scale):
    x = mx.clip(skewed((500, 4)), -1, 1) * 1.6 * scale
    table = bw.histogram_table(x)
    for c, column in enumerate(np64(x).T):
        np.testing.assert_array_equal(np.array(table.counts)[c], np.histogram(column, np64(table.edges)[c])[0])
    want = hbos64(np64(x), np64(table.edges), np.array(table.counts), np64(table.widths))
    assert_scores(bw.histogram_scores(x, table), want.sum(1))


# ---- robust z-scores


@pytest.mark.parametrize("n", [1, 2, 3, 30, 31, 33, 500])
def test_robust_scale(backend, n):
    x = skewed((n, 5))
    x[:, 1] = mx.floor(x[:, 1])
    x[:, 2] = 2.5
    center, scale = bw.robust_scale(bw.quantile_table(x))
    np.testing.assert_allclose(np64(center), np.median(np64(x), axis=0), rtol=1e-6)
    want = scipy.stats.median_abs_deviation(np64(x), axis=0, scale="normal")
    np.testing.assert_allclose(np64(scale), want, rtol=1e-6, atol=1e-7)


@settings(max_examples=60)
@given(x=hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.just(2)), elements=st.integers(-5, 5)))
def test_any_robust_scale(backend, x):
    center, scale = bw.robust_scale(bw.quantile_table(mx.array(x)))
    assert np64(center).tolist() == np.median(x, axis=0).tolist()
    np.testing.assert_allclose(np64(scale), 1.4826022185056018 * scipy.stats.median_abs_deviation(x), rtol=1e-6)


def test_robust_scale_leaves_nan_out(backend):
    x = np.array([[NAN, 1.0], [4.0, 2.0], [1.0, INF], [2.0, 4.0]], np.float32)
    center, scale = bw.robust_scale(bw.quantile_table(mx.array(x)))
    assert center.tolist() == [2.0, 3.0]
    np.testing.assert_allclose(np64(scale), [1.4826022, 1.4826022 * 1.5], rtol=1e-6)
    with pytest.raises(ValueError, match=r"\[robust_scale\] table must hold all values but was made with bins"):
        bw.robust_scale(bw.quantile_table(rand((10, 2)), bins=4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (31, 3), (33, 64), (sized("", 5003), 7)])
def test_robust_zscore(backend, dtype, shape):
    x, center, scale = rand(shape, dtype), rand(shape[1:], seed=1), mx.abs(rand(shape[1:], seed=2))
    got = bw.robust_zscore(x, center, scale)
    assert got.dtype == mx.float32
    want = (np64(x) - np64(center)) / np64(scale)
    np.testing.assert_allclose(np64(got), want, rtol=1e-6, atol=1e-6)


def test_robust_zscore_of_constants(backend):
    x = mx.array([[2.0, 3.0], [2.5, NAN], [-INF, 3.0]])
    got = bw.robust_zscore(x, mx.array([2.0, 3.0]), mx.array([0.0, 0.0]))
    np.testing.assert_array_equal(np.array(got), [[0, 0], [INF, NAN], [-INF, 0]])


# ---- Mahalanobis


def factor(d, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((2 * d + 3, d))
    return np.linalg.cholesky(a.T @ a / len(a) + 0.1 * np.eye(d)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (31, 3), (33, 64), (100, 65), (257, 130), (5003, 16), (70, 300)])
def test_mahalanobis(backend, dtype, n, d):
    x, mean, lower = rand((sized(backend, n), d), dtype), rand((d,), seed=1), factor(d)
    covariance = lower.astype(np.float64) @ lower.T
    want = scipy.spatial.distance.cdist(np64(x), np64(mean)[None], "mahalanobis", VI=np.linalg.inv(covariance))[:, 0]
    got = bw.mahalanobis(x, mean, mx.array(lower) + mx.triu(mx.full((d, d), NAN), 1))
    assert got.dtype == mx.float32
    np.testing.assert_allclose(np64(got), want**2, rtol=2e-5)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_mahalanobis_of_huge_and_tiny_values(backend, scale):
    x, lower = rand((33, 5)) * scale, mx.array(factor(5))
    want = np64(bw.mahalanobis(x / scale, mx.zeros(5), lower))
    np.testing.assert_allclose(np64(bw.mahalanobis(x, mx.zeros(5), lower * scale)), want, rtol=1e-5)


def test_nan_stays_in_its_row(backend):
    x, mean, lower = rand((70, 9)), rand((9,), seed=1), mx.array(factor(9))
    clean = np.array(bw.mahalanobis(x, mean, lower))
    x[11, 4], x[20, 8] = NAN, INF
    got = np.array(bw.mahalanobis(x, mean, lower))
    assert np.isnan(got[11])
    assert not np.isfinite(got[20])
    keep = np.delete(np.arange(70), [11, 20])
    assert bits(got[keep]) == bits(clean[keep])
    alone = bw.mahalanobis(x[5:6], mean, lower)
    assert bits(alone[0]) == bits(clean[5])


def test_derivatives_of_distances(backend):
    x, mean, lower, w = rand((6, 4)), rand((4,), seed=1), mx.array(factor(4)), rand((6,), seed=2)
    got = mx.grad(lambda x: (bw.mahalanobis(x, mean, lower) * w).sum())(x)
    inverse = np.linalg.inv(np64(lower) @ np64(lower).T)
    want = 2 * (np64(x) - np64(mean)) @ inverse * np64(w)[:, None]
    np.testing.assert_allclose(np64(got), want, rtol=1e-4, atol=1e-4)
    center, scale = rand((4,), seed=1), mx.array([1.0, 2.0, 0.5, 4.0])
    got = mx.grad(lambda x: bw.robust_zscore(x, center, scale).sum())(x)
    np.testing.assert_allclose(np64(got), np.broadcast_to(1 / np64(scale), (6, 4)), rtol=1e-6)


# ---- spectral scores


def spectral64(x, k):
    centred = x - x.mean(0)
    _, _, v = np.linalg.svd(centred, full_matrices=False)
    return np.square(centred @ v[:k].T).sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "k"), [(2, 1, 1), (40, 3, 3), (100, 30, 1), (100, 30, 4), (20, 70, 2)])
def test_spectral(backend, dtype, n, d, k):
    """Planted directions of falling strength: the gap below the k-th is 1.5, so that sixteen steps settle it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d)) * 1.5 ** -np.arange(d) + 50
    x = mx.array(x.astype(np.float32)).astype(dtype)
    got, want = np64(bw.spectral_scores(x, k)), spectral64(np64(x), k)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * want.max())
    assert bits(bw.spectral_scores(x, k)) == bits(bw.spectral_scores(x, k))


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_spectral_of_huge_and_tiny_values(backend, scale):
    x = rand((50, 6)) * mx.array([1.0, 0.5, 0.2, 0.1, 0.1, 0.1])
    want = np64(bw.spectral_scores(x)) * scale**2
    np.testing.assert_allclose(np64(bw.spectral_scores(x * scale)), want, rtol=1e-3, atol=1e-4 * want.max())


def test_spectral_of_equal_rows(backend):
    assert bw.spectral_scores(mx.full((7, 3), 5.0)).tolist() == [0.0] * 7


# ---- any rows

ANY = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, 3.4e38, -3.4e38, INF, -INF, NAN]))


@settings(max_examples=30)
@given(x=hnp.arrays(np.float32, (5, 3), elements=ANY), constant=st.booleans())
def test_any_rows_have_scores_of_their_own(backend, x, constant):
    """Whatever stands beside it, a row scores what it scores alone: NaN where it has one."""
    if backend in ("metal", "metal-sim"):
        x = np.where(abs(x) < 2.0**-126, 0, x).astype(np.float32)
    train = skewed((33, 3))
    train[:, 0] = 2.5 if constant else train[:, 0]
    quantiles, histogram = bw.quantile_table(train), bw.histogram_table(train)
    center, scale = bw.robust_scale(quantiles)
    lower = mx.array(factor(3))
    nan, finite = np.isnan(x), np.isfinite(x).all(1)
    for f in (
        lambda a: bw.tail_scores(a, quantiles),
        lambda a: bw.tail_scores(a, quantiles, "copod", "paper"),
        lambda a: bw.histogram_scores(a, histogram),
        lambda a: bw.mahalanobis(a, center, lower),
        lambda a: bw.robust_zscore(a, center, scale),
    ):
        got = f(mx.array(x))
        alone = mx.concatenate([f(mx.array(row[None])) for row in x])
        assert mx.array_equal(got, alone, equal_nan=True)
        found = np.isnan(np.array(got))
        assert found[nan if found.ndim == 2 else nan.any(1)].all()
        if f(mx.array(x[:1])).ndim == 2:
            assert (found == nan).all()
    want = hbos64(
        x[finite].astype(np.float64), np64(histogram.edges), np.array(histogram.counts), np64(histogram.widths)
    )
    assert_scores(bw.histogram_scores(mx.array(x[finite]), histogram), want.sum(1))
    off = x.astype(np.float64) - np64(center)
    with np.errstate(all="ignore"):
        z = np.where(off == 0, np.where(nan, NAN, 0), off / np64(scale)).astype(np.float32)
    np.testing.assert_allclose(np64(bw.robust_zscore(mx.array(x), center, scale)), z, rtol=1e-5, atol=1e-6)


@settings(max_examples=20)
@given(x=hnp.arrays(np.float32, (7, 3), elements=st.floats(-(2.0**50), 2.0**50, width=32)))
def test_any_spectral_scores(backend, x):
    """By all directions a row scores its squared distance from the mean."""
    want = np.square(x - x.astype(np.float64).mean(0)).sum(1)
    got = np64(bw.spectral_scores(mx.array(x), 3))
    assert (got >= 0).all()
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * want.max() + 1e-37)


# ---- transformations, threads, arguments


def transformable():
    train = skewed((40, 5))
    table, histogram, lower = bw.quantile_table(train), bw.histogram_table(train), mx.array(factor(5))
    return [
        lambda x: bw.column_stats(x)[:7],
        lambda x: bw.tail_scores(x, table),
        lambda x: bw.mahalanobis(x, lower[0], lower),
        lambda x: bw.quantile_table(x)[:3],
        lambda x: bw.tail_scores(x, table, "copod"),
        lambda x: bw.tail_scores(x, table, "ecod", "paper", per_column=True),
        lambda x: tuple(bw.histogram_table(x)),
        lambda x: bw.histogram_scores(x, histogram),
        lambda x: bw.histogram_scores(x, histogram, 2.0, per_column=True),
        lambda x: bw.robust_zscore(x, lower[0], lower[4]),
    ]


def assert_same(got, want):
    several = isinstance(want, (list, tuple))
    for a, b in zip(got, want, strict=True) if several else [(got, want)]:
        np.testing.assert_allclose(np64(a), np64(b), rtol=1e-5, atol=1e-6)


def test_vmap(backend):
    x = skewed((3, 40, 5), seed=1)
    for op in transformable():
        mapped = mx.vmap(op)(x)
        for i in range(3):
            assert_same([a[i] for a in mapped] if isinstance(mapped, (list, tuple)) else mapped[i], op(x[i]))


def test_compile(backend):
    """Of the reference a few: MLX runs a C++ compiler for each of its fused kernels."""
    x = skewed((2, 40, 5), seed=1)
    for op in transformable()[: 2 if backend == "reference" else None]:
        compiled = mx.compile(op)
        for one in x:
            assert_same(compiled(one), op(one))


def test_no_derivative_is_said(backend):
    x = skewed((20, 3))
    table, histogram = bw.quantile_table(x), bw.histogram_table(x)
    for op, name in (
        (lambda x: bw.tail_scores(x, table), "tail_scores"),
        (lambda x: bw.tail_scores(x, table, "copod", "paper", per_column=True), "tail_scores"),
        (lambda x: bw.histogram_scores(x, histogram), "histogram_scores"),
        (lambda x: bw.spectral_scores(x), "spectral_scores"),
    ):
        with pytest.raises(ValueError, match=rf"\[{name}\] has no derivative"):
            mx.eval(mx.grad(lambda x, op=op: op(x).sum())(x))


def test_streams(backend):
    s = mx.new_stream(mx.cpu)
    x = skewed((50, 3))
    table = bw.quantile_table(x, stream=s)
    with mx.stream(s):
        want = bw.tail_scores(x, table)
    assert bits(bw.tail_scores(x, table, stream=s)) == bits(want)


def everything():
    x = skewed((3001, 37))
    yield from bw.column_stats(rand((200003, 5)))
    yield from bw.column_stats(x)
    table = bw.quantile_table(x)
    yield from table[:3]
    for method, aggregation in METHODS:
        yield bw.tail_scores(x, table, method, aggregation)
    histogram = bw.histogram_table(x)
    yield from histogram
    yield bw.histogram_scores(x, histogram)
    yield bw.robust_zscore(x, x[0], mx.abs(x[1]))
    yield bw.mahalanobis(x, x[0], mx.array(factor(37)))
    yield bw.spectral_scores(x, 2)


def test_threads_do_not_change_bits():
    _native.use("native")
    got = []
    try:
        for n in (1, 2, 3, 7):
            _native.ext.set_num_threads(n)
            got.append([bits(x) for x in everything()])
    finally:
        _native.ext.set_num_threads(os.cpu_count())
        _native.use_from_environment()
    assert all(g == got[0] for g in got)


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_instruction_sets(isa):
    """Values again, in a process that is held to one instruction set."""
    tests = (
        "test_stats or test_scores or test_ties or test_hist or test_robust_z or test_mahal or test_nan or test_threads"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests],
        env={**os.environ, "BULWARK_ISA": isa, "BULWARK_TEST_BACKENDS": "native"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_bad_arguments(backend):
    x, d3 = mx.zeros((2, 3)), mx.zeros((3,))
    table, histogram = bw.quantile_table(x), bw.histogram_table(x)
    for call, says in [
        (lambda: bw.column_stats([[1.0]]), r"\[column_stats\] x must be an array but is list"),
        (lambda: bw.column_stats(d3), r"\[column_stats\] x must have shape \[n, d\] but has shape \[3\]"),
        (lambda: bw.quantile_table(mx.zeros((2, 3), mx.int32)), r"\[quantile_table\] x must be float32, float16 or"),
        (lambda: bw.quantile_table(x, bins=3), r"\[quantile_table\] bins must be 4 or more but is 3"),
        (lambda: bw.tail_scores(x[:, :2], table), r"\[tail_scores\] x must have shape \[n, 3\] but has shape \[2, 2\]"),
        (lambda: bw.tail_scores(x, table, "hbos"), r"\[tail_scores\] method must be one of ecod, copod but is 'hbos'"),
        (lambda: bw.tail_scores(x, table, "ecod", "sum"), "aggregation must be one of per_feature, paper but is 'sum'"),
        (lambda: bw.histogram_table(x, 0), r"\[histogram_table\] bins must be from 1 to 4096 but is 0"),
        (lambda: bw.histogram_table(x, 2, 0.0), r"\[histogram_table\] alpha must be positive and finite but is 0.0"),
        (lambda: bw.histogram_scores(x, histogram, NAN), r"\[histogram_scores\] tol must be 0 or more but is nan"),
        (lambda: bw.histogram_scores(d3, histogram), r"x must have shape \[n, 3\] but has shape \[3\]"),
        (lambda: bw.robust_zscore(x, d3[:2], d3), r"\[robust_zscore\] center must have shape \[3\] and dtype float32"),
        (
            lambda: bw.robust_zscore(x, d3, d3.astype(mx.float16)),
            "scale must have shape .* has .* dtype mlx.core.float16",
        ),
        (lambda: bw.mahalanobis(x, d3[None], mx.eye(3)), r"\[mahalanobis\] mean must have shape \[3\]"),
        (
            lambda: bw.mahalanobis(x, d3, mx.eye(2)),
            r"cholesky must have shape \[3, 3\] and dtype float32 but has shape",
        ),
        (
            lambda: bw.spectral_scores(x, 4),
            r"\[spectral_scores\] k must be from 1 to 3, the number of columns, but is 4",
        ),
        (lambda: bw.spectral_scores(x, 1, 0), r"\[spectral_scores\] iterations must be 1 or more but is 0"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
