"""Projected steps of attacks, on batches of images [128, 3, 32, 32].

Against their plain-MLX reference, compiled, and the projection onto the L1 ball and the box by sorting.
"""

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
from mlx_bulwark.ops import step

SHAPE, BOUNDS = (128, 3, 32, 32), (0, 1)


def run(bench):
    limit = mx.set_cache_limit(4 << 30)
    rng = np.random.default_rng(0)
    x, origin = (mx.array(rng.random(SHAPE, np.float32)) for _ in range(2))
    grad = mx.array(rng.standard_normal(SHAPE, np.float32))
    try:
        for norm, eps in (("linf", 0.03), ("l2", 0.5)):
            reference = mx.compile(
                lambda x, g, o, e=eps, n=norm: step.projected_step_reference(x, g, o, e, e, n, BOUNDS)
            )
            case, inputs = f"projected_step_{norm}", (x, grad, origin)
            contestants = {
                "ours": lambda i=inputs, e=eps, n=norm: bw.projected_step(*i, e, e, n, BOUNDS),
                "reference": lambda i=inputs, f=reference: f(*i),
            }
            report(bench, case, contestants, "vs_compiled_reference", "plain MLX ops, compiled")
        contestants = {
            "ours": lambda: bw.projected_step(x, grad, origin, 12.0, 12.0, "l1", BOUNDS),
            "reference": lambda: by_sorting(x, grad, origin, 12.0),
        }
        report(bench, "projected_step_l1", contestants, "vs_sort", "sorting in MLX")
    finally:
        mx.set_cache_limit(limit)


def report(bench, case, contestants, metric, peer):
    bench.check(case, lambda: mx.allclose(contestants["ours"](), contestants["reference"](), atol=2e-5).item())
    times = bench.compare(contestants)
    bench.row(f"{case}/time", times["ours"].median * 1e6, "us", better="lower")
    bench.row(f"{case}/{metric}", times.ratio("reference", "ours"), "x", peer=peer, better="higher")


def by_sorting(x, grad, origin, eps):
    """The threshold from the sorted places where the sum bends, and the slopes between them."""
    x, g, o = (a.reshape(len(a), -1) for a in (x, grad, origin))
    moved = x - o + eps * g / mx.abs(g).sum(1, keepdims=True)
    room, size = mx.where(moved < 0, o, 1 - o), mx.abs(moved)
    places = mx.concatenate([size, mx.maximum(size - room, 0)], axis=1)
    order = mx.argsort(-places, axis=1)
    places = mx.take_along_axis(places, order, axis=1)
    slope = mx.cumsum(mx.where(order < size.shape[1], 1.0, -1.0), axis=1)
    sums = mx.cumsum(slope[:, :-1] * (places[:, :-1] - places[:, 1:]), axis=1)
    at = mx.argmax(sums > eps, axis=1, keepdims=True)
    excess = mx.take_along_axis(sums, at, axis=1) - eps
    threshold = mx.take_along_axis(places, at + 1, axis=1) + excess / mx.take_along_axis(slope, at, axis=1)
    left = mx.minimum(mx.maximum(size - threshold, 0), room)
    return mx.clip(o + mx.sign(moved) * left, 0, 1).reshape(SHAPE)
