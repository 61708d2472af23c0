"""Control charts: what they share. A chart looks at one value after the other and says when it is out of control."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from .plot import Panel, draw

Array = np.ndarray[Any, np.dtype[Any]]

Self = TypeVar("Self", bound="Chart")

NOT_FINITE = "not finite"
FORMAT = 1  # of the states


@dataclass(frozen=True)
class Signal:
    """A chart's word that a value is out of control.

    Attributes:
        chart: Kind of the chart, such as ``"CUSUM"``.
        rule: What was broken, such as ``"nelson 2"``; ``"not finite"`` of NaN and infinities on every chart.
        index: Of the value, counted from 0 since the chart began.
        value: Which the chart was given, or which it made of that: of a p-chart the share, of T2 the statistic.
        limit: What was passed; None where the rule has none.
        points: Length of the run that the rule looks at, the newest point included; 1 where it looks at one alone.
        message: All this in plain words.
        statistic: What was held against the limit, where it is not the value itself: the sum of a CUSUM, the average
            of an EWMA.
        side: ``"above"`` or ``"below"`` the centre; None where a rule knows no side.
        others: Signals of further rules that the same value has broken.
    """

    chart: str
    rule: str
    index: int
    value: float
    limit: float | None
    points: int
    message: str
    statistic: float | None = None
    side: str | None = None
    others: tuple["Signal", ...] = ()

    def __str__(self) -> str:
        return self.message

    def to_json(self) -> dict[str, Any]:
        """Return the signal as JSON values; a value that is not finite is a word."""
        content = asdict(self)
        content["others"] = [s.to_json() for s in self.others]
        return {k: repr(v) if isinstance(v, float) and not np.isfinite(v) else v for k, v in content.items()}


class Chart(ABC):
    """What every control chart does.

    A chart holds its parameters and the little that its rules remember, never the values: its memory is bounded. A
    value that is NaN or infinite is a signal of its own and changes nothing that the other rules remember.

    Attributes:
        kind: Name of the chart in signals and states.
        count: How many values it has seen.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type["Chart"]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in cls.__dict__:
            Chart.kinds[cls.kind] = cls

    def __init__(self) -> None:
        self.count = 0

    @abstractmethod
    def update(self, value: Any) -> Signal | None:
        """Look at the next value.

        Args:
            value: A number; of a chart over several at once what its class says.

        Returns:
            Signal | None: What is out of control; None where nothing is.

        Raises:
            ValueError: The value is none.
        """

    @abstractmethod
    def update_many(self, values: Any) -> list[Signal]:
        """Look at the next values: the same signals as of one update after the other, many times faster.

        Args:
            values: Numbers ``[n]``, oldest first.

        Returns:
            list[Signal]: Of each value that is out of control, in order.

        Raises:
            ValueError: The values have another shape or are none.
        """

    @abstractmethod
    def _parameters(self) -> dict[str, Any]:
        """Keyword arguments that build the chart anew, as JSON values."""

    @abstractmethod
    def _memory(self) -> dict[str, Any]:
        """What the rules remember, as JSON values."""

    @abstractmethod
    def _remember(self, memory: Mapping[str, Any]) -> None:
        """Take back what ``_memory`` gave."""

    def state(self) -> dict[str, Any]:
        """Return parameters and memory as JSON values, from which ``from_state`` goes on to the bit."""
        return {
            "kind": self.kind,
            "format": FORMAT,
            "count": self.count,
            "parameters": self._parameters(),
            "memory": self._memory(),
        }

    @classmethod
    def from_state(cls: type[Self], state: Mapping[str, Any]) -> Self:
        """Build the chart that ``state`` was called of; it goes on where that stood.

        Args:
            state: What ``state()`` gave, also through JSON. ``Chart.from_state`` takes that of any chart.

        Returns:
            Chart: Of the kind that the state names.

        Raises:
            ValueError: It is not the state of such a chart.
        """
        try:
            kind = Chart.kinds[state["kind"]]
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']!r}")
            chart = kind(**state["parameters"])
            chart.count = int(state["count"])
            chart._remember(state["memory"])
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"[{cls.__name__}.from_state] state must be that of a chart but has {e}") from e
        if not isinstance(chart, cls):
            raise ValueError(f"[{cls.__name__}.from_state] state must be of a {cls.__name__} but is of a {chart.kind}")
        return chart

    def plot(self, values: Any, path: str | os.PathLike[str] | None = None, *, title: str = "") -> str | None:
        """Draw what a fresh chart makes of values: points, centre, limits, and what is out of control.

        Args:
            values: What ``update_many`` takes, oldest first.
            path: SVG or PNG file, by its suffix.
            title: Words above the picture; by default the chart's kind.

        Returns:
            str | None: The text of an SVG; None where a file was written.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: The values are none, or the path has another suffix.
            OSError: The file cannot be written.
        """
        return draw(self.fresh()._panels(values), title or self.kind, path)

    @abstractmethod
    def _panels(self, values: Any) -> list[Panel]:
        """What is drawn of values that this chart, which is a fresh one, goes through."""

    def fresh(self: Self) -> Self:
        """Return a chart of the same parameters that has seen nothing."""
        parameters = json.loads(json.dumps(self._parameters()))
        return type(self)(**parameters)

    def _number(self, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError) as e:
            raise ValueError(f"[{self.kind}.update] value must be a number but is {value!r}") from e

    def _numbers(self, values: Any) -> Array:
        try:
            numbers = np.asarray(values, np.float64)
        except (TypeError, ValueError) as e:
            raise ValueError(f"[{self.kind}.update_many] values must be numbers but are {str(values)[:80]}") from e
        if numbers.ndim != 1:
            raise ValueError(f"[{self.kind}.update_many] values must be [n] but have shape {list(numbers.shape)}")
        return numbers

    def _not_finite(self, index: int, value: float) -> Signal:
        word = "not a number" if np.isnan(value) else "infinite"
        return Signal(self.kind, NOT_FINITE, index, value, None, 1, f"value {index} is {word}")


def joined(signals: list[Signal]) -> Signal:
    """Make one signal of those that one value has raised: the first leads, the others ride along."""
    first, *others = signals
    return replace(first, others=tuple(others)) if others else first


def finite(op: str, name: str, value: Any) -> float:
    """Return a parameter as a float."""
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(f"[{op}] {name} must be finite but is {number}")
    return number


def positive(op: str, name: str, value: Any) -> float:
    """Return a parameter above 0 as a float."""
    number = finite(op, name, value)
    if number <= 0:
        raise ValueError(f"[{op}] {name} must be above 0 but is {number:g}")
    return number
