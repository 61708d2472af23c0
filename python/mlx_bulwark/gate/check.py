"""One run of a schema over one batch: what every rule found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .batch import Batch
from .contributors import check_contributors
from .copies import check_copies
from .domain import registered
from .fields import check_field, first_rows, tests
from .relations import check_relation
from .report import Mask, RuleResult, ValidationReport
from .rules import Field
from .series import check_series
from .statistics import ChannelStatistics, channel_statistics, neighbours

if TYPE_CHECKING:
    from .schema import Schema


class Check:
    """Collects what rules find.

    Attributes:
        schema: The schema.
        batch: The data.
        alpha: False-alarm rate of one test against trusted data: the schema's over their number.
        axes: Sizes of the named axes seen so far.
        bad: Rows that break a rule, by the number of the result.
        memory: What a stream keeps between batches; None for data that stand alone.
    """

    def __init__(self, schema: Schema, batch: Batch, memory: Any = None, statistics: bool = False) -> None:
        self.schema, self.batch, self.memory = schema, batch, memory
        self._all_moments = statistics
        self._known: dict[str, ChannelStatistics] = {}
        count = sum(1 for _ in tests(schema.fields)) + sum(rule.trusted is not None for rule in schema.outliers)
        self.alpha = schema.false_alarm / max(1, count)
        self.axes: dict[str, int] = {}
        self.results: list[RuleResult] = []
        self.bad: list[tuple[int, Mask]] = []
        self.statistics: dict[str, dict[str, list[float]]] = {}
        self.contributors: dict[str, dict[str, float]] = {}

    def holds(self, rule: str, where: str, limit: str) -> None:
        """A rule that holds."""
        self.results.append(RuleResult(rule, where, 0, limit, ""))

    def data(self, rule: str, where: str, count: int, limit: str, found: str) -> None:
        """A rule about the data as a whole, which no leaving out of rows mends."""
        self.results.append(RuleResult(rule, where, count, limit, found if count else ""))

    def rows(self, rule: str, where: str, bad: Mask, limit: str, found: str, count: int | None = None) -> None:
        """A rule of rows; ``{}`` in the words becomes their number."""
        number = int(bad.sum())
        if not number:
            self.holds(rule, where, limit)
            return
        self.bad.append((len(self.results), bad))
        count = number if count is None else count
        words = found.format(f"{number:,}")
        self.results.append(RuleResult(rule, where, count, limit, words, first_rows(bad), True))

    def reasons(self, row: int) -> list[RuleResult]:
        """What a row breaks."""
        return [self.results[i] for i, bad in self.bad if row < len(bad) and bad[row]]

    def run(self) -> ValidationReport:
        """Hold the batch against all rules."""
        arrays, schema = self.batch.arrays, self.schema
        self._presence()
        for name, rule in schema.fields.items():
            if name in arrays:
                check_field(self, name, rule)
        if schema.has_text:
            from .frames import check_text

            check_text(self)
        check_copies(self)
        if schema.series and self.numeric(schema.series.time):
            check_series(self, schema.series)
        for relation in schema.relations:
            check_relation(self, relation)
        if schema.outliers:
            from .detectors import check_outliers

            for outliers in schema.outliers:
                check_outliers(self, outliers)
        for domain_rule in schema.domain:
            self._domain(domain_rule)
        if schema.contributors and schema.contributors.field in arrays:
            self.contributors = check_contributors(self, schema.contributors)
        return self.report()

    def report(self) -> ValidationReport:
        """All that was found."""
        rows = max((len(a) for a in self.batch.arrays.values()), default=0)
        marked = np.zeros(rows, bool)
        for _, bad in self.bad:
            marked[: len(bad)] |= bad
        name = f"{self.schema.name} {self.schema.version}"
        return ValidationReport(name, rows, self.results, self.statistics, self.contributors, marked)

    def numeric(self, name: str) -> bool:
        """Whether a field is there and holds numbers or times; a rule that needs it says if not."""
        return name in self.batch.arrays and self.batch.arrays[name].dtype.kind in "fiubmM"

    def reads_moments(self, rule: Field) -> bool:
        """Whether mean and standard deviation of a field are asked for."""
        return self._all_moments or rule.mean is not None or rule.std is not None or rule.trusted is not None

    def channel_statistics(self, name: str, rule: Field) -> ChannelStatistics:
        """Statistics of a numeric field; columns of one matrix are read together."""
        a, device = self.batch.arrays[name], self.batch.device.get(name)
        if name in self._known:
            return self._known[name]
        found = neighbours(name, self.batch.arrays) if device is None else None
        if found is None:
            return channel_statistics(a, rule.axis, device, moments=self.reads_moments(rule))
        names, matrix = found
        moments = any(self.reads_moments(self.schema.fields[n]) for n in names if n in self.schema.fields)
        together = channel_statistics(matrix, 0, moments=moments)
        self._known.update((n, together.channel(j)) for j, n in enumerate(names))
        return self._known[name]

    def _presence(self) -> None:
        schema, arrays = self.schema, self.batch.arrays
        missing = [n for n, f in schema.fields.items() if f.required and n not in arrays]
        self.data("fields", ", ".join(missing) or "data", len(missing), "be there", "is missing")
        if not schema.extra:
            extra = [n for n in arrays if n not in schema.fields]
            known = "be a field of the schema"
            self.data("extra", ", ".join(extra) or "data", len(extra), known, "is not")
        if schema.ordered:
            order = [n for n in arrays if n in schema.fields]
            wanted = [n for n in schema.fields if n in arrays]
            off = sum(a != b for a, b in zip(order, wanted, strict=True))
            self.data("order", "data", off, "have its fields in order", f"has {', '.join(order)}")
        lengths = {n: len(a) for n, a in arrays.items()}
        low, high = min(lengths.values(), default=0), max(lengths.values(), default=0)
        told = ", ".join(f"{n} {k}" for n, k in lengths.items() if k in (low, high))
        self.data("length", "data", high - low, "have as many rows in every field", f"has {told}" if high > low else "")
        if schema.rows and self.memory is None:
            least, most = schema.rows
            off = max(least - low, 0) + (max(high - most, 0) if most is not None else 0)
            words = f"have {least} to {'any number of' if most is None else most} rows"
            self.data("rows", "data", off, words, f"has {low}")

    def _domain(self, rule: Any) -> None:
        function = registered(rule.name, rule.version)
        n = self.batch.rows
        right = np.asarray(function({k: a[:n] for k, a in self.batch.arrays.items()}))
        if right.dtype != np.bool_ or right.shape != (n,):
            raise ValueError(
                f"[gate] rule {rule.name!r} must return bool [{n}] but returned {right.dtype} {list(right.shape)}"
            )
        limit = f"hold in {1 - rule.share:.3%} of rows"
        if (~right).sum() <= rule.share * n:
            self.holds("domain", rule.name, limit)
        else:
            self.rows("domain", rule.name, ~right, limit, "{} rows break it")
