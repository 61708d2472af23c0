"""Drift over time: rows of many batches in a window of bounded size, held against a frozen reference."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from ..gate import chi_square, kolmogorov_smirnov, population_stability_index
from ..ops.mmd import mmd

Array = np.ndarray[Any, Any]
Kind = Literal["numbers", "classes"]
MOST_COMPARED = 500  # rows of each side in the MMD
FIRST_PERMUTATIONS = 63  # most windows need no more to be cleared
BINS = 10  # of the PSI
LEAST_MMD = 0.03  # as of gate.Drift


@dataclass(frozen=True)
class WindowTest:
    """A window that was held against its reference.

    Attributes:
        window: Its name.
        rows: Rows of the window.
        test: ``"ks"``, ``"chi2"`` or ``"mmd"``: the one with the least p-value for its level.
        column: Column that moved the most; None for all columns together.
        p_value: Of that test, times the number of columns where one was chosen among many.
        level: Below it the test says drift.
        effect: KS statistic, share of rows that moved, or MMD.
        psi: Population stability index of that column.
        psi_null_mean: What it is on average without drift.
        drift: Whether the p-value is below its level and the effect large enough to matter.
    """

    window: str
    rows: int
    test: str
    column: int | None
    p_value: float
    level: float
    effect: float
    psi: float | None
    psi_null_mean: float | None
    drift: bool

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


class DriftWindow:
    """Rows that come batch by batch, tested in windows that do not overlap, short ones and long ones.

    Each ``size`` rows are held against the reference, and each ``long * size`` rows once more, which finds less drift
    later. Columns of numbers are tested by Kolmogorov-Smirnov at a level divided by their number, long windows also
    together by the MMD; classes by chi-square. The levels are such that on average at most one alarm in ``run_length``
    short windows is false, whatever the number of columns. That is an average over references too: all windows are
    held against the same one, and one that is unlike what it was drawn from alarms more often; a reference much larger
    than a window keeps that rare. Rows must be independent.

    At most ``long * size`` rows are kept.

    Args:
        name: Of the window.
        reference: Trusted rows, ``[n, d]`` numbers, or ``[n]`` numbers of classes.
        kind: ``"numbers"`` or ``"classes"``.
        size: Rows of a short window.
        long: Short windows in a long one; 1 for none.
        run_length: Short windows between false alarms.
        min_effect: Least KS statistic, or share of rows that moved, that matters.
        mmd: Test all columns together too.
        seed: Of permutations.

    Raises:
        ValueError: The reference is too small, or an argument has a wrong value.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.monitor import DriftWindow
        >>> rng = np.random.default_rng(0)
        >>> window = DriftWindow("confidences", rng.normal(size=(1000, 1)), size=200)
        >>> [test.drift for test in window.add(rng.normal(size=(200, 1)))]
        [False]
        >>> [test.drift for test in window.add(rng.normal(0.5, size=(200, 1)))]
        [True]

    Source:
        S. Rabanser, S. Guennemann, Z. Lipton, "Failing Loudly: An Empirical Study of Methods for Detecting Dataset
        Shift", 2019.
    """

    def __init__(
        self,
        name: str,
        reference: Any,
        *,
        kind: Kind = "numbers",
        size: int = 500,
        long: int = 8,
        run_length: float = 1000.0,
        min_effect: float = 0.05,
        mmd: bool = True,
        seed: int = 0,
    ) -> None:
        rows: Array = np.asarray(reference)
        rows = (
            rows.astype(np.int64).reshape(-1) if kind == "classes" else rows.astype(np.float32).reshape(len(rows), -1)
        )
        if len(rows) < 20 or size < 20:
            raise ValueError(f"[DriftWindow] reference and size must have 20 rows or more but have {len(rows)}, {size}")
        if kind == "numbers" and not np.isfinite(rows).all():
            raise ValueError("[DriftWindow] reference must be finite but has NaN or infinite values")
        if long < 1 or not run_length > 1 or not 0 <= min_effect < 1:
            raise ValueError(
                f"[DriftWindow] long must be 1 or more, run_length above 1 and min_effect from 0 and below 1, but are "
                f"{long}, {run_length} and {min_effect}"
            )
        self.name, self.kind, self.size, self.long = name, kind, size, long
        self.run_length, self.min_effect, self.seed = float(run_length), float(min_effect), seed
        self.reference: Array = rows
        self._sorted = [] if kind == "classes" else list(np.sort(rows, axis=0).T.copy())
        self._edges = [np.unique(np.quantile(column, np.arange(1, BINS) / BINS)) for column in self._sorted]
        spread = rows.std(axis=0) if kind == "numbers" else rows[:0]
        self._scale: Array = np.where(spread > 0, spread, 1.0).astype(np.float32)
        self.mmd = mmd and kind == "numbers" and rows.shape[1] > 1
        self.windows = 0
        self._pending: Array = rows[:0]

    def add(self, rows: Any) -> list[WindowTest]:
        """Add rows; return a result for each window that is full.

        Args:
            rows: ``[b, d]`` or ``[b]``, any number of them.

        Raises:
            ValueError: They have other columns than the reference.
        """
        new: Array = np.asarray(rows).astype(self.reference.dtype)
        new = new.reshape(-1) if self.kind == "classes" else new.reshape(len(new), math.prod(new.shape[1:]))
        if new.shape[1:] != self.reference.shape[1:]:
            raise ValueError(
                f"[DriftWindow.add] rows must have {self.reference.shape[1]} columns but have {new.shape[1]}"
            )
        found = []
        while len(new):
            room = self.size - len(self._pending) % self.size
            self._pending, new = np.concatenate([self._pending, new[:room]]), new[room:]
            if len(self._pending) % self.size == 0:
                found.append(self._test(self._pending[-self.size :], long=False))
                self.windows += 1
                if len(self._pending) == self.size * self.long:
                    if self.long > 1:
                        found.append(self._test(self._pending, long=True))
                    self._pending = self._pending[:0]
        return found

    def _test(self, rows: Array, long: bool) -> WindowTest:
        """Short windows may take half of the rate of false alarms, long ones, which are rarer, the other half."""
        rate = 1 / self.run_length
        if self.long > 1:
            rate = min(0.5, rate * self.long / 2) if long else rate / 2
        if self.kind == "classes":
            return self._classes(rows, rate)
        together = self.mmd and long
        columns = self._columns(rows, rate / 2 if together else rate)
        if not together:
            return columns
        mmd = self._together(rows, rate / 2)
        return mmd if (mmd.drift, -mmd.p_value) > (columns.drift, -columns.p_value) else columns

    def _classes(self, rows: Array, level: float) -> WindowTest:
        most = int(max(rows.max(), self.reference.max())) + 1
        counts = [np.bincount(r, minlength=most) for r in (self.reference, rows)]
        found, psi = chi_square(*counts), population_stability_index(*counts)
        shares = [c / c.sum() for c in counts]
        moved = int(np.abs(shares[1] - shares[0]).argmax())
        drift = found.p_value < level and found.effect >= self.min_effect
        return WindowTest(
            self.name, len(rows), "chi2", moved, found.p_value, level, found.effect, psi.value, psi.null_mean, drift
        )

    def _columns(self, rows: Array, level: float) -> WindowTest:
        width = rows.shape[1]
        worst = max(range(width), key=lambda j: _distance(self._sorted[j], np.sort(rows[:, j])))
        found = kolmogorov_smirnov(
            self._sorted[worst], rows[:, worst]
        )  # sizes are the same: the least p of all columns
        edges, both = self._edges[worst], (self._sorted[worst], rows[:, worst])
        counts = [np.bincount(np.searchsorted(edges, v), minlength=len(edges) + 1) for v in both]
        psi, p = population_stability_index(*counts), min(1.0, found.p_value * width)
        drift = p < level and found.effect >= self.min_effect
        return WindowTest(self.name, len(rows), "ks", worst, p, level, found.effect, psi.value, psi.null_mean, drift)

    def _together(self, rows: Array, level: float) -> WindowTest:
        """Few permutations clear most windows; only where they leave room for drift all of them are looked at.

        The first of all permutations are those few, so that what they clear all of them would have cleared too.
        """
        generator = np.random.default_rng([self.seed, self.windows])
        few = (r[generator.permutation(len(r))[:MOST_COMPARED]] / self._scale for r in (self.reference, rows))
        old, new = (mx.array(r) for r in few)
        everything = max(199, int(np.ceil(2 / level)) - 1)  # so many that the least p-value is below the level
        seed = int(generator.integers(2**31))
        found = mmd(old, new, bandwidth=self._bandwidth, permutations=FIRST_PERMUTATIONS, seed=seed)
        effect, p = math.sqrt(max(found.statistic, 0.0)), float(found.p_value or 1)
        least = p * (1 + FIRST_PERMUTATIONS) / (1 + everything)  # that all of them can still come to
        if least < level and effect >= LEAST_MMD:
            p = float(mmd(old, new, bandwidth=self._bandwidth, permutations=everything, seed=seed).p_value or 1)
        drift = p < level and effect >= LEAST_MMD
        return WindowTest(self.name, len(rows), "mmd", None, p, level, effect, None, None, drift)

    @cached_property
    def _bandwidth(self) -> tuple[float, ...]:
        """The median distance of rows of the reference, which does not change.

        As it knows one side alone, the permutation test is exact no more but in the limit of a large reference; in 700
        windows without drift it alarmed as often as with both sides' median.
        """
        rows = mx.array(self.reference / self._scale)
        return mmd(rows[::2], rows[1::2]).bandwidths

    @property
    def pending(self) -> Array:
        """Rows that wait for their window to be full, and those of the long one."""
        return self._pending

    def load(self, windows: int, pending: Array) -> None:
        """Go on after a restart.

        Args:
            windows: Short windows that were tested.
            pending: What ``pending`` was.
        """
        self.windows, self._pending = windows, pending.astype(self.reference.dtype)


def _distance(reference: Array, new: Array) -> float:
    """Kolmogorov-Smirnov statistic of sorted values: it is reached at, or just before, a new one."""
    steps = np.arange(len(new) + 1) / len(new)
    above = steps[1:] - np.searchsorted(reference, new, side="right") / len(reference)
    below = np.searchsorted(reference, new, side="left") / len(reference) - steps[:-1]
    return float(max(above.max(), below.max()))
