"""What charts of single numbers share: centre and sigma, a baseline, and many streams at once."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from .baseline import Estimator, estimate
from .charts import FORMAT, NOT_FINITE, Array, Chart, Signal, finite, positive
from .plot import Panel

Self = TypeVar("Self", bound="LocationChart")

Memory = dict[str, Array]  # what the rules remember, the last axis the streams
AT_ONCE = 1 << 15  # values: what is made of them stays in the cache
FAR = 1e100  # sigmas: farther is taken for as far, so that no sum overflows


class LocationChart(Chart):
    """Chart of single numbers that come from a process with a centre and a sigma."""

    bits: ClassVar[tuple[str, ...]]  # what each bit of a flag says, the lowest first
    curves: ClassVar[tuple[str, ...]] = ("value",)  # of the picture
    label: ClassVar[str] = "value"

    def __init__(self, center: float, sigma: float) -> None:
        super().__init__()
        self.center, self.sigma = finite(self.kind, "center", center), positive(self.kind, "sigma", sigma)

    @classmethod
    def from_baseline(cls: type[Self], values: Any, *, estimator: Estimator = "moving_range", **options: Any) -> Self:
        """Build the chart from trusted values.

        Args:
            values: Numbers ``[n]``, oldest first.
            estimator: See ``estimate``, which also says what estimates do to run lengths.
            options: Further arguments of the chart.

        Returns:
            Chart: With estimated centre and sigma.

        Raises:
            ValueError: The values are fewer than 2, not finite, or do not vary.

        Example:
            >>> from mlx_bulwark.monitor import Shewhart
            >>> Shewhart.from_baseline([0.91, 0.92, 0.90, 0.91, 0.93]).center
            0.914
        """
        found = estimate(values, estimator)
        return cls(found.center, found.sigma, **options)

    def streams(self, number: int, *, center: Any = None, sigma: Any = None) -> "Streams":
        """Return charts of these rules for many streams at once, which have seen nothing.

        Args:
            number: Of the streams.
            center: Of each stream, ``[number]``; by default the chart's.
            sigma: The same.

        Returns:
            Streams: Whose ``update_many`` takes ``[n, number]``.

        Raises:
            ValueError: An argument has a wrong value or shape.

        Example:
            >>> from mlx_bulwark.monitor import CUSUM
            >>> charts = CUSUM(0.0, 1.0).streams(3)
            >>> found = charts.update_many([[0, 3, 0], [0, 3, 0], [0, 3, 0]])
            >>> found.index.tolist(), found.stream.tolist(), found.rules(0)
            ([2], [1], ('cusum above',))
        """
        return Streams(self.fresh(), number, center, sigma)

    def _panels(self, values: Any) -> list[Panel]:
        x = self._numbers(values)
        rows, signals = [], []
        for value in x.tolist():
            signals.append(self.update(value))
            rows.append(self._drawn(value, signals[-1]))
        told = np.array(rows, np.float64).reshape(len(x), 2 + len(self.curves))
        curves = {name: told[:, i] for i, name in enumerate(self.curves)}
        missing = [s.index for s in signals if s and s.rule == NOT_FINITE]
        told[missing] = np.nan
        marks = [(o.index, self._height(o)) for s in signals if s and s.rule != NOT_FINITE for o in (s, *s.others)]
        return [Panel(self.label, curves, self._middle(), told[:, -2], told[:, -1], sorted(set(marks)), missing)]

    @abstractmethod
    def _drawn(self, value: float, signal: Signal | None) -> tuple[float, ...]:
        """Heights of the curves after this value, and the limits below and above."""

    def _height(self, signal: Signal) -> float:
        return signal.value

    def _middle(self) -> float:
        return self.center

    @abstractmethod
    def _begin(self, streams: int) -> Memory:
        """What the rules remember at first."""

    @abstractmethod
    def _scan(self, values: Array, center: Array, sigma: Array, memory: Memory) -> tuple[Array, Memory]:
        """Flags ``[n, streams]`` of values of that shape, and what is remembered after them."""


@dataclass(frozen=True)
class Violations:
    """What many streams have broken, oldest first.

    Attributes:
        index: Number of the value within its stream, int64 ``[m]``, from 0.
        stream: Number of the stream, int64 ``[m]``.
        value: float64 ``[m]``.
        flags: uint16 ``[m]``; ``rules`` tells what they mean.
        names: Of the bits of the flags.
    """

    index: Array
    stream: Array
    value: Array
    flags: Array
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.index)

    def rules(self, i: int) -> tuple[str, ...]:
        """Return what the i-th of them has broken."""
        return tuple(name for bit, name in enumerate(self.names) if int(self.flags[i]) >> bit & 1)


class Streams:
    """Charts of the same rules for many streams, that step together; made by the method ``streams`` of a chart.

    Attributes:
        chart: Whose rules they are.
        number: Of the streams.
        count: How many values each stream has seen.
    """

    def __init__(self, chart: LocationChart, number: int, center: Any = None, sigma: Any = None) -> None:
        if number < 1:
            raise ValueError(f"[Streams] number must be 1 or more but is {number}")
        self.chart, self.number, self.count = chart, int(number), 0
        self.center = self._of_each("center", chart.center if center is None else center)
        self.sigma = self._of_each("sigma", chart.sigma if sigma is None else sigma)
        if not (self.sigma > 0).all():
            raise ValueError(f"[Streams] sigma must be above 0 but has {self.sigma.min():g}")
        self._memory = chart._begin(self.number)

    def _of_each(self, name: str, values: Any) -> Array:
        given = np.asarray(values, np.float64)
        if given.shape not in ((), (self.number,)):
            raise ValueError(f"[Streams] {name} must be [{self.number}] but has shape {list(given.shape)}")
        if not np.isfinite(given).all():
            raise ValueError(f"[Streams] {name} must be finite but has {given[~np.isfinite(given)][0]}")
        return np.array(np.broadcast_to(given, (self.number,)))

    def update(self, values: Any) -> Violations:
        """Look at the next value of each stream.

        Args:
            values: Numbers ``[streams]``.

        Returns:
            Violations: None of them where all is well.
        """
        return self.update_many(np.asarray(values, np.float64)[None])

    def update_many(self, values: Any) -> Violations:
        """Look at the next values of each stream.

        Args:
            values: Numbers ``[n, streams]``, oldest first.

        Returns:
            Violations: What is out of control.

        Raises:
            ValueError: The values have another shape.
        """
        x = np.asarray(values, np.float64)
        if x.ndim != 2 or x.shape[1] != self.number:
            raise ValueError(f"[Streams] values must be [n, {self.number}] but have shape {list(x.shape)}")
        rows = max(64, AT_ONCE // self.number)
        pieces = [self._piece(x[i : i + rows]) for i in range(0, len(x), rows)]
        index, stream, value, flags = (
            np.concatenate([np.empty(0, kind)] + [piece[i] for piece in pieces])
            for i, kind in enumerate((np.int64, np.int64, np.float64, np.uint16))
        )
        return Violations(index, stream, value, flags, self.chart.bits)

    def _piece(self, x: Array) -> tuple[Array, Array, Array, Array]:
        found, self._memory = self.chart._scan(x, self.center, self.sigma, self._memory)
        row, stream = np.nonzero(found)
        index = row + self.count
        self.count += len(x)
        return index, stream, x[row, stream], found[row, stream]

    def state(self) -> dict[str, Any]:
        """Return parameters and memory as JSON values, from which ``from_state`` goes on to the bit."""
        return {
            "kind": "Streams",
            "format": FORMAT,
            "count": self.count,
            "chart": self.chart.state(),
            "center": self.center.tolist(),
            "sigma": self.sigma.tolist(),
            "memory": {name: plain(values) for name, values in self._memory.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Streams":
        """Build the streams that ``state`` was called of; they go on where those stood.

        Args:
            state: What ``state()`` gave, also through JSON.

        Returns:
            Streams: At that point.

        Raises:
            ValueError: It is not such a state.
        """
        try:
            if state["kind"] != "Streams" or state["format"] != FORMAT:
                raise ValueError(f"kind {state['kind']!r} and format {state['format']!r}")
            chart = LocationChart.from_state(state["chart"])
            streams = cls(chart, len(state["center"]), state["center"], state["sigma"])
            streams.count = int(state["count"])
            streams._memory = {k: taken(state["memory"][k], v) for k, v in streams._memory.items()}
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"[Streams.from_state] state must be that of streams but has {e}") from e
        return streams


def plain(values: Array) -> Any:
    """Return an array as JSON values: NaN, which JSON has not, as None."""
    if values.dtype.kind != "f":
        return values.tolist()
    return [None if np.isnan(v) else v for v in values.tolist()]


def taken(values: Any, like: Array) -> Array:
    """Return what ``plain`` gave as an array like another."""
    if like.dtype.kind == "f":
        values = [np.nan if v is None else v for v in values]
    array = np.array(values, like.dtype)
    if array.shape != like.shape:
        raise ValueError(f"a memory of shape {list(array.shape)}, not {list(like.shape)}")
    return array
