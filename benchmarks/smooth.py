"""Randomized smoothing: noisy copies, votes, and whole certificates.

Timed is the steady state: buffers exist and their pages are mapped, so that MLX's cache limit is raised. torch's side
stands in two forms: `randn` and additions into new tensors, and `normal_` in place on a tensor that it keeps.

A certificate is n0 = 100 draws and n = 1000 others, in batches of 100: what every side is given. Beside it stands the
same number of forward passes of the same model on a batch of noisy copies that is there (on other data MLX's ReLU takes
another time). The peers run the same weights on torch, with
as many threads, and the check of a case gives all of them the same counts: their decisions must agree.
"""

import math

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
from mlx_bulwark import faster_convolutions, smoothing
from mlx_bulwark.ops import smooth
from scipy import special

from benchmarks import smooth_peers as peers

KEY = bw.random_key()
COUNTER = mx.array([0, 0], mx.uint32)
SIGMA = 0.25
BATCH = 1000
N0, N, DRAWS = 100, 1000, 100  # of a certificate: for the guess, for the bound, in a batch


def run(bench):
    limit = mx.set_cache_limit(4 << 30)
    try:
        noisy_copies(bench, "noisy_copies", (3, 32, 32))
        noisy_copies(bench, "noisy_copies_28x28", (28, 28))
        count_votes(bench)
        certify_mlp(bench)
        certify_cnn(bench)
        peak_memory(bench)
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


def certify_mlp(bench):
    x = np.random.default_rng(0).random((4, 784), np.float32)
    certify(bench, "certify_mlp", peers.mlp(), x)


def certify_cnn(bench):
    data = peers.packaged_data()
    if data is None:
        return
    x = peers.images(data, 4)
    contestants, torch = {}, bench.peer("torch")
    art = bench.peer("statsmodels") and bench.peer("art")  # which imports it as it decides
    if torch:
        model, rows = peers.torch_cnn(torch, data), torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        contestants["torch"] = lambda: [peers.torch_loop(torch, model, row, N0, N, DRAWS) for row in rows]
        last = {"memory_format": torch.channels_last}
        other, other_rows = peers.torch_cnn(torch, data).to(**last), rows.contiguous(**last)
        contestants["channels last"] = lambda: [peers.torch_loop(torch, other, r, N0, N, DRAWS) for r in other_rows]
    if torch and art:
        certifier = peers.art(torch, model, (1, 28, 28), N0)
        contestants["art"] = lambda: certifier.certify(rows.numpy(), n=N, batch_size=DRAWS)
        bench.check("certify_cnn", lambda: decisions_agree(certifier))
    times = certify(bench, "certify_cnn", peers.cnn(data), x, contestants)
    if torch:
        for name, metric in (("torch", "vs_torch_loop"), ("channels last", "vs_torch_loop_channels_last")):
            ratio = times.ratio(name, "ours")
            bench.row(f"certify_cnn/{metric}", ratio, "x", peer="the algorithm on torch", better="higher")
    if torch and art:
        bench.row("certify_cnn/vs_art", times.ratio("art", "ours"), "x", peer=f"ART {art.__version__}", better="higher")


def smoothed(model):
    return smoothing.Smooth(model, peers.CLASSES, peers.SIGMA)


def certify(bench, case, model, x, contestants=None):
    certifier, x = smoothed(model), mx.array(x)
    forward, batch = smoothing_forward(model), bw.noisy_copies(x[0], DRAWS, peers.SIGMA, KEY, COUNTER)
    mx.eval(batch)
    passes = len(x) * (N0 + N) // DRAWS
    plain = mx.compile(model)

    def bare(forward=forward):
        for _ in range(passes):
            mx.eval(forward(batch))

    contestants = dict(contestants or {}) | {
        "ours": lambda: certifier.certify(x, N0, N, peers.ALPHA, DRAWS),
        "bare": bare,
        "mlx": lambda: bare(plain),
    }
    bench.check(case, lambda: same_certificates(contestants))
    times = bench.compare(contestants)
    bench.row(f"{case}/time_an_input", times["ours"].median / len(x) * 1e3, "ms", better="lower")
    ratio = times.ratio("ours", "bare")
    bench.row(f"{case}/over_bare_forward", ratio, "x", peer="the model's forward passes", better="lower")
    ratio = times.ratio("ours", "mlx")
    bench.row(f"{case}/over_forward_of_mlx", ratio, "x", peer="the same with MLX's convolutions", better="lower")
    return times


def smoothing_forward(model):
    """The model's forward pass as a certificate takes it."""

    def forward(batch):
        with faster_convolutions(model):
            return model(batch)

    return mx.compile(forward)


def same_certificates(contestants):
    """The same classes by all, and radii whose votes differ by what 1000 draws may: five deviations of each."""
    found = contestants["ours"]()
    want = [
        peers.decide(p, np.bincount([p], [v], peers.CLASSES), N)
        for p, v in zip(found.prediction, found.votes, strict=True)
    ]
    assert [w.prediction for w in want] == found.prediction.tolist()
    assert np.allclose([w.radius for w in want], found.radius, atol=1e-9)
    for name in set(contestants) - {"ours", "bare", "mlx"}:
        result = contestants[name]()
        other = [peers.Decision(*r) for r in (zip(*result, strict=True) if name == "art" else result)]
        assert [d.prediction for d in other] == found.prediction.tolist(), name
        shares = [special.ndtr(np.array(r) / peers.SIGMA) for r in ([d.radius for d in other], found.radius)]
        assert abs(shares[0] - shares[1]).max() < 5 * math.sqrt(2 * 0.25 / N), name


def decisions_agree(certifier):
    """Ours, the published algorithm's and ART's on the same counts."""
    for n in (100, N, 100_000):
        for share in (0.3, 0.5, 0.51, 0.55, 0.6, 0.8, 0.99, 0.999, 1.0):
            counts = np.bincount([3], [round(share * n)], peers.CLASSES).astype(np.int64)
            want = peers.decide(3, counts, n)
            radius = float(smoothing.certified_radius(int(counts[3]), n, peers.ALPHA, peers.SIGMA))
            ours = peers.Decision(3 if radius > 0 else smoothing.ABSTAIN, radius)
            for found in (ours, peers.art_decision(certifier, 3, counts, n)):
                assert found.prediction == want.prediction, (found, want)
                assert abs(found.radius - want.radius) < 1e-9, (found, want)


def setup_certify(n):
    mx.set_cache_limit(0)
    certifier, x = smoothed(peers.mlp()), mx.array(np.random.default_rng(0).random((1, 784), np.float32))
    certifier.certify(x, N0, 2 * DRAWS, peers.ALPHA, DRAWS)
    return lambda: mx.array(certifier.certify(x, N0, n, peers.ALPHA, DRAWS).radius[0])


def peak_memory(bench):
    """Bounded by the batch: ten times the draws take no more."""
    few, many = (bench.peak_memory(setup_certify, n, steps=1) for n in (N, 10 * N))
    bench.check("certify_mlp", many < few + (8 << 20))
    bench.row("certify_mlp/peak_memory_1000_draws", few / 2**20, "MiB", better="lower")
    bench.row("certify_mlp/peak_memory_10000_draws", many / 2**20, "MiB", better="lower")
