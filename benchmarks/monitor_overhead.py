"""What a monitor costs beside bare inference, and how late it finds what is planted.

``overhead`` times batches of 256 through an MLP of 784-1024-1024-10, bare and under a monitor with its defaults: one
figure, four windows, state in SQLite after each batch. Both evaluate their output. The delays are those of ``Monitor``
with its default charts, which allow for what an estimated baseline may be off and for their own number.
"""

import statistics
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_bulwark.monitor import Baseline, Monitor

BATCH, WIDTH = 256, 784
CLASSES, POINTS = 10, 100


def run(bench):
    with tempfile.TemporaryDirectory() as folder:
        overhead(bench, Path(folder))
        accuracy_drop(bench, Path(folder))
        slow_drift(bench, Path(folder))


def overhead(bench, folder):
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, CLASSES))
    x = np.random.default_rng(0).random((2000, WIDTH), np.float32)
    baseline = Baseline.from_data(model, x)
    batches = [mx.array(x[i : i + BATCH]) for i in range(0, 1536, BATCH)]

    def bare():
        for batch in batches:
            output = model(batch)
            mx.eval(output)
        return output

    for name, windows in (("overhead", None), ("overhead_without_windows", ())):
        with Monitor(model, baseline, state=folder / name, windows=windows) as monitor:

            def watched(monitor=monitor):
                for batch in batches:
                    output = monitor(batch)
                return output

            bench.check(name, lambda: mx.array_equal(bare(), watched()).item())
            times = bench.compare({"bare": bare, "monitored": watched}, rounds=5 if bench.quick else 30)
            bench.row(f"{name}/ratio", times.ratio("monitored", "bare"), "x", better="lower")
            extra = (times["monitored"].median - times["bare"].median) / len(batches)
            bench.row(f"{name}/time", extra * 1e3, "ms a batch", better="lower")


def model_of(x):
    return 3 * x


def stream(seed, rows, wrong):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, CLASSES)).astype(np.float32)
    shift = (rng.random(rows) < wrong) * rng.integers(1, CLASSES, rows)
    return x, (x.argmax(axis=1) + shift) % CLASSES


def found_after(folder, seed, feed, source, most):
    """Batches of 100 rows from the change on; None where it was not found, -1 where it was found before."""
    baseline = Baseline.from_data(model_of, *stream([seed, 0], 10_000, 0.05))
    path = folder / f"{source.replace('/', '-')}-{seed}"
    with Monitor(model_of, baseline, state=path, rows_per_batch=POINTS) as monitor:
        for i in range(-100, most):
            feed(monitor, seed, i)
            if any(a.source == source for a in monitor.alerts()):
                return i + 1 if i >= 0 else -1
    return None


def accuracy_drop(bench, folder):
    """From 0.95 to 0.92 after 100 batches of 100 labelled rows."""

    def feed(monitor, seed, i):
        monitor.evaluate(*stream([seed, 1, i + 100], POINTS, 0.05 if i < 0 else 0.08))

    delays(bench, folder, "accuracy_drop", feed, "accuracy", 200)


def slow_drift(bench, folder):
    """One of ten inputs moves by 0.005 standard deviations a batch."""

    def feed(monitor, seed, i):
        x, _ = stream([seed, 2, i + 100], POINTS, 0.05)
        x[:, 3] += max(0, i) * 0.005
        monitor(mx.array(x))

    delays(bench, folder, "slow_drift", feed, "drift/inputs", 400)


def delays(bench, folder, case, feed, source, most):
    found = [found_after(folder, seed, feed, source, most) for seed in range(3 if bench.quick else 20)]
    bench.check(case, all(f is not None for f in found))
    late = [f for f in found if f is not None and f > 0]
    bench.row(f"{case}/delay", statistics.median(late), "batches of 100 rows", better="lower")
    bench.row(f"{case}/delay_worst", max(late), "batches of 100 rows", better="lower")
    bench.row(f"{case}/false_alarms", sum(f == -1 for f in found), f"of {len(found)} runs", better="lower")
