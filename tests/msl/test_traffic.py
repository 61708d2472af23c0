"""What the simulator counts of each buffer: bytes, lines of 64 bytes, accesses of simdgroups."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import msl

pytestmark = pytest.mark.usefixtures("simulator")
THREADS = 64  # two simdgroups


@cache
def library():
    return msl.Library(Path(__file__).parent / "traffic.metal")


def buffers(kernel, size, order=0):
    x = np.zeros(size, np.uint8)
    arguments = {"x": x, "y": msl.Output((size,), np.uint8) if kernel != "count_atomically" else x}
    result = library().launch(kernel, arguments, grid=(THREADS, 1, 1), group=(THREADS, 1, 1), order=order)
    assert result.reports == []
    return result.buffers["x"], result.buffers["y"]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("kernel", "element", "loads", "stores"),
    [
        ("copy_uchar", 1, 1, 1),
        ("copy_half4", 8, 1, 1),
        ("copy_float4", 16, 1, 1),
        ("copy_float3", 16, 1, 1),  # aligned to 16 bytes, and moved whole
        ("copy_packed_float3", 12, 3, 1),  # as clang splits it
        ("copy_packed_float4", 16, 1, 1),
        ("copy_packed_bfloat4", 8, 1, 1),
        ("copy_struct", 20, 3, 3),
    ],
)
def test_bytes_lines_and_accesses_of_a_copy(kernel, element, loads, stores, order):
    size = THREADS * element
    x, y = buffers(kernel, size, order)
    assert (x["size"], x["read"], x["unique_read"], x["written"]) == (size, size, size, 0)
    assert (y["size"], y["written"], y["unique_written"], y["read"]) == (size, size, size, 0)
    lines = 2 * -(-32 * element // 64)  # of two simdgroups; each part of an element lies in all of them
    assert (x["lines_read"], x["accesses_read"]) == (lines * loads, 2 * loads)
    assert (y["lines_written"], y["accesses_written"]) == (lines * stores, 2 * stores)


@pytest.mark.parametrize(
    ("kernel", "size", "read", "unique", "lines"),
    [
        ("every_16th_float", 16 * 4 * THREADS, 256, 256, 64),  # a line for each thread
        ("one_float_for_all", 256, 256, 4, 2),  # one for each simdgroup
        ("each_float_twice", 256, 512, 256, 8),
        ("shifted_float", 260, 256, 256, 6),  # 32 floats from the second on lie in three lines
    ],
)
def test_how_memory_is_read(kernel, size, read, unique, lines):
    x, _ = buffers(kernel, size)
    assert (x["read"], x["unique_read"], x["lines_read"]) == (read, unique, lines)


def test_atomics_are_counted_apart():
    x, y = buffers("count_atomically", 256)
    assert (x["read"], x["atomic"]) == (256, 0)
    assert (y["read"], y["written"], y["atomic"]) == (0, 0, 2 * 4 * THREADS)  # a read and a write each
