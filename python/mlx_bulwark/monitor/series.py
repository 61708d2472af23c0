"""Figures of a model over time: rows make points of equal size, points go to charts, and a change gets its place."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from .charts import Chart, Signal
from .observation import Array

LEAST_POINT = 100  # rows
LEAST_ERRORS = 5.0  # that a point of a share is to have in the baseline: with fewer it is hardly normal
CONFIDENCE = 1.2815515655446004  # normal quantile: 9 of 10 baselines are no further from the truth


class Batch(NamedTuple):
    """Where rows came from.

    Attributes:
        batch: Number.
        label: Name; None without.
        checkpoint: Weights that ran; None where they have no name.
    """

    batch: int
    label: str | None = None
    checkpoint: str | None = None


class Point(NamedTuple):
    """Some rows together.

    Attributes:
        first: The batch that its first row came in.
        value: Mean of the rows.
        standardised: How far that is from the baseline, in standard deviations.
        size: Rows.
        signals: Of the charts.
    """

    first: Batch
    value: float
    standardised: float
    size: int
    signals: list[Signal]


class Series:
    """One figure of a model, such as its accuracy.

    Rows are gathered into points of one size, large enough that their mean is about normal, whatever the sizes of
    batches; a point is standardised by the baseline: a share by the normal score of its binomial mid-P value, a mean by
    the standard deviation of rows. A baseline is itself a guess: of 10 baselines 9 are at most ``allowance`` standard
    deviations of a point away from the truth, and charts that add up many points must allow for as much.

    Args:
        name: Of the figure.
        mean: Of the baseline.
        sd: Of rows of the baseline; None where rows are right or wrong and the mean is a share.
        rows: Of the baseline.
        charts: Charts of standardised values.
        size: Rows of a point; by default 100, or as many as have 5 errors on average, at most a tenth of the baseline.
    """

    def __init__(
        self, name: str, mean: float, sd: float | None, rows: int, charts: Sequence[Chart] = (), size: int | None = None
    ) -> None:
        if sd is None:  # a share of 1, or of 0, is one that no error was seen of yet
            mean = (mean * rows + 0.5) / (rows + 1)
        self.name, self.mean, self.rows = name, float(mean), rows
        self.sd = None if sd is None else max(float(sd), 1e-6)
        self.size = size or default_size(self.mean if sd is None else None, rows)
        self.charts = list(charts)
        self._count, self._total, self._first = 0, 0.0, Batch(0)

    @property
    def allowance(self) -> float:
        """How far a baseline may be off, in standard deviations of a point."""
        return CONFIDENCE * math.sqrt(self.size / self.rows)

    def add(self, values: Array, batch: Batch) -> list[Point]:
        """Add rows; return the points that are full.

        Args:
            values: ``[n]``, 0 or 1 where the figure is a share.
            batch: Where they came from.
        """
        points = []
        while len(values):
            piece, values = values[: self.size - self._count], values[self.size - self._count :]
            if not self._count:
                self._first = batch
            self._total += float(np.sum(piece, dtype=np.float64))
            self._count += len(piece)
            if self._count == self.size:
                points.append(self._point())
        return points

    def _point(self) -> Point:
        value, z = self._total / self.size, self._standardised(self._total)
        self._count, self._total = 0, 0.0
        signals = [signal for chart in self.charts if (signal := chart.update(z)) is not None]
        return Point(self._first, value, z, self.size, signals)

    def _standardised(self, total: float) -> float:
        if self.sd is not None:
            return (total / self.size - self.mean) / (self.sd / math.sqrt(self.size))
        right = round(total)
        below = float(stats.binom.cdf(right - 1, self.size, self.mean))
        at = float(stats.binom.pmf(right, self.size, self.mean))
        if below + at / 2 <= 0.5:
            return float(stats.norm.ppf(max(below + at / 2, 1e-300)))
        above = float(stats.binom.sf(right, self.size, self.mean))
        return float(stats.norm.isf(max(above + at / 2, 1e-300)))

    def state(self) -> dict[str, Any]:
        """Return what ``load`` takes, as JSON values."""
        return {
            "count": self._count,
            "total": self._total,
            "first": list(self._first),
            "charts": [chart.state() for chart in self.charts],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` returned.

        Args:
            state: JSON values.

        Raises:
            ValueError: It is of other charts.
        """
        charts: list[Chart] = [Chart.from_state(s) for s in state["charts"]]
        if [_settings(c) for c in charts] != [_settings(c) for c in self.charts]:
            raise ValueError(f"[Monitor] state must be of the charts that are given but has others of {self.name}")
        self.charts, self._count = charts, int(state["count"])
        self._total, self._first = float(state["total"]), Batch(*state["first"])


def _settings(chart: Chart) -> dict[str, Any]:
    return {k: v for k, v in chart.state().items() if k in ("kind", "parameters")}


def default_size(share: float | None, rows: int) -> int:
    """Rows of a point: enough for a mean to be normal, and few beside the baseline."""
    wanted = LEAST_POINT if share is None else max(LEAST_POINT, math.ceil(LEAST_ERRORS / min(share, 1 - share)))
    return max(20, min(wanted, rows // 10))


def change_point(values: Sequence[float], side: str | None) -> int:
    """Where a series of standardised values has changed: index of the first value after the change.

    The maximum likelihood estimate for a step of a normal mean whose first value, 0, is known.

    Args:
        values: Up to the one that signals, oldest first.
        side: ``"above"`` or ``"below"``; None for either.

    Returns:
        int: From 0 to the last index.

    Example:
        >>> from mlx_bulwark.monitor import change_point
        >>> change_point([0.3, -0.5, 0.1, -2.2, -1.8, -3.1], "below")
        3

    Source:
        T. Samuel, J. Pignatiello, J. Calvin, "Identifying the Time of a Step Change with X-bar Control Charts", 1998.
    """
    z = np.nan_to_num(np.asarray(values, np.float64))
    if not len(z):
        raise ValueError("[change_point] values must have 1 or more but have none")
    sums, counts = np.cumsum(z[::-1])[::-1], np.arange(len(z), 0, -1)
    if side is not None:
        sums = np.maximum(sums if side == "above" else -sums, 0.0)
    return int(np.argmax(sums**2 / counts))
