import itertools
import os
import subprocess
import sys
import warnings

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark import _native

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
METRICS = ["euclidean", "sqeuclidean", "cosine", "inner_product"]
NAN, INF = float("nan"), float("inf")


def rand(shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def whole(shape, most, seed=0):
    """Small whole numbers: distances are exact, and many are equal."""
    return mx.array(np.random.default_rng(seed).integers(0, most, shape).astype(np.float32))


def np64(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def bits(found):
    return [np.array(a).tobytes() for a in found]


def distances64(x, y, metric):
    """All distances, in subtracted form where there is one; rows that are not finite count as zeros."""
    x, y = (np.where(np.isfinite(a).all(1, keepdims=True), a, 0) for a in (np64(x), np64(y)))
    if metric == "inner_product":
        return x @ y.T
    if metric == "cosine":
        zero = [~a.any(1) for a in (x, y)]
        x, y = (
            a / np.where(z, 1, np.sqrt(np.square(a / scale).sum(1)) * scale[:, 0])[:, None]
            for a, z, scale in (
                (a, z, np.maximum(abs(a).max(1, initial=0, keepdims=True), 1e-300))
                for a, z in zip((x, y), zero, strict=True)
            )
        )
        half = np.array([np.square(row - y).sum(1) / 2 for row in x]).reshape(len(x), len(y))
        return half + zero[0][:, None] / 2 + zero[1] / 2
    squares = np.array([np.square(row - y).sum(1) for row in x]).reshape(len(x), len(y))
    return np.sqrt(squares) if metric == "euclidean" else squares


def nearest64(x, y, k, metric, exclude):
    """All distances, and the k nearest in float32: distances and indices, ties by the lower index."""
    every = distances64(x, y, metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what overflows float32 is infinite
        order = -every.astype(np.float32) if metric == "inner_product" else every.astype(np.float32)
    finite = np.isfinite(np64(x)).all(1)[:, None] & np.isfinite(np64(y)).all(1)
    barred = ~finite
    if exclude is not None:
        barred |= np.arange(every.shape[1]) == np.array(exclude)[:, None]
    indices = np.lexsort((np.broadcast_to(np.arange(every.shape[1]), order.shape), order, barred))[:, :k]
    gone = np.take_along_axis(barred, indices, 1)
    found = np.where(gone, np.nan, np.take_along_axis(every, indices, 1))
    return np.where(barred, np.nan, every), found, np.where(gone, -1, indices)


def assert_knn(x, y=None, k=5, metric="euclidean", exclude=None, exact=False, rtol=3e-6):
    """``exact``: distances are exact in float32, and indices are those of the oracle. Otherwise neighbours whose
    distances are equal up to rounding may stand in either order, or one for the other at the end."""
    got = bw.knn(x, y, k, metric, exclude=exclude)
    assert (got.distances.dtype, got.indices.dtype) == (mx.float32, mx.int32)
    distances, indices = np64(got.distances), np.array(got.indices)
    itself = np.arange(len(x)) if y is None else exclude
    every, want, order = nearest64(x, x if y is None else y, k, metric, itself)
    assert distances.shape == indices.shape == (len(x), k)
    np.testing.assert_array_equal(indices < 0, order < 0)
    np.testing.assert_array_equal(np.isnan(distances), order < 0)
    if exact:
        np.testing.assert_array_equal(indices, order)
    scale = 0.0
    if metric == "inner_product":  # as exact as its terms
        scale = (abs(np64(x)) @ abs(np64(x if y is None else y)).T)[np.isfinite(every)].max(initial=0)
    if metric == "cosine":  # unit rows are rounded: of a distance D, by some 1e-7 sqrt(D)
        scale = 1e-7 * np.sqrt(np.nanmax(want, initial=1e-12)) / rtol
    at = np.take_along_axis(every, np.maximum(indices, 0), 1)
    kept = order >= 0
    with np.errstate(over="ignore"):
        want, at = want.astype(np.float32), at.astype(np.float32)
    np.testing.assert_allclose(distances[kept], want[kept], rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(distances[kept], at[kept], rtol=rtol, atol=rtol * scale)
    for row, held in zip(indices, kept, strict=True):
        assert len(set(row[held])) == held.sum()


# Rows of x and y, columns, neighbours: around the sizes at which tiles and vectors end.
SHAPES = [
    (1, 1, 1, 1),
    (5, 7, 3, 7),
    (31, 33, 33, 5),
    (33, 31, 31, 31),
    (64, 65, 16, 10),
    (3, 130, 129, 40),
    (130, 3, 40, 2),
    (1, 257, 8, 100),
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_queries(backend, shape, metric):
    n, m, d, k = shape
    assert_knn(rand((n, d)), rand((m, d), seed=1), k, metric)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes(backend, dtype, metric):
    assert_knn(rand((40, 13), dtype), rand((71, 13), dtype, 1), 6, metric)
    assert_knn(rand((65, 13), dtype), None, 6, metric)


def test_mixed_dtypes(backend):
    assert_knn(rand((9, 5), mx.float16), rand((20, 5), mx.float32, 1))
    assert_knn(rand((9, 5)), rand((20, 5), mx.bfloat16, 1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "d", "k"), [(2, 1, 1), (31, 5, 30), (33, 31, 4), (97, 33, 96), (150, 2, 7)])
def test_rows_against_themselves(backend, n, d, k, metric):
    assert_knn(rand((n, d)), None, k, metric)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "inner_product"])
def test_ties_go_to_the_lower_index(backend, metric):
    for n, m, d, most, k in ((40, 90, 3, 3, 11), (7, 150, 1, 2, 30), (20, 70, 2, 4, 70)):
        x, y = whole((n, d), most), whole((m, d), most, 1)
        assert_knn(x, y, k, metric, exact=metric != "euclidean")
        assert_knn(y, None, min(k, m - 1), metric, exact=metric != "euclidean")
        if metric == "euclidean":  # roots are rounded, to the same value where squares are equal
            squares = bw.knn(x, y, k, "sqeuclidean")
            assert (np.array(bw.knn(x, y, k, metric).indices) == np.array(squares.indices)).all()


def test_duplicates(backend):
    """Many rows at one place: all of them are neighbours at an exact 0, the lowest first."""
    x = mx.concatenate([mx.broadcast_to(rand((1, 17)), (90, 17)), rand((40, 17), seed=1)])
    found = bw.knn(x, k=20)
    for i in range(90):
        assert np.array(found.indices)[i].tolist() == [j for j in range(21) if j != i][:20]
    assert (np.array(found.distances)[:90] == 0).all()
    assert_knn(x, None, 20)
    assert_knn(mx.ones((70, 3)), None, 69, exact=True)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_offsets(backend, offset):
    """Far from the origin; float32 holds the rows themselves to an ulp, and the answer is right for these."""
    x = rand((80, 24)) + offset
    assert_knn(x, None, 9)
    assert_knn(x, rand((60, 24), seed=1) + offset, 9, "sqeuclidean")
    assert_knn(x, rand((60, 24), seed=1) - offset, 9)


def test_near_duplicates(backend):
    """Distances far below the rounding of the squared norms."""
    x = rand((50, 40))
    near = mx.concatenate([x + 1e-5 * rand((50, 40), seed=s) for s in (1, 2, 3)])
    assert_knn(x, near, 4)
    assert_knn(100.0 * x + 50, 100.0 * near + 50, 4)


def test_rows_that_products_cannot_tell_apart(backend):
    """Two places far from the centre, around each of them distances below the rounding of a product of rows."""
    sides = mx.where(mx.arange(240) % 2 == 0, 10.0, -10.0)[:, None]
    assert_knn(sides[:8] + 1e-4 * rand((8, 3)), sides + 1e-4 * rand((240, 3), seed=1), 4)
    if backend != "metal-sim":
        assert_knn(sides + 1e-4 * rand((240, 3), seed=1), None, 4)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30])
def test_magnitudes(backend, metric, scale):
    x, y = scale * rand((40, 9)), scale * rand((70, 9), seed=1)
    assert_knn(x, y, 5, metric)


def test_squares_that_overflow_tie(backend):
    x = mx.array([[0.0], [3e30], [1e30], [1e13]])
    found = bw.knn(x, k=3, metric="sqeuclidean")
    assert np.array(found.indices).tolist() == [[3, 1, 2], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert np.array(found.distances)[0].tolist() == pytest.approx([1e26, INF, INF])
    assert np.array(bw.knn(x, k=3).indices).tolist() == [[3, 2, 1], [2, 0, 3], [0, 3, 1], [0, 2, 1]]


@pytest.mark.parametrize("metric", METRICS)
def test_one_far_row_harms_no_other(backend, metric):
    y = np.array(rand((90, 12), seed=1))
    y[40] = 1e6
    assert_knn(rand((30, 12)), mx.array(y), 6, metric)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_are_not_finite(backend, metric, bad):
    x, y = np.array(rand((20, 6))), np.array(rand((50, 6), seed=1))
    want = bw.knn(mx.array(x), mx.array(np.delete(y, [7, 31], 0)), 5, metric)
    x[3, 2], y[7], y[31, 5] = bad, bad, bad
    assert_knn(mx.array(x), mx.array(y), 5, metric)
    got = bw.knn(mx.array(x), mx.array(y), 5, metric)
    others = np.arange(20) != 3
    assert np.array(got.distances)[others].tobytes() == np.array(want.distances)[others].tobytes()
    assert_knn(mx.array(y), None, 49, metric)


def test_rows_of_zeros(backend):
    x = mx.concatenate([mx.zeros((3, 5)), rand((30, 5))])
    for metric in METRICS:
        assert_knn(x, None, 7, metric)
    assert (np.array(bw.knn(x[:3], k=2, metric="cosine").distances) == 1).all()


@pytest.mark.parametrize("metric", METRICS)
def test_exclude(backend, metric):
    x, y = rand((30, 7)), rand((40, 7), seed=1)
    exclude = mx.array(np.random.default_rng(2).integers(-1, 40, 30).astype(np.int32))
    assert_knn(x, y, 5, metric, exclude=exclude)
    assert_knn(x, y, 40, metric, exclude=exclude)  # one of them is missing
    itself, other = bw.knn(x, None, 6, metric), bw.knn(x, x, 6, metric, exclude=mx.arange(30))
    assert bits(itself) == bits(other)


def test_layouts(backend):
    y = rand((40, 8), seed=1)
    assert_knn(rand((8, 20)).T, y)
    assert_knn(rand((40, 8))[::3], y[::-1])
    assert_knn(rand((20, 16))[:, ::2], y[:, 4:] @ rand((4, 8)))
    assert_knn(mx.broadcast_to(rand((1, 8)), (9, 8)), y)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing(backend, metric):
    found = bw.knn(mx.zeros((0, 3)), mx.zeros((4, 3)), 2, metric)
    assert found.distances.shape == found.indices.shape == (0, 2)
    assert bw.knn(mx.zeros((0, 3)), None, 2, metric).indices.shape == (0, 2)
    assert bw.knn(mx.zeros((0, 3)), mx.zeros((0, 3)), 2, metric).indices.shape == (0, 2)
    found = bw.knn(mx.zeros((3, 0)), mx.zeros((4, 0)), 2, metric)
    assert np.array(found.indices).tolist() == [[0, 1]] * 3
    assert np.array(found.distances).tolist() == [[float(metric == "cosine")] * 2] * 3
    for x, y, most in ((mx.zeros((1, 3)), None, 0), (mx.zeros((2, 3)), mx.zeros((0, 3)), 0)):
        with pytest.raises(ValueError, match=f"k must be at most the {most} rows"):
            bw.knn(x, y, 1, metric)


@settings(max_examples=12)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 60),
    d=st.integers(0, 20),
    most=st.sampled_from([2, 5, 500]),
    offset=st.sampled_from([0, -7, 1000]),
    metric=st.sampled_from(["sqeuclidean", "inner_product"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_whole_numbers(backend, n, m, d, most, offset, metric, seed, data):
    offset = 0 if metric == "inner_product" else offset  # its sums stay below 2^24
    x, y = whole((n, d), most, seed) + offset, whole((m, d), most, seed + 100) + offset
    k = data.draw(st.integers(1, m))
    assert_knn(x, y, k, metric, exact=True)
    if m > 1:
        assert_knn(y, None, min(k, m - 1), metric, exact=True)


@settings(max_examples=12)
@given(
    rows=st.integers(2, 50),
    d=st.integers(1, 40),
    exponent=st.integers(-18, 18),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_rows(backend, rows, d, exponent, metric, dtype, seed):
    scale = 10.0**exponent if dtype != mx.float16 and metric in ("euclidean", "cosine") else 1.0
    x = (scale * rand((rows, d), seed=seed)).astype(dtype)
    assert_knn(x, None, min(rows - 1, 1 + seed % 9), metric)


def test_a_row_does_not_depend_on_those_beside_it(backend):
    x, y = rand((40, 10)), rand((90, 10), seed=1)
    together, alone = bw.knn(x, y, 7), [bw.knn(x[i : i + 1], y, 7) for i in range(3)]
    for i, one in enumerate(alone):
        assert [np.array(a)[0].tobytes() for a in one] == [np.array(a)[i].tobytes() for a in together]


@pytest.mark.parametrize("metric", METRICS)
def test_chunks_are_merged_exactly(backend, metric, tmp_path):
    x, y = rand((20, 6)), whole((90, 6), 3, 1)
    exclude = mx.array(np.random.default_rng(2).integers(-1, 90, 20).astype(np.int32))
    want = bits(bw.knn(x, y, 8, metric, exclude=exclude))
    cuts = [0, 3, 3, 40, 89, 90]
    chunks = [np.array(y)[a:b] for a, b in itertools.pairwise(cuts)]
    assert bits(bw.knn(x, (c for c in chunks), 8, metric, exclude=exclude)) == want
    assert bits(bw.knn(x, [mx.array(c) for c in chunks], 8, metric, exclude=exclude)) == want
    np.save(tmp_path / "y.npy", np.array(y, np.float64))
    mapped = np.load(tmp_path / "y.npy", mmap_mode="r")
    assert bits(bw.knn(x, mapped, 8, metric, exclude=exclude)) == want


def test_an_array_is_streamed_in_pieces(backend, monkeypatch):
    monkeypatch.setattr("mlx_bulwark.ops.neighbors._CHUNK_BYTES", 24 * 7)
    x, y = rand((9, 6)), rand((50, 6), seed=1)
    assert bits(bw.knn(x, np.array(y), 8)) == bits(bw.knn(x, y, 8))


LARGER_THAN_MEMORY = """
import resource, sys
import numpy as np, mlx.core as mx, mlx_bulwark as bw

n, d = 4_000_000, 32
x = mx.random.normal((10, d))
mx.eval(bw.knn(x, np.zeros((1000, d), np.float32), 3))
data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, ((data << 10) + (192 << 20), resource.RLIM_INFINITY))
try:
    np.ones(n * d, np.float32)
except MemoryError:
    print("does not fit")

mapped = np.load(sys.argv[1], mmap_mode="r")
rows = np.arange(0, n, n // 40)[:30]
want = np.asarray(mapped[rows]).reshape(10, 3, d)[:, 0]
found = bw.knn(mx.array(want), mapped, 1)
print(np.array_equal(np.array(found.indices)[:, 0], rows[::3]), np.array(found.distances).max())

def pieces():
    for first in range(0, n, 100_000):
        yield np.array(mapped[first : first + 100_000])

streamed = bw.knn(mx.array(want), pieces(), 1)
print(np.array_equal(np.array(streamed.indices), np.array(found.indices)))
"""


@pytest.mark.slow  # and a sanitizer has memory of its own
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's memory is Linux's")
def test_rows_larger_than_memory(tmp_path):
    """Half a gigabyte of rows, from a file and from a generator, with 192 MiB to spare."""
    path, n, d = tmp_path / "y.npy", 4_000_000, 32
    y = np.lib.format.open_memmap(path, "w+", np.float32, (n, d))  # nearly all of it a hole
    rows = np.arange(0, n, n // 40)[:30]
    y[rows] = np.random.default_rng(0).standard_normal((30, d))
    y.flush()
    del y
    native = os.environ | {"BULWARK_BACKEND": "native"}
    done = subprocess.run([sys.executable, "-c", LARGER_THAN_MEMORY, path], capture_output=True, text=True, env=native)
    assert done.stdout.splitlines() == ["does not fit", "True 0.0", "True"], done.stderr


def test_bad_chunks(backend):
    x = mx.zeros((3, 4))
    for y, says in (
        (np.zeros((5, 4), np.int32), "y must be of floats but has dtype int32"),
        (np.zeros((5, 3), np.float32), r"y must have shape \[m, 4\] .* but has shape \[5, 3\]"),
        (np.zeros(5, np.float32), r"y must have shape \[m, 4\]"),
        (np.float32(1)[None][0:0], r"y must have shape \[m, 4\]"),
        ([np.zeros((1, 4), np.float32)], "k must be at most the 1 rows that can be neighbours but is 2"),
        ([], "k must be at most the 0 rows"),
    ):
        with pytest.raises(ValueError, match=says):
            bw.knn(x, y, 2)


def test_compiled(backend):
    f = mx.compile(lambda x, y: bw.knn(x, y, 3, "sqeuclidean"))
    g = mx.compile(lambda x, y: [*bw.knn(x, y, 3), *bw.knn(x, y, 3, "cosine"), *bw.knn(x, y, 2)])
    x, y = rand((8, 5)), rand((30, 5), seed=1)
    for seed in (0, 7):
        x = rand((8, 5), seed=seed)
        assert bits(f(x, y)) == bits(bw.knn(x, y, 3, "sqeuclidean"))
    assert bits(g(x, y)) == bits([*bw.knn(x, y, 3), *bw.knn(x, y, 3, "cosine"), *bw.knn(x, y, 2)])


@pytest.mark.parametrize("metric", METRICS)
def test_gradients(backend, metric):
    x, y, w = rand((6, 4)), rand((15, 4), seed=1), rand((6, 3), seed=2)
    got = mx.grad(lambda x, y: (w * bw.knn(x, y, 3, metric).distances).sum(), argnums=(0, 1))(x, y)
    X, Y, W = np64(x), np64(y), np64(w)
    index = np.array(bw.knn(x, y, 3, metric).indices)

    def loss(X, Y):
        a, b = X[:, None], Y[index]
        if metric == "inner_product":
            return (W * (a * b).sum(-1)).sum()
        if metric == "cosine":
            norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            return (W * (1 - (a * b).sum(-1) / norms)).sum()
        squares = np.square(a - b).sum(-1)
        return (W * (squares if metric == "sqeuclidean" else np.sqrt(squares))).sum()

    for which, (g, at) in enumerate(zip(got, (X, Y), strict=True)):
        want = np.zeros_like(at)
        for i in np.ndindex(at.shape):
            step = np.zeros_like(at)
            step[i] = 1e-6
            sides = [(X + s * step, Y) if which == 0 else (X, Y + s * step) for s in (1, -1)]
            want[i] = (loss(*sides[0]) - loss(*sides[1])) / 2e-6
        np.testing.assert_allclose(np64(g), want, rtol=1e-4, atol=1e-5)


def test_gradient_of_duplicates_is_finite(backend):
    x = mx.concatenate([mx.ones((3, 4)), rand((5, 4))])
    assert np.isfinite(np.array(mx.grad(lambda x: bw.knn(x, k=3).distances.sum())(x))).all()


def test_vmap(backend):
    x, y = rand((3, 6, 4)), rand((3, 15, 4), seed=1)
    got = mx.vmap(lambda x, y: tuple(bw.knn(x, y, 3)))(x, y)
    for i in range(3):
        one = bw.knn(x[i], y[i], 3)
        np.testing.assert_allclose(np.array(got[0][i]), np.array(one.distances), rtol=1e-5)
        assert (np.array(got[1][i]) == np.array(one.indices)).all()


def test_bad_arguments(backend):
    x, y = mx.zeros((6, 4)), mx.zeros((7, 4))
    for call, says in [
        (lambda: bw.knn(x[0]), r"\[knn\] x must have shape \[n, d\] .* but has shape \[4\]"),
        (lambda: bw.knn(x.astype(mx.int32)), "x must have .* but .* dtype .*int32"),
        (lambda: bw.knn(x, y[:, :3]), r"y must have shape \[m, 4\] .* but has shape \[7, 3\]"),
        (lambda: bw.knn(x, y.astype(mx.int32)), "y must have .* dtype .*int32"),
        (lambda: bw.knn(x, y, 0), "k must be from 1 to 1024 but is 0"),
        (lambda: bw.knn(x, y, 1025), "k must be from 1 to 1024 but is 1025"),
        (lambda: bw.knn(x, y, 8), "k must be at most the 7 rows that can be neighbours but is 8"),
        (lambda: bw.knn(x, None, 6), "k must be at most the 5 rows"),
        (lambda: bw.knn(x, y, metric="manhattan"), "metric must be one of euclidean, .* but is 'manhattan'"),
        (lambda: bw.knn(x, exclude=mx.zeros(6, mx.int32)), "exclude must be given with y"),
        (lambda: bw.knn(x, y, exclude=mx.zeros(5, mx.int32)), r"exclude must have shape \[6\] .* \[5\]"),
        (lambda: bw.knn(x, y, exclude=mx.zeros(6)), "exclude must have .* integer dtype but .*float32"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


@pytest.mark.parametrize("d", [64, 1024, 4096])
def test_margin_of_products_covers_their_rounding(backend, d):
    """Rows of one value each, around 1 and around -1: a product adds equal terms, whose roundings go one way, and is
    off by many times what the distances are apart. Without the margin most neighbours are wrong."""
    n, d = (48, min(d, 256)) if backend == "metal-sim" else (192, d)
    steps = np.random.default_rng(0).permutation(n)
    values = np.where(np.arange(n) % 2, 1, -1) * (1 + steps * 2.0**-20)
    x = mx.array(np.repeat(values[:, None], d, 1).astype(np.float32))
    assert_knn(x, None, 7, "sqeuclidean", exact=True)
    assert_knn(x[: n // 3], x[n // 3 :], 7, "sqeuclidean", exact=True)


def test_threads_and_blocks_change_nothing():
    """More rows than a block of the CPU path has, by one thread and by three, by themselves and by halves."""
    x = rand((1500, 9))
    with _native.using("native"):
        want = bw.knn(x, k=20)
        mx.eval(want)
        try:
            for threads in (1, 3):
                _native.ext.set_num_threads(threads)
                mx.eval(got := bw.knn(x, k=20))
                assert bits(got) == bits(want)
        finally:
            _native.ext.set_num_threads(os.cpu_count() or 1)
        assert bits(bw.knn(x, x, k=20, exclude=mx.arange(1500))) == bits(want)
    assert_knn(x, None, 20)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="one instruction set")
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The tests of values, in a process of their own for each."""
    tests = "queries or themselves or ties or duplicates or whole_numbers or not_finite"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", f"({tests}) and not every_instruction"],
        env=os.environ | {"BULWARK_ISA": isa, "BULWARK_TEST_BACKENDS": "native"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_without_a_blas():
    code = "import sys; sys.modules['scipy_openblas32'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", __file__, "-k", "queries or ties or offsets or themselves"],
        env=os.environ | {"BULWARK_TEST_BACKENDS": "native"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("metric", METRICS)
def test_few_rows_against_many(metric):
    """The rows of y are cut into parts."""
    with _native.using("native"):
        y = rand((9000, 6), seed=1)
        assert_knn(rand((3, 6)), y, 7, metric)
        assert_knn(rand((3, 6)), mx.concatenate([y[:40]] * 230), 60, metric)


def test_most_neighbors(backend):
    assert_knn(rand((4, 5)), rand((3000, 5), seed=1), 1024)
    assert_knn(rand((4, 5)), rand((1024, 5), seed=1), 1024)  # every row is a neighbour
    if backend != "metal-sim":  # a million pairs are many for a simulator
        assert_knn(rand((1100, 5)), None, 1024)
