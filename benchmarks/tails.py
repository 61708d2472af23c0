"""Outlier scores by columns, beside PyOD and scikit-learn.

Timed are the public ops on arrays that are already there. `fit` is the table and the scores of its own rows, which is
what PyOD's fit computes. PyOD's ECOD and COPOD run with one and with two jobs, and the faster counts. Its
decision_function sorts the reference set again together with the rows it scores; ours looks rows up in the frozen
table.

Growth: time is fitted as a power of rows and of columns; scoring must be linear in rows.
"""

import math
import time

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np

ROWS, COLUMNS = 100_000, 64


def run(bench):
    x, other = data(ROWS, COLUMNS), data(ROWS, COLUMNS, seed=1)
    for method in ("ecod", "copod"):
        tail(bench, method, x, other)
    histograms(bench, x, other)
    distances(bench, x, other)
    statistics(bench)
    growth(bench)


def data(n, d, seed=0):
    """Columns skewed to both sides, so that the sign of no skewness hangs on rounding."""
    values = np.random.default_rng(seed).exponential(size=(n, d)) * np.where(np.arange(d) % 2, -1, 1)
    return mx.array(values.astype(np.float32))


def fit_tail(x, method):
    table = bw.quantile_table(x)
    return table, bw.tail_scores(x, table, method)


def tail(bench, method, x, other):
    table = bw.quantile_table(x)
    mx.eval(table)
    pyod = bench.peer("pyod")
    fit = {"ours": lambda: fit_tail(x, method)}
    score = {"ours": lambda: bw.tail_scores(other, table, method)}
    fit_case, score_case = (f"{method}_{part}_{ROWS // 1000}kx{COLUMNS}" for part in ("fit", "score"))
    if pyod:
        peers = {f"pyod_{jobs}": detector(method, jobs) for jobs in (1, 2)}
        a, b = np.array(x, np.float64), np.array(other, np.float64)
        bench.check(fit_case, lambda: near(fit["ours"]()[1], peers["pyod_1"].fit(a).decision_scores_))
        peers["pyod_2"].fit(a)
        # What PyOD scores together with its training rows is near, not equal: both are samples of one distribution.
        bench.check(
            score_case, lambda: abs(np.array(score["ours"]()) / peers["pyod_1"].decision_function(b) - 1).max() < 0.1
        )
        fit |= {name: lambda p=p: p.fit(a) for name, p in peers.items()}
        score |= {name: lambda p=p: p.decision_function(b) for name, p in peers.items()}
    bench.check(score_case, lambda: near(bw.tail_scores(x, table, method), np.array(fit["ours"]()[1])))
    for case, contestants in ((fit_case, fit), (score_case, score)):
        bench.check(case, True)
        times = bench.compare(contestants, rounds=3 if pyod else None)
        if pyod:
            best = min(("pyod_1", "pyod_2"), key=lambda name: times[name].median)
            ratio = times.ratio(best, "ours")
            bench.row(f"{case}/vs_pyod", ratio, "x", peer=f"pyod, {best[-1]} jobs", better="higher")
        bench.row(f"{case}/time", times["ours"].median * 1e3, "ms", better="lower")


def detector(method, jobs):
    """PyOD's, without the lines that joblib prints."""
    import importlib

    from joblib import Parallel

    module = importlib.import_module(f"pyod.models.{method}")
    module.Parallel = lambda **options: Parallel(**{**options, "verbose": 0})
    return getattr(module, method.upper())(n_jobs=jobs)


def histograms(bench, x, other):
    table = bw.histogram_table(x)
    mx.eval(table)
    size = f"{ROWS // 1000}kx{COLUMNS}"

    def fit():
        fitted = bw.histogram_table(x)
        return fitted, bw.histogram_scores(x, fitted)

    contestants = {"fit": {"ours": fit}, "score": {"ours": lambda: bw.histogram_scores(other, table)}}
    if bench.peer("pyod"):
        from pyod.models.hbos import HBOS

        a, b, peer = np.array(x, np.float64), np.array(other, np.float64), HBOS()
        # A value at an edge, which float32 rounds, may go to the neighbouring bin.
        bench.check(f"hbos_fit_{size}", lambda: close(fit()[1], peer.fit(a).decision_scores_))
        bench.check(f"hbos_score_{size}", lambda: close(contestants["score"]["ours"](), peer.decision_function(b)))
        contestants["fit"]["pyod"] = lambda: HBOS().fit(a)
        contestants["score"]["pyod"] = lambda: peer.decision_function(b)
    for part, functions in contestants.items():
        case = f"hbos_{part}_{size}"
        bench.check(case, lambda: bool(mx.isfinite(bw.histogram_scores(x, table)).all().item()))
        times = bench.compare(functions)
        if "pyod" in functions:
            bench.row(f"{case}/vs_pyod", times.ratio("pyod", "ours"), "x", peer="pyod", better="higher")
        bench.row(f"{case}/time", times["ours"].median * 1e3, "ms", better="lower")


def distances(bench, x, other):
    case = f"mahalanobis_{ROWS // 1000}kx{COLUMNS}"
    a, b = np.array(x, np.float64), np.array(other, np.float64)
    covariance, mean = np.cov(a.T, bias=True), a.mean(0)
    lower, center = mx.array(np.linalg.cholesky(covariance).astype(np.float32)), mx.array(mean.astype(np.float32))
    contestants = {"ours": lambda: bw.mahalanobis(other, center, lower)}
    want = ((b - mean) @ np.linalg.inv(covariance) * (b - mean)).sum(1)
    bench.check(case, lambda: np.allclose(np.array(contestants["ours"]()), want, rtol=1e-4))
    if bench.peer("sklearn"):
        from sklearn.covariance import EmpiricalCovariance

        fitted, single = EmpiricalCovariance().fit(a), np.array(other)
        fitted32 = EmpiricalCovariance().fit(np.array(x))
        bench.check(case, lambda: np.allclose(fitted.mahalanobis(b), want, rtol=1e-6))
        contestants |= {"sklearn": lambda: fitted.mahalanobis(b), "float32": lambda: fitted32.mahalanobis(single)}
    times = bench.compare(contestants)
    if "sklearn" in contestants:
        best = min(("sklearn", "float32"), key=lambda name: times[name].median)
        bench.row(f"{case}/vs_sklearn", times.ratio(best, "ours"), "x", peer="EmpiricalCovariance", better="higher")
    bench.row(f"{case}/time", times["ours"].median * 1e3, "ms", better="lower")


def statistics(bench):
    case, n = "column_stats_1Mx64", 1_000_000
    x = mx.array(np.random.default_rng(0).standard_normal((n, 64), np.float32)) + 1000.0
    mx.eval(x)

    def right():
        got, values = bw.column_stats(x), np.array(x)
        means = np.array([values[:, c].mean(dtype=np.float64) for c in range(64)])
        m2 = np.array([np.square(values[:, c] - means[c], dtype=np.float64).sum() for c in range(64)])
        return np.allclose(np.array(got.mean), means, rtol=1e-7) and np.allclose(np.array(got.m2), m2, rtol=1e-6)

    bench.check(case, right)
    elapsed = bench.time(lambda: bw.column_stats(x)).median
    bench.row(f"{case}/time", elapsed * 1e3, "ms", better="lower")
    bench.row(f"{case}/throughput", x.nbytes / elapsed / 1e9, "GB/s", better="higher")
    bench.row(f"{case}/limit_share", x.nbytes / elapsed / bench.bandwidth(), "x", peer="one read", better="higher")


def exponent(sizes, function):
    """Exponent e of time = a + b size^e through three sizes in equal ratios, so that a, what a call costs at any size,
    does not flatten it. The least time of several runs each, interleaved."""
    best = dict.fromkeys(sizes, np.inf)
    for size in sizes:
        mx.eval(function(size))
    for _ in range(9):
        for size in sizes:
            start = time.perf_counter()
            mx.eval(function(size))
            best[size] = min(best[size], time.perf_counter() - start)
    small, middle, large = best.values()
    return math.log((large - middle) / (middle - small), sizes[1] / sizes[0])


def growth(bench):
    train, x = data(ROWS, COLUMNS), data(16 * ROWS, COLUMNS, seed=1)
    rows, columns = [ROWS, 4 * ROWS, 16 * ROWS], [16, 32, 64]
    by_rows = {n: mx.contiguous(x[:n]) for n in rows}
    by_columns = {d: (mx.contiguous(x[:ROWS, :d]), bw.quantile_table(mx.contiguous(train[:, :d]))) for d in columns}
    table, histogram = bw.quantile_table(train), bw.histogram_table(train)
    lower, mean = mx.eye(COLUMNS), mx.zeros(COLUMNS)
    mx.eval(by_rows, by_columns, table, histogram, lower, mean)
    for case, sizes, function in (
        ("tails_score", rows, lambda n: bw.tail_scores(by_rows[n], table)),
        ("hbos_score", rows, lambda n: bw.histogram_scores(by_rows[n], histogram)),
        ("mahalanobis", rows, lambda n: bw.mahalanobis(by_rows[n], mean, lower)),
        ("tails_fit", rows, lambda n: bw.quantile_table(by_rows[n])),
        ("tails_score", columns, lambda d: bw.tail_scores(*by_columns[d])),
        ("tails_fit", columns, lambda d: bw.quantile_table(by_columns[d][0])),
    ):
        of = "rows" if sizes is rows else "columns"
        found = exponent(sizes, function)
        linear = "score" not in case or of == "columns" or bench.quick or found < 1.05
        bench.check(f"growth_{case}_{of}", linear)
        bench.row(f"growth_{case}_{of}/exponent", found, "", better="lower")


def near(got, want):
    return np.allclose(np.array(got), want, rtol=1e-5)


def close(got, want):
    """Whether all but one in a thousand are equal but for rounding."""
    return np.mean(abs(np.array(got) - want) > 1e-3 * abs(want)) < 1e-3
