"""A stream of test digits, watched."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..monitor import Alert, Baseline, FileSink, Monitor
from .data import Array
from .progress import waiting
from .sections import monitored
from .stage import Digits, Outcome, Scene, percent

BATCHES = 30
ROWS = 60
SHOWN = 6
DIM = 0.35  # of white is left after the lens got dirty


def monitor(scene: Scene) -> Outcome:
    """Let a model name batches of test digits, the later ones through a dirty lens, and wait for the alert."""
    model = scene.plain_model()
    batches = scene.options.reduced(BATCHES, least=12)
    drop = batches // 2
    file = scene.options.out / "alerts.jsonl"
    file.unlink(missing_ok=True)
    # the stream draws the same few test digits again and again: a baseline without them would differ from it for good
    known = np.concatenate([scene.trusted.x, scene.test.x]), np.concatenate([scene.trusted.y, scene.test.y])
    baseline = Baseline.from_data(model, *known)
    shares: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        waiting(f"Watching {batches} batches"),
        Monitor(model, baseline, sinks=[FileSink(file)], state=Path(folder) / "monitor.sqlite") as watched,
    ):
        for batch in _stream(scene.test, batches, drop, scene.options.seed):
            watched(mx.array(batch.x))
            shares.append(watched.evaluate(batch.x, batch.y)["accuracy"])
            scene.stop.check()
        alerts = watched.alerts()
    before, after = (float(np.mean(part)) for part in (shares[:drop], shares[drop:]))
    scene.tell("stream", f"{batches} batches of {ROWS} test digits; from batch {drop} on the lens is dirty")
    scene.tell("accuracy", f"{percent(before)} before, {percent(after)} after")
    early, late = _split(alerts, drop)
    scene.tell("alerts", f"{len(early)} before the drop, {len(late)} after")
    if late:
        scene.tell("first", late[0].message)
    delay = _batch(late[0]) - drop if late else None
    figures = {
        "batches": batches,
        "rows": ROWS,
        "drop_at": drop,
        "accuracy": shares,
        "false_alerts": len(early),
        "delay_batches": delay,
        "alerts": [a.to_json() | {"batch": _batch(a)} for a in sorted(alerts, key=_batch)],
    }
    shown = scene.test.x[:SHOWN]
    section = monitored(figures, shown, _dirty(shown, np.random.default_rng(scene.options.seed)))
    told = "not found" if delay is None else str(delay + 1)
    return Outcome(figures, "batches until a planted drop is found", "never", told, section)


def _stream(test: Digits, batches: int, drop: int, seed: int) -> Iterator[Digits]:
    rng = np.random.default_rng(seed)
    for batch in range(batches):
        rows = rng.choice(len(test), ROWS, replace=False)
        yield Digits(_dirty(test.x[rows], rng) if batch >= drop else test.x[rows], test.y[rows])


def _dirty(x: Array, rng: np.random.Generator) -> Array:
    """Less light, and dust."""
    dirty: Array = np.clip(DIM * x + rng.normal(0, 0.05, x.shape), 0, 1).astype(np.float32)
    return dirty


def _split(alerts: list[Alert], drop: int) -> tuple[list[Alert], list[Alert]]:
    """Alerts before and after the drop, each oldest first."""
    ordered = sorted(alerts, key=_batch)
    return [a for a in ordered if _batch(a) < drop], [a for a in ordered if _batch(a) >= drop]


def _batch(alert: Any) -> int:
    return int(alert.details.get("batch", alert.details.get("evaluation", 0)))
