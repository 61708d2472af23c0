"""Hotelling's T2: one chart of several correlated numbers."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from scipy import linalg, stats

from .charts import NOT_FINITE, Array, Chart, Signal
from .plot import Panel
from .proportions import THREE_SIGMA

Self = TypeVar("Self", bound="HotellingT2")

AT_ONCE = 4096  # vectors


class HotellingT2(Chart):
    """Chart of a vector's distance from the mean, in units of its covariance: Hotelling's T2.

    It sees what no chart of a single number sees: two that go together, and for once do not. A signal names the
    coordinate without which T2 would fall most. With known parameters the limit is that of the chi-square
    distribution; where mean and covariance were estimated from ``size`` vectors it is the wider one of the F
    distribution, which holds the rate of false alarms for the next vector, on average over baselines.

    Args:
        mean: Of the process in control, ``[d]``.
        covariance: Its covariance, ``[d, d]``, positive definite.
        false_alarm_rate: Of a vector.
        size: Vectors that mean and covariance were estimated from; None where they are known.

    Raises:
        ValueError: An argument has a wrong shape or value.

    Example:
        >>> from mlx_bulwark.monitor import HotellingT2
        >>> chart = HotellingT2([0.0, 0.0], [[1.0, 0.9], [0.9, 1.0]])
        >>> chart.update([2.0, 2.0])
        >>> print(chart.update([2.0, -2.0]))
        value 1 has T2 80, above the limit of 11.83; most of it by coordinate 0, 8.72 sigma from where the others put it

    Source:
        H. Hotelling, "Multivariate Quality Control", 1947; N. Tracy, J. Young, R. Mason, "Multivariate Control Charts
        for Individual Observations", 1992; on coordinates: G. Runger, F. Alt, D. Montgomery, "Contributors to a
        Multivariate Statistical Process Control Signal", 1996.
    """

    kind = "HotellingT2"

    def __init__(
        self, mean: Any, covariance: Any, *, false_alarm_rate: float = THREE_SIGMA, size: int | None = None
    ) -> None:
        super().__init__()
        self.mean, self.covariance = np.array(mean, np.float64), np.array(covariance, np.float64)
        self.false_alarm_rate, self.size = float(false_alarm_rate), size
        d = len(self.mean) if self.mean.ndim == 1 else 0
        if not d or self.covariance.shape != (d, d):
            raise ValueError(
                f"[HotellingT2] mean must be [d] and covariance [d, d] but have shapes {list(self.mean.shape)} and "
                f"{list(self.covariance.shape)}"
            )
        if not np.isfinite(self.mean).all() or not np.isfinite(self.covariance).all():
            raise ValueError("[HotellingT2] mean and covariance must be finite")
        if not np.allclose(self.covariance, self.covariance.T, rtol=1e-9, atol=0):
            raise ValueError("[HotellingT2] covariance must be symmetric")
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError(
                f"[HotellingT2] false_alarm_rate must be above 0 and below 1 but is {self.false_alarm_rate}"
            )
        if size is not None and size <= d:
            raise ValueError(f"[HotellingT2] size must be above the {d} coordinates but is {size}")
        try:
            self._factor: Array = np.linalg.cholesky(self.covariance)
        except np.linalg.LinAlgError as e:
            raise ValueError(
                "[HotellingT2] covariance must be positive definite but is not: leave out coordinates that are "
                "constant or follow from others"
            ) from e
        self.limit = self._limit()

    def _limit(self) -> float:
        d, m = len(self.mean), self.size
        if m is None:
            return float(stats.chi2.isf(self.false_alarm_rate, d))
        return float(d * (m + 1) * (m - 1) / (m * (m - d)) * stats.f.isf(self.false_alarm_rate, d, m - d))

    @classmethod
    def from_baseline(cls: type[Self], values: Any, **options: Any) -> Self:
        """Build the chart from trusted vectors.

        Args:
            values: Numbers ``[m, d]``, m > d, in the order of their time: more than ten for each coordinate, or the
                limit is of little use.
            options: ``false_alarm_rate``.

        Returns:
            HotellingT2: With estimated mean and covariance, and the limit that belongs to them.

        Raises:
            ValueError: The values are too few, not finite, or one coordinate follows from the others.

        Example:
            >>> import numpy as np
            >>> from mlx_bulwark.monitor import HotellingT2
            >>> chart = HotellingT2.from_baseline(np.random.default_rng(0).normal(size=(200, 3)))
            >>> round(chart.limit, 2)
            14.86
        """
        x = np.asarray(values, np.float64)
        if x.ndim != 2 or len(x) <= x.shape[1]:
            raise ValueError(f"[HotellingT2.from_baseline] values must be [m, d], m > d, but are {list(x.shape)}")
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if len(bad):
            raise ValueError(
                f"[HotellingT2.from_baseline] values must be finite but have {len(bad)} rows that are not, the first "
                f"at {bad[0]}"
            )
        return cls(x.mean(axis=0), np.cov(x, rowvar=False).reshape(x.shape[1], -1), size=len(x), **options)

    def update(self, value: Any) -> Signal | None:
        """Look at the next vector.

        Args:
            value: Numbers ``[d]``.

        Returns:
            Signal | None: What is out of control; None where nothing is.

        Raises:
            ValueError: The vector has another shape.
        """
        return next(iter(self.update_many(np.asarray(value, np.float64)[None])), None)

    def update_many(self, values: Any) -> list[Signal]:
        """Look at the next vectors.

        Args:
            values: Numbers ``[n, d]``, oldest first.

        Returns:
            list[Signal]: Of each that is out of control, in order.

        Raises:
            ValueError: The vectors have another shape.
        """
        x = self._vectors(values)
        t2 = self.statistic(x)
        signals = []
        for i in np.flatnonzero(~(t2 <= self.limit)).tolist():
            bad = not np.isfinite(x[i]).all()
            index = self.count + i
            signals.append(self._not_finite(index, float("nan")) if bad else self._signal(index, x[i], float(t2[i])))
        self.count += len(x)
        return signals

    def statistic(self, values: Any) -> Array:
        """Return T2 of vectors, by forward substitution with the Cholesky factor of the covariance.

        Args:
            values: Numbers ``[n, d]``.

        Returns:
            Array: float64 ``[n]``; NaN where a vector is not finite.
        """
        x = self._vectors(values)
        pieces = [self._squares(x[i : i + AT_ONCE]) for i in range(0, len(x), AT_ONCE)]
        return np.concatenate([np.zeros(0), *pieces])

    def _vectors(self, values: Any) -> Array:
        x = np.asarray(values, np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"[HotellingT2] values must be [n, {len(self.mean)}] but have shape {list(x.shape)}")
        return x

    def _squares(self, x: Array) -> Array:
        # Products are added one by one, not by BLAS, whose sums depend on how many vectors come at once.
        usable: Array = np.logical_and.reduce(np.isfinite(x), axis=1)
        deviations = np.where(usable[:, None], x - self.mean, np.nan).T
        solved = np.empty_like(deviations)
        with np.errstate(invalid="ignore", over="ignore"):
            for i, row in enumerate(self._factor):
                known = np.add.accumulate(row[:i, None] * solved[:i])[-1] if i else 0.0
                solved[i] = (deviations[i] - known) / row[i]
            total: Array = np.add.accumulate(solved * solved)[-1]
        total[usable & np.isnan(total)] = np.inf
        return total

    def _signal(self, index: int, x: Array, t2: float) -> Signal:
        coordinate, distance = self._farthest(x)
        message = (
            f"value {index} has T2 {t2:.4g}, above the limit of {self.limit:.4g}; most of it by coordinate "
            f"{coordinate}, {distance:.3g} sigma from where the others put it"
        )
        return Signal(self.kind, "T2", index, t2, self.limit, 1, message, side="above")

    @cached_property
    def _half(self) -> Array:
        """The factor's inverse: its columns' squares add up to the diagonal of the covariance's."""
        half: Array = linalg.solve_triangular(self._factor, np.eye(len(self.mean)), lower=True)
        return half

    def _farthest(self, x: Array) -> tuple[int, float]:
        half = self._half
        with np.errstate(over="ignore", invalid="ignore"):
            pulled = half.T @ (half @ (x - self.mean))
            distances = np.nan_to_num(np.abs(pulled) / np.sqrt((half * half).sum(axis=0)), nan=0.0)
        coordinate = int(np.argmax(distances))
        return coordinate, float(distances[coordinate])

    def _panels(self, values: Any) -> list[Panel]:
        x = self._vectors(values)
        signals = self.update_many(x)
        marks = [(s.index, s.value) for s in signals if s.rule != NOT_FINITE and np.isfinite(s.value)]
        missing = [s.index for s in signals if s.rule == NOT_FINITE]
        return [Panel("T2", {"T2": self.statistic(x)}, None, None, np.full(len(x), self.limit), marks, missing)]

    def _parameters(self) -> dict[str, Any]:
        return {
            "mean": self.mean.tolist(),
            "covariance": self.covariance.tolist(),
            "false_alarm_rate": self.false_alarm_rate,
            "size": self.size,
        }

    def _memory(self) -> dict[str, Any]:
        return {}

    def _remember(self, memory: Mapping[str, Any]) -> None:
        pass  # each vector is judged by itself
