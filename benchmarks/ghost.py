"""Per-sample gradients of one layer: their norms without them, and their clipped sum.

Timed are the public functions on inputs and output gradients that are already there. The weight gradient is the one
product that training needs anyway, by MLX's BLAS, the same as everybody's in this run: a norm costs so much of it. For
PyTorch, norms are those of its fastest plain form (Gram matrices by bmm, as Opacus' ghost clipping has them).
"""

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
from mlx_bulwark import _native

LAYERS = {"attention_16x128x512x512": (16, 128, 512, 512), "feedforward_16x128x512x2048": (16, 128, 512, 2048)}
ADAPTER = (8, 256, 512, 8)


def run(bench):
    for case, shape in LAYERS.items():
        linear(bench, case, *shape)
    linear(bench, "adapter_8x256x512x8", *ADAPTER)
    units(bench)
    convolution(bench)
    embedding(bench)


def linear(bench, case, B, T, d, p):
    x, dy = rand((B, T, d)), rand((B, T, p), 1)
    factors = mx.array(np.random.default_rng(2).random(B).astype(np.float32))
    contestants = {
        "norms": lambda: bw.linear_sq_norms(x, dy),
        "gram": lambda: bw.linear_sq_norms(x, dy, method="gram"),
        "direct": lambda: bw.linear_sq_norms(x, dy, method="direct"),
        "sum": lambda: bw.linear_clipped_sum(x, dy, factors).weight,
        "norms, reference": lambda: reference_norms(x, dy),
        "weight gradient": lambda: dy.reshape(-1, p).T @ x.reshape(-1, d),
    }
    if torch := bench.peer("torch"):
        u, e = torch.from_numpy(np.array(x)).clone(), torch.from_numpy(np.array(dy)).clone()
        contestants["torch"] = lambda: ((u @ u.mT) * (e @ e.mT)).sum((1, 2))
        bench.check(case, lambda: np.allclose(contestants["torch"]().numpy(), norms64(x, dy), rtol=1e-4))
    for name in ("norms", "gram", "direct"):
        bench.check(case, lambda name=name: np.allclose(np.array(contestants[name]()), norms64(x, dy), rtol=1e-4))
    bench.check(case, lambda: close(contestants["sum"](), sum64(x, dy, factors)))
    times = bench.compare(contestants)
    share = times.ratio("norms", "weight gradient")
    bench.row(f"{case}/norms_over_weight_gradient", share, "x", peer="mlx, one product", better="lower")
    share = times.ratio("sum", "weight gradient")
    bench.row(f"{case}/sum_over_weight_gradient", share, "x", peer="mlx, one product", better="lower")
    speed = times.ratio("norms, reference", "norms")
    bench.row(f"{case}/vs_reference", speed, "x", peer="plain MLX ops", better="higher")
    if torch:
        bench.row(f"{case}/vs_torch", times.ratio("torch", "norms"), "x", peer="torch, bmm", better="higher")
    best = min(times["gram"].median, times["direct"].median)
    bench.row(f"{case}/norms_over_best_method", times["norms"].median / best, "x", peer="either", better="lower")
    bench.row(f"{case}/norms", times["norms"].median * 1e3, "ms", better="lower")


def units(bench):
    """Two rows a unit: twice the rows of a Gram matrix."""
    case = "units_of_two_16x128x512x512"
    x, dy, ids = rand((16, 128, 512)), rand((16, 128, 512), 1), mx.array(np.arange(16) // 2)
    pairs = [a.reshape(8, 256, 512) for a in (x, dy)]
    f = {
        "units": lambda: bw.linear_sq_norms(x, dy, segments=ids, num_segments=8),
        "rows": lambda: bw.linear_sq_norms(x, dy),
    }
    bench.check(case, lambda: np.allclose(np.array(f["units"]()), norms64(*pairs), rtol=1e-4))
    times = bench.compare(f)
    bench.row(f"{case}/units_over_rows", times.ratio("units", "rows"), "x", peer="every row a unit", better="lower")


def convolution(bench):
    case = "convolution_64x16x16_64x64"
    x, dy = rand((64, 16, 16, 64)), rand((64, 16, 16, 64), 1)
    weight, factors = rand((64, 3, 3, 64), 2), mx.ones((64,))
    plain = mx.vjp(lambda w: mx.conv2d(x, w, padding=1), [weight], [dy])
    f = {
        "grads": lambda: bw.conv_sample_grads(x, dy, 3, padding=1).weight,
        "norms": lambda: bw.conv_sq_norms(x, dy, 3, padding=1),
        "sum": lambda: bw.conv_clipped_sum(x, dy, factors, 3, padding=1).weight,
        "weight gradient": lambda: mx.vjp(lambda w: mx.conv2d(x, w, padding=1), [weight], [dy])[1],
    }
    bench.check(case, lambda: close(f["sum"](), np.array(plain[1][0], np.float64)))
    bench.check(case, lambda: close(f["grads"]().sum(axis=0), np.array(plain[1][0], np.float64)))
    bench.check(case, lambda: close(f["norms"](), np.array(bw.sample_sq_norms(f["grads"]()))))
    times = bench.compare(f)
    for name in ("grads", "norms", "sum"):
        share = times.ratio(name, "weight gradient")
        peer = "mlx, forward and weight gradient"
        bench.row(f"{case}/{name}_over_weight_gradient", share, "x", peer=peer, better="lower")


def embedding(bench):
    case = "embedding_16x512x512"
    tokens, dy = mx.array(np.random.default_rng(0).integers(0, 2000, (16, 512))), rand((16, 512, 512))
    f = {
        "tokens": lambda: bw.embedding_sq_norms(tokens, dy),
        "gram": lambda: ((dy @ dy.swapaxes(1, 2)) * (tokens[:, :, None] == tokens[:, None])).sum((1, 2)),
    }
    bench.check(case, lambda: np.allclose(np.array(f["tokens"]()), np.array(f["gram"]()), rtol=1e-4))
    times = bench.compare(f)
    bench.row(f"{case}/vs_gram", times.ratio("gram", "tokens"), "x", peer="mlx, Gram matrix", better="higher")


def reference_norms(x, dy):
    with _native.using("reference"):
        return bw.linear_sq_norms(x, dy)


def rand(shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def norms64(x, dy):
    x, dy = np.array(x, np.float64), np.array(dy, np.float64)
    return np.array([np.square(e.T @ u).sum() for u, e in zip(x, dy, strict=True)])


def sum64(x, dy, factors):
    x, dy, factors = (np.array(a, np.float64) for a in (x, dy, factors))
    return sum(f * e.T @ u for f, u, e in zip(factors, x, dy, strict=True))


def close(ours, want):
    return abs(np.array(ours) - want).max() < 1e-4 * abs(want).max()
