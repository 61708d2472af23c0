"""The kernels that the extension ships: clean in any thread order, and no barrier too many."""

import re
from contextlib import contextmanager

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_bulwark import _native

import msl
from msl.mutations import barriers, without

KEY = bw.key_from_seed(3)
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
SOURCES = {} if msl.missing() else {name: (text, digest) for name, text, digest in _native.ext.sources()}
BARRIERS = [(name, i) for name, (text, _) in SOURCES.items() for i in range(len(barriers(text)))]


def rand(shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def clipped(leaves):
    yield bw.sample_sq_norms(leaves)
    sums, found = bw.clip_and_sum(leaves, 1.0)
    yield from (*sums, *found)
    mask = mx.arange(leaves[0].shape[0]) != 1
    yield from bw.clip_and_sum(leaves, 1.0, "automatic", mask, 0.5, KEY, 7)[0]
    yield from bw.clipped_sum(leaves, found.factors, 0.5, KEY, 7)


def everything():
    """All kernels, on leaves that take each of their ways: short and long samples, more of them than a block or a
    threadgroup has, columns of several threadgroups, more leaves than a call has."""
    yield from clipped([rand((300, 7)), rand((300, 8), mx.float16, 1)])
    yield from clipped([rand((20, 700)), rand((20, 601), mx.bfloat16, 1)])
    yield from clipped([rand((3, 5000), mx.bfloat16, 2), rand((3, 4099))])
    yield from clipped([rand((500, i + 1), seed=i) for i in range(10)])
    yield from bw.add_gaussian([rand((5, 7)), rand((700,), mx.float16)], 0.5, KEY, 7)
    yield bw.gaussian((700,), 1.0, KEY, 9)
    yield bw.random_bits((777,), KEY, 9, domain="test")


def results():
    out = list(everything())
    mx.eval(out)
    return [np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x).tobytes() for x in out]


@pytest.fixture(scope="module")
def expected():
    from conftest import use_simulator

    use_simulator()
    yield results()
    _native.use_from_environment()


@pytest.mark.parametrize("order", ORDERS)
def test_thread_order_changes_nothing(sim, expected, order):
    sim.option("order", ORDERS[order])
    assert results() == expected
    assert not sim.reports


def test_every_kernel_was_run(sim, expected):
    results()
    names = {k for text, _ in SOURCES.values() for k in re.findall(r"\[\[kernel\]\][^;]*?void (\w+)\(", text)}
    assert names == {re.sub(r"_b?float\d+$", "", call.kernel) for call in sim.calls}


@contextmanager
def mutated(sim, name, change):
    """Run another text in place of a shipped one."""
    text, digest = SOURCES[name]
    mutant = change(text)
    assert mutant != text
    try:
        sim.load(name, mutant, digest)
        yield
    finally:
        sim.load(name, text, digest)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "number"), BARRIERS)
def test_no_barrier_can_be_missed(sim, expected, name, number, order):
    with mutated(sim, name, lambda text: without(text, barriers(text)[number])):
        sim.option("order", ORDERS[order])
        results()
        assert any("without a barrier" in report for report in sim.reports)


BUSY = 80 * 192  # threads: some for each of the 80 cores of Apple's largest GPU
OPS = {
    "sq_norms": lambda g: bw.sample_sq_norms(g),
    "clipped_sum": lambda g: bw.clipped_sum(g, mx.ones(g.shape[0])),
    "clip_and_sum": lambda g: bw.clip_and_sum(g, 1.0)[0],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape", [(1, 700_001), (2, 160_000), (8, 40_001), (64, 8000), (300, 3073), (300, 3072), (2000, 300), (200_000, 1)]
)
def test_enough_threads_for_every_shape(sim, op, shape):
    sim.option("races", 0)
    sim.option("lines", 0)
    mx.eval(OPS[op](mx.ones(shape)))
    assert len(sim.calls) <= 2
    reading = max(sim.calls, key=lambda call: sum(b["read"] for b in call.buffers.values()))
    assert reading.threads >= BUSY


PLANTED = {
    "past the end": ("n = sample < batch ? min(chunk_size, size - begin) : 0u", "n = chunk_size", "out-of-bounds"),
    "norm not written": ("if (t == 0u) num_refused[0] = bad;", "", None),
    "noise not added": ("fma(sigma, z[j], value)", "value", None),
    "noise of another column": ("what[TILE], column), value)", "what[TILE], column + 1u), value)", None),
    "a sample forgotten": ("samples = min(tile, end - block)", "samples = max(1u, min(tile, end - block) - 1u)", None),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_seen(sim, expected, bug):
    old, new, says = PLANTED[bug]
    with mutated(sim, "clip", lambda text: text.replace(old, new)):
        changed = results() != expected
        assert changed if says is None else any(says in report for report in sim.reports)
