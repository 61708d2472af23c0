import math
import os
import subprocess
import sys

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark import _native
from scipy import stats
from scipy.spatial.distance import pdist

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def rand(shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def np64(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def kernel64(z, bandwidths):
    """The kernel's matrix from differences of rows, without its diagonal."""
    squares = np.array([np.square(row - z).sum(1) for row in z])
    k = sum(np.exp(-squares / (2 * b * b)) for b in bandwidths)
    np.fill_diagonal(k, 0)
    return k


def unbiased64(k, is_x):
    n, m = is_x.sum(), (~is_x).sum()
    within = k[is_x][:, is_x].sum() / (n * (n - 1)) + k[~is_x][:, ~is_x].sum() / (m * (m - 1))
    return within - 2 * k[is_x][:, ~is_x].sum() / (n * m)


def assert_mmd(x, y, bandwidth, permutations=0, atol=3e-6, seed=0):
    """Against float64; ``atol`` over the mean of the kernel: some roundings of float32 where rows are few."""
    got = bw.mmd(x, y, bandwidth=bandwidth, permutations=permutations, seed=seed)
    widths = got.bandwidths
    z = np.concatenate([np64(x), np64(y)])
    k = kernel64(z, widths)
    few, rows = min(len(x), len(y)), len(z)
    scale = k.sum() / (rows * (rows - 1)) + 1e-30
    assert got.statistic == pytest.approx(unbiased64(k, np.arange(rows) < len(x)), rel=0, abs=atol * scale)
    generator = np.random.default_rng(seed)
    if bandwidth is None:
        generator.permutation(rows)
    if len(x) > len(y):
        k = np.roll(k, (len(y), len(y)), (0, 1))
    is_x = np.zeros((permutations, rows), bool)
    for row in is_x:
        row[generator.choice(rows, few, replace=False, shuffle=False)] = True
    permuted = [unbiased64(k, row) for row in is_x]
    np.testing.assert_allclose(got.permuted, permuted, rtol=0, atol=atol * scale)
    if permutations:
        assert got.p_value == (1 + sum(p >= got.statistic - 4e-6 * scale / math.sqrt(rows) for p in got.permuted)) / (
            1 + permutations
        )
    else:
        assert got.p_value is None
    return got


# Rows of x and y, columns, permutations: around the sizes at which tiles, vectors and words of bits end.
SHAPES = [
    (2, 2, 1, 3),
    (31, 33, 5, 31),
    (33, 31, 64, 32),
    (64, 64, 16, 33),
    (65, 130, 33, 64),
    (5, 300, 3, 65),
    (300, 2, 7, 100),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_values(backend, shape):
    n, m, d, permutations = shape
    if backend == "metal-sim" and n + m > 128:
        n, m = n // 3 + 2, m // 3 + 2
    assert_mmd(rand((n, d)), rand((m, d), seed=1) + 0.2, math.sqrt(d), permutations)
    if backend == "metal-sim":
        permutations = 0
    assert_mmd(rand((n, d)), rand((m, d), seed=1) * 1.3, [math.sqrt(d), 0.3 * math.sqrt(d), 4.0], permutations)
    assert_mmd(rand((n, d)), rand((m, d), seed=1), None)


@pytest.mark.parametrize("shape", [(513, 700, 9, 40), (1100, 600, 20, 3), (600, 530, 3, 270), (64, 1500, 4, 10)])
def test_several_tiles(backend, shape):
    if backend != "native":
        shape = (60, 90, 9, 70) if backend == "metal-sim" else (513, 600, 5, 40)
    n, m, d, permutations = shape
    assert_mmd(rand((n, d)), rand((m, d), seed=1) + 0.1, None, permutations)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(backend, dtype):
    assert_mmd(rand((40, 13), dtype), rand((71, 13), dtype, 1) + 0.25, 3.0, 5)
    assert_mmd(rand((40, 13), dtype), rand((71, 13), mx.float32, 1), None, 5)


def test_columns_of_another_array(backend):
    x = rand((60, 20))
    a, b = x[:, ::2], x[::-1, 1::2]
    got = bw.mmd(a, b, permutations=20)
    want = bw.mmd(mx.contiguous(a), mx.contiguous(b), permutations=20)
    assert got[:3] == want[:3]


def test_equals_scikit_learn(backend):
    x, y = rand((50, 6)), rand((80, 6), seed=1) + 0.3
    gamma = 0.17
    sklearn = pytest.importorskip("sklearn.metrics.pairwise", reason="scikit-learn's kernel is the oracle")
    xx, yy, xy = (sklearn.rbf_kernel(np64(a), np64(b), gamma) for a, b in ((x, x), (y, y), (x, y)))
    want = (xx.sum() - 50) / (50 * 49) + (yy.sum() - 80) / (80 * 79) - 2 * xy.mean()
    assert bw.mmd(x, y, bandwidth=math.sqrt(0.5 / gamma)).statistic == pytest.approx(want, abs=2e-7)


def test_default_bandwidth_is_the_median_distance(backend):
    x, y = 100 * rand((60, 6)) + 1e4, 100 * rand((80, 6), seed=1) + 1e4
    want = np.median(pdist(np.concatenate([np64(x), np64(y)])))
    assert bw.mmd(x, y).bandwidths == pytest.approx((want,), rel=1e-5)
    equal = mx.zeros((30, 2)) + 5
    got = bw.mmd(equal, equal, permutations=9)
    assert (got.statistic, got.p_value) == (0, 1)
    few = mx.concatenate([equal, mx.array([[5.0, 7.0]])])
    assert bw.mmd(equal, few).bandwidths == pytest.approx((2.0,))


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1.0, 1e30])
def test_scale_changes_nothing(backend, factor):
    x, y = rand((40, 5)), rand((50, 5), seed=1) + 0.5
    want, got = bw.mmd(x, y, permutations=19), bw.mmd(x * factor, y * factor, permutations=19)
    assert got.statistic == pytest.approx(want.statistic, abs=1e-6)
    np.testing.assert_allclose(got.permuted, want.permuted, rtol=0, atol=1e-6)
    assert got.bandwidths == pytest.approx([b * factor for b in want.bandwidths], rel=1e-5)


def test_far_from_the_origin(backend):
    """Whole numbers, so that moving them is exact."""
    x, y = mx.round(8 * rand((70, 4))), mx.round(8 * rand((70, 4), seed=1)) + 1
    want = bw.mmd(x, y, permutations=9)
    got = assert_mmd(x + 1e6, y + 1e6, None, 9)
    assert got.statistic == pytest.approx(want.statistic, abs=1e-6)


def test_near_rows_in_groups_that_are_far_apart(backend):
    """Products of such rows cannot tell how near they are: 2^20 bandwidths from their centre."""
    sides = np.where(np.arange(120) % 3 == 0, 2.0**20, -(2.0**20))[:, None]
    steps = np.random.default_rng(0).integers(-8, 9, (120, 3)) / 8
    z = mx.array((sides + steps).astype(np.float32))
    assert_mmd(z[:50], z[50:], 1.0, 20, atol=1e-5)
    assert_mmd(z[:50], z[50:], [0.5, 2.0, 2.0**20], 20, atol=1e-5)


def test_bandwidths_that_are_tiny_or_huge(backend):
    x, y = rand((40, 5)), rand((50, 5), seed=1)
    assert bw.mmd(x, y, bandwidth=1e-30).statistic == 0
    assert bw.mmd(x, y, bandwidth=1e30).statistic == pytest.approx(0, abs=1e-6)
    again = mx.concatenate([x, x])[30:65]  # 35 pairs of equal rows between the samples, none within
    assert bw.mmd(x, again, bandwidth=1e-30).statistic == pytest.approx(-2 * 35 / (40 * 35))


def test_equal_splits_count_as_equal(backend):
    """3 + 3 rows: 20 splits, of which two by two have one statistic."""
    x, y = mx.array([[0.0], [1.0], [2.0]]), mx.array([[10.0], [11.0], [12.0]])
    got = bw.mmd(x, y, bandwidth=5.0, permutations=2000)
    assert got.p_value == pytest.approx(0.1, abs=0.03)  # 1 of 10, at five standard errors
    assert len(np.unique(np.round(got.permuted, 5))) <= 10


def test_p_values_are_uniform_under_the_null():
    """At 24 and 30 rows; a false alarm at 1e-4 with other seeds."""
    runs = 400
    p = [
        bw.mmd(rand((24, 3), seed=2 * i), rand((30, 3), seed=2 * i + 1), permutations=39, seed=i).p_value
        for i in range(runs)
    ]
    counts = np.bincount(np.round(np.array(p) * 40).astype(int) - 1, minlength=40).reshape(8, 5).sum(1)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_finds_what_differs():
    x = rand((150, 4))
    for y in (rand((150, 4), seed=1) + 0.5, rand((150, 4), seed=1) * 1.7, mx.abs(rand((150, 4), seed=1)) - 0.8):
        assert bw.mmd(x, y, permutations=99).p_value == 0.01


def test_seed(backend):
    x, y = rand((40, 5)), rand((50, 5), seed=1)
    one, again, other = (bw.mmd(x, y, permutations=50, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.permuted, again.permuted)
    assert (one.permuted != other.permuted).any()


@settings(max_examples=20)
@given(st.integers(2, 70), st.integers(2, 70), st.integers(1, 9), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_any_shape(n, m, d, permutations, seed):
    assert_mmd(rand((n, d), seed=seed), rand((m, d), seed=seed + 1), None, permutations, seed=seed)


@pytest.mark.parametrize(
    ("x", "y", "arguments", "message"),
    [
        (mx.zeros((1, 3)), mx.zeros((5, 3)), {}, "x must have shape [n, d], of 2 rows or more"),
        (mx.zeros((3, 0)), mx.zeros((5, 0)), {}, "but has shape [3, 0]"),
        (mx.zeros((3, 3)), mx.zeros((5,)), {}, "y must have shape [n, d]"),
        (mx.zeros((3, 3)), mx.zeros((5, 3), mx.int32), {}, "dtype mlx.core.int32"),
        (mx.zeros((3, 3)), mx.zeros((5, 4)), {}, "y must have 3 columns, as x has, but has 4"),
        (mx.zeros((3, 3)), mx.zeros((5, 3)), {"bandwidth": 0.0}, "bandwidth must be positive"),
        (mx.zeros((3, 3)), mx.zeros((5, 3)), {"bandwidth": []}, "bandwidth must be positive"),
        (mx.zeros((3, 3)), mx.zeros((5, 3)), {"bandwidth": [1.0, math.inf]}, "bandwidth must be positive"),
        (mx.zeros((3, 3)), mx.zeros((5, 3)), {"permutations": -1}, "permutations must be a number from 0 on but is -1"),
        (mx.zeros((3, 3)), mx.zeros((5, 3)), {"permutations": 1.5}, "permutations must be a number from 0 on"),
        (mx.zeros((3, 3)), mx.array([[0.0] * 3, [1, math.nan, 2], [math.inf] * 3]), {}, "2 of its rows are not, row 1"),
    ],
)
def test_refusals(x, y, arguments, message):
    with pytest.raises(ValueError, match=r"^\[mmd\] ") as error:
        bw.mmd(x, y, **arguments)
    assert message in str(error.value)


def test_threads_change_nothing():
    x, y = rand((900, 9)), rand((1100, 9), seed=1)
    with _native.using("native"):
        want = bw.mmd(x, y, permutations=40)
        try:
            for threads in (1, 3):
                _native.ext.set_num_threads(threads)
                got = bw.mmd(x, y, permutations=40)
                assert got[:3] == want[:3]
                np.testing.assert_array_equal(got.permuted, want.permuted)
        finally:
            _native.ext.set_num_threads(os.cpu_count() or 1)


def values_elsewhere(before, **environment):
    """The tests of values in a process of their own, on the CPU."""
    code = f"import sys; {before}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", __file__, "-k", "values or near_rows or tiny"],
        env=os.environ | {"BULWARK_TEST_BACKENDS": "native"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="one instruction set")
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa):
    values_elsewhere("pass", BULWARK_ISA=isa)


@pytest.mark.slow
def test_without_a_blas():
    values_elsewhere("sys.modules['scipy_openblas32'] = None")
