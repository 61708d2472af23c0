"""Charts of single values against limits and run rules: Shewhart's with Nelson's rules, Western Electric's."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .charts import NOT_FINITE, Array, Signal, joined, positive
from .location import AT_ONCE, LocationChart, Memory

NELSON = (1, 2, 3, 4, 5, 6, 7, 8)

# What has held of the last points is an integer, its lowest bit the newest point: no rule looks further back than 15.
KEPT = 0x7FFF
ABOVE, BELOW, ABOVE_1, BELOW_1, ABOVE_2, BELOW_2, RISING, FALLING, INSIDE = range(9)
WATCHED = {
    1: (),
    2: (ABOVE, BELOW),
    3: (RISING, FALLING),
    4: (RISING, FALLING),
    5: (ABOVE_2, BELOW_2),
    6: (ABOVE_1, BELOW_1),
    7: (INSIDE,),
    8: (ABOVE_1, BELOW_1),
}
UP_DOWN, DOWN_UP, STEPS = 0b1010101010101, 0b0101010101010, 0x1FFF  # 13 steps between 14 points
# Of the points that a mask holds the newest must be one: a point that is back inside is no news.
TWO_OF_THREE = np.array([m & 1 and bin(m).count("1") >= 2 for m in range(8)], bool)
FOUR_OF_FIVE = np.array([m & 1 and bin(m).count("1") >= 4 for m in range(32)], bool)
TWO: list[bool] = TWO_OF_THREE.tolist()
FOUR: list[bool] = FOUR_OF_FIVE.tolist()
NOT_FINITE_BIT, RISES_BIT = 1 << 8, 1 << 9  # of a flag, whose lower bits are Nelson's rules


class _Rule(NamedTuple):
    points: int
    sigmas: float | None  # its limit; None where it has none
    words: str


class Shewhart(LocationChart):
    """Chart of single values with limits at 3 sigma, and any of Nelson's eight rules.

    ==== =============================================================== ==========
    rule a point is out of control where                                 sided
    ==== =============================================================== ==========
    1    it is beyond 3 sigma                                            yes
    2    9 points in a row are on one side of the centre                 yes
    3    6 points in a row rise steadily, or fall: 5 steps               yes
    4    14 points in a row go up and down by turns: 13 steps            no
    5    2 of the last 3, itself one of them, are beyond 2 sigma         yes
    6    4 of the last 5, itself one of them, are beyond 1 sigma         yes
    7    15 points in a row are within 1 sigma                           no
    8    8 points in a row are outside of 1 sigma, on both sides         no
    ==== =============================================================== ==========

    Beyond is strictly so; a point on the centre belongs to neither side, and one that equals the last neither rises nor
    falls. Each point that breaks a rule is a signal, so a lasting shift goes on signalling. With rule 1 alone a process
    in control gives a false alarm every 370 values on average, with all eight every 74.

    Args:
        center: Of the process in control.
        sigma: Its standard deviation; of means of n values that of the means.
        rules: Which of Nelson's rules are watched, by number.
        limit: Of rule 1, in sigmas.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> from mlx_bulwark.monitor import Shewhart
        >>> chart = Shewhart(center=0.95, sigma=0.01, rules=(1, 2))
        >>> chart.update(0.953)
        >>> print(chart.update(0.91))
        value 1 is 0.91: below the limit of 0.92 (3 sigma)

    Source:
        W. Shewhart, "Economic Control of Quality of Manufactured Product", 1931; L. Nelson, "The Shewhart Control
        Chart: Tests for Special Causes", 1984.
    """

    kind = "Shewhart"
    nelson: ClassVar[dict[int, int]] = {rule: rule for rule in NELSON}  # number of a rule -> Nelson's number
    run: ClassVar[int] = 9
    bits = (*(f"nelson {rule}" for rule in NELSON), NOT_FINITE)

    def __init__(self, center: float, sigma: float, *, rules: Iterable[int] = (1,), limit: float = 3.0) -> None:
        super().__init__(center, sigma)
        self.limit = positive(self.kind, "limit", limit)
        self.rules = tuple(sorted(set(rules)))
        if not self.rules or not set(self.rules) <= set(self.nelson):
            raise ValueError(f"[{self.kind}] rules must be some of {list(self.nelson)} but are {list(self.rules)}")
        self._tested = tuple(self.nelson[rule] for rule in self.rules)
        self._watched = sorted({condition for rule in self._tested for condition in WATCHED[rule]})
        self._described = self._descriptions()
        self._history = [0] * 9
        self._last = math.nan

    def update(self, value: Any) -> Signal | None:
        """Look at the next value; see ``Chart.update``."""
        x, index = self._number(value), self.count
        self.count += 1
        flags = self._flags(x) if math.isfinite(x) else NOT_FINITE_BIT
        return self._signal(index, x, flags) if flags & ~RISES_BIT else None

    def _flags(self, x: float) -> int:
        center, sigma, history = self.center, self.sigma, self._history
        if self._watched:
            holds = (
                x > center,
                x < center,
                x > center + sigma,
                x < center - sigma,
                x > center + 2 * sigma,
                x < center - 2 * sigma,
                x > self._last,
                x < self._last,
                center - sigma <= x <= center + sigma,
            )
            for condition in self._watched:
                history[condition] = (history[condition] << 1 | holds[condition]) & KEPT
        self._last = x
        flags = RISES_BIT if history[RISING] & 1 else 0
        for rule in self._tested:
            if self._breaks(rule, x):
                flags |= 1 << rule - 1
        return flags

    def _breaks(self, rule: int, x: float) -> bool:
        h = self._history
        if rule == 1:
            return x > self.center + self.limit * self.sigma or x < self.center - self.limit * self.sigma
        if rule == 2:
            full = (1 << self.run) - 1
            return h[ABOVE] & full == full or h[BELOW] & full == full
        if rule == 3:
            return h[RISING] & 31 == 31 or h[FALLING] & 31 == 31
        if rule == 4:
            return (h[RISING] & STEPS, h[FALLING] & STEPS) in ((UP_DOWN, DOWN_UP), (DOWN_UP, UP_DOWN))
        if rule == 5:
            return TWO[h[ABOVE_2] & 7] or TWO[h[BELOW_2] & 7]
        if rule == 6:
            return FOUR[h[ABOVE_1] & 31] or FOUR[h[BELOW_1] & 31]
        if rule == 7:
            return h[INSIDE] == KEPT
        above, below = h[ABOVE_1] & 255, h[BELOW_1] & 255
        return bool(above | below == 255 and above and below)

    def update_many(self, values: Any) -> list[Signal]:
        """Look at the next values; see ``Chart.update_many``."""
        x = self._numbers(values)
        center, sigma = np.array([self.center]), np.array([self.sigma])
        memory = {"history": np.array(self._history, np.uint16)[:, None], "last": np.array([self._last])}
        signals: list[Signal] = []
        for start in range(0, len(x), AT_ONCE):
            piece = x[start : start + AT_ONCE]
            found, memory = self._scan(piece[:, None], center, sigma, memory)
            broken = np.flatnonzero(found & ~np.uint16(RISES_BIT))
            for i, v, flags in zip(broken.tolist(), piece[broken].tolist(), found[broken, 0].tolist(), strict=True):
                signals.append(self._signal(self.count + i, v, flags))
            self.count += len(piece)
        self._history, self._last = memory["history"][:, 0].tolist(), float(memory["last"][0])
        return signals

    def _drawn(self, value: float, signal: Signal | None) -> tuple[float, ...]:
        return value, self.center - self.limit * self.sigma, self.center + self.limit * self.sigma

    def _begin(self, streams: int) -> Memory:
        return {"history": np.zeros((9, streams), np.uint16), "last": np.full(streams, np.nan)}

    def _scan(self, values: Array, center: Array, sigma: Array, memory: Memory) -> tuple[Array, Memory]:
        usable = np.isfinite(values)
        if usable.all():
            seen = np.full(values.shape[1], len(values))
            return self._scan_finite(values, seen, center, sigma, memory)
        # What is not finite goes behind the rest of its stream, where nothing looks back at it, and its flags return.
        order = np.argsort(~usable, axis=0, kind="stable")
        seen = usable.sum(axis=0)
        together = np.take_along_axis(np.where(usable, values, center), order, axis=0)
        found, memory = self._scan_finite(together, seen, center, sigma, memory)
        found[np.arange(len(values))[:, None] >= seen] = NOT_FINITE_BIT
        flags = np.empty_like(found)
        np.put_along_axis(flags, order, found, axis=0)
        return flags, memory

    def _scan_finite(self, x: Array, seen: Array, center: Array, sigma: Array, memory: Memory) -> tuple[Array, Memory]:
        last = memory["last"]
        if not len(x):
            return np.zeros(x.shape, np.uint16), memory
        before = np.concatenate([last[None], x[:-1]])
        newest, streams = np.maximum(seen - 1, 0), np.arange(x.shape[1])
        history = memory["history"].copy()
        masks: dict[int, Array] = {}
        with np.errstate(invalid="ignore"):  # before the first value stands NaN, and nothing rises from there
            for condition in self._watched:
                masks[condition] = _histories(_holds(condition, x, before, center, sigma), history[condition])
                history[condition] = np.where(seen > 0, masks[condition][newest, streams], history[condition])
        flags = np.zeros(x.shape, np.uint16)
        for rule in self._tested:
            flags |= self._broken(rule, x, masks, center, sigma).astype(np.uint16) << np.uint16(rule - 1)
        if RISING in masks:
            flags |= (masks[RISING] & np.uint16(1)) * np.uint16(RISES_BIT) * (flags > 0)
        return flags, {"history": history, "last": np.where(seen > 0, x[newest, streams], last)}

    def _broken(self, rule: int, x: Array, m: dict[int, Array], center: Array, sigma: Array) -> Any:
        if rule == 1:
            return (x > center + self.limit * sigma) | (x < center - self.limit * sigma)
        if rule == 2:
            full = np.uint16((1 << self.run) - 1)
            return (m[ABOVE] & full == full) | (m[BELOW] & full == full)
        if rule == 3:
            return (m[RISING] & 31 == 31) | (m[FALLING] & 31 == 31)
        if rule == 4:
            up, down = m[RISING] & STEPS, m[FALLING] & STEPS
            return ((up == UP_DOWN) & (down == DOWN_UP)) | ((up == DOWN_UP) & (down == UP_DOWN))
        if rule == 5:
            return TWO_OF_THREE[m[ABOVE_2] & 7] | TWO_OF_THREE[m[BELOW_2] & 7]
        if rule == 6:
            return FOUR_OF_FIVE[m[ABOVE_1] & 31] | FOUR_OF_FIVE[m[BELOW_1] & 31]
        if rule == 7:
            return m[INSIDE] == KEPT
        above, below = m[ABOVE_1] & 255, m[BELOW_1] & 255
        return (above | below == 255) & (above > 0) & (below > 0)

    def _signal(self, index: int, x: float, flags: int) -> Signal:
        if flags & NOT_FINITE_BIT:
            return self._not_finite(index, x)
        return joined(
            [
                self._one(rule, index, x, bool(flags & RISES_BIT))
                for rule in self.rules
                if flags >> self.nelson[rule] - 1 & 1
            ]
        )

    def _one(self, rule: int, index: int, x: float, rises: bool) -> Signal:
        points, sigmas, words = self._described[self.nelson[rule]]
        side = limit = None
        if self.nelson[rule] in (1, 2, 5, 6):
            side = "above" if x > self.center else "below"
            limit = self.center + (1 if side == "above" else -1) * (sigmas or 0.0) * self.sigma
        elif self.nelson[rule] == 3:
            side = "above" if rises else "below"
        words = words.format(
            side=side, limit=f"{limit:.6g}" if limit is not None else "", way="rise" if rises else "fall"
        )
        name = self.bits[self.nelson[rule] - 1]
        return Signal(self.kind, name, index, x, limit, points, f"value {index} is {x:.6g}: {words}", side=side)

    def _descriptions(self) -> dict[int, _Rule]:
        return {
            1: _Rule(1, self.limit, f"{{side}} the limit of {{limit}} ({self.limit:g} sigma)"),
            2: _Rule(self.run, 0.0, f"the last {self.run} points are all {{side}} the centre of {{limit}}"),
            3: _Rule(6, None, "the last 6 points {way} steadily"),
            4: _Rule(14, None, "the last 14 points go up and down by turns"),
            5: _Rule(3, 2.0, "2 of the last 3 points are {side} {limit} (2 sigma)"),
            6: _Rule(5, 1.0, "4 of the last 5 points are {side} {limit} (1 sigma)"),
            7: _Rule(15, None, "the last 15 points are all within 1 sigma of the centre: too little variation"),
            8: _Rule(8, None, "the last 8 points are all outside of 1 sigma, on both sides: two processes mixed?"),
        }

    def _parameters(self) -> dict[str, Any]:
        return {"center": self.center, "sigma": self.sigma, "rules": list(self.rules), "limit": self.limit}

    def _memory(self) -> dict[str, Any]:
        return {"history": list(self._history), "last": None if math.isnan(self._last) else self._last}

    def _remember(self, memory: Mapping[str, Any]) -> None:
        history = [int(h) for h in memory["history"]]
        if len(history) != len(self._history) or not all(0 <= h <= KEPT for h in history):
            raise ValueError(f"a history of {history}")
        self._history, self._last = history, math.nan if memory["last"] is None else float(memory["last"])


class WesternElectric(Shewhart):
    """Shewhart's chart with the four rules of the Western Electric handbook, whose run on one side is of 8 points.

    ==== =============================================================== =============
    rule a point is out of control where                                 Nelson's rule
    ==== =============================================================== =============
    1    it is beyond 3 sigma                                            1
    2    2 of the last 3, itself one of them, are beyond 2 sigma         5
    3    4 of the last 5, itself one of them, are beyond 1 sigma         6
    4    8 points in a row are on one side of the centre                 2, of 9
    ==== =============================================================== =============

    With all four a process in control gives a false alarm every 91.75 values on average.

    Args:
        center: Of the process in control.
        sigma: Its standard deviation.
        rules: Which of the rules are watched, by number.
        limit: Of rule 1, in sigmas.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> from mlx_bulwark.monitor import WesternElectric
        >>> for signal in WesternElectric(0.0, 1.0).update_many([0.3] * 8):
        ...     print(signal)
        value 7 is 0.3: the last 8 points are all above the centre of 0

    Source:
        Western Electric, "Statistical Quality Control Handbook", 1956; C. Champ, W. Woodall, "Exact Results for
        Shewhart Control Charts with Supplementary Runs Rules", 1987.
    """

    kind = "WesternElectric"
    nelson: ClassVar[dict[int, int]] = {1: 1, 2: 5, 3: 6, 4: 2}
    run: ClassVar[int] = 8
    bits = (
        "western electric 1",
        "western electric 4",
        "",
        "",
        "western electric 2",
        "western electric 3",
        "",
        "",
        NOT_FINITE,
    )

    def __init__(self, center: float, sigma: float, *, rules: Iterable[int] = (1, 2, 3, 4), limit: float = 3.0) -> None:
        super().__init__(center, sigma, rules=rules, limit=limit)


def _holds(condition: int, x: Array, before: Array, center: Array, sigma: Array) -> Any:
    if condition == RISING:
        return x > before
    if condition == FALLING:
        return x < before
    if condition == INSIDE:
        return (x >= center - sigma) & (x <= center + sigma)
    sigmas = {ABOVE: 0, BELOW: 0, ABOVE_1: 1, BELOW_1: 1, ABOVE_2: 2, BELOW_2: 2}[condition]
    return x > center + sigmas * sigma if condition in (ABOVE, ABOVE_1, ABOVE_2) else x < center - sigmas * sigma


def _histories(holds: Array, earlier: Array) -> Array:
    """Bits of the last 15 points at each point: those of 1, then of 2, 4, 8 and 16 points by doubling."""
    mask: Array = holds.astype(np.uint16)
    for span in (1, 2, 4, 8):
        mask[span:] |= mask[:-span] << np.uint16(span)
    for i in range(min(15, len(mask))):
        mask[i] |= earlier << np.uint16(i + 1)
    mask &= np.uint16(KEPT)
    return mask
