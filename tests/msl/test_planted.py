"""Bugs that are known to be there: each must be reported, in any thread order, at its line."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import msl

pytestmark = pytest.mark.usefixtures("simulator")
SOURCE = Path(__file__).parent / "planted.metal"
X = np.arange(64, dtype=np.float32)
COUNTS = np.zeros(64, np.uint32)

OUT_OF_BOUNDS_READ = "out-of-bounds read"
RACE = "data race: (read after write|write after read) without a barrier"
BESIDE_ATOMICS = "data race: (plain (read|write) after an atomic|atomic operation after a plain (read|write))"
BUGS = {
    "read_past_the_end": f"{OUT_OF_BOUNDS_READ}: 4 bytes at offset 256 of x",
    "read_before_the_start": f"{OUT_OF_BOUNDS_READ}: 4 bytes at offset -4 of x",
    "write_past_the_end": "out-of-bounds write: 4 bytes at offset 256 of y",
    "straddle_the_end": f"{OUT_OF_BOUNDS_READ}: 4 bytes at offset 256 of x",
    "threadgroup_past_the_end": "out-of-bounds write: 4 bytes at offset 256 of shared",
    "array_past_the_end": "array index out of bounds",
    "array_past_the_end_through_a_pointer": "access outside of an array",
    "wild_pointer": OUT_OF_BOUNDS_READ,
    "too_much_private_memory": "wild pointer, or too much private memory",
    "read_never_written_output": r"read of memory never written: offset \d+ of y",
    "read_never_written_threadgroup": "read of memory never written: offset 0 of shared",
    "no_barrier_before_read": RACE,
    "no_barrier_before_write": RACE,
    "no_barrier_inside_a_simdgroup": RACE,
    "simdgroup_barrier_across_simdgroups": RACE,
    "barrier_for_other_memory": RACE,
    "barrier_for_no_memory": RACE,
    "two_writers": "data race: two writes",
    "two_threadgroups": r"data race: two writes.* by thread \d+ of threadgroup [01]",
    "barrier_that_some_miss": "thread ended while others wait at a threadgroup_barrier",
    "two_barriers_at_once": "threads wait at different threadgroup_barriers",
    "simdgroup_barrier_that_some_miss": "simdgroup_barrier not reached by all lanes",
    "shuffle_from_inactive_lane": "simdgroup function reads an inactive lane",
    "shuffle_in_half_a_simdgroup": "simdgroup function reads an inactive lane",
    "matrix_with_inactive_lanes": "simdgroup matrix operation with inactive lanes",
    "write_to_constant": "write to constant memory: x",
    "plain_read_beside_atomics": BESIDE_ATOMICS,
    "plain_write_beside_atomics": BESIDE_ATOMICS,
    "too_much_threadgroup_memory": "more than 32 KiB of threadgroup memory: 32784 bytes with more",
    "too_much_threadgroup_memory_from_the_host": "more than 32 KiB of threadgroup memory: 32784 bytes",
    "too_many_threads": "more than 1024 threads a threadgroup: 2048 threads",
    "more_threads_than_promised": "more than 32 threads a threadgroup: 64 threads",
    "function_constant_not_set": "read of a function constant that the host did not set: chosen",
    "signed_overflow": "signed overflow",
    "shift_too_far": "shift out of range",
    "divide_by_zero": "integer division by zero",
    "misaligned": "misaligned pointer",
    "cast_out_of_range": "float to integer cast out of range",
    "spin": "no progress: threads spin",
}
LAUNCHES = {  # other than 64 threads in one threadgroup
    "two_threadgroups": {"group": (32, 1, 1)},
    "shuffle_in_half_a_simdgroup": {"grid": (48, 1, 1), "group": (48, 1, 1)},
    "too_many_threads": {"grid": (2048, 1, 1), "group": (2048, 1, 1)},
    "spin": {"grid": (1, 1, 1)},
}
FIXED_LAUNCHES = {
    "too_many_threads": {"grid": (2048, 1, 1), "group": (1024, 1, 1)},
    "more_threads_than_promised": {"group": (32, 1, 1)},
}


@cache
def library(fixed):
    return msl.Library(SOURCE, flags=["-DFIXED"] if fixed else [])


def launch(name, order, fixed):
    setting = {"grid": (64, 1, 1), "group": (64, 1, 1)} | LAUNCHES.get(name, {})
    constants = {"flagged": False, "chosen": 3}
    if fixed:
        setting |= FIXED_LAUNCHES.get(name, {})
    elif name == "function_constant_not_set":
        del constants["chosen"]
    shared = 32784 if name == "too_much_threadgroup_memory_from_the_host" and not fixed else 256
    arguments = {"x": X, "y": msl.Output((64,)), "counts": COUNTS, "flag": COUNTS}
    return library(fixed).launch(
        name, arguments, **setting, constants=constants, threadgroup=[shared], order=order, most_reports=100
    )


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_reported_at_its_line(name, order):
    lines = [n for n, line in enumerate(SOURCE.read_text().splitlines(), 1) if line.endswith(f"// bug: {name}")]
    reports = launch(name, order, fixed=False).reports
    expected = rf"planted\.metal:({'|'.join(map(str, lines))})(:\d+)?: {BUGS[name]}"
    assert any(re.match(expected, report) for report in reports), reports


@pytest.mark.parametrize("order", [0, 1, 2])
def test_without_the_bugs_nothing_is_reported(order):
    assert {name: r for name in BUGS if (r := launch(name, order, fixed=True).reports)} == {}


def test_every_kernel_of_the_file_is_tested():
    assert set(library(False).kernels) == set(BUGS)
