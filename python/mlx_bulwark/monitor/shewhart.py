"""Charts of single values against limits and run rules: Shewhart's with Nelson's rules, Western Electric's."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .baseline import Estimator, estimate
from .charts import Chart, Signal, finite, joined, positive

Self = TypeVar("Self", bound="Shewhart")

NELSON = (1, 2, 3, 4, 5, 6, 7, 8)

# A condition's history is an integer, whose lowest bit is the newest point: 15 bits are all that any rule looks at.
KEPT = 0x7FFF
ABOVE, BELOW, ABOVE_1, BELOW_1, ABOVE_2, BELOW_2, RISING, FALLING, SEEN = range(9)
TWO_OF_THREE = [b & 1 and b.bit_count() >= 2 for b in range(8)]  # the newest is one of them: a point inside is no news
FOUR_OF_FIVE = [b & 1 and b.bit_count() >= 4 for b in range(32)]
TWO_OF_THREE_MANY, FOUR_OF_FIVE_MANY = np.array(TWO_OF_THREE, bool), np.array(FOUR_OF_FIVE, bool)
UP_DOWN, DOWN_UP = 0b1010101010101, 0b0101010101010  # 13 steps between 14 points


class _Rule(NamedTuple):
    points: int
    sigmas: float | None  # its limit; None where it has none
    words: str


class Shewhart(Chart):
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
    prefix = "nelson"
    run = 9

    def __init__(self, center: float, sigma: float, *, rules: Iterable[int] = (1,), limit: float = 3.0) -> None:
        super().__init__()
        self.center, self.sigma = finite(self.kind, "center", center), positive(self.kind, "sigma", sigma)
        self.limit = positive(self.kind, "limit", limit)
        self.rules = tuple(sorted(set(rules)))
        if not self.rules or not set(self.rules) <= set(NELSON):
            raise ValueError(f"[{self.kind}] rules must be some of 1 to 8 but are {list(self.rules)}")
        self._history = [0] * 9
        self._last = 0.0

    @classmethod
    def from_baseline(cls: type[Self], values: Any, *, estimator: Estimator = "moving_range", **options: Any) -> Self:
        """Build the chart from trusted values.

        Args:
            values: Numbers ``[n]``, oldest first.
            estimator: See ``estimate``, which also says what estimates do to run lengths.
            options: Further arguments of the chart.

        Returns:
            Shewhart: With estimated centre and sigma.

        Raises:
            ValueError: The values are fewer than 2, not finite, or do not vary.

        Example:
            >>> from mlx_bulwark.monitor import Shewhart
            >>> Shewhart.from_baseline([0.91, 0.92, 0.90, 0.91, 0.93]).center
            0.914
        """
        found = estimate(values, estimator)
        return cls(found.center, found.sigma, **options)

    def update(self, value: Any) -> Signal | None:
        """Look at the next value; see ``Chart.update``."""
        x, index = self._number(value), self.count
        self.count += 1
        if not np.isfinite(x):
            return self._not_finite(index, x)
        above, below = x > self.center, x < self.center
        bits = (
            above,
            below,
            x > self.center + self.sigma,
            x < self.center - self.sigma,
            x > self.center + 2 * self.sigma,
            x < self.center - 2 * self.sigma,
            bool(self._history[SEEN]) and x > self._last,
            bool(self._history[SEEN]) and x < self._last,
            True,
        )
        self._history = [(h << 1 | b) & KEPT for h, b in zip(self._history, bits, strict=True)]
        self._last = x
        broken = [rule for rule in self.rules if self._broken(rule, x)]
        return self._signal(index, x, above, broken) if broken else None

    def _broken(self, rule: int, x: float) -> bool:
        h = self._history
        if rule == 1:
            return x > self.center + self.limit * self.sigma or x < self.center - self.limit * self.sigma
        if rule == 2:
            full = (1 << self.run) - 1
            return h[ABOVE] & full == full or h[BELOW] & full == full
        if rule == 3:
            return h[RISING] & 31 == 31 or h[FALLING] & 31 == 31
        if rule == 4:
            up, down = h[RISING] & 0x1FFF, h[FALLING] & 0x1FFF
            return (up, down) in ((UP_DOWN, DOWN_UP), (DOWN_UP, UP_DOWN))
        if rule == 5:
            return bool(TWO_OF_THREE[h[ABOVE_2] & 7] or TWO_OF_THREE[h[BELOW_2] & 7])
        if rule == 6:
            return bool(FOUR_OF_FIVE[h[ABOVE_1] & 31] or FOUR_OF_FIVE[h[BELOW_1] & 31])
        outside = h[ABOVE_1] | h[BELOW_1]
        if rule == 7:
            return h[SEEN] == KEPT and not outside
        return outside & 255 == 255 and bool(h[ABOVE_1] & 255) and bool(h[BELOW_1] & 255)

    def _signal(self, index: int, x: float, above: bool, broken: list[int]) -> Signal:
        return joined([self._one(rule, index, x, above) for rule in broken])

    def _one(self, rule: int, index: int, x: float, above: bool) -> Signal:
        points, sigmas, words = self._described(rule)
        side = None
        limit = None
        if rule in (1, 2, 5, 6):
            side = "above" if above else "below"
            limit = self.center + (1 if above else -1) * (sigmas or 0.0) * self.sigma
        elif rule == 3:
            side = "above" if self._rises else "below"
        message = f"value {index} is {x:.6g}: " + words.format(
            side=side, limit=f"{limit:.6g}" if limit is not None else "", way="rise" if side == "above" else "fall"
        )
        return Signal(self.kind, f"{self.prefix} {self._number_of(rule)}", index, x, limit, points, message, side=side)

    @property
    def _rises(self) -> bool:
        return bool(self._history[RISING] & 1)

    def _described(self, rule: int) -> _Rule:
        return {
            1: _Rule(1, self.limit, f"{{side}} the limit of {{limit}} ({self.limit:g} sigma)"),
            2: _Rule(self.run, 0.0, f"the last {self.run} points are all {{side}} the centre of {{limit}}"),
            3: _Rule(6, None, "the last 6 points {way} steadily"),
            4: _Rule(14, None, "the last 14 points go up and down by turns"),
            5: _Rule(3, 2.0, "2 of the last 3 points are {side} {limit} (2 sigma)"),
            6: _Rule(5, 1.0, "4 of the last 5 points are {side} {limit} (1 sigma)"),
            7: _Rule(15, 1.0, "the last 15 points are all within 1 sigma of the centre: too little variation"),
            8: _Rule(8, 1.0, "the last 8 points are all outside of 1 sigma, on both sides: two processes mixed?"),
        }[rule]

    def _number_of(self, rule: int) -> int:
        return rule

    def update_many(self, values: Any) -> list[Signal]:
        """Look at the next values; see ``Chart.update_many``."""
        return [s for s in map(self.update, self._numbers(values).tolist()) if s is not None]

    def _parameters(self) -> dict[str, Any]:
        return {"center": self.center, "sigma": self.sigma, "rules": list(self.rules), "limit": self.limit}

    def _memory(self) -> dict[str, Any]:
        return {"history": list(self._history), "last": self._last}

    def _remember(self, memory: Mapping[str, Any]) -> None:
        history = [int(h) for h in memory["history"]]
        if len(history) != len(self._history) or not all(0 <= h <= KEPT for h in history):
            raise ValueError(f"a history of {history}")
        self._history, self._last = history, float(memory["last"])
