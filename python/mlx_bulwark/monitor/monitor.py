"""A model under watch: what it is asked and what it answers, held against a baseline, call by call."""

import base64
import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import mlx.core as mx
import numpy as np
from scipy import stats

from .alerts import Alert, Cooldown, Severity
from .charts import Chart, Signal
from .observation import Array, Observation, check_output, drawn, flattened, numbers, observe, run_listening, summary
from .reference import Baseline, Detector, check_labels
from .schedule import Schedule
from .sequential import CUSUM
from .series import Batch, Point, Series, change_point
from .shewhart import Shewhart
from .sinks import Outbox, PrometheusSink, Sink
from .snapshot import snapshot
from .state import State, StateError, acknowledge
from .windows import DriftWindow, WindowTest

COUNTERS = ("batches", "rows", "predictions", "not_finite", "not_finite_inputs", "evaluations", "evaluated_rows")
MOST_CLASSES = 20  # that have charts of their own
LEAST_OF_CLASS = 200  # rows of a class in the baseline, for charts of its own
HELD_OUT = "held_out"
WORSE = -1.645  # standard deviations: an evaluation that is worse at 5 %


class Monitor:
    """Watch a model: ``monitor(x)`` is ``model(x)``, and what it sees is charted, tested and told.

    **Inference**: the mean confidence goes to charts; inputs, embeddings, confidences, predicted classes and outlier
    scores go to windows that are tested for drift. Rows with NaN, or with infinite values that leave no distribution,
    are a critical alert and never count as predictions. **Evaluation**, ``monitor.evaluate(x, y)`` on fresh labelled
    data: accuracy, and precision and recall of each class, go to charts; an alert names the first bad batch and the
    checkpoint of the last good one. A **held-out set** is evaluated every so many batches or so much time, and compared
    to itself, row by row, by McNemar's test.

    False alarms: all charts together are set to one in ``run_length`` points of about 100 rows, each window to one in
    ``run_length`` tests. After each call everything is in the state file; an alert is on the disk before any sink gets
    it. Memory does not grow. There are no threads: sinks are called after each batch, and one that fails waits.

    Args:
        model: From ``[b, ...]`` to ``[b, ..., classes]``, in evaluation mode.
        baseline: What it does on trusted data.
        charts: Charts of *standardised* values (centre 0, sigma 1) by the name of a figure, in place of the default
            ones: ``"confidence"``, ``"accuracy"``, ``"precision[3]"``, ``"recall[3]"``; others are left out.
        windows: Which of the baseline's windows are kept; all by default.
        sinks: Where alerts go.
        state: SQLite file; written by one process at a time.
        cooldown: Seconds that repetitions of an alert are held back, or a ``Cooldown``.
        detector: The one that the baseline was made with.
        scores: The same.
        held_out: ``(x, y)`` that is evaluated on a schedule.
        every: Batches, or a ``timedelta``, between its evaluations.
        checkpoint: Name of the weights that run; set ``monitor.checkpoint`` when they change.
        run_length: Points, or tests, between false alarms.
        window_size: Rows of a short window.
        rows_per_batch: Most rows of a batch that windows look at, drawn at random.
        keep: Points of a figure that are kept.
        batch_size: Rows of a forward pass of ``evaluate``.
        clock: Seconds since 1970.

    Raises:
        ValueError: The arguments do not fit the baseline, or the state file belongs to another one.
        StateError: Another process writes the state file.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, tempfile
        >>> from mlx_bulwark.monitor import Baseline, Monitor
        >>> model, x = nn.Linear(4, 3), mx.random.normal((500, 4), key=mx.random.key(0))
        >>> baseline = Baseline.from_data(model, x, mx.argmax(model(x), axis=1))
        >>> with Monitor(model, baseline, state=tempfile.mkdtemp() + "/monitor.sqlite") as monitor:
        ...     output = monitor(x[:100])
        ...     _ = monitor(mx.full((1, 4), float("nan")))
        ...     print([(alert.severity, alert.source) for alert in monitor.alerts()])
        [('critical', 'outputs')]

    Source:
        D. Montgomery, "Introduction to Statistical Quality Control", 2012; A. Gandy, J. Kvaloy, "Guaranteed Conditional
        Performance of Control Charts via Bootstrap Methods", 2013, on what estimated baselines do to charts.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        baseline: Baseline,
        *,
        charts: Mapping[str, Sequence[Chart]] | None = None,
        windows: Sequence[str] | None = None,
        sinks: Sequence[Sink] = (),
        state: str | os.PathLike[str] = "monitor.sqlite",
        cooldown: float | Cooldown = 300.0,
        detector: Detector | None = None,
        scores: Callable[[Any], mx.array] | None = None,
        held_out: tuple[Any, Any] | None = None,
        every: int | timedelta | None = None,
        checkpoint: str | None = None,
        run_length: float = 1000.0,
        window_size: int = 500,
        rows_per_batch: int = 64,
        keep: int = 1000,
        batch_size: int = 256,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if (held_out is None) != (every is None):
            raise ValueError("[Monitor] held_out and every must be given together but are not")
        if run_length <= 1 or rows_per_batch < 1 or keep < 10 or batch_size < 1:
            raise ValueError(
                "[Monitor] run_length must be above 1, rows_per_batch and batch_size at least 1 and keep 10, but "
                f"are {run_length}, {rows_per_batch}, {batch_size} and {keep}"
            )
        self.model, self.baseline, self.checkpoint = model, baseline, checkpoint
        self._scores, self._detector, self._clock = scores, detector, clock
        self._run_length, self._rows_per_batch, self._keep, self._batch_size = (
            run_length,
            rows_per_batch,
            keep,
            batch_size,
        )
        self._charts, self._window_size = charts, window_size
        self._windows = self._make_windows(windows, window_size)
        ends = "_directions"
        self._towards = {n.removesuffix(ends): mx.array(a) for n, a in baseline.arrays.items() if n.endswith(ends)}
        self._schedule = None if every is None else Schedule(every, clock=clock)
        self._held_out = None if held_out is None else _held_out(baseline, *held_out)
        self._reference: Array | None = None  # which rows of the held-out set were right at first
        self._turn = threading.RLock()
        self._state = State(state)
        try:
            cool = cooldown if isinstance(cooldown, Cooldown) else Cooldown(cooldown, clock=clock)
            self._outbox = Outbox(self._state, sinks, cooldown=cool, clock=clock)
            self._load()
            self._state.keep({"owner": {"baseline": baseline.fingerprint}})
            if self._held_out is not None and self._reference is None:
                self._evaluate_held_out()
            self._state.keep({"settings": self._settings()})
            for sink in sinks:
                if isinstance(sink, PrometheusSink):
                    sink.watch(self.snapshot)
        except BaseException:
            self._state.close()
            raise

    def _make_windows(self, names: Sequence[str] | None, size: int) -> dict[str, DriftWindow]:
        wanted = self.baseline.windows if names is None else tuple(names)
        if unknown := sorted(set(wanted) - set(self.baseline.windows)):
            raise ValueError(
                f"[Monitor] windows must be some of the baseline's, {', '.join(self.baseline.windows)}, but have "
                f"{', '.join(unknown)}"
            )
        if "outliers" in wanted and self._detector is None:
            raise ValueError("[Monitor] detector must be given where the baseline has outlier scores but is None")
        return {
            name: DriftWindow(
                name,
                self.baseline.arrays[name],
                kind="classes" if name == "predictions" else "numbers",
                size=size,
                run_length=self._run_length,
            )
            for name in wanted
        }

    # what a call does

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the model does, unchanged, and look at it.

        Args:
            x: Inputs ``[b, ...]``.
            args: Further arguments of the model.
            kwargs: The same.

        Raises:
            ValueError: Inputs or outputs have other shapes than the baseline's.
            sqlite3.Error: The state file cannot be written.
        """
        with self._turn:
            given = None
            if "embeddings" in self._windows and len(x):
                output, _, given = run_listening(self.model, self.baseline.facts["layer"], x, *args, **kwargs)
            else:
                output = self.model(x, *args, **kwargs)
            scores = check_output("Monitor", self._scores(output) if self._scores else output, self._classes)
            at = drawn(len(scores), self._rows_per_batch, int(self.baseline.facts["seed"]), self._counters["batches"])
            glance = self._glance(x, given, at)
            seen = observe(scores, self.baseline.facts["outputs"], *glance.values())
            with self._restored():
                self._watch(seen, scores.shape, at, {name: np.array(rows) for name, rows in glance.items()})
            self.tick()
        return output

    @property
    def _classes(self) -> int:
        return int(self.baseline.facts["classes"])

    def _glance(self, x: Any, given: mx.array | None, at: Array) -> dict[str, mx.array]:
        """What windows look at of some rows, to be evaluated together with the output."""
        glance: dict[str, mx.array] = {}
        if not len(at):
            return glance
        if {"inputs", "outliers"} & self._windows.keys():
            rows = flattened(x[mx.array(at)] if isinstance(x, mx.array) else np.asarray(x)[at])
            if "inputs" in self._windows:
                glance["inputs"] = summary(rows, self._directions("inputs", rows))
            if "outliers" in self._windows:
                glance["outliers"] = rows
        if given is not None:
            rows = flattened(given[mx.array(at)])
            glance["embeddings"] = summary(rows, self._directions("embeddings", rows))
        return glance

    def _watch(self, seen: Observation, shape: tuple[int, ...], at: Array, glance: dict[str, Array]) -> None:
        batch, rows = self._counters["batches"], shape[0]
        where = Batch(batch, None, self.checkpoint)
        valid: Array = np.asarray(seen.valid.reshape(rows, -1).all(axis=1)) if rows else seen.valid
        alerts = self._count(batch, seen)
        per_row = seen.confidences.reshape(rows, -1) if rows else seen.confidences.reshape(0, 1)
        confidences = per_row[valid].mean(axis=1, dtype=np.float64)
        points = {name: self._series[name].add(confidences, where) for name in ("confidence",) if name in self._series}
        alerts += [a for name, found in points.items() for a in self._judge(name, found, where)]
        tests = self._look(seen, valid, at, glance, batch)
        alerts += [self._drift_alert(test, batch) for test in tests if test.drift]
        self._counters["batches"] += 1
        self._counters["rows"] += rows
        self._commit(alerts, points, tests, batch)

    def _count(self, batch: int, seen: Observation) -> list[Alert]:
        bad = int((~seen.valid).sum())
        self._counters["predictions"] += len(seen.valid) - bad
        self._counters["not_finite"] += bad
        if not bad:
            return []
        details = {"rule": "not finite", "batch": batch, "rows": bad, "of": len(seen.valid)}
        message = f"{bad} of {len(seen.valid)} outputs of batch {batch} are not finite; they are no predictions"
        return [Alert("critical", "outputs", message, details, self._clock())]

    def _look(
        self, seen: Observation, valid: Array, at: Array, glance: dict[str, Array], batch: int
    ) -> list[WindowTest]:
        """Give windows some rows of the batch."""
        usable, found = valid[at], {}
        # Sums over a row tell of every NaN and infinity in it.
        finite = {name: np.isfinite(rows).all(axis=1) for name, rows in glance.items()}
        if inputs := [finite[name] for name in ("inputs", "outliers") if name in finite]:
            self._counters["not_finite_inputs"] += int((~inputs[0]).sum())
        if "inputs" in glance:
            found["inputs"] = glance["inputs"][finite["inputs"]]
        if self._detector is not None and "outliers" in glance and finite["outliers"].any():
            scores = self._detector.score_samples(glance["outliers"][finite["outliers"]])
            found["outliers"] = np.asarray(scores, np.float32).reshape(-1, 1)
        if "embeddings" in glance:
            found["embeddings"] = glance["embeddings"][usable & finite["embeddings"]]
        if "confidences" in self._windows and len(at):
            per_row = seen.confidences.reshape(len(valid), -1)[at][usable]
            found["confidences"] = per_row.mean(axis=1, keepdims=True)
        if "predictions" in self._windows:
            found["predictions"] = seen.classes[at][usable]
        return [test for name, rows in found.items() for test in self._add(name, rows, batch)]

    def _add(self, name: str, rows: Array, batch: int) -> list[WindowTest]:
        """Add rows to a window, and note what of it must be written: new rows, or all once it was emptied."""
        window = self._windows[name]
        before = len(window.pending)
        if before % window.size == 0:
            self._began[name] = batch
        tests = window.add(rows)
        emptied = len(window.pending) != before + len(rows)
        if len(rows):
            self._pieces[name] = (emptied, window.pending if emptied else window.pending[before:])
        return tests

    def _directions(self, name: str, rows: mx.array) -> mx.array | None:
        directions = self._towards.get(name)
        wanted = self.baseline.arrays[name].shape[1] if directions is None else len(directions)
        if rows.shape[1] != wanted:
            raise ValueError(f"[Monitor] {name} must have rows of {wanted} numbers but have {rows.shape[1]}")
        return directions

    def evaluate(self, x: Any, y: Any, *, label: str | None = None) -> dict[str, Any]:
        """Evaluate the model on fresh labelled data, which the charts take for a new sample.

        A row without a valid output is wrong, and a prediction of no class. A set that is evaluated again and again
        belongs into ``held_out``: it is not a new sample.

        Args:
            x: Inputs ``[b, ...]``.
            y: Classes, of the shape of the output without its last axis.
            label: Name of the batch, for alerts.

        Returns:
            dict: ``accuracy``, ``rows``, and ``not_finite``.

        Raises:
            ValueError: ``y`` does not fit the outputs, or the baseline was made without labels.
            sqlite3.Error: The state file cannot be written.
        """
        if "accuracy" not in self.baseline.facts:
            raise ValueError("[Monitor.evaluate] baseline must have been made with labels but was made without")
        with self._turn:
            seen, shape = self._predict(x)
            labels = np.asarray(y)
            check_labels("Monitor.evaluate", labels, shape, self._classes)
            with self._restored():
                return self._score(seen, labels, label)

    def _predict(self, x: Any) -> tuple[Observation, tuple[int, ...]]:
        parts, shapes = [], []
        for start in range(0, max(len(x), 1), self._batch_size):
            output = self.model(mx.array(x[start : start + self._batch_size]))
            scores = check_output("Monitor.evaluate", self._scores(output) if self._scores else output, self._classes)
            parts.append(observe(scores, self.baseline.facts["outputs"]))
            shapes.append(tuple(scores.shape[:-1]))
        seen = Observation(*(np.concatenate(p) for p in zip(*parts, strict=True)))
        return seen, (sum(s[0] for s in shapes), *shapes[0][1:])

    def _score(self, seen: Observation, labels: Array, label: str | None) -> dict[str, Any]:
        batch, rows = self._counters["evaluations"], len(labels)
        where = Batch(batch, label, self.checkpoint)
        y = labels.reshape(-1)
        right = (seen.classes == y).reshape(rows, -1).mean(axis=1, dtype=np.float64) if rows else np.zeros(0)
        figures = {"accuracy": right}
        for c in [c for c in range(min(self._classes, MOST_CLASSES)) if f"recall[{c}]" in self._series]:
            figures[f"recall[{c}]"] = (seen.classes[y == c] == c).astype(np.float64)
        for c in [c for c in range(min(self._classes, MOST_CLASSES)) if f"precision[{c}]" in self._series]:
            figures[f"precision[{c}]"] = (y[seen.classes == c] == c).astype(np.float64)
        points = {
            name: self._series[name].add(values, where) for name, values in figures.items() if name in self._series
        }
        bad = int((~seen.valid).sum())
        alerts = []
        if bad:
            details = {"rule": "not finite", "evaluation": batch, "label": label, "rows": bad, "of": len(seen.valid)}
            message = f"{bad} of {len(seen.valid)} outputs of evaluation {batch} are not finite; they count as wrong"
            alerts.append(Alert("critical", "outputs", message, details, self._clock()))
        alerts += [a for name, found in points.items() for a in self._judge(name, found, where)]
        self._counters["evaluations"] += 1
        self._counters["evaluated_rows"] += rows
        self._commit(alerts, points, [], batch)
        return {"accuracy": float(right.mean()) if rows else math.nan, "rows": rows, "not_finite": bad}

    # what is found, and where the change was

    def _judge(self, name: str, points: list[Point], where: Batch) -> list[Alert]:
        """Alerts of a figure's new points: each is judged by those on record and the ones before it."""
        if not any(point.signals for point in points):
            return []
        before, alerts = self._state.points(name), []
        for point in points:
            before.append(point.first._asdict() | {"value": point.value, "standardised": point.standardised})
            alerts += [self._alert(name, before, signal, where) for signal in point.signals]
        return alerts

    def _alert(self, name: str, points: list[dict[str, Any]], signal: Signal, where: Batch) -> Alert:
        now, mean = points[-1], self._series[name].mean
        word = "batch" if name == "confidence" else "evaluation"
        side = signal.side or ("below" if now["standardised"] < 0 else "above")
        at = change_point([p["standardised"] for p in points], side)
        level = float(np.mean([p["value"] for p in points[at:]]))
        first, good = _place(points, at), _place(points, at - 1)
        way = "fell" if side == "below" else "rose"
        message = (
            f"{name} {way} from {mean:.4g} to {level:.4g}, found by {signal.chart} at "
            f"{word} {where.batch}; the first bad {word} is about {_named(first)}, the last good one {_named(good)}"
        )
        details = {
            "rule": f"{signal.chart}: {signal.rule}",
            word: where.batch,
            "label": where.label,
            "value": now["value"],
            "baseline": mean,
            "standardised": now["standardised"],
            "first_bad": first,
            "last_good": good,
        }
        if name != "confidence" and side == "below":
            message += _advice(first, good)
            details["rollback_to"] = _rollback(first, good)
        severity: Severity = "warning" if name != "accuracy" else "critical" if side == "below" else "info"
        return Alert(severity, name, message, details, self._clock())

    def _drift_alert(self, test: WindowTest, batch: int) -> Alert:
        what = "all columns together" if test.column is None else f"column {test.column}"
        if test.window == "predictions":
            what = f"class {test.column}"
        elif test.window in ("confidences", "outliers"):
            what = "its distribution"
        message = (
            f"{test.window} drifted: {what} moved most, {test.test} effect {test.effect:.3g} in {test.rows} rows up to "
            f"batch {batch} ({_chance(test.p_value)})"
        )
        details = test.to_json() | {"rule": test.test, "batch": batch, "first_batch": self._began[test.window]}
        return Alert("warning", f"drift/{test.window}", message, details, self._clock())

    def tick(self) -> bool:
        """Deliver what waits, and evaluate the held-out set if it is due; return whether it was.

        Every call does this. Between calls, where time decides, a loop of one's own may.
        """
        with self._turn:
            due = self._schedule is not None and self._schedule.due(self._counters["batches"])
            if due:
                self._evaluate_held_out()
            self._outbox.deliver()
            return due

    def _evaluate_held_out(self) -> None:
        assert self._held_out is not None
        x, y, fingerprint = self._held_out
        seen, shape = self._predict(x)
        check_labels("Monitor", y, shape, self._classes)
        right = seen.classes == y.reshape(-1)
        with self._restored():
            first = self._reference is None
            if self._reference is None:
                self._reference = right
            batch = self._counters["batches"]
            alerts, point = self._compared(right, batch)
            kept = {"schedule": self._schedule.state()} if self._schedule else {}
            if first:
                bits = base64.b64encode(np.packbits(right).tobytes()).decode()
                kept[HELD_OUT] = {"data": fingerprint, "right": bits, "rows": len(right)}
            with self._state.transaction(durable=bool(alerts)):
                self._state.add_points([point], self._keep)
                self._state.keep(kept)
                if alerts:
                    self._outbox.raise_alerts(alerts)

    def _compared(self, right: Array, batch: int) -> tuple[list[Alert], dict[str, Any]]:
        """McNemar's test, exact and one-sided, of the same rows then and now."""
        assert self._reference is not None
        lost, won = int((self._reference & ~right).sum()), int((~self._reference & right).sum())
        p = float(stats.binom.sf(lost - 1, lost + won, 0.5)) if lost else 1.0
        z = (won - lost) / math.sqrt(won + lost) if won + lost else 0.0
        point = {
            "series": HELD_OUT,
            "batch": batch,
            "time": self._clock(),
            "label": None,
            "checkpoint": self.checkpoint,
        }
        point |= {"value": float(right.mean()), "standardised": z, "size": len(right)}
        if p >= 1 / self._run_length:
            return [], point | {"signals": []}
        points = [*self._state.points(HELD_OUT), point]
        at = len(points) - 1
        while at and points[at - 1]["standardised"] <= WORSE:
            at -= 1
        first, good = _place(points, at), _place(points, at - 1)
        was = float(self._reference.mean())
        message = (
            f"accuracy on the held-out set fell from {was:.4g} to {point['value']:.4g} at batch {batch}: {lost} rows "
            f"were lost, {won} won ({_chance(p)}); the first bad evaluation is at {_named(first)}, the last good one "
            f"{_named(good)}"
        ) + _advice(first, good)
        details = {"rule": "mcnemar", "batch": batch, "p_value": p, "lost": lost, "won": won, "value": point["value"]}
        details |= {"baseline": was, "first_bad": first, "last_good": good, "rollback_to": _rollback(first, good)}
        alert = Alert("critical", HELD_OUT, message, details, self._clock())
        return [alert], point | {"signals": ["mcnemar"]}

    # what is kept

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """What could not be written did not happen: memory goes back to what the file holds."""
        try:
            yield
        except BaseException:
            self._load()
            raise

    def _commit(
        self,
        alerts: list[Alert],
        points: dict[str, list[Point]],
        tests: list[WindowTest],
        batch: int,
    ) -> None:
        now = self._clock()
        kept: dict[str, Any] = {"counters": self._counters}
        kept |= {f"series/{name}": self._series[name].state() for name in points}
        if self._schedule is not None:
            kept["schedule"] = self._schedule.state()
        if self._pieces:
            kept["windows"] = {name: [w.windows, self._began.get(name, 0)] for name, w in self._windows.items()}
        if tests:
            self._tested |= {test.window: test.to_json() for test in tests}
            kept["tests"] = self._tested
        rows = [_row(name, p) | {"time": now} for name, found in points.items() for p in found]
        rows += [_test_row(test, batch) | {"time": now, "checkpoint": self.checkpoint} for test in tests]
        with self._state.transaction(durable=bool(alerts)):
            for name, (emptied, new) in self._pieces.items():
                if emptied:
                    self._state.drop_pieces(name)
                self._state.add_piece(name, batch, np.ascontiguousarray(new).tobytes())
            self._state.keep(kept)
            self._state.add_points(rows, self._keep)
            if alerts:
                self._outbox.raise_alerts(alerts)
        self._pieces.clear()

    def _load(self) -> None:
        """Take everything from the state file."""
        kept = self._state.kept()
        owner = {"baseline": self.baseline.fingerprint}
        if kept.get("owner", owner) != owner:
            raise StateError(
                f"[Monitor] state must be of this baseline but {self._state.path} is of another: begin a new file"
            )
        self._outbox.load()
        self._series = _make_series(self.baseline, self._charts, self._run_length)
        self._windows = self._make_windows(tuple(self._windows), self._window_size)
        self._counters = dict.fromkeys(COUNTERS, 0) | kept.get("counters", {})
        self._tested: dict[str, dict[str, Any]] = kept.get("tests", {})
        self._pieces: dict[str, tuple[bool, Array]] = {}
        self._began = {name: began for name, (_, began) in kept.get("windows", {}).items()}
        for name, series in self._series.items():
            if f"series/{name}" in kept:
                series.load(kept[f"series/{name}"])
        for name, window in self._windows.items():
            pieces = [np.frombuffer(p, window.reference.dtype) for p in self._state.pieces(name)]
            rows = np.concatenate([window.reference[:0].reshape(-1), *pieces])
            windows, _ = kept.get("windows", {}).get(name, (0, 0))
            window.load(windows, rows.reshape(-1, *window.reference.shape[1:]))
        if self._schedule is not None and "schedule" in kept:
            self._schedule.load(kept["schedule"])
        if self._held_out is not None and HELD_OUT in kept:
            found = kept[HELD_OUT]
            if found["data"] != self._held_out[2]:
                raise StateError(
                    f"[Monitor] held_out must be the set that {self._state.path} began with but is another"
                )
            bits = np.frombuffer(base64.b64decode(found["right"]), np.uint8)
            self._reference = np.unpackbits(bits, count=found["rows"]).astype(bool)

    def _settings(self) -> dict[str, Any]:
        series = {
            n: {"baseline": s.mean, "point_rows": s.size, "baseline_rows": s.rows} for n, s in self._series.items()
        }
        if self._held_out is not None and self._reference is not None:
            rows = len(self._reference)
            series[HELD_OUT] = {"baseline": float(self._reference.mean()), "point_rows": rows, "baseline_rows": rows}
        windows = {n: {"rows": w.size, "reference_rows": len(w.reference)} for n, w in self._windows.items()}
        return {"series": series, "windows": windows, "run_length": self._run_length}

    # what is shown

    def alerts(self, *, last: int | None = None, open_only: bool = False) -> list[Alert]:
        """Return alerts, the oldest first.

        Args:
            last: Only so many, the newest.
            open_only: Only those that nobody has acknowledged.
        """
        return [alert for alert, _ in self._state.alerts(last=last, open_only=open_only)]

    def acknowledge(self, *ids: str) -> None:
        """Mark alerts as seen: they are no longer open.

        Args:
            ids: Of alerts.

        Raises:
            ValueError: An id is of no alert.
        """
        if unknown := acknowledge(self._state.path, list(ids), self._clock()):
            raise ValueError(f"[Monitor.acknowledge] ids must be of alerts but have {', '.join(unknown)}")

    def snapshot(self) -> dict[str, Any]:
        """Return all there is to see, as JSON values: counters, figures, windows, alerts, and what sinks wait for."""
        return snapshot(self._state)

    to_json = snapshot

    def close(self) -> None:
        """Close the state file; another process may go on with it."""
        with self._turn:
            self._state.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_series(
    baseline: Baseline, charts: Mapping[str, Sequence[Chart]] | None, run_length: float
) -> dict[str, Series]:
    series = [Series("confidence", *_of(baseline.facts["confidence"]))]
    if "accuracy" in baseline.facts:
        mean, sd, rows = _of(baseline.facts["accuracy"])
        series.append(Series("accuracy", mean, None if baseline.facts["plain"] else sd, rows))
    confusion = baseline.arrays.get("confusion")
    if confusion is not None and len(confusion) <= MOST_CLASSES:
        for name, axis in (("recall", 1), ("precision", 0)):
            totals = confusion.sum(axis=axis)
            for c in np.flatnonzero(totals >= LEAST_OF_CLASS).tolist():
                series.append(Series(f"{name}[{c}]", confusion[c, c] / totals[c], None, int(totals[c])))
    if charts is not None:
        if unknown := sorted(charts.keys() - {s.name for s in series}):
            raise ValueError(
                f"[Monitor] charts must be of figures of the baseline, {', '.join(s.name for s in series)}, but are of "
                f"{', '.join(unknown)}"
            )
        series = [s for s in series if s.name in charts]
        for s in series:
            s.charts = [chart.fresh() for chart in charts[s.name]]
    else:
        for s in series:
            s.charts = default_charts(s, run_length * 2 * len(series))
    return {s.name: s for s in series}


def default_charts(series: Series, run_length: float) -> list[Chart]:
    """A Shewhart chart for what is sudden and a CUSUM for what is slow, each with this run length."""
    limit = float(stats.norm.isf(1 / (2 * run_length))) + series.allowance
    both = series.name == "confidence"
    k = 0.5 + series.allowance
    h = cusum_limit(k, run_length * (2 if both else 1))
    return [Shewhart(0.0, 1.0, limit=limit), CUSUM(0.0, 1.0, k=k, h=h, sides="both" if both else "below")]


def cusum_limit(k: float, run_length: float) -> float:
    """Limit of a one-sided CUSUM of standard normal values by its run length.

    Source:
        D. Siegmund, "Sequential Analysis", 1985: (exp(2 k b) - 1 - 2 k b) / (2 k^2), b = h + 1.166.
    """
    low, high = 0.0, 700.0 / (2 * k)
    for _ in range(100):
        b = (low + high) / 2
        low, high = (b, high) if (math.exp(2 * k * b) - 1 - 2 * k * b) / (2 * k * k) < run_length else (low, b)
    return max(low - 1.166, 0.1)


def _of(moments: Mapping[str, Any]) -> tuple[float, float, int]:
    return float(moments["mean"]), float(moments["sd"]), int(moments["rows"])


def _row(name: str, point: Point) -> dict[str, Any]:
    found = point.first._asdict() | {"series": name, "value": point.value, "standardised": point.standardised}
    return found | {"size": point.size, "signals": [f"{s.chart}: {s.rule}" for s in point.signals]}


def _test_row(test: WindowTest, batch: int) -> dict[str, Any]:
    z = float(stats.norm.isf(min(max(test.p_value, 1e-300), 0.999)))
    found = {"series": f"drift/{test.window}", "batch": batch, "value": test.effect, "standardised": z}
    return found | {"size": test.rows, "signals": [test.test] if test.drift else []}


def _place(points: Sequence[Mapping[str, Any]], at: int) -> dict[str, Any] | None:
    return {k: points[at][k] for k in ("batch", "label", "checkpoint")} if at >= 0 else None


def _chance(p_value: float) -> str:
    return f"p = {p_value:.2g}" if p_value >= 1e-12 else "p below 1e-12"  # beyond, what is assumed decides


def _named(place: Mapping[str, Any] | None) -> str:
    if place is None:
        return "before all on record"
    return f"{place['batch']}" + (f" ({place['label']})" if place["label"] else "")


def _rollback(first: Mapping[str, Any] | None, good: Mapping[str, Any] | None) -> str | None:
    """The checkpoint of the last good batch, unless the first bad one had the same."""
    if first is None or good is None or not good["checkpoint"] or good["checkpoint"] == first["checkpoint"]:
        return None
    return str(good["checkpoint"])


def _advice(first: Mapping[str, Any] | None, good: Mapping[str, Any] | None) -> str:
    if checkpoint := _rollback(first, good):
        return f"; advice: roll back to {checkpoint}, the checkpoint of the last good one"
    if good is not None and good["checkpoint"]:
        return f"; both ran {good['checkpoint']}: look at the data rather than at the weights"
    return ""


def _held_out(baseline: Baseline, x: Any, y: Any) -> tuple[Any, Array, str]:
    x, labels = x if isinstance(x, mx.array) else np.asarray(x), np.asarray(y)
    if len(x) != len(labels) or not len(labels):
        raise ValueError(f"[Monitor] held_out must have as many inputs as classes but has {len(x)} and {len(labels)}")
    digest = hashlib.sha256(np.ascontiguousarray(numbers(x)).tobytes() + labels.astype(np.int64).tobytes())
    return x, labels, digest.hexdigest()
