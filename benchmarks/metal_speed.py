"""Kernels on an Apple GPU: time, share of the chip's bandwidth, and the roofline beside it (``--device gpu``).

A case knows the bytes that its kernels must move: what they read and write, the gradients twice where norms come before
the sum. The tests hold that number against the simulator's count, at small sizes. Noise is bound by arithmetic, so its
share is the lower. So are ghost norms and neighbours: their bytes are each input once, which caches serve again and
again, and beside them stand the multiplications and additions of their products. Scores by columns search a table that
caches hold as well. The peer is the plain-MLX reference under ``mx.compile``, which returns the same values.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
from mlx.utils import tree_flatten
from mlx_bulwark import _native
from mlx_bulwark.ops import clip, noise, smooth

from benchmarks.chips import PREDICTED, predicted_seconds

KEY = bw.key_from_seed(0)  # nothing is kept secret by what is measured here
COUNTER = mx.array([0, 0], mx.uint32)
SIGMA = mx.array(0.5)
BOUND = mx.array(1.0)


class Case(NamedTuple):
    """An op, the same by its reference, the inputs of both, and what the op must do."""

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: list[mx.array]
    nbytes: int
    flops: int = 0  # of matrix products


class Sizes(NamedTuple):
    """How large the cases are."""

    values: int = 16_000_000
    batch: int = 64
    columns: int = 1_000_000
    leaves: int = 200
    leaf: int = 2048
    tokens: int = 512
    width: int = 1024
    copies: int = 10_000
    neighbors: int = 16_384
    rows: int = 1_000_000
    samples: int = 4096


def cases(sizes: Sizes) -> Iterator[Case]:
    """Every family in turn."""
    yield from _noise_cases(sizes.values)
    batch, columns, leaves, leaf = sizes.batch, sizes.columns, sizes.leaves, sizes.leaf
    for dtype, suffix in ((mx.float32, ""), (mx.bfloat16, "_bfloat16")):
        yield from _clip_cases(f"{batch}x{columns}{suffix}", [_normals((batch, columns), dtype)])
    yield from _clip_cases(f"{batch}x{leaves}x{leaf}", [_normals((batch, leaf)) for _ in range(leaves)])
    for dtype, suffix in ((mx.float32, ""), (mx.bfloat16, "_bfloat16")):
        yield from _ghost_cases(batch // 4, sizes.tokens, sizes.width, dtype, suffix)
    yield from _smooth_cases(sizes.copies)
    yield _neighbors_case(sizes.neighbors)
    yield from _tails_cases(sizes.rows)
    yield from _step_cases(sizes.samples)


def _noise_cases(n: int) -> Iterator[Case]:
    yield Case(
        f"noise.gaussian.{n}",
        lambda: bw.gaussian((n,), SIGMA, KEY, COUNTER),
        lambda: noise.gaussian_reference((n,), SIGMA, KEY, COUNTER),
        [],
        4 * n,
    )
    yield Case(
        f"noise.add_gaussian.{n}",
        lambda x: bw.add_gaussian(x, SIGMA, KEY, COUNTER),
        lambda x: noise.add_gaussian_reference(x, SIGMA, KEY, COUNTER),
        [_normals((n,))],
        8 * n,
    )
    yield Case(
        f"noise.random_bits.{n}",
        lambda: bw.random_bits((n,), KEY, COUNTER, domain="test"),
        lambda: noise.random_bits_reference((n,), KEY, COUNTER, domain="test"),
        [],
        4 * n,
    )


def _clip_cases(shape: str, grads: list[mx.array]) -> Iterator[Case]:
    batch = grads[0].shape[0]
    read, written = sum(g.nbytes for g in grads), sum(4 * g.size // batch for g in grads)
    factors = mx.ones(batch)
    yield Case(
        f"clip.sample_sq_norms.{shape}",
        lambda *g: bw.sample_sq_norms(list(g)),
        lambda *g: clip.sample_sq_norms_reference(list(g)),
        grads,
        read + 4 * batch,
    )
    yield Case(
        f"clip.clipped_sum.{shape}",
        lambda *g: bw.clipped_sum(list(g), factors),
        lambda *g: clip.clipped_sum_reference(list(g), factors),
        grads,
        read + written,
    )
    yield Case(
        f"clip.clip_and_sum.{shape}",
        lambda *g: bw.clip_and_sum(list(g), BOUND, sigma=SIGMA, key=KEY, counter=COUNTER)[0],
        lambda *g: clip.clip_and_sum_reference(list(g), BOUND, sigma=SIGMA, key=KEY, counter=COUNTER)[0],
        grads,
        2 * read + written,
    )


def _ghost_cases(batch: int, rows: int, width: int, dtype: mx.Dtype, suffix: str) -> Iterator[Case]:
    x, dy = _normals((batch, rows, width), dtype), _normals((batch, rows, width), dtype)
    shape, nbytes = f"{batch}x{rows}x{width}x{width}{suffix}", x.nbytes + dy.nbytes + 4 * batch
    # A Gram matrix is symmetric: half of it is computed.
    for method, flops in (("gram", 2 * batch * rows**2 * width), ("direct", 2 * batch * rows * width**2)):
        op = partial(bw.linear_sq_norms, method=method)
        yield Case(f"ghost.{method}.{shape}", op, _by_reference(op), [x, dy], nbytes, flops)
    each = [x.flatten(0, 1), dy.flatten(0, 1)]
    yield Case(
        f"ghost.outer.{batch * rows}x1x{width}x{width}{suffix}",
        bw.linear_sq_norms,
        _by_reference(bw.linear_sq_norms),
        each,
        x.nbytes + dy.nbytes + 4 * batch * rows,
    )
    tokens = mx.array(np.random.default_rng(0).integers(0, 32_000, (batch, rows)), mx.int32)
    yield Case(
        f"ghost.embedding.{batch}x{rows}x{width}{suffix}",
        bw.embedding_sq_norms,
        _by_reference(bw.embedding_sq_norms),
        [tokens, dy],
        tokens.nbytes + dy.nbytes + 4 * batch,
    )


def _smooth_cases(copies: int) -> Iterator[Case]:
    x = _normals((28, 28))
    yield Case(
        f"smooth.noisy_copies.{copies}x28x28",
        lambda x: bw.noisy_copies(x, copies, SIGMA, KEY, COUNTER),
        lambda x: smooth.noisy_copies_reference(x, copies, SIGMA, KEY, COUNTER),
        [x],
        copies * x.nbytes,
    )
    logits, counts = _normals((copies, 100)), mx.zeros(101, mx.int32)
    yield Case(
        f"smooth.count_votes.{copies}x100",
        lambda x: bw.count_votes(x, counts),
        lambda x: smooth.count_votes_reference(x, counts),
        [logits],
        logits.nbytes + 2 * counts.nbytes,
    )


def _neighbors_case(n: int, d: int = 128, k: int = 10) -> Case:
    x, y = _normals((n, d)), _normals((n + 1, d))[1:]
    op = partial(bw.knn, k=k)
    return Case(f"neighbors.knn.{n}x{n}x{d}", op, _by_reference(op), [x, y], 2 * x.nbytes + 8 * n * k, 2 * n * n * d)


def _tails_cases(n: int, d: int = 64) -> Iterator[Case]:
    x, center, scale = _normals((n, d)), _normals((d,)), mx.abs(_normals((d,))) + 1
    table, histogram = bw.quantile_table(x[: n // 10]), bw.histogram_table(x[: n // 10])
    lower = mx.tril(0.01 * _normals((d, d))) + mx.eye(d)
    stats = 6 * 4 * d  # all but the two that say what is missing
    for name, op, nbytes in (
        ("column_stats", lambda x: list(bw.column_stats(x))[1:5], x.nbytes + stats),
        ("robust_zscore", lambda x: bw.robust_zscore(x, center, scale), 2 * x.nbytes + 8 * d),
        ("tail_scores", lambda x: bw.tail_scores(x, table), x.nbytes + table.values.nbytes + 4 * n),
        ("histogram_scores", lambda x: bw.histogram_scores(x, histogram), x.nbytes + histogram.edges.nbytes + 4 * n),
        ("mahalanobis", lambda x: bw.mahalanobis(x, center, lower), x.nbytes + 2 * d * (d + 1) + 4 * n),
    ):
        yield Case(f"tails.{name}.{n}x{d}", op, _by_reference(op), [x], nbytes)


def _step_cases(n: int, d: int = 3072) -> Iterator[Case]:
    x, grad, origin = (mx.sigmoid(_normals((n + i, d))[i:]) for i in range(3))
    for norm, eps in (("linf", 0.1), ("l2", 1.0), ("l1", 5.0)):
        op = partial(bw.projected_step, eps=eps, alpha=eps / 2, norm=norm, bounds=(0, 1))
        yield Case(f"step.{norm}.{n}x{d}", op, _by_reference(op), [x, grad, origin], 4 * x.nbytes)


def _by_reference(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op in plain MLX ops."""

    def plain(*inputs: mx.array) -> Any:
        with _native.using("reference"):
            return op(*inputs)

    return plain


def _normals(shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(0).standard_normal(shape, np.float32)).astype(dtype)


def run(bench: Any, sizes: Sizes | None = None) -> None:
    if bench.device != "gpu":
        print(f"  {bench.suite}: only with --device gpu: no rows")
        return
    for case in cases(sizes or Sizes()):
        _run_case(bench, case)


def _run_case(bench: Any, case: Case) -> None:
    compiled = mx.compile(case.reference)
    bench.check(case.name, lambda: _agree(case.op(*case.inputs), case.reference(*case.inputs)))
    times = bench.compare({"ours": lambda: case.op(*case.inputs), "reference": lambda: compiled(*case.inputs)})
    rows(bench, case.name, case.nbytes, times["ours"].median, times["reference"].median)
    if case.flops:
        bench.row(f"{case.name}/arithmetic", case.flops / times["ours"].median / 1e9, "GFLOP/s", better="higher")


def rows(bench: Any, name: str, nbytes: int, seconds: float, reference_seconds: float) -> None:
    """What follows from the bytes and the medians of both sides."""
    peer = "plain MLX ops, compiled"
    bench.row(f"{name}/time", seconds * 1e6, "us", better="lower")
    bench.row(f"{name}/vs_compiled_reference", reference_seconds / seconds, "x", peer=peer, better="higher")
    bench.row(f"{name}/throughput", nbytes / seconds / 1e9, "GB/s", better="higher")
    roofline = predicted_seconds(nbytes, bench.chip_bandwidth)
    bench.row(f"{name}/share_of_published_bandwidth", 100 * roofline / seconds, "%", better="higher")
    bench.row(f"{name}/predicted_time", roofline * 1e6, "us", better="lower")
    bench.row(f"{name}/measured_over_predicted", seconds / roofline, "x", better="lower")
    for other, bandwidth in PREDICTED.items():
        bench.row(f"{name}/predicted_time_{other}", predicted_seconds(nbytes, bandwidth) * 1e6, "us", better="lower")


def _agree(got: Any, want: Any) -> bool:
    """Whether all values are those of the reference, by the largest one: sums of many differ by rounding."""
    pairs = zip(tree_flatten(got), tree_flatten(want), strict=True)
    return all(_near(x, y) for (_, x), (_, y) in pairs)


def _near(x: mx.array, y: mx.array) -> bool:
    if x.dtype in (mx.uint32, mx.int32):
        return bool((x == y).all().item())
    return bool((mx.abs(x - y).max() <= 1e-5 * mx.maximum(mx.abs(y).max(), 1.0)).item())
