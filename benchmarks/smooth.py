"""Randomized smoothing: noisy copies and votes.

Timed is the steady state: buffers exist and their pages are mapped, so that MLX's cache limit is raised. torch's side
stands in two forms: `randn` and additions into new tensors, and `normal_` in place on a tensor that it keeps.
"""

import math

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
from mlx_bulwark.ops import smooth
from scipy import special

KEY = bw.random_key()
COUNTER = mx.array([0, 0], mx.uint32)
SIGMA = 0.25
BATCH = 1000


def run(bench):
    limit = mx.set_cache_limit(4 << 30)
    try:
        noisy_copies(bench, "noisy_copies", (3, 32, 32))
        noisy_copies(bench, "noisy_copies_28x28", (28, 28))
        count_votes(bench)
    finally:
        mx.set_cache_limit(limit)


def is_noise(copies, x):
    """Moments and a histogram of the noise; a perfect generator fails once in a million runs."""
    z = ((np.array(copies).astype(np.float64) - np.array(x)) / SIGMA).reshape(-1)
    edges = np.concatenate([[-np.inf], np.linspace(-3, 3, 61), [np.inf]])
    expected = z.size * np.diff(special.ndtr(edges))
    chi_square = ((np.histogram(z, edges)[0] - expected) ** 2 / expected).sum()
    return bool(
        abs(z.mean()) < 5.5 / math.sqrt(z.size)
        and abs(z.var() - 1) < 5.5 * math.sqrt(2 / z.size)
        and special.chdtrc(len(expected) - 1, chi_square) > 1e-7
    )


def noisy_copies(bench, case, shape):
    x = mx.array(np.random.default_rng(0).random(shape, np.float32))
    n = BATCH * x.size
    contestants = {
        "ours": lambda: bw.noisy_copies(x, BATCH, SIGMA, KEY, COUNTER),
        "clipped": lambda: bw.noisy_copies(x, BATCH, SIGMA, KEY, COUNTER, bounds=(0, 1)),
        "grid": lambda: bw.noisy_copies(x, BATCH, SIGMA, KEY, COUNTER, bounds=(0, 1), levels=256),
        "uniform": lambda: bw.noisy_copies(x, BATCH, SIGMA, KEY, COUNTER, distribution="uniform"),
        "mx": lambda: x + SIGMA * mx.random.normal((BATCH, *shape)),
    }
    if torch := bench.peer("torch"):
        image = torch.from_numpy(np.array(x)).clone()
        kept = torch.empty((BATCH, *shape))
        contestants["torch"] = lambda: image + SIGMA * torch.randn((BATCH, *shape))
        contestants["torch, kept"] = lambda: kept.normal_(0, SIGMA).add_(image)
        bench.check(case, lambda: is_noise(contestants["torch"]().numpy(), x))
        bench.check(case, lambda: is_noise(contestants["torch, kept"]().numpy(), x))
    bench.check(case, lambda: is_noise(contestants["ours"](), x))
    bench.check(case, lambda: is_reference(contestants["ours"]()[:10], x))
    times = bench.compare(contestants)
    for name, metric in (("ours", "throughput"), ("clipped", "clipped"), ("grid", "grid"), ("uniform", "uniform")):
        bench.row(f"{case}/{metric}", n / times[name].median / 1e9, "G/s", better="higher")
    bench.row(f"{case}/vs_mx", times.ratio("mx", "ours"), "x", peer="mx.random.normal", better="higher")
    if torch:
        bench.row(f"{case}/vs_torch", times.ratio("torch", "ours"), "x", peer="torch.randn", better="higher")
        bench.row(
            f"{case}/vs_torch_kept_tensor",
            times.ratio("torch, kept", "ours"),
            "x",
            peer="torch.normal_",
            better="higher",
        )


def is_reference(copies, x):
    return (mx.abs(copies - smooth.noisy_copies_reference(x, len(copies), SIGMA, KEY, COUNTER)).max() <= 1e-5).item()


def count_votes(bench):
    for rows, classes in ((1000, 10), (1000, 1000)):
        case = f"count_votes_{rows}x{classes}"
        logits = mx.array(np.random.default_rng(0).standard_normal((rows, classes), np.float32))
        zeros = mx.zeros(classes + 1, mx.int32)
        contestants = {
            "ours": lambda x=logits, z=zeros: bw.count_votes(x, z),
            "reference": lambda x=logits, z=zeros: smooth.count_votes_reference(x, z),
        }
        want = np.bincount(np.argmax(np.array(logits), axis=1), minlength=classes + 1)
        if torch := bench.peer("torch"):
            t, total = torch.from_numpy(np.array(logits)).clone(), torch.zeros(classes, dtype=torch.int64)
            contestants["torch"] = lambda t=t, total=total, c=classes: total + torch.bincount(t.argmax(1), minlength=c)
            bench.check(case, lambda f=contestants["torch"], w=want: (f().numpy() == w[:-1]).all())
        bench.check(case, lambda f=contestants["ours"], w=want: (np.array(f()) == w).all())
        times = bench.compare(contestants)
        bench.row(f"{case}/time", times["ours"].median * 1e6, "us", better="lower")
        bench.row(f"{case}/vs_reference", times.ratio("reference", "ours"), "x", peer="plain MLX ops", better="higher")
        if torch:
            bench.row(f"{case}/vs_torch", times.ratio("torch", "ours"), "x", peer="torch", better="higher")
