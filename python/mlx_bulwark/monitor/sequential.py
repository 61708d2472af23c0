"""Charts that add evidence up over time, and so find small shifts: CUSUM and EWMA."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from .charts import NOT_FINITE, Array, Signal, finite, joined, positive
from .location import FAR, LocationChart, Memory

Sides = Literal["both", "above", "below"]

ABOVE_BIT, BELOW_BIT, NOT_FINITE_BIT = 1, 2, 4


class SequentialChart(LocationChart):
    """Chart whose every value leads to the next state: one loop serves one value and many."""

    def __init__(self, center: float, sigma: float, sides: Sides, restart: bool) -> None:
        super().__init__(center, sigma)
        if sides not in get_args(Sides):
            raise ValueError(f"[{self.kind}] sides must be one of {', '.join(get_args(Sides))} but is {sides!r}")
        self.sides, self.restart = sides, bool(restart)

    def update(self, value: Any) -> Signal | None:
        """Look at the next value; see ``Chart.update``."""
        return next(iter(self._run([self._number(value)])), None)

    def update_many(self, values: Any) -> list[Signal]:
        """Look at the next values; see ``Chart.update_many``."""
        return self._run(self._numbers(values).tolist())

    @abstractmethod
    def _run(self, values: list[float]) -> list[Signal]:
        """Look at values one after the other."""

    def _deviations(self, values: Array, center: Array, sigma: Array) -> tuple[Array, list[tuple[Array, Array, bool]]]:
        """Flags of what is no number; of each row the sigmas from the centre, what is a number, and whether all is."""
        usable: Array = np.isfinite(values)
        with np.errstate(over="ignore"):
            z = np.clip((np.where(usable, values, center) - center) / sigma, -FAR, FAR)
        rows = [(*row, bool(row[1].all())) for row in zip(z, usable, strict=True)]
        return np.where(usable, 0, NOT_FINITE_BIT).astype(np.uint16), rows


class CUSUM(SequentialChart):
    """Cumulative sums of deviations, upwards and downwards: finds a lasting shift of about ``2 * k`` sigma soonest.

    The sums are ``up = max(0, up + z - k)`` and ``down = max(0, down - z - k)`` of ``z = (x - center) / sigma``. One
    that passes ``h`` is a signal, whose ``points`` are the values since it was last 0: about as long the shift has
    lasted. With k = 0.5 and h = 5 a process in control gives a false alarm every 465 values on average, and a shift of
    one sigma is found after 10.4.

    Args:
        center: Of the process in control.
        sigma: Its standard deviation.
        k: Allowance, in sigmas: half of the shift that matters.
        h: Limit of the sums, in sigmas.
        head_start: Fast initial response: where the sums begin, as a share of h; customary is 0.5. It finds sooner what
            is wrong from the start, and after a restart.
        sides: ``"both"``, or the one that is watched: ``"below"`` of an accuracy.
        restart: Begin anew after a signal. Without, a sum goes on, and signals until it has come down.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> from mlx_bulwark.monitor import CUSUM
        >>> chart = CUSUM(center=0.95, sigma=0.01, sides="below")
        >>> for signal in chart.update_many([0.95, 0.96] + [0.93] * 5):
        ...     print(signal)
        value 5 is 0.93: the sum below the centre is 6 sigma, past 5, after 4 points whose mean is about 0.93

    Source:
        E. Page, "Continuous Inspection Schemes", 1954; J. Lucas, R. Crosier, "Fast Initial Response for CUSUM
        Quality-Control Schemes", 1982.
    """

    kind = "CUSUM"
    curves = ("sum above", "sum below")
    label = "sum of deviations, sigma"
    bits = ("cusum above", "cusum below", NOT_FINITE)

    def __init__(
        self,
        center: float,
        sigma: float,
        *,
        k: float = 0.5,
        h: float = 5.0,
        head_start: float = 0.0,
        sides: Sides = "both",
        restart: bool = True,
    ) -> None:
        super().__init__(center, sigma, sides, restart)
        self.k, self.h = finite(self.kind, "k", k), positive(self.kind, "h", h)
        self.head_start = finite(self.kind, "head_start", head_start)
        if self.k < 0 or not 0 <= self.head_start < 1:
            raise ValueError(f"[CUSUM] k must be 0 or more and head_start below 1 but are {k:g} and {head_start:g}")
        self._up_limit = self.h if sides != "below" else math.inf
        self._down_limit = self.h if sides != "above" else math.inf
        self._start()

    def _start(self) -> None:
        self._up = self._down = self.head_start * self.h
        self._up_points = self._down_points = 0

    def _run(self, values: list[float]) -> list[Signal]:
        center, sigma, k, up_limit, down_limit = self.center, self.sigma, self.k, self._up_limit, self._down_limit
        up, down, up_points, down_points = self._up, self._down, self._up_points, self._down_points
        signals: list[Signal] = []
        for index, x in enumerate(values, self.count):
            z = (x - center) / sigma
            if not -FAR < z < FAR:
                if not math.isfinite(x):
                    signals.append(self._not_finite(index, x))
                    continue
                z = math.copysign(FAR, z)
            up = up + z - k
            if up > 0.0:
                up_points += 1
            else:
                up, up_points = 0.0, 0
            down = down - z - k
            if down > 0.0:
                down_points += 1
            else:
                down, down_points = 0.0, 0
            if up > up_limit or down > down_limit:
                self._up, self._down, self._up_points, self._down_points = up, down, up_points, down_points
                signals.append(self._signal(index, x))
                if self.restart:
                    self._start()
                    up, down, up_points, down_points = self._up, self._down, self._up_points, self._down_points
        self._up, self._down, self._up_points, self._down_points = up, down, up_points, down_points
        self.count += len(values)
        return signals

    def _signal(self, index: int, x: float) -> Signal:
        sides = [("above", 1, self._up, self._up_points)] if self._up > self._up_limit else []
        if self._down > self._down_limit:
            sides.append(("below", -1, self._down, self._down_points))
        return joined([self._one(index, x, *side) for side in sides])

    def _one(self, index: int, x: float, side: str, sign: int, total: float, points: int) -> Signal:
        mean = self.center + sign * self.sigma * (self.k + total / points)
        message = (
            f"value {index} is {x:.6g}: the sum {side} the centre is {total:.4g} sigma, past {self.h:g}, after "
            f"{points} point{'s' * (points > 1)} whose mean is about {mean:.4g}"
        )
        rule = f"cusum {side}"
        return Signal(self.kind, rule, index, x, self.h, points, message, statistic=total, side=side)

    def _drawn(self, value: float, signal: Signal | None) -> tuple[float, ...]:
        sums = {"above": self._up, "below": self._down}
        if signal is not None and signal.statistic is not None:  # from before the restart
            sums |= {str(s.side): s.statistic for s in (signal, *signal.others) if s.statistic is not None}
        low, high = -self.h if self.sides != "above" else np.nan, self.h if self.sides != "below" else np.nan
        return sums["above"], -sums["below"], low, high

    def _height(self, signal: Signal) -> float:
        return (signal.statistic or 0.0) * (1 if signal.side == "above" else -1)

    def _middle(self) -> float:
        return 0.0

    def _begin(self, streams: int) -> Memory:
        return {"up": np.full(streams, self.head_start * self.h), "down": np.full(streams, self.head_start * self.h)}

    def _scan(self, values: Array, center: Array, sigma: Array, memory: Memory) -> tuple[Array, Memory]:
        up, down = memory["up"], memory["down"]
        found, rows = self._deviations(values, center, sigma)
        start = self.head_start * self.h
        for i, (step, usable, every) in enumerate(rows):
            next_up, next_down = np.maximum(up + step - self.k, 0.0), np.maximum(down - step - self.k, 0.0)
            if not every:
                next_up, next_down = np.where(usable, next_up, up), np.where(usable, next_down, down)
            up, down = next_up, next_down
            high, low = up > self._up_limit, down > self._down_limit
            if not every:
                high, low = high & usable, low & usable
            broken = high | low
            if broken.any():
                found[i] |= high * np.uint16(ABOVE_BIT) | low * np.uint16(BELOW_BIT)
                if self.restart:
                    up, down = np.where(broken, start, up), np.where(broken, start, down)
        return found, {"up": up, "down": down}

    def _parameters(self) -> dict[str, Any]:
        names = ("center", "sigma", "k", "h", "head_start", "sides", "restart")
        return {name: getattr(self, name) for name in names}

    def _memory(self) -> dict[str, Any]:
        return {
            "up": self._up,
            "down": self._down,
            "up_points": self._up_points,
            "down_points": self._down_points,
        }

    def _remember(self, memory: Mapping[str, Any]) -> None:
        self._up, self._down = float(memory["up"]), float(memory["down"])
        self._up_points, self._down_points = int(memory["up_points"]), int(memory["down_points"])


class EWMA(SequentialChart):
    """Exponentially weighted moving average against its limits: finds small shifts, and is read as a smooth curve.

    The average is ``a + weight * (x - a)``, from the centre on; its standard deviation after t values is ``sigma *
    sqrt(weight / (2 - weight) * (1 - (1 - weight) ** (2 t)))``. With weight 0.2, limit 2.86 and the asymptotic limits a
    process in control gives a false alarm every 370 values on average.

    Args:
        center: Of the process in control.
        sigma: Its standard deviation.
        weight: Of the newest value, called lambda: above 0 and at most 1, where the chart is Shewhart's.
        limit: L, in standard deviations of the average.
        exact: Limits of each t, narrow at first, that find what is wrong from the start; else the asymptotic ones.
        sides: ``"both"``, or the one that is watched.
        restart: Begin anew at the centre after a signal. Without, every value signals until the average is back.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> from mlx_bulwark.monitor import EWMA
        >>> for signal in EWMA(center=0.95, sigma=0.01).update_many([0.95, 0.955, 0.92, 0.92]):
        ...     print(signal)
        value 3 is 0.92: the moving average is 0.9398, below the limit of 0.9413 (2.86 sigma)

    Source:
        S. Roberts, "Control Chart Tests Based on Geometric Moving Averages", 1959; J. Lucas, M. Saccucci,
        "Exponentially Weighted Moving Average Control Schemes", 1990.
    """

    kind = "EWMA"
    curves = ("moving average", "value")
    bits = ("ewma above", "ewma below", NOT_FINITE)

    def __init__(
        self,
        center: float,
        sigma: float,
        *,
        weight: float = 0.2,
        limit: float = 2.86,
        exact: bool = True,
        sides: Sides = "both",
        restart: bool = True,
    ) -> None:
        super().__init__(center, sigma, sides, restart)
        self.weight, self.limit = positive(self.kind, "weight", weight), positive(self.kind, "limit", limit)
        self.exact = bool(exact)
        if self.weight > 1:
            raise ValueError(f"[EWMA] weight must be at most 1 but is {weight:g}")
        self._variance = self.weight / (2 - self.weight)
        self._decay = (1 - self.weight) * (1 - self.weight)
        self._start()

    def _start(self) -> None:
        self._average, self._points = 0.0, 0
        self._missing = 1.0 if self.exact else 0.0  # share of the asymptotic variance: a product, exact on every path

    def _run(self, values: list[float]) -> list[Signal]:
        center, sigma, weight, decay, variance = self.center, self.sigma, self.weight, self._decay, self._variance
        above, below, sqrt = self.sides != "below", self.sides != "above", math.sqrt
        average, missing, points, limit = self._average, self._missing, self._points, self.limit
        signals: list[Signal] = []
        for index, x in enumerate(values, self.count):
            z = (x - center) / sigma
            if not -FAR < z < FAR:
                if not math.isfinite(x):
                    signals.append(self._not_finite(index, x))
                    continue
                z = math.copysign(FAR, z)
            average += weight * (z - average)
            missing *= decay
            points += 1
            bound = limit * sqrt(variance * (1.0 - missing))
            if (average > bound and above) or (average < -bound and below):
                signals.append(self._signal(index, x, average, bound, points))
                if self.restart:
                    self._start()
                    average, missing, points = self._average, self._missing, self._points
        self._average, self._missing, self._points = average, missing, points
        self.count += len(values)
        return signals

    def _signal(self, index: int, x: float, average: float, bound: float, points: int) -> Signal:
        side = "above" if average > 0 else "below"
        statistic = self.center + self.sigma * average
        limit = self.center + self.sigma * math.copysign(bound, average)
        message = (
            f"value {index} is {x:.6g}: the moving average is {statistic:.4g}, {side} the limit of {limit:.4g} "
            f"({self.limit:g} sigma)"
        )
        return Signal(self.kind, f"ewma {side}", index, x, limit, points, message, statistic=statistic, side=side)

    def _drawn(self, value: float, signal: Signal | None) -> tuple[float, ...]:
        average = self.center + self.sigma * self._average
        width = self.sigma * self.limit * math.sqrt(self._variance * (1.0 - self._missing))
        if signal is not None and signal.statistic is not None and signal.limit is not None:  # before the restart
            average, width = signal.statistic, abs(signal.limit - self.center)
        low = self.center - width if self.sides != "above" else math.nan
        high = self.center + width if self.sides != "below" else math.nan
        return average, value, low, high

    def _height(self, signal: Signal) -> float:
        return signal.statistic or 0.0

    def _begin(self, streams: int) -> Memory:
        return {"average": np.zeros(streams), "missing": np.full(streams, 1.0 if self.exact else 0.0)}

    def _scan(self, values: Array, center: Array, sigma: Array, memory: Memory) -> tuple[Array, Memory]:
        average, missing = memory["average"], memory["missing"]
        found, rows = self._deviations(values, center, sigma)
        above, below = np.uint16(ABOVE_BIT * (self.sides != "below")), np.uint16(BELOW_BIT * (self.sides != "above"))
        for i, (step, usable, every) in enumerate(rows):
            next_average, next_missing = average + self.weight * (step - average), missing * self._decay
            if not every:
                next_average = np.where(usable, next_average, average)
                next_missing = np.where(usable, next_missing, missing)
            average, missing = next_average, next_missing
            bound = self.limit * np.sqrt(self._variance * (1.0 - missing))
            broken = (average > bound) * above | (average < -bound) * below
            if not every:
                broken = broken * usable
            if broken.any():
                found[i] |= broken
                if self.restart:
                    average = np.where(broken, 0.0, average)
                    missing = np.where(broken, 1.0 if self.exact else 0.0, missing)
        return found, {"average": average, "missing": missing}

    def _parameters(self) -> dict[str, Any]:
        names = ("center", "sigma", "weight", "limit", "exact", "sides", "restart")
        return {name: getattr(self, name) for name in names}

    def _memory(self) -> dict[str, Any]:
        return {"average": self._average, "missing": self._missing, "points": self._points}

    def _remember(self, memory: Mapping[str, Any]) -> None:
        self._average, self._missing = float(memory["average"]), float(memory["missing"])
        self._points = int(memory["points"])
