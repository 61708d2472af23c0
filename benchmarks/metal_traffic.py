"""Memory traffic of the Metal kernels, counted by the simulator (tests/msl) while ops run them.

Least: every byte of the buffers that the host binds, once. Requested: what the threads ask for. Both without constant
memory, a few words that all threads share. Times are predicted, not measured: the requested bytes over the bandwidth
that is published for a chip.

Lines of 64 bytes are counted an access of a simdgroup. Rows of odd length start anywhere in a line, so that 32 lanes
that load four values each touch one line more than they fill: 9 for 8 in float32, 5 for 4 in 16 bits, which is what
`lines_over_least` shows for them. The next simdgroup finds the shared line in the cache. Loads that begin on lines
would add a sample's squares in an order that depends on where in the batch it stands, and its norm must not.

A product of matrices reads its inputs many times. What its kernels request stands beside what tiles of 32 x 32 would,
as 32 KiB of threadgroup memory allow them: `tiled`, from shapes alone. So do nearest neighbours, with one more read of
each neighbour, whose distance is computed again in subtracted form.

A case that requests more than 1.05 of the least (noisy copies: 1.02), or 1.1 of `tiled`, has failed its check.
"""

import math
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
from mlx_bulwark import _native

from benchmarks.chips import PREDICTED, predicted_seconds

KEY = bw.random_key()
LINE = 64


def simulator(bench):
    """The simulator, or None where it cannot run."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    try:
        import msl
        import msl.bridge
    finally:
        del sys.path[0]
    if reason := msl.missing():
        print(f"  {bench.suite}: {reason}: no rows")
        return None
    return msl.bridge.Simulator()


def normals(shape, dtype=mx.float32):
    return mx.array(np.random.default_rng(0).standard_normal(shape).astype(np.float32)).astype(dtype)


def spans(n, tile=32):
    return [min(tile, n - at) for at in range(0, n, tile)]


def tiled_gram(batch, rows, d, p, item):
    """Bytes that a Gram norm moves in tiles of 32 x 32 rows: both tiles' rows of x and dy, on the diagonal once."""
    tiles = spans(rows)
    loaded = sum(a + (b if j < i else 0) for i, a in enumerate(tiles) for j, b in enumerate(tiles[: i + 1]))
    return batch * (loaded * (d + p) * item + 4)


def tiled_direct(batch, rows, d, p, item):
    """Bytes that the norm of a gradient moves in tiles of 32 x 32 of its values: their columns of x and dy."""
    return batch * (sum(rows * (a + b) * item for a in spans(p) for b in spans(d)) + 4)


def ghost_cases():
    """Names, what runs, and the bytes that a tiling of 32 x 32 moves."""
    for (batch, rows, d, p), dtype in (
        ((8, 96, 128, 60), mx.float32),
        ((26, 256, 33, 31), mx.float32),
        ((26, 250, 40, 40), mx.bfloat16),
        ((3, 31, 300, 301), mx.float16),
    ):
        x, dy = normals((batch, rows, d), dtype), normals((batch, rows, p), dtype)
        name = f"{batch}x{rows}x{d}x{p}" + ("" if dtype == mx.float32 else f"_{str(dtype).rpartition('.')[2]}")
        shape = batch, rows, d, p, dtype.size
        yield f"ghost.gram.{name}", lambda x=x, dy=dy: [bw.linear_sq_norms(x, dy, method="gram")], tiled_gram(*shape)
        direct = tiled_direct(*shape)
        yield f"ghost.direct.{name}", lambda x=x, dy=dy: [bw.linear_sq_norms(x, dy, method="direct")], direct
    for rows in (1, 100):
        tokens, dy = mx.array(np.random.default_rng(0).integers(0, 50, (8, rows))), normals((8, rows, 64))
        tiled = tiled_gram(8, rows, 1, 64, 4)  # a token is as large as a column
        yield f"ghost.embedding.8x{rows}x64", lambda t=tokens, dy=dy: [bw.embedding_sq_norms(t, dy)], tiled
    x, dy = normals((256, 300)), normals((256, 201))
    yield "ghost.outer.256x1x300x201", lambda: [bw.linear_sq_norms(x, dy)], None


def smooth_cases():
    """Copies whose inputs fit into a threadgroup, and ones that do not; votes among few and many classes."""
    for n, size in ((1000, 784), (300, 3072), (20_000, 30), (50, 10_001), (2, 150_528)):
        x = normals((size,))
        yield f"smooth.noisy_copies.{n}x{size}", lambda n=n, x=x: [bw.noisy_copies(x, n, 0.25, KEY, 0)]
    for rows, classes in ((20_000, 10), (300, 1000), (100, 5001)):
        zeros, logits = mx.zeros(classes + 1, mx.int32), normals((rows, classes))
        yield f"smooth.count_votes.{rows}x{classes}", lambda x=logits, z=zeros: [bw.count_votes(x, z)]


def tails_cases():
    """Names, what runs, and what a search by halves (a value a step) or a substitution (L for each row) asks for."""
    for n, d in ((40_000, 3), (3001, 64), (700, 1000)):
        for dtype, name in ((mx.float32, f"{n}x{d}"), (mx.bfloat16, f"{n}x{d}_bfloat16")):
            x, center = normals((n, d), dtype), normals((d,))
            yield f"tails.column_stats.{name}", lambda x=x: list(bw.column_stats(x)[1:5])
            yield f"tails.robust_zscore.{name}", lambda x=x, c=center: [bw.robust_zscore(x, c, mx.abs(c) + 1)]
            table, histogram = bw.quantile_table(x[:500]), bw.histogram_table(x[:500])
            steps = math.ceil(math.log2(table.values.shape[1])) + 1
            search = n * d * (dtype.size + 4 * (steps + 5)) + 4 * n
            yield f"tails.tail_scores.{name}", lambda x=x, t=table: [bw.tail_scores(x, t)], search
            steps = math.ceil(math.log2(histogram.edges.shape[1])) + 1
            search = n * d * (dtype.size + 4 * (steps + 5)) + 4 * n
            yield f"tails.histogram_scores.{name}", lambda x=x, t=histogram: [bw.histogram_scores(x, t)], search
    for n, d in ((5000, 3), (1001, 64), (100, 200)):
        x, mean, lower = normals((n, d)), normals((d,)), mx.tril(0.01 * normals((d, d))) + mx.eye(d)
        solve = n * (d * (d + 1) // 2 + 2 * d + 1) * 4
        yield f"tails.mahalanobis.{n}x{d}", lambda x=x, m=mean, c=lower: [bw.mahalanobis(x, m, c)], solve


def tiled_knn(n, m, d, k):
    """Bytes that all distances move in tiles of 32 x 32 pairs; then each neighbour is read once more, and comes out."""
    return sum((a + b) * d * 4 for a in spans(n) for b in spans(m)) + n * k * (4 * d + 8)


def knn_cases():
    """Names, what runs, and the bytes that a tiling of 32 x 32 moves."""
    for n, m, d, k in ((128, 3000, 128, 10), (65, 2500, 301, 10), (33, 1500, 300, 40), (9, 3000, 64, 1000)):
        x, y = normals((n, d)), normals((m, d))[::-1]
        yield f"neighbors.knn.{n}x{m}x{d}_k{k}", lambda x=x, y=y, k=k: nearest(x, y, k), tiled_knn(n, m, d, k)


def nearest(x, y, k):
    """Of a thousand, neighbours as a set: two whose distances are equal but for rounding may change places."""
    distances, indices = bw.knn(x, y, k)
    return [distances, mx.sort(indices, axis=1) if k == 1000 else indices]


def tiled_mmd(n, d, permutations):
    """Bytes that the kernel moves in tiles of 32 x 32 pairs, each pair once; with both tiles' bits and sums."""
    tiles = spans(n)
    words = 4 * math.ceil(permutations / 32)
    each = [(a + b) * (4 * d + words + 4) + 32 * permutations for i, a in enumerate(tiles) for b in tiles[: i + 1]]
    return sum(each)


def mmd_cases():
    """Names, what runs, and the bytes that a tiling of 32 x 32 moves."""
    for n, m, d, permutations in ((150, 300, 64, 0), (200, 120, 33, 40), (90, 70, 300, 100)):
        x, y = normals((n, d)), normals((m, d))[::-1]
        run = partial(bw.mmd, x, y, bandwidth=math.sqrt(d), permutations=permutations)
        name = f"neighbors.mmd.{n}x{m}x{d}_b{permutations}"
        yield name, lambda f=run: [mx.array(f().statistic)], tiled_mmd(n + m, d, permutations)


def step_cases():
    """Samples that the registers of a threadgroup hold; longer ones are read in each pass of l2 and l1."""
    for shape in ((2000, 30), (64, 784), (16, 3072), (5, 8191)):
        x, grad, origin = (mx.random.uniform(shape=shape, key=mx.random.key(i)) for i in range(3))
        for norm, eps in (("linf", 0.1), ("l2", 1.0), ("l1", 5.0)):
            run = partial(bw.projected_step, x, grad, origin, eps, eps / 2, norm, (0, 1))
            yield f"step.{norm}.{shape[0]}x{shape[1]}", lambda f=run: [f()]


def cases():
    """Names, and what runs."""
    for n in (1000, 32_000, 400_003):
        yield f"noise.gaussian.{n}", lambda n=n: [bw.gaussian((n,), 1.0, KEY, 0)]
        yield f"noise.add_gaussian.{n}", lambda n=n: [bw.add_gaussian(mx.zeros(n), 1.0, KEY, 0)]
    for batch, size in ((60_000, 3), (512, 1000), (64, 8000), (4, 160_001), (1, 400_003)):
        shape = f"{batch}x{size}"
        for dtype, name in ((mx.float32, shape), (mx.bfloat16, f"{shape}_bfloat16")):
            x, f = normals((batch, size), dtype), mx.ones(batch)
            yield f"clip.sq_norms.{name}", lambda x=x: [bw.sample_sq_norms(x)]
            yield f"clip.clipped_sum.{name}", lambda x=x, f=f: [bw.clipped_sum(x, f)]
            yield f"clip.clip_and_sum.{name}", lambda x=x: [bw.clip_and_sum(x, 1.0, sigma=1.0, key=KEY, counter=0)[0]]
    leaves = [normals((8, n), mx.bfloat16) for n in (70_001, 257, 20_000, 64, 9, 40_004, 1, 3000, 30_011)]
    yield "clip.clip_and_sum.9_leaves_bfloat16", lambda: bw.clip_and_sum(leaves, 1.0)[0]
    yield from tree_cases()
    yield from ghost_cases()
    yield from knn_cases()
    yield from mmd_cases()
    yield from smooth_cases()
    yield from tails_cases()
    yield from step_cases()


def tree_cases():
    """60 leaves, as five blocks of a transformer have them."""
    width, inner = 64, 256
    attention = [n for _ in range(4) for n in (width * width, width)]
    block = [*attention, inner * width, inner, width * inner, width]
    for dtype in (mx.float32, mx.bfloat16):
        leaves = [normals((4, n), dtype) for n in 5 * block]
        name = "4x60_leaves" + ("" if dtype == mx.float32 else "_bfloat16")
        yield f"clip.sq_norms.{name}", lambda x=leaves: [bw.sample_sq_norms(x)]
        yield f"clip.clipped_sum.{name}", lambda x=leaves: bw.clipped_sum(x, mx.ones(4))
        yield (
            f"clip.clip_and_sum.{name}",
            lambda x=leaves: bw.clip_and_sum(x, 1.0, sigma=1.0, key=KEY, counter=0)[0],
        )


def agree(a, b):
    return all(mx.abs(x - y).max() <= 1e-5 * mx.maximum(mx.abs(y).max(), 1) for x, y in zip(a, b, strict=True))


def run(bench):
    sim = simulator(bench)
    if sim is None:
        return
    _native.connect(sim)
    try:
        for case, op, *tiled in cases():
            _native.use("native")
            expected = op()
            _native.use("metal-sim")
            got = op()
            mx.eval(expected, got)
            calls = sim.calls
            bench.check(case, lambda a=got, b=expected, calls=calls: agree(a, b) and not any(c.reports for c in calls))
            rows(bench, case, calls, *tiled)
    finally:
        _native.use_from_environment()


def rows(bench, case, calls, tiled=None):
    buffers = [b for c in calls for b in c.buffers.values() if b["space"] == "device" and b["read"] + b["written"]]
    requested = sum(b["read"] + b["written"] for b in buffers)
    unique = sum(b["unique_read"] + b["unique_written"] for b in buffers)
    least = sum(b["size"] for b in buffers)
    lines = sum(b["lines_read"] + b["lines_written"] for b in buffers)
    accesses = sum(b["accesses_read"] + b["accesses_written"] for b in buffers)
    most = 1.02 if case.startswith("smooth.noisy_copies") else 1.05
    # Each time that a list of candidates is cut, what of it is beyond the 256 keys in registers is read 33 times.
    over_tiled, limit = (4.0, "keys read 33 times") if case.endswith("_k1000") else (1.1, None)
    bench.check(case, requested <= (over_tiled * tiled if tiled else most * least))
    bench.row(f"{case}/requested_over_least", requested / least, "x", better="lower")
    if tiled:
        bench.row(f"{case}/requested_over_tiled", requested / tiled, "x", peer=limit, better="lower")
        bench.row(f"{case}/tiled", tiled, "bytes", better="lower")
    bench.row(f"{case}/requested", requested, "bytes", better="lower")
    bench.row(f"{case}/unique", unique, "bytes", better="lower")
    bench.row(f"{case}/least", least, "bytes", better="lower")
    bench.row(f"{case}/unique_over_least", unique / least, "x", better="lower")
    bench.row(f"{case}/lines_over_least", lines / math.ceil(least / LINE), "x", better="lower")
    bench.row(f"{case}/lines_an_access", lines / accesses, "lines", better="lower")
    bench.row(f"{case}/dispatches", len(calls), "calls", better="lower")
    for chip, bandwidth in PREDICTED.items():
        bench.row(f"{case}/predicted_time_{chip}", predicted_seconds(requested, bandwidth) * 1e6, "us", better="lower")
