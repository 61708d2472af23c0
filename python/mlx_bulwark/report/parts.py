"""What a report is made of: sections, and in them figures, tables, plots and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["problem", "attention", "good", "info"]
WORDS: dict[Status, str] = {
    "problem": "Problem",
    "attention": "Attention",
    "good": "In order",
    "info": "For information",
}


@dataclass(frozen=True)
class Figure:
    """One number: its name, its value as text, and what it means."""

    name: str
    value: str
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text: those in ``marked`` are findings, those in ``strong`` sums; columns in ``numeric`` are numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()
    left_out: int = 0

    @property
    def long(self) -> frozenset[int]:
        """Columns of sentences, which want room on a narrow screen."""
        return frozenset(i for i in range(len(self.columns)) if any(len(row[i]) > 40 for row in self.rows))

    @property
    def stacks(self) -> bool:
        """Whether a narrow screen shows its cells below each other: there is no room for them side by side."""
        return len(self.columns) > 4 or (len(self.columns) > 2 and bool(self.long))


@dataclass(frozen=True)
class Plot:
    """A drawing of ``svg.py``, put into the page as it is, and the words below it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Picture:
    """A PNG image as a data URI; ``words`` stand below it, ``alt`` says what it shows."""

    source: str
    words: str
    alt: str


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side."""

    caption: str
    pictures: list[Picture]


@dataclass
class Section:
    """One topic of a report.

    Attributes:
        kind: What the data are, as their key ``kind`` says.
        title: Heading.
        status: ``"problem"``, ``"attention"``, ``"good"`` or ``"info"``.
        verdict: What was found, in a sentence.
        sure: How sure that is.
        advice: What to do next.
        data: The figures as they came, for the JSON beside the page.
    """

    kind: str
    title: str
    status: Status
    verdict: str
    sure: str = ""
    advice: str = ""
    figures: list[Figure] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """The status as a person reads it."""
        return WORDS[self.status]


def percent(share: float | None) -> str:
    """A share in [0, 1] as a person reads it."""
    return "none" if share is None else f"{100 * share:.1f} %"


def number(value: Any) -> str:
    """A number, or whatever stands in its place, as a person reads it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return plain_words(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.4g}"
    return f"{value:.4g}"


def plain_words(value: Any) -> str:
    """Any JSON value in a line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, (list, tuple)):
        shown = ", ".join(plain_words(v) for v in value[:12])
        return shown + (f" and {len(value) - 12} more" if len(value) > 12 else "") if value else "none"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {plain_words(v)}" for k, v in list(value.items())[:12]) or "none"
    return str(value)
