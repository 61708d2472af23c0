"""The kernels that the extension ships: clean in any thread order, and no barrier too many."""

import re

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_bulwark import _native

KEY = bw.key_from_seed(3)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}


def rand(shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def everything():
    """All kernels, on leaves that take each of their ways: short and long rows, more samples than a block, loads of one
    and of four values, more leaves than a call has."""
    batches = [[rand((500, 7)), rand((500, 8), mx.float16, 1)], [rand((3, 5000), mx.bfloat16, 2), rand((3, 4099))]]
    batches.append([rand((5, i + 1), seed=i) for i in range(10)])
    for leaves in batches:
        yield bw.sample_sq_norms(leaves)
        sums, found = bw.clip_and_sum(leaves, 1.0)
        yield from (*sums, *found)
        mask = mx.arange(leaves[0].shape[0]) != 1
        yield from bw.clip_and_sum(leaves, 1.0, "automatic", mask, 0.5, KEY, 7)[0]
        yield from bw.clipped_sum(leaves, found.factors, 0.5, KEY, 7)
        yield from bw.add_gaussian(leaves, 0.5, KEY, 7)
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


def source(sim, name):
    (found,) = (s for s in sim.extension.sources() if s[0] == name)
    return found


def test_every_kernel_was_run(sim, expected):
    results()
    texts = "".join(text for _, text, _ in sim.extension.sources())
    names = set(re.findall(r"\[\[kernel\]\][^;]*?void (\w+)\(", texts))
    assert names == {re.sub(r"_b?float\d+$", "", call.kernel) for call in sim.calls}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("number", range(6))
def test_no_barrier_can_be_missed(sim, expected, number, order):
    name, text, digest = source(sim, "clip")
    pieces = text.split(BARRIER)
    assert len(pieces) == 6 + 1
    mutant = BARRIER.join(pieces[: number + 1]) + BARRIER.join(["", *pieces[number + 1 :]])[len(BARRIER) :]
    assert mutant.count(BARRIER) == 5
    try:
        sim.load(name, mutant, digest)
        sim.option("order", ORDERS[order])
        results()
        assert any("race" in report for report in sim.reports)
    finally:
        sim.load(name, text, digest)


def test_other_sources_have_no_barriers(sim):
    assert BARRIER not in source(sim, "noise")[1]


PLANTED = {
    "past the end": ("n = sample < batch ? min(chunk_size, size - begin) : 0u", "n = chunk_size", "out-of-bounds"),
    "norm not written": ("if (t == 0u) num_refused[0] = bad;", "", None),
    "noise not added": ("z[j], scratch[at])", "0.0f, scratch[at])", None),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_seen(sim, expected, bug):
    name, text, digest = source(sim, "clip")
    old, new, says = PLANTED[bug]
    assert old in text
    try:
        sim.load(name, text.replace(old, new), digest)
        changed = results() != expected
        assert changed if says is None else any(says in report for report in sim.reports)
    finally:
        sim.load(name, text, digest)
