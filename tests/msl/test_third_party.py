"""Kernels that are not ours: those that MLX ships, against numpy, in any thread order, and with barriers missing."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import mlx
import numpy as np
import pytest

import msl
from msl.build import preprocess
from msl.mutations import barriers, without
from msl.scan import after_bracket

pytestmark = pytest.mark.usefixtures("simulator")
FOLDER = Path(__file__).parent / "third_party"
INCLUDE = [Path(folder) / "include" for folder in mlx.__path__]
ORDERS = pytest.mark.parametrize("order", [0, 1, 2])
rng = np.random.default_rng(7)


@cache
def library(name):
    return msl.Library(FOLDER / f"{name}.metal", include=INCLUDE)


def run(file, kernel, arguments, grid, group, order=0, constants=None):
    result = library(file).launch(kernel, arguments, grid=grid, group=group, constants=constants, order=order)
    assert not result.reports, "\n".join(result.reports)
    return result.arrays


def random(*shape, dtype=np.float32):
    return (3 * rng.standard_normal(shape)).astype(dtype)


def softmax_of(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logsumexp_of(x):
    return np.log(np.exp(x.astype(np.float64)).sum(-1))


def bfloat_bits(x):
    return (x.view(np.uint32) + 0x7FFF + (x.view(np.uint32) >> 16 & 1) >> 16).astype(np.uint16)


def from_bfloat_bits(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@ORDERS
@pytest.mark.parametrize("columns", [1, 31, 129, 1000])
def test_softmax(columns, order):
    x = random(3, columns)
    threads = -(-columns // 128) * 32
    arguments = {"in": x, "out": msl.Output(x.shape), "axis_size": np.int32(columns)}
    out = run("softmax", "softmax_float32", arguments, (3 * threads, 1, 1), (threads, 1, 1), order)["out"]
    np.testing.assert_allclose(out, softmax_of(x), rtol=1e-5, atol=1e-9)


def test_softmax_of_16_bits():
    x = random(2, 300, dtype=np.float16)
    arguments = {"in": x, "out": msl.Output(x.shape, np.float16), "axis_size": np.int32(300)}
    out = run("softmax", "softmax_float16", arguments, (192, 1, 1), (96, 1, 1))["out"]
    np.testing.assert_allclose(out, softmax_of(x), rtol=1e-3, atol=1e-6)

    bits = bfloat_bits(random(2, 300))
    arguments = {"in": bits, "out": msl.Output(bits.shape, np.uint16), "axis_size": np.int32(300)}
    out = from_bfloat_bits(run("softmax", "softmax_bfloat16", arguments, (192, 1, 1), (96, 1, 1))["out"])
    np.testing.assert_allclose(out, softmax_of(from_bfloat_bits(bits)), rtol=2**-8)


@ORDERS
def test_softmax_of_long_rows(order):
    x = random(2, 5001)
    arguments = {"in": x, "out": msl.Output(x.shape), "axis_size": np.int32(5001)}
    out = run("softmax", "softmax_looped_float32", arguments, (2048, 1, 1), (1024, 1, 1), order)["out"]
    np.testing.assert_allclose(out, softmax_of(x), rtol=1e-5, atol=1e-9)


@ORDERS
@pytest.mark.parametrize(("kernel", "columns", "threads"), [("", 33, 32), ("", 1000, 256), ("_looped", 5001, 1024)])
def test_logsumexp(kernel, columns, threads, order):
    x = random(3, columns)
    arguments = {"in": x, "out": msl.Output((3,)), "axis_size": np.int32(columns)}
    name = f"logsumexp{kernel}_float32"
    out = run("softmax", name, arguments, (3 * threads, 1, 1), (threads, 1, 1), order)["out"]
    np.testing.assert_allclose(out, logsumexp_of(x), rtol=1e-6)


@ORDERS
def test_cross_entropy(order):
    x, targets = random(4, 777), np.array([0, 776, 5, -2], np.int32)
    arguments = {"in": x, "targets": targets, "out": msl.Output((4,)), "axis_size": np.int32(777)}
    out = run("softmax", "cross_entropy_float32", arguments, (4 * 256, 1, 1), (256, 1, 1), order)["out"]
    np.testing.assert_allclose(out, logsumexp_of(x) - x[np.arange(4), targets], rtol=1e-5)


@ORDERS
@pytest.mark.parametrize("size", [1, 33, 10007])
def test_reduce_all(size, order):
    x = random(size)
    arguments = {"in": x, "out": msl.Output((1,)), "in_size": np.uint64(size), "row_size": np.uint64(size)}
    out = run("reduce", "all_sum_float32", arguments, (256, 1, 1), (256, 1, 1), order)["out"]
    np.testing.assert_allclose(out[0], x.sum(dtype=np.float64), rtol=1e-5, atol=1e-4)

    half = x.astype(np.float16)
    arguments |= {"in": half, "out": msl.Output((1,), np.float16)}
    assert run("reduce", "all_max_float16", arguments, (256, 1, 1), (256, 1, 1), order)["out"] == half.max()


def rows(count, columns):
    x = random(count, columns)
    arguments = {
        "in": x,
        "out": msl.Output((count,)),
        "reduction_size": np.uint64(columns),
        "out_size": np.int64(count),
    }
    return x, arguments, (64, -(-count // 4), 1), (64, 1, 1)


@ORDERS
def test_reduce_rows(order):
    x, *launch = rows(8, 333)
    out = run("reduce", "row_sum_float32", *launch, order)["out"]
    np.testing.assert_allclose(out, x.sum(1, dtype=np.float64), rtol=1e-5, atol=1e-4)


def test_that_two_threadgroups_of_mlx_write_the_same_row():
    # Its last threadgroup steps back to a whole block of four rows, and sums again what the one before it sums.
    _, arguments, grid, group = rows(7, 333)
    reports = library("reduce").launch("row_sum_float32", arguments, grid=grid, group=group).reports
    assert len(reports) == 1
    assert reports[0].startswith("reduce_row.h:")
    assert "two writes without a barrier: offset 12 of out" in reports[0]


@ORDERS
@pytest.mark.parametrize(
    ("kernel", "dtype", "width"), [("column_min_int32", np.int32, 32), ("column_sum_float32", np.float32, 32)]
)
def test_reduce_columns(kernel, dtype, width, order):
    x = (100 * random(70, 45)).astype(dtype)
    arguments = {
        "in": x,
        "out": msl.Output((45,), dtype),
        "reduction_size": np.uint64(70),
        "reduction_stride": np.int64(45),
        "shape": np.array([1], np.int32),
        "strides": np.array([0], np.int64),
        "ndim": np.int32(0),
        "reduce_shape": np.array([70], np.int32),
        "reduce_strides": np.array([45], np.int64),
        "reduce_ndim": np.int32(1),
        "non_col_reductions": np.uint64(1),
        "column_offset": np.int64(0),
    }
    out = run("reduce", kernel, arguments, (256 * -(-45 // width), 1, 1), (256, 1, 1), order)["out"]
    expected = x.min(0) if dtype == np.int32 else x.sum(0, dtype=np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-3)


@ORDERS
@pytest.mark.parametrize("size", [1, 127, 128, 1000])
def test_scan(size, order):
    x = rng.integers(-99, 99, (3, size), dtype=np.int32)
    arguments = {"in": x, "out": msl.Output(x.shape, np.int32), "axis_size": np.uint64(size)}
    grid, group = (1024, 3, 1), (1024, 1, 1)
    assert (run("scan", "sum_int32", arguments, grid, group, order)["out"] == x.cumsum(1)).all()
    reversed_sums = x[:, ::-1].cumsum(1)[:, ::-1] - x
    assert (run("scan", "sum_reversed_exclusive_int32", arguments, grid, group, order)["out"] == reversed_sums).all()

    y = random(3, size)
    arguments |= {"in": y, "out": msl.Output(y.shape)}
    assert (run("scan", "max_float32", arguments, grid, group, order)["out"] == np.maximum.accumulate(y, 1)).all()


@ORDERS
def test_long_scan(order):
    x = random(9999)
    arguments = {"in": x, "out": msl.Output(x.shape), "axis_size": np.uint64(9999)}
    out = run("scan", "max_float32", arguments, (1024, 1, 1), (1024, 1, 1), order)["out"]
    assert (out == np.maximum.accumulate(x)).all()


def test_that_a_scan_of_mlx_reads_sums_of_simdgroups_that_do_not_exist():
    # Harmless there: these lanes' sums are not used.
    arguments = {"in": np.ones(99, np.int32), "out": msl.Output((99,), np.int32), "axis_size": np.uint64(99)}
    result = library("scan").launch("sum_int32", arguments, grid=(64, 1, 1), group=(64, 1, 1))
    assert (result.arrays["out"] == np.arange(1, 100)).all()
    assert len(result.reports) == 1
    assert result.reports[0].startswith("scan.h:")
    assert "read of memory never written: offset 8 of simdgroup_sums" in result.reports[0]


@ORDERS
def test_scan_along_columns(order):
    x = rng.integers(-99, 99, (70, 45), dtype=np.int32)
    arguments = {
        "in": x,
        "out": msl.Output(x.shape, np.int32),
        "axis_size": np.uint64(70),
        "stride": np.uint64(45),
        "stride_blocks": np.uint64(2),
    }
    out = run("scan", "strided_sum_int32", arguments, (256, 2, 1), (256, 1, 1), order)["out"]
    assert (out == x.cumsum(0)).all()


def sorting(kernel, x, dtype, order=0):
    size = np.int32(x.shape[1])
    arguments = {"inp": x, "out": msl.Output(x.shape, dtype), "size_sorted_axis": size}
    arguments |= {f"{side}_stride_sorted_axis": np.int32(1) for side in ("in", "out")}
    arguments |= {f"{side}_stride_segment_axis": size for side in ("in", "out")}
    return run("sort", kernel, arguments, (64, len(x), 1), (64, 1, 1), order)["out"]


@ORDERS
@pytest.mark.parametrize("size", [1, 33, 500])
def test_sort(size, order):
    x = random(3, size)
    assert (sorting("sort_float32", x, np.float32, order) == np.sort(x, 1)).all()


@ORDERS
def test_argsort(order):
    x = random(2, 300, dtype=np.float16)
    places = sorting("argsort_float16", x, np.uint32, order)
    assert (np.sort(places, 1) == np.arange(300)).all()
    assert (np.take_along_axis(x, places, 1) == np.sort(x, 1)).all()


def test_searchsorted():
    a, v = np.sort(random(99)), random(40)
    arguments = {"a": a, "v": v, "out": msl.Output((40,), np.uint32), "n": np.uint32(99), "a_stride": np.int64(1)}
    out = run("sort", "searchsorted_float32", arguments, (40, 1, 1), (32, 1, 1))["out"]
    assert (out == np.searchsorted(a, v)).all()


@ORDERS
def test_attention(order):
    heads, keys, width = 2, 45, 64
    q, k, v = random(heads, width), random(heads, keys, width), random(heads, keys, width)
    arguments = {"queries": q, "keys": k, "values": v, "out": msl.Output(q.shape), "scale": np.float32(0.125)}
    arguments |= {"gqa_factor": np.int32(1), "N": np.int32(keys)}
    arguments |= {f"{x}_head_stride": np.uint64(keys * width) for x in "kv"}
    arguments |= {f"{x}_seq_stride": np.uint64(width) for x in "kv"}
    constants = dict.fromkeys(
        ["has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask", "has_sinks"], False
    )
    grid, group = (1024 * heads, 1, 1), (1024, 1, 1)
    out = run("attention", "attention_float32", arguments, grid, group, order, constants)["out"]
    weights = softmax_of(0.125 * np.einsum("hd,hkd->hk", q, k, dtype=np.float64))
    np.testing.assert_allclose(out, np.einsum("hk,hkd->hd", weights, v), rtol=1e-4, atol=1e-5)


def launch_gemm(a, b, c=None, order=0):
    """a @ b, or 2 a @ b - 3 c."""
    (m, k), n = a.shape, b.shape[1]
    params = np.zeros(
        1,
        [
            *((name, np.int32) for name in ("M", "N", "K", "lda", "ldb", "ldd", "tiles_n", "tiles_m")),
            *((name, np.int64) for name in ("batch_stride_a", "batch_stride_b", "batch_stride_d")),
            *((name, np.int32) for name in ("swizzle_log", "gemm_k_iterations_aligned", "batch_ndim", "padding")),
        ],
    )
    params[0] = (m, n, k, k, n, n, -(-n // 32), -(-m // 32), 0, 0, 0, 0, k // 16, 0, 0)
    addmm = [("ldc", np.int32), ("fdc", np.int32), ("stride", np.int64), ("alpha", np.float32), ("beta", np.float32)]
    arguments = {"A": a, "B": b, "C": c, "D": msl.Output((m, n)), "params": params}
    arguments["addmm_params"] = np.array([(n, 1, 0, 2.0, -3.0)], addmm)
    if c is None:
        del arguments["C"]
    constants = dict.fromkeys(["has_batch", "align_M", "align_N", "align_K"], False)
    constants |= dict.fromkeys(["use_out_source", "do_axpby"], c is not None)
    grid = (32 * -(-n // 32), 2 * -(-m // 32), 2)
    return library("gemm").launch(
        "gemm_float32", arguments, grid=grid, group=(32, 2, 2), constants=constants, order=order
    )


@ORDERS
def test_matrix_product(order):
    a, b, c = random(45, 50), random(50, 37), random(64, 37)
    result = launch_gemm(a, b, order=order)
    assert result.reports == []
    np.testing.assert_allclose(result.arrays["D"], a.astype(np.float64) @ b, rtol=1e-5, atol=1e-4)

    a = random(64, 50)
    result = launch_gemm(a, b, c, order=order)
    assert result.reports == []
    np.testing.assert_allclose(result.arrays["D"], 2 * (a.astype(np.float64) @ b) - 3 * c, rtol=1e-5, atol=1e-4)


def test_that_addmm_of_mlx_reads_past_the_last_row():
    # Its epilogue compares columns with the matrix's edge, but not rows.
    result = launch_gemm(random(45, 50), random(50, 37), random(45, 37))
    assert len(result.reports) == 1
    assert result.reports[0].startswith("mma.h:")
    assert "out-of-bounds read: 4 bytes at offset 7104 of C (6660 bytes)" in result.reports[0]


@pytest.mark.parametrize(
    ("file", "kernel", "where", "barrier_count", "test"),
    [
        ("softmax", "softmax_float32", "void softmax_single_row", 5, lambda: test_softmax(1000, 0)),
        ("softmax", "softmax_looped_float32", "void softmax_looped", 2, lambda: test_softmax_of_long_rows(0)),
        ("scan", "max_float32", "void contiguous_scan", 5, lambda: test_long_scan(0)),
        ("sort", "argsort_float16", "struct BlockMergeSort", 3, lambda: test_argsort(0)),
        ("sort", "argsort_float16", "struct KernelMergeSort", 2, lambda: test_argsort(0)),
        ("attention", "attention_float32", "void sdpa_vector", 3, lambda: test_attention(0)),
    ],
)
def test_a_missing_barrier_is_reported(file, kernel, where, barrier_count, test, tmp_path, monkeypatch):
    text = preprocess(FOLDER / f"{file}.metal", include=INCLUDE)
    start = text.index(where)
    end = after_bracket(text, text.index("{", start))
    calls = [call for call in barriers(text) if start < call[0] < end]
    assert len(calls) == barrier_count

    def mutant(number):
        source = tmp_path / f"{number}.metal"
        source.write_text(without(text, calls[number]))
        return msl.Library(source, only=lambda name: name == kernel)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for library in pool.map(mutant, range(barrier_count)):
            monkeypatch.setitem(globals(), "library", lambda _, library=library: library)
            with pytest.raises(AssertionError, match=r"data race|read of memory never written"):
                test()
