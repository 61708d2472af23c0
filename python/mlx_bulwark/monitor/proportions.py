"""Charts of shares of a count: a p-chart for accuracy, and recall and precision of each class."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from scipy import stats

from .charts import NOT_FINITE, Array, Chart, Signal, joined
from .plot import Panel
from .sequential import Sides

Method = Literal["exact", "normal"]

KEPT_SIZES = 4096  # sizes of subgroups whose limits are kept
THREE_SIGMA = 0.0027  # rate of false alarms of limits at 3 sigma of a normal value

Classes = TypeVar("Classes", bound="ClassChart")
Share = TypeVar("Share", bound="PChart")


class PChart(Chart):
    """Chart of a share, such as an accuracy, in subgroups of any size.

    A value is a pair: how many were right, and of how many. With p near 1 the number of errors is far from normal: of
    batches of 200 at an accuracy of 0.99, the customary 3-sigma limits call 1.7 % too bad, 13 times what they promise.
    The exact limits are those of the binomial distribution, whose rate of false alarms is at most the one asked for,
    and often below it, since counts are whole.

    Args:
        p: Share of the process in control, above 0 and below 1.
        false_alarm_rate: Of a value, both sides together.
        method: ``"exact"`` by the binomial distribution, or ``"normal"``, the customary approximation.
        sides: ``"both"``, or the one that is watched: ``"below"`` of an accuracy. It gets the whole rate.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> from mlx_bulwark.monitor import PChart
        >>> chart = PChart(0.97)
        >>> chart.update((484, 500))
        >>> print(chart.update((465, 500)))
        value 1 is 0.93 (465 of 500): below the limit of 0.944

    Source:
        D. Montgomery, "Introduction to Statistical Quality Control", 2012, section 7.2; T. Ryan, N. Schwertman,
        "Optimal Limits for Attributes Control Charts", 1997, on the normal approximation.
    """

    kind = "PChart"

    def __init__(
        self,
        p: float,
        *,
        false_alarm_rate: float = THREE_SIGMA,
        method: Method = "exact",
        sides: Sides = "both",
    ) -> None:
        super().__init__()
        self.p, self.false_alarm_rate = float(p), float(false_alarm_rate)
        self.method, self.sides = method, sides
        if not 0 < self.p < 1 or not 0 < self.false_alarm_rate < 1:
            raise ValueError(
                f"[PChart] p and false_alarm_rate must be above 0 and below 1 but are {p} and {false_alarm_rate}"
            )
        if method not in get_args(Method) or sides not in get_args(Sides):
            raise ValueError(
                f"[PChart] method must be one of {', '.join(get_args(Method))} and sides one of "
                f"{', '.join(get_args(Sides))} but are {method!r} and {sides!r}"
            )
        self._limits: dict[int, tuple[float, float]] = {}

    @classmethod
    def from_baseline(
        cls: type[Share], values: Any, *, estimator: Literal["pooled", "median"] = "pooled", **options: Any
    ) -> Share:
        """Build the chart from trusted subgroups.

        What limits from estimates do to run lengths says ``estimate``. Here the number of errors in the baseline
        counts, not that of its rows: take a hundred errors or more.

        Args:
            values: Pairs ``[m, 2]`` of how many were right, of how many.
            estimator: ``"pooled"``: all subgroups together; without any error, or without anything right, half a one
                is added. ``"median"``: the median of the shares, which bad subgroups hardly move.
            options: Further arguments of the chart.

        Returns:
            PChart: With the estimated share.

        Raises:
            ValueError: The values are none, or the median is 0 or 1.

        Example:
            >>> from mlx_bulwark.monitor import PChart
            >>> PChart.from_baseline([(95, 100), (190, 200)]).p
            0.95
        """
        counts = _pairs("PChart.from_baseline", values)
        counts = counts[counts[:, 1] > 0]
        if not len(counts) or not np.isfinite(counts).all():
            raise ValueError("[PChart.from_baseline] values must have subgroups with rows, all of them finite")
        if estimator not in ("pooled", "median"):
            raise ValueError(f"[PChart.from_baseline] estimator must be pooled or median but is {estimator!r}")
        if estimator == "median":
            return cls(float(np.median(counts[:, 0] / counts[:, 1])), **options)
        right, size = counts.sum(axis=0).tolist()
        return cls(_share(right, size), **options)

    def limits(self, size: int) -> tuple[float, float]:
        """Return the least and the greatest share that are no signal, of a subgroup of so many.

        Args:
            size: Of the subgroup, 1 or more.

        Returns:
            tuple[float, float]: Shares; 0 and 1 where a side has no limit.
        """
        found = self._limits.get(size)
        if found is None:
            if len(self._limits) >= KEPT_SIZES:
                self._limits.clear()
            lower, upper = self._limits_of(np.array([size], np.float64))
            found = self._limits[size] = (float(lower[0]), float(upper[0]))
        return found

    def _limits_of(self, sizes: Array) -> tuple[Array, Array]:
        rate = self.false_alarm_rate / (2 if self.sides == "both" else 1)
        if self.method == "normal":
            width = stats.norm.isf(rate) * np.sqrt(self.p * (1 - self.p) / sizes)
            lower, upper = np.maximum(self.p - width, 0.0), np.minimum(self.p + width, 1.0)
        else:  # the least count that is reached with a probability of `rate` or more, from below; from above, of errors
            lower = stats.binom.ppf(rate, sizes, self.p) / sizes
            upper = (sizes - stats.binom.ppf(rate, sizes, 1 - self.p)) / sizes
        if self.sides == "above":
            lower = np.zeros_like(sizes)
        if self.sides == "below":
            upper = np.ones_like(sizes)
        return lower, upper

    def standardize(self, values: Any) -> Array:
        """Return how far shares are from p, in standard deviations: what a CUSUM or EWMA takes (centre 0, sigma 1).

        Args:
            values: Pairs ``[n, 2]``.

        Returns:
            Array: float64 ``[n]``; NaN of empty subgroups.

        Example:
            >>> from mlx_bulwark.monitor import CUSUM, PChart
            >>> z = PChart(0.9).standardize([(45, 50), (80, 100)])
            >>> CUSUM(0.0, 1.0, sides="below").update_many(z)
            []
        """
        counts = _pairs("PChart.standardize", values)
        with np.errstate(invalid="ignore", divide="ignore"):
            z: Array = (counts[:, 0] - self.p * counts[:, 1]) / np.sqrt(self.p * (1 - self.p) * counts[:, 1])
        return z

    def update(self, value: Any) -> Signal | None:
        """Look at the next subgroup.

        Args:
            value: A pair: how many were right, of how many. An empty subgroup says nothing.

        Returns:
            Signal | None: What is out of control; None where nothing is.

        Raises:
            ValueError: The value is no such pair.
        """
        return next(iter(self.update_many([value])), None)

    def update_many(self, values: Any) -> list[Signal]:
        """Look at the next subgroups.

        Args:
            values: Pairs ``[n, 2]``, oldest first.

        Returns:
            list[Signal]: Of each that is out of control, in order.

        Raises:
            ValueError: The values are no such pairs.
        """
        counts = _pairs("PChart.update_many", values)
        if len(counts) == 1:
            return self._one_subgroup(*counts[0].tolist())
        usable: Array = np.logical_and.reduce(np.isfinite(counts), axis=1)
        full = usable & (counts[:, 1] > 0)
        sizes, which = np.unique(counts[full, 1], return_inverse=True)
        lower, upper = (np.zeros(0), np.zeros(0)) if not len(sizes) else self._limits_of(sizes)
        share = counts[full, 0] / counts[full, 1]
        broken: Array = ~usable
        broken[full] = (share < lower[which]) | (share > upper[which])
        signals = []
        for i in np.flatnonzero(broken).tolist():
            signals += self._judged(self.count + i, *counts[i].tolist())
        self.count += len(counts)
        return signals

    def _one_subgroup(self, right: float, size: float) -> list[Signal]:
        self.count += 1
        return self._judged(self.count - 1, right, size)

    def _judged(self, index: int, right: float, size: float) -> list[Signal]:
        if not math.isfinite(right) or not math.isfinite(size):
            return [self._not_finite(index, math.nan)]
        if not size:
            return []
        lower, upper = self.limits(int(size))
        share = right / size
        if lower <= share <= upper:
            return []
        side, limit = ("below", lower) if share < lower else ("above", upper)
        message = f"value {index} is {share:.4g} ({right:.0f} of {size:.0f}): {side} the limit of {limit:.4g}"
        return [Signal(self.kind, f"binomial {side}", index, share, limit, 1, message, side=side)]

    def _panels(self, values: Any) -> list[Panel]:
        counts = _pairs("PChart.plot", values)
        signals = self.update_many(counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = counts[:, 0] / counts[:, 1]
        limits = [
            self.limits(int(n)) if np.isfinite(v) else (np.nan, np.nan)
            for v, n in zip(share, counts[:, 1], strict=True)
        ]
        lower, upper = np.array(limits, np.float64).reshape(-1, 2).T
        marks = [(s.index, s.value) for s in signals if s.rule != NOT_FINITE]
        missing = [s.index for s in signals if s.rule == NOT_FINITE]
        return [Panel("share", {"share": share}, self.p, lower, upper, marks, missing)]

    def _parameters(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("p", "false_alarm_rate", "method", "sides")}

    def _memory(self) -> dict[str, Any]:
        return {}

    def _remember(self, memory: Mapping[str, Any]) -> None:
        pass  # each subgroup is judged by itself


class ClassChart(Chart):
    """Charts of recall and precision of each class, by the exact limits of ``PChart``.

    The rate of false alarms is that of all charts together, by Bonferroni. A signal is that of the share farthest from
    where it should be, in standard deviations; ``others`` holds the rest. Recall knows nothing of how frequent classes
    are; precision falls where a class becomes rare, though the model is what it was.

    Args:
        recall: Of each class, in control, ``[C]``; None for a class that is not watched.
        precision: The same.
        false_alarm_rate: Of a value, all charts together.
        sides: ``"below"``, or also ``"above"`` or ``"both"``: a recall that rises is a model that changed too.
        names: Of the classes; by default their numbers.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> from mlx_bulwark.monitor import ClassChart
        >>> chart = ClassChart.from_baseline([[480, 20], [15, 485]], names=["cat", "dog"])
        >>> print(chart.update([[70, 30], [3, 97]]))
        value 0: recall of class cat is 0.7 (70 of 100): below the limit of 0.89

    Source:
        As ``PChart``.
    """

    kind = "ClassChart"

    def __init__(
        self,
        recall: Sequence[float | None],
        precision: Sequence[float | None],
        *,
        false_alarm_rate: float = THREE_SIGMA,
        sides: Sides = "below",
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.recall, self.precision = list(recall), list(precision)
        self.names = [str(name) for name in (range(len(self.recall)) if names is None else names)]
        self.false_alarm_rate, self.sides = float(false_alarm_rate), sides
        if not len(self.recall) == len(self.precision) == len(self.names) > 0:
            raise ValueError(
                f"[ClassChart] recall, precision and names must be of the same classes but have {len(self.recall)}, "
                f"{len(self.precision)} and {len(self.names)}"
            )
        shares = {(metric, i): p for metric in ("recall", "precision") for i, p in enumerate(getattr(self, metric))}
        watched = {key: p for key, p in shares.items() if p is not None}
        if not watched:
            raise ValueError("[ClassChart] recall and precision must have a class that is watched but have none")
        rate = self.false_alarm_rate / len(watched)
        self._charts = {key: PChart(p, false_alarm_rate=rate, sides=sides) for key, p in watched.items()}

    @classmethod
    def from_baseline(cls: type[Classes], values: Any, **options: Any) -> Classes:
        """Build the charts from trusted confusion matrices.

        Args:
            values: Counts ``[C, C]`` or ``[m, C, C]``, rows the truth, columns the predictions. A class that has no
                rows is not watched; one without errors is given half of one.
            options: Further arguments of the chart.

        Returns:
            ClassChart: With estimated recalls and precisions.

        Raises:
            ValueError: The values are no such counts.
        """
        counts = np.asarray(values, np.float64)
        if counts.ndim == 2:
            counts = counts[None]
        counts = _matrices("ClassChart.from_baseline", counts, counts.shape[-1])
        if not np.isfinite(counts).all():
            raise ValueError("[ClassChart.from_baseline] values must be finite")
        total = counts.sum(axis=0)
        right, true, predicted = (v.tolist() for v in (np.diag(total), total.sum(axis=1), total.sum(axis=0)))
        recall, precision = (
            [_share(r, n) if n else None for r, n in zip(right, sizes, strict=True)] for sizes in (true, predicted)
        )
        return cls(recall, precision, **options)

    def update(self, value: Any) -> Signal | None:
        """Look at the next confusion matrix.

        Args:
            value: Counts ``[C, C]``, rows the truth, columns the predictions; see ``confusion_matrix``.

        Returns:
            Signal | None: What is out of control; None where nothing is.

        Raises:
            ValueError: The value is no such matrix.
        """
        return next(iter(self.update_many(np.asarray(value, np.float64)[None])), None)

    def update_many(self, values: Any) -> list[Signal]:
        """Look at the next confusion matrices.

        Args:
            values: Counts ``[n, C, C]``, oldest first.

        Returns:
            list[Signal]: Of each that is out of control, in order.

        Raises:
            ValueError: The values are no such matrices.
        """
        counts = _matrices("ClassChart.update_many", values, len(self.names))
        bad: Array = ~np.logical_and.reduce(np.isfinite(counts), axis=(1, 2))
        broken: dict[int, list[tuple[float, Signal]]] = {
            i: [(math.inf, self._not_finite(self.count + i, math.nan))] for i in np.flatnonzero(bad).tolist()
        }
        counts = np.where(bad[:, None, None], 0, counts)
        for (metric, i), chart in self._charts.items():
            pairs = np.stack([counts[:, i, i], counts.sum(axis=2 if metric == "recall" else 1)[:, i]], axis=1)
            for signal in chart.fresh().update_many(pairs):
                distance = abs(float(chart.standardize(pairs[signal.index])[0]))
                broken.setdefault(signal.index, []).append((distance, self._named(signal, metric, self.names[i])))
        self.count += len(counts)
        return [joined([s for _, s in sorted(found, key=lambda f: -f[0])]) for _, found in sorted(broken.items())]

    def _named(self, signal: Signal, metric: str, name: str) -> Signal:
        index = self.count + signal.index
        what = f"{metric} of class {name}"
        message = signal.message.replace(f"value {signal.index} is", f"value {index}: {what} is", 1)
        return Signal(
            self.kind, f"{what} {signal.side}", index, signal.value, signal.limit, 1, message, side=signal.side
        )

    def _panels(self, values: Any) -> list[Panel]:
        counts = _matrices("ClassChart.plot", values, len(self.names))
        signals = [o for s in self.update_many(counts) for o in (s, *s.others)]
        missing = [s.index for s in signals if s.rule == NOT_FINITE]
        right = np.diagonal(counts, axis1=1, axis2=2)
        panels = []
        for metric, axis in (("recall", 2), ("precision", 1)):
            with np.errstate(invalid="ignore", divide="ignore"):
                shares = right / counts.sum(axis=axis)
            curves = {f"class {self.names[i]}": shares[:, i] for m, i in self._charts if m == metric}
            marks = [(s.index, s.value) for s in signals if s.rule.startswith(metric)]
            panels.append(Panel(metric, curves, marks=marks, missing=missing))
        return panels

    def _parameters(self) -> dict[str, Any]:
        return {
            "recall": self.recall,
            "precision": self.precision,
            "false_alarm_rate": self.false_alarm_rate,
            "sides": self.sides,
            "names": self.names,
        }

    def _memory(self) -> dict[str, Any]:
        return {}

    def _remember(self, memory: Mapping[str, Any]) -> None:
        pass  # each matrix is judged by itself


def confusion_matrix(y: Any, predicted: Any, num_classes: int) -> Array:
    """Count predictions by class.

    Args:
        y: True classes ``[n]``, whole numbers from 0 to ``num_classes - 1``.
        predicted: Classes that were predicted, ``[n]``.
        num_classes: How many there are.

    Returns:
        Array: Counts, int64 ``[C, C]``: rows the truth, columns the predictions.

    Raises:
        ValueError: The classes are none, or of other lengths.

    Example:
        >>> from mlx_bulwark.monitor import confusion_matrix
        >>> confusion_matrix([0, 0, 1], [0, 1, 1], 2).tolist()
        [[1, 1], [0, 1]]
    """
    true, given = np.asarray(y), np.asarray(predicted)
    if true.shape != given.shape or true.ndim != 1:
        raise ValueError(
            f"[confusion_matrix] y and predicted must be [n] but have shapes {list(true.shape)} and {list(given.shape)}"
        )
    for name, classes in (("y", true), ("predicted", given)):
        if classes.dtype.kind not in "iub" and classes.size:
            raise ValueError(f"[confusion_matrix] {name} must be whole numbers but has dtype {classes.dtype}")
        outside = np.flatnonzero((classes < 0) | (classes >= num_classes))
        if len(outside):
            raise ValueError(
                f"[confusion_matrix] {name} must be from 0 to {num_classes - 1} but has {classes[outside[0]]} at "
                f"{outside[0]}"
            )
    flat = true.astype(np.int64) * num_classes + given.astype(np.int64)
    return np.bincount(flat, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


def _share(right: float, size: float) -> float:
    """Without an error, or without anything right, half a one is added: no share is 0 or 1."""
    return float(right / size) if 0 < right < size else float((right + 0.5) / (size + 1))


def _pairs(op: str, values: Any) -> Array:
    try:
        counts = np.asarray(values, np.float64)
    except (TypeError, ValueError) as e:
        raise ValueError(f"[{op}] values must be pairs of counts but are {str(values)[:80]}") from e
    if counts.size == 0:
        return np.zeros((0, 2))
    if counts.shape == (2,):
        counts = counts[None]
    if counts.ndim != 2 or counts.shape[1] != 2:
        raise ValueError(f"[{op}] values must be pairs [n, 2] but have shape {list(counts.shape)}")
    right, size = counts.T
    with np.errstate(invalid="ignore"):
        wrong = np.isfinite(counts).all(axis=1) & (
            (right < 0) | (right > size) | (right != np.floor(right)) | (size != np.floor(size))
        )
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"[{op}] values must be whole numbers, right <= size, but have {counts[i].tolist()} at {i}")
    return counts


def _matrices(op: str, values: Any, classes: int) -> Array:
    counts = np.asarray(values, np.float64)
    if counts.ndim != 3 or counts.shape[1:] != (classes, classes):
        raise ValueError(f"[{op}] values must be [n, {classes}, {classes}] but have shape {list(counts.shape)}")
    with np.errstate(invalid="ignore"):
        wrong = np.isfinite(counts) & ((counts < 0) | (counts != np.floor(counts)))
    if wrong.any():
        raise ValueError(f"[{op}] values must be counts but have {counts[wrong][0]:g}")
    return counts
