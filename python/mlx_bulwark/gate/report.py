"""What was found: every rule that ran, how often it was broken, where, and a table of it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMED_ROWS = 10
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class RuleResult:
    """One rule of one place, and how often it was broken.

    Attributes:
        rule: Kind of the rule, ``"range"`` for example.
        where: Field, or fields together.
        count: How many values, rows or classes break it; 0 if it holds.
        limit: What must be, in words.
        found: What is, in words.
        rows: First rows that break it; empty where the rule is about the data as a whole.
        droppable: Whether leaving out rows mends it.
    """

    rule: str
    where: str
    count: int
    limit: str
    found: str
    rows: tuple[int, ...] = ()
    droppable: bool = False

    @property
    def words(self) -> str:
        """The finding in a line."""
        place = f", first in row {self.rows[0]}" if self.rows else ""
        return f"{self.where} must {self.limit} but {self.found}{place}"


class GateError(ValueError):
    """Data that the gate does not let pass.

    Attributes:
        report: All that was found.
    """

    def __init__(self, message: str, report: "ValidationReport") -> None:
        super().__init__(message)
        self.report = report


@dataclass
class ValidationReport:
    """All rules of a schema against some data.

    Attributes:
        schema: Name and version of the schema.
        rows: Rows that were looked at.
        results: Every rule that ran, broken or not.
        statistics: Count, minimum, maximum, missing and infinite of numeric fields, an entry a channel; mean and std
            where they were asked for.
        contributors: Rows, share and agreement by contributor, where the schema has such rules.
        bad_rows: bool ``[rows]``: which rows break a rule.
        dropped: How many rows were left out, under the policy ``"drop"``.
    """

    schema: str
    rows: int
    results: list[RuleResult]
    statistics: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    contributors: dict[str, dict[str, float]] = field(default_factory=dict)
    bad_rows: Mask = field(default_factory=lambda: np.zeros(0, bool))
    dropped: int = 0

    @property
    def findings(self) -> list[RuleResult]:
        """The rules that are broken."""
        return [r for r in self.results if r.count]

    @property
    def ok(self) -> bool:
        """Whether every rule holds."""
        return not self.findings

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind of rule was broken, over all places."""
        found: dict[str, int] = {}
        for r in self.results:
            found[r.rule] = found.get(r.rule, 0) + r.count
        return found

    def raise_if_bad(self) -> None:
        """Raise ``GateError`` if a rule is broken."""
        if bad := self.findings:
            further = f", and {len(bad) - 3} further findings" if len(bad) > 3 else ""
            raise GateError(f"[gate] {'; '.join(r.words for r in bad[:3])}{further}", self)

    def to_dict(self) -> dict[str, Any]:
        """The report as what JSON knows; numbers that JSON lacks are text."""
        plain: dict[str, Any] = _plain(
            {
                "kind": "gate",
                "schema": self.schema,
                "ok": self.ok,
                "rows": self.rows,
                "bad_rows": int(self.bad_rows.sum()),
                "dropped": self.dropped,
                "counts": self.counts,
                "results": [asdict(r) for r in self.results],
                "statistics": self.statistics,
                "contributors": self.contributors,
            }
        )
        return plain

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def show(self) -> None:
        """Print the findings as a table.

        Raises:
            ImportError: rich is missing.
        """
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError as e:
            raise ImportError('[gate] rich is missing; pip install "mlx-bulwark[gate]" brings it') from e
        table = Table(title=f"{self.schema}: {self.rows:,} rows, {len(self.results)} rules", title_justify="left")
        for name in ("rule", "where", "count", "must", "but", "rows"):
            table.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
        for r in self.findings:  # Text: what data say is no markup
            rows = ", ".join(map(str, r.rows[:3])) + (" ..." if len(r.rows) > 3 else "")
            table.add_row(*map(Text, (r.rule, r.where, f"{r.count:,}", r.limit, r.found, rows)))
        console = Console()
        console.print(table if self.findings else Text(f"{table.title}: all hold"))
        if self.dropped:
            console.print(f"{self.dropped:,} rows dropped")


def merged(reports: Sequence[ValidationReport], schema: str) -> ValidationReport:
    """Reports of consecutive batches as one; statistics stay with the batches."""
    total = ValidationReport(schema, 0, [])
    places: dict[tuple[str, str], RuleResult] = {}
    for report in reports:
        absorb(total, places, report)
    return total


def absorb(total: ValidationReport, places: dict[tuple[str, str], RuleResult], report: ValidationReport) -> None:
    """Add the report of the next batch to that of those before it."""
    for r in report.results:
        rows = tuple(total.rows + i for i in r.rows)
        old = places.get((r.rule, r.where))
        if old is not None:
            rows = (old.rows + rows)[:NAMED_ROWS]
            kept = old if old.count or not r.count else r
            r = RuleResult(r.rule, r.where, old.count + r.count, kept.limit, kept.found, rows, r.droppable)
        else:
            r = RuleResult(r.rule, r.where, r.count, r.limit, r.found, rows, r.droppable)
        places[r.rule, r.where] = r
    total.results = list(places.values())
    total.rows += report.rows
    total.dropped += report.dropped


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
