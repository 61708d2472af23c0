"""A monitor in children that are killed: ``python watched.py FOLDER SEED BATCHES MICROSECONDS``; 0 kills none.

The stream is the same in each run: a child takes the batch that the state file says comes next. Some batches hold NaN,
and from the middle on the labels are wrong more often. What is in the file in the end must not depend on the kills.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from killed import FailsHalfOfTheTime, Receiver, killed
from mlx_bulwark.monitor import Baseline, FileSink, Monitor

CLASSES, WIDTH = 3, 5


def model(x):
    return 3 * x[:, :CLASSES]


def rows(seed, n, wrong=0.1):
    """Inputs, and labels of which a share is wrong."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, WIDTH)).astype(np.float32)
    y = x[:, :CLASSES].argmax(axis=1)
    shift = (rng.random(n) < wrong) * rng.integers(1, CLASSES, n)
    return x, (y + shift) % CLASSES


def child(folder, seed, batches):
    now = [0.0]

    def clock():
        now[0] += 1000.0
        return now[0]

    monitor = Monitor(
        model,
        Baseline.load(folder / "baseline.safetensors"),
        sinks=[FailsHalfOfTheTime(s, seed) for s in (FileSink(folder / "alerts.jsonl"), Receiver(folder / "got"))],
        state=folder / "monitor.sqlite",
        cooldown=0,
        window_size=100,
        clock=clock,
    )
    while (done := monitor.snapshot()["counters"].get("evaluations", 0)) < batches:
        x, y = rows([7, done], 100, 0.1 if done < batches // 2 else 0.4)
        if done % 10 == 3:
            x[5] = np.nan
        if monitor.snapshot()["counters"].get("batches", 0) == done:
            monitor(mx.array(x))
        monitor.evaluate(x, y, label=f"day {done}")
    while any(box["waiting"] for box in monitor.snapshot()["outbox"].values()):
        monitor.tick()
    monitor.close()


if __name__ == "__main__":
    folder, seed, batches, most = sys.argv[1:]
    killed(lambda seed: child(Path(folder), seed, int(batches)), int(seed), float(most) * 1e-6)
