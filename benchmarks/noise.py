"""Secure noise against the samplers of torch and MLX, which are not secure.

Timed is the steady state: buffers exist and their pages are mapped. MLX keeps large buffers only when told to, so the
suite raises its cache limit; torch fills a new tensor (randn) and one that it keeps (normal_).
"""

import math
import os

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
from mlx_bulwark.ops import noise
from scipy import special

KEY = bw.random_key()
N = 16_000_000
COUNTER = mx.array([0, 0], mx.uint32)


def is_standard_normal(z):
    """Moments and a histogram of all values; a perfect generator fails once in a million runs."""
    z = np.array(z.astype(mx.float32))
    n = z.size
    edges = np.linspace(-3, 3, 61)
    expected = n * np.diff(special.ndtr(np.concatenate([[-np.inf], edges, [np.inf]])))
    found = np.histogram(z, np.concatenate([[-np.inf], edges, [np.inf]]))[0]
    chi_square = ((found - expected) ** 2 / expected).sum()
    mean, variance = z.mean(dtype=np.float64), z.var(dtype=np.float64)
    return bool(
        abs(mean) < 5.5 / math.sqrt(n)
        and abs(variance - 1) < 5.5 * math.sqrt(2 / n)
        and special.chdtrc(len(found) - 1, chi_square) > 1e-7
    )


def is_near(a, b):
    return bool((mx.abs(a - b).max() <= 1e-5).item())


def reference(n):
    return noise.gaussian_reference((n,), 1.0, KEY, COUNTER)


def run(bench):
    limit = mx.set_cache_limit(4 << 30)
    try:
        gaussian(bench)
        add_gaussian(bench)
        random_bits(bench)
    finally:
        mx.set_cache_limit(limit)


def gaussian(bench):
    contestants = {
        "ours": lambda: bw.gaussian((N,), 1.0, KEY, COUNTER),
        "mx": lambda: mx.random.normal((N,)),
    }
    torch = bench.peer("torch")
    if torch:
        kept = torch.empty(N)
        contestants["torch.randn"] = lambda: torch.randn(N)
        contestants["torch.normal_"] = lambda: kept.normal_()
    bench.check("gaussian", lambda: is_standard_normal(contestants["ours"]()))
    bench.check("gaussian", lambda: is_near(contestants["ours"]()[:6400], reference(6400)))
    times = bench.compare(contestants)
    bench.row("gaussian/throughput", N / times["ours"].median / 1e9, "G/s", better="higher")
    bench.row("gaussian/vs_mx_random_normal", times.ratio("mx", "ours"), "x", peer="mx.random.normal", better="higher")
    if torch:
        for name, metric in (("torch.randn", "vs_torch_randn"), ("torch.normal_", "vs_torch_normal_kept_tensor")):
            bench.row(f"gaussian/{metric}", times.ratio(name, "ours"), "x", peer=name, better="higher")
    bench.row(
        "gaussian/share_of_memory_bandwidth",
        4 * N / times["ours"].median / bench.bandwidth(),
        "share",
        better="higher",
    )
    small = N // 16
    times = bench.compare(
        {
            "ours": lambda: bw.gaussian((small,), 1.0, KEY, COUNTER),
            "reference": lambda: reference(small),
        }
    )
    bench.row("gaussian/vs_reference", times.ratio("reference", "ours"), "x", peer="plain MLX ops", better="higher")
    for dtype, name in ((mx.float16, "float16"), (mx.bfloat16, "bfloat16")):
        half_precision(bench, f"gaussian_{name}", dtype)


def half_precision(bench, case, dtype):
    def draw():
        return bw.gaussian((N,), 1.0, KEY, COUNTER, dtype=dtype)

    bench.check(case, lambda: (draw() == bw.gaussian((N,), 1.0, KEY, COUNTER).astype(dtype)).all().item())
    bench.row(f"{case}/throughput", N / bench.time(draw).median / 1e9, "G/s", better="higher")


def add_gaussian(bench):
    """Noise on the gradients of a model, in place: one large array, and 200 small ones."""
    gradients = [mx.zeros((N,))]
    mx.eval(gradients)

    def step():
        out = bw.add_gaussian(gradients.pop(), 1.0, KEY, COUNTER)
        mx.eval(out)
        gradients.append(out)

    step()
    bench.check("add_gaussian", lambda: is_standard_normal(gradients[0]))
    t = bench.time(step)
    bench.row("add_gaussian/throughput", N / t.median / 1e9, "G/s", better="higher")
    gradients.clear()

    leaves = [mx.zeros((64,)) for _ in range(200)]
    bits = [mx.random.key(i) for i in range(200)]
    contestants = {
        "ours": lambda: bw.add_gaussian(leaves, 1.0, KEY, COUNTER),
        "one by one": lambda: [x + mx.random.normal(x.shape, key=k) for x, k in zip(leaves, bits, strict=True)],
    }
    bench.check("add_gaussian_200x64", lambda: is_standard_normal(mx.concatenate(contestants["ours"]())))
    times = bench.compare(contestants)
    bench.row("add_gaussian_200x64/time", times["ours"].median * 1e6, "us", better="lower")
    ratio = times.ratio("one by one", "ours")
    bench.row("add_gaussian_200x64/vs_mx_random_normal", ratio, "x", peer="mx.random.normal", better="higher")


def random_bits(bench):
    contestants = {
        "ours": lambda: bw.random_bits((N,), KEY, COUNTER, domain="test"),
        "os": lambda: os.urandom(4 * N),
    }
    words = noise.random_bits_reference((1600,), KEY, COUNTER, domain="test")
    bench.check("random_bits", lambda: (contestants["ours"]()[:1600] == words).all().item())
    times = bench.compare(contestants)
    bench.row("random_bits/throughput", N / times["ours"].median / 1e9, "Gword/s", better="higher")
    bench.row("random_bits/vs_os_urandom", times.ratio("os", "ours"), "x", peer="os.urandom", better="higher")
