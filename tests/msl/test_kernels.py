"""The kernels that the extension ships: clean in any thread order, and no barrier too many."""

import math
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path

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


def clip():
    """Short and long samples, more of them than a block or a threadgroup has, columns of several threadgroups, more
    leaves than there are buffers for."""
    yield from clipped([rand((300, 7)), rand((300, 8), mx.float16, 1)])
    yield from clipped([rand((20, 700)), rand((20, 601), mx.bfloat16, 1)])
    yield from clipped([rand((3, 5000), mx.bfloat16, 2), rand((3, 4099))])
    yield from clipped([rand((500, i + 1), seed=i) for i in range(10)])
    yield from clipped([rand((3, n), seed=n) for n in (3100, 1, 700, 4, 9, 330, 8, 1100, 2, 31)])


def noise():
    yield from bw.add_gaussian([rand((5, 7)), rand((700,), mx.float16)], 0.5, KEY, 7)
    yield bw.gaussian((700,), 1.0, KEY, 9)
    yield bw.random_bits((777,), KEY, 9, domain="test")


def ghost():
    """Tiles of both sizes, on the diagonal and beside it, several of a unit in a threadgroup, rows left out."""
    x, dy, ids = rand((3, 70, 40)), rand((3, 70, 35), seed=1), mx.array([1, 0, 1])
    mask = mx.array(np.arange(210).reshape(3, 70) % 5 != 2)
    for method in ("gram", "direct"):
        yield bw.linear_sq_norms(x, dy, bias=True, mask=mask, method=method)
        yield bw.linear_sq_norms(x, dy, segments=ids, num_segments=3, method=method)
    yield bw.linear_sq_norms(rand((86, 65, 3), mx.float16), rand((86, 65, 2), mx.float16, 1), method="gram")
    yield bw.linear_sq_norms(rand((260, 2, 33), mx.bfloat16), rand((260, 2, 33), mx.bfloat16, 1), method="direct")
    yield bw.linear_sq_norms(x[:, 0], dy[:, 0], bias=True)
    tokens = mx.array(np.random.default_rng(0).integers(-1, 30, (3, 70)))
    yield bw.embedding_sq_norms(tokens, dy)
    yield bw.embedding_sq_norms(mx.arange(210).reshape(3, 70) // 3, dy, segments=ids)  # most tiles have no equal tokens


def smooth():
    """All copies in one run, and one run each; a slot of votes beside the first threadgroup's."""
    x = rand((40,), mx.float16)
    yield bw.noisy_copies(x, 150, 0.5, KEY, 7)
    yield bw.noisy_copies(x, 3, 0.5, KEY, 7, distribution="uniform", bounds=(-1, 1), levels=17)
    yield bw.noisy_copies(rand((4100,)), 2, 0.5, KEY, 7, bounds=(-1, 1))
    logits = mx.concatenate([rand((50, 10)), mx.full((1, 10), math.nan)])
    yield bw.count_votes(logits, mx.arange(11, dtype=mx.int32))
    yield bw.count_votes(rand((5, 4099), mx.bfloat16), mx.zeros(4100, mx.int32))


def neighbors():
    """Rows of y in two parts, lists that overflow, every metric; rows too near each other for products to tell."""
    x, y = rand((70, 20)), rand((600, 20), seed=1)
    yield from bw.knn(x, y, 3)
    yield from bw.knn(x[:5], y[:90], 2, "sqeuclidean", exclude=mx.arange(5))
    yield from bw.knn(x[:3], y[:70], 2, "inner_product")
    yield from bw.knn(x[:20].astype(mx.float16), None, 2, "cosine")
    sides = 10.0 * mx.where(mx.arange(96) % 2 == 0, 1.0, -1.0)
    near = mx.concatenate([y[:48, :2]] * 2)
    yield from bw.knn(sides[:8, None] + 1e-4 * x[:8, :2], sides[:, None] + 1e-4 * near, 2)
    for permutations in (0, 70):  # rows of two blocks, and columns of two products
        found = bw.mmd(rand((20, 40)), rand((50, 40), seed=1), bandwidth=[6.0, 3.0], permutations=permutations)
        yield mx.array([found.statistic, *found.permuted])
    yield mx.array(bw.mmd(sides[:9, None] + near[:9], sides[9:30, None] + near[9:30], bandwidth=1e-3).statistic)


def tails():
    """Few columns and many, rows beside a full threadgroup, holes, ties, tables of all values and of some."""
    x = mx.concatenate([rand((67, 37)), mx.round(rand((67, 3), seed=1))], axis=1)
    x[3, 5], x[4, 6] = math.nan, math.inf
    yield from bw.column_stats(x)
    yield from bw.column_stats(rand((2300, 3), mx.float16) + 100)
    for bins in (None, 16):
        table = bw.quantile_table(x, bins)
        for aggregation in ("per_feature", "paper"):
            yield bw.tail_scores(x[::-1] * 1.1, table, "copod", aggregation)
            yield bw.tail_scores(x[:9], table, "ecod", aggregation, per_column=True)
    histogram = bw.histogram_table(x)
    yield bw.histogram_scores(x[::-1] * 1.1, histogram)
    yield bw.histogram_scores(x[:9, :].astype(mx.bfloat16), histogram, per_column=True)
    yield bw.robust_zscore(x, x[0], mx.abs(x[1]))
    for d in (5, 70):
        yield bw.mahalanobis(rand((67, d)), rand((d,), seed=1), mx.tril(0.1 * rand((d, d))) + mx.eye(d))


def step():
    """Samples that a threadgroup holds, and one that it does not."""
    for shape in ((3, 40), (2, 700), (1, 8200)):
        x, grad, origin = (mx.clip(rand(shape, mx.bfloat16, i), 0, 1) for i in range(3))
        eps = mx.arange(1, shape[0] + 1).astype(mx.float32) * (0.1 * shape[1])
        for norm in ("linf", "l2", "l1"):
            yield bw.projected_step(x, grad, origin, eps, 0.5 * shape[1], norm, (0, 1))


FAMILIES = {
    "noise": noise,
    "clip": clip,
    "ghost": ghost,
    "smooth": smooth,
    "neighbors": neighbors,
    "tails": tails,
    "step": step,
}


def results(family):
    out = list(FAMILIES[family]())
    mx.eval(out)
    return [np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x).tobytes() for x in out]


@cache
def expected(sim, family):
    """What the shipped text gives, and the kernels that gave it. Before a test changes anything."""
    sim.reset()
    values = results(family)
    kernels = {call.kernel for call in sim.calls}
    sim.reset()
    return values, kernels


def test_one_file_knows_metal():
    files = Path(__file__).parents[2].glob("csrc/**/*.*")
    assert [f.name for f in files if "mlx/backend/metal/" in f.read_text()] == ["launch_metal.cpp"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ORDERS)
def test_thread_order_changes_nothing(sim, family, order):
    values, _ = expected(sim, family)
    sim.option("order", ORDERS[order])
    assert results(family) == values
    assert not sim.reports


def test_every_kernel_was_run(sim):
    run = set.union(*(expected(sim, family)[1] for family in FAMILIES))
    names = {k for text, _ in SOURCES.values() for k in re.findall(r"\[\[kernel\]\][^;]*?void (\w+)\(", text)}
    assert names == {re.sub(r"(_\d+)?_b?float\d+$", "", kernel) for kernel in run}


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
def test_no_barrier_can_be_missed(sim, name, number, order):
    with mutated(sim, name, lambda text: without(text, barriers(text)[number])):
        sim.option("order", ORDERS[order])
        sim.option("lines", 0)
        for x in FAMILIES[name]():
            mx.eval(x)
            if any("without a barrier" in report for report in sim.reports):
                return
    pytest.fail("nothing was reported")


BUSY = 80 * 192  # threads: some for each of the 80 cores of Apple's largest GPU
OPS = {
    "sq_norms": lambda g: bw.sample_sq_norms(g),
    "clipped_sum": lambda g: bw.clipped_sum(g, mx.ones(g[0].shape[0])),
    "clip_and_sum": lambda g: bw.clip_and_sum(g, 1.0)[0],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape", [(1, 700_001), (2, 160_000), (8, 40_001), (64, 8000), (300, 3073), (300, 3072), (2000, 300), (200_000, 1)]
)
def test_enough_threads_for_every_shape(sim, op, shape):
    sim.option("races", 0)
    sim.option("lines", 0)
    mx.eval(OPS[op]([mx.ones(shape)]))
    assert len(sim.calls) <= 2
    reading = max(sim.calls, key=lambda call: sum(b["read"] for b in call.buffers.values()))
    assert reading.threads >= BUSY


TREES = {
    "tiny leaves": [7, 1] * 60,
    "a transformer": [48 * 48, 48, 48 * 48, 48, 192 * 48, 192, 48 * 192, 48] * 12,
    "300 leaves": [300] * 300,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tree", TREES)
def test_any_tree_takes_two_dispatches(sim, op, tree):
    sim.option("races", 0)
    sim.option("lines", 0)
    leaves = [mx.ones((2, size)) for size in TREES[tree]]
    mx.eval(OPS[op](leaves))
    assert len(sim.calls) <= 2
    assert not sim.reports


PLANTED = {
    "past the end": ("clip", "n = min(end - at, size) - first", "n = end - at - first", "out-of-bounds"),
    "another leaf": ("clip", "inputs[input].x", "inputs[input ^ 1u].x", None),
    "leaves before forgotten": ("clip", "if (at >= end) break;", "if (at > begin) break;", None),
    "norm not written": ("clip", "if (t == 0u) num_refused[0] = bad;", "", None),
    "noise not added": ("clip", "fma(sigma, z[j], value)", "value", None),
    "noise of another column": ("clip", "what[TILE], column), value)", "what[TILE], column + 1u), value)", None),
    "a sample forgotten": (
        "clip",
        "samples = min(tile, end - block)",
        "samples = max(1u, min(tile, end - block) - 1u)",
        None,
    ),
    "bias not counted": ("ghost", "+ float(has_bias), v", ", v", None),
    "tiles counted once": ("ghost", "row == column ? 1.0f : 2.0f", "row == column ? 1.0f : 1.0f", None),
    "rows of others": ("ghost", "if (r >= rows) return NOWHERE;", "", "out-of-bounds"),
    "mask forgotten": ("ghost", "masked && mask[row] == 0u", "false", None),
    "ties by the higher index": ("neighbors", "a_index > b_index", "a_index < b_index", None),
    "exclusion forgotten": ("neighbors", "if (excludes && simd_shuffle", "if (false && simd_shuffle", None),
    "never looks beyond": ("neighbors", "all = !is_beyond(", "all = false && !is_beyond(", None),
    "a candidate too few": ("neighbors", "filled[list] = size[r]", "filled[list] = max(1u, size[r]) - 1u", None),
    "a list overflows": ("neighbors", "> sizes.room)", "> 4u * sizes.room)", None),
    "a row too many": ("tails", "held = min(32u, rows - first)", "held = 32u", "out-of-bounds"),
    "equal values not counted": ("tails", "(equal && v == x)", "(equal && v < x)", None),
    "ties forgotten": ("tails", "end >= step && values[end - step] == x", "false", None),
    "the other side": ("tails", "s < 0.0f ? left : s > 0.0f", "s > 0.0f ? left : s < 0.0f", None),
    "differences from a rounded mean": ("tails", "0.5f * m.mean) - m.rest", "0.5f * m.mean)", None),
    "a simdgroup forgotten": ("tails", "other < STATS_SIMDGROUPS", "other + 1u < STATS_SIMDGROUPS", None),
    "noise of the next tile": ("smooth", "tile * 32u + lane, z", "tile * 32u + 32u + lane, z", None),
    "a last tile forgotten": ("smooth", "length / NORMALS_PER_TILE + 2u", "length / NORMALS_PER_TILE", None),
    "a neighbour's values written": ("smooth", "if (at >= from && at < to)", "if (at < to)", None),
    "a value of the copy before": ("smooth", "if (i >= n) i -= n;", "", None),
    "NaN votes": ("smooth", "if (is_nan(x)) return 0xffffffffu;", "", None),
    "ties to the higher class": ("smooth", "index < winner", "index > winner", None),
    "rounded away from the origin": ("step", "ushort(bits - 1) : ushort(bits + 1)", "bits : bits", None),
    "zeros that step": ("step", "(bits & 0x7fffffffu) == 0u", "false", None),
    "radius of another sample": ("step", "by_sample[EPS] != 0u ? row : 0u", "0u", None),
    "bounds forgotten": ("step", "origin - bounds[LOW] : bounds[HIGH] - origin", "1.0f : 1.0f", None),
    "a threshold too small": ("step", "threshold = high;", "threshold = high * 0.99f;", None),
    "votes of other slots": ("smooth", "if (slot < n) atomic", "atomic", "out-of-bounds"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_seen(sim, bug):
    name, old, new, says = PLANTED[bug]
    values, _ = expected(sim, name)
    with mutated(sim, name, lambda text: text.replace(old, new)):
        changed = results(name) != values
        assert changed if says is None else any(says in report for report in sim.reports)
