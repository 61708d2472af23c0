"""Per-sample clipping: norms, factors, clipped sums and their noise.

Timed are the public functions on gradients that are already there; half of the samples are clipped.
PyTorch's side is its fastest plain form at as many threads, into buffers that are kept. The DRAM share is what reading
every gradient once would take at the bandwidth measured in this run, over the time taken.
"""

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
from mlx_bulwark.ops import clip

BATCH, COLUMNS = 64, 1_000_000
SIGMA = 0.5


def run(bench):
    one_leaf(bench)
    half_precision(bench)
    norms(bench)
    many_leaves(bench)


def one_leaf(bench):
    case = "clipped_sum_64x1M"
    g = gradients(COLUMNS)
    c, key = bound(g), bw.random_key()
    contestants = {
        "ours": lambda: bw.clip_and_sum(g, c, sigma=SIGMA, key=key, counter=0),
        "reference": lambda: clip.clip_and_sum_reference(g, mx.array(c), sigma=mx.array(SIGMA), key=key, counter=0),
    }
    if torch := bench.peer("torch"):
        t = torch.from_numpy(np.array(g)).clone()  # memory of its own kind: numpy's has huge pages
        total, noise = torch.empty(COLUMNS), torch.empty(COLUMNS)

        def in_torch():
            norms = torch.linalg.vector_norm(t, dim=1)
            factors = (c / (norms + 1e-6)).clamp_(max=1)
            torch.mv(t.t(), factors, out=total)
            total.add_(noise.normal_(), alpha=SIGMA)
            return norms, factors, total

        contestants["torch"] = in_torch
        bench.check(case, lambda: agrees(g, c, [in_torch()[2].numpy()], SIGMA))
    bench.check(case, lambda: agrees(g, c, [bw.clip_and_sum(g, c)[0]], 0))
    bench.check(case, lambda: agrees(g, c, [contestants["ours"]()[0]], SIGMA))
    times = bench.compare(contestants)
    if torch:
        bench.row(f"{case}/vs_torch", times.ratio("torch", "ours"), "x", peer="torch", better="higher")
    bench.row(f"{case}/vs_reference", times.ratio("reference", "ours"), "x", peer="plain MLX ops", better="higher")
    throughput(bench, case, g.nbytes, times["ours"])


def half_precision(bench):
    for name, dtype in (("bf16", mx.bfloat16), ("fp16", mx.float16)):
        case = f"clipped_sum_64x1M_{name}"
        g = gradients(COLUMNS).astype(dtype)
        c, key = bound(g), bw.random_key()
        bench.check(case, lambda g=g, c=c: agrees(g, c, [bw.clip_and_sum(g, c)[0]], 0))
        time = bench.time(lambda g=g, c=c, key=key: bw.clip_and_sum(g, c, sigma=SIGMA, key=key, counter=0))
        throughput(bench, case, g.nbytes, time)


def norms(bench):
    case = "sample_sq_norms_64x1M"
    g = gradients(COLUMNS)
    contestants = {"ours": lambda: bw.sample_sq_norms(g)}
    if torch := bench.peer("torch"):
        t = torch.from_numpy(np.array(g)).clone()
        contestants["torch"] = lambda: torch.linalg.vector_norm(t, dim=1).square_()
    bench.check(case, lambda: np.allclose(np.array(contestants["ours"]()), sq_norms64(g), rtol=1e-6))
    times = bench.compare(contestants)
    if torch:
        bench.row(f"{case}/vs_torch", times.ratio("torch", "ours"), "x", peer="torch", better="higher")
    throughput(bench, case, g.nbytes, times["ours"])


def many_leaves(bench):
    """Adapters of rank 8 on 100 layers of width 256."""
    case = "clipped_sum_200_leaves"
    leaves = [gradients(2048, seed) for seed in range(200)]
    whole = mx.concatenate(leaves, axis=1)
    c, key = bound(whole), bw.random_key()
    contestants = {
        "ours": lambda: bw.clip_and_sum(leaves, c, sigma=SIGMA, key=key, counter=0),
        "reference": lambda: clip.clip_and_sum_reference(
            leaves, mx.array(c), sigma=mx.array(SIGMA), key=key, counter=0
        ),
    }
    if torch := bench.peer("torch"):
        ts = [torch.from_numpy(np.array(g)).clone() for g in leaves]

        def in_torch():
            norms = torch.stack([torch.linalg.vector_norm(t, dim=1) for t in ts]).norm(dim=0)
            factors = (c / (norms + 1e-6)).clamp_(max=1)
            return [torch.mv(t.t(), factors).add_(torch.randn(2048), alpha=SIGMA) for t in ts]

        contestants["torch"] = in_torch
        bench.check(case, lambda: agrees(whole, c, [s.numpy() for s in in_torch()], SIGMA))
    bench.check(case, lambda: agrees(whole, c, bw.clip_and_sum(leaves, c)[0], 0))
    bench.check(case, lambda: agrees(whole, c, contestants["ours"]()[0], SIGMA))
    times = bench.compare(contestants)
    if torch:
        bench.row(f"{case}/vs_torch", times.ratio("torch", "ours"), "x", peer="torch", better="higher")
    bench.row(f"{case}/vs_reference", times.ratio("reference", "ours"), "x", peer="plain MLX ops", better="higher")
    throughput(bench, case, whole.nbytes, times["ours"])


def throughput(bench, case, nbytes, time):
    bench.row(f"{case}/time", time.median * 1e3, "ms", better="lower")
    bench.row(f"{case}/throughput", nbytes / time.median / 1e9, "GB/s", better="higher")
    share = 100 * nbytes / bench.bandwidth() / time.median
    bench.row(f"{case}/dram_share", share, "%", peer="one read", better="higher")


def gradients(columns, seed=0):
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.standard_normal((BATCH, 1))).astype(np.float32)
    return mx.array(rng.standard_normal((BATCH, columns), np.float32) * sizes)


def bound(g):
    return float(np.sqrt(np.median(sq_norms64(g))))


def sq_norms64(g):
    return np.array([np.square(np.array(row.astype(mx.float32)), dtype=np.float64).sum() for row in g])


def agrees(g, c, sums, sigma):
    """Whether the sums are those of float64, give or take the noise; tests/ops looks closer."""
    factors = np.minimum(1, c / (np.sqrt(sq_norms64(g)) + 1e-6))
    want = np.zeros(g.shape[1])
    for row, f in zip(g, factors, strict=True):
        want += f * np.array(row.astype(mx.float32), np.float64)
    error = np.concatenate([np.array(s) for s in sums]) - want
    if sigma:
        return abs(error.std() / sigma - 1) < 0.02 and abs(error.mean() / sigma) < 0.02
    return abs(error).max() < 1e-5 * abs(want).max()
