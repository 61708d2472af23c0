"""Schemas: what data must be, as plain data that is inferred, edited, versioned and held against batches."""

import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from .batch import LABELS, Batch, take
from .check import Check
from .quarantine import Quarantine
from .report import ValidationReport
from .rules import (
    Contributors,
    DomainRule,
    Field,
    NearDuplicates,
    Operator,
    Outliers,
    Relation,
    SchemaError,
    Series,
    from_plain,
    to_plain,
)

if TYPE_CHECKING:
    from ..provenance.manifest import AppendsLines

FORMAT = 1
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?)?")
_MOST_BYTES = 64 << 20  # of a schema in a file
Policy = Literal["raise", "drop", "report"]


class Validated(NamedTuple):
    """What a schema let pass.

    Attributes:
        data: The data; under ``"drop"`` without the rows that break a rule.
        report: All that was found.
    """

    data: Any
    report: ValidationReport


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What data must be, before it becomes an array that a model trusts.

    Data are fields with the same rows: an array is the field ``"x"``, ``(features, labels)`` are ``"x"`` and ``"y"``,
    and mappings of arrays, structured arrays and dataframes have fields of their own names.

    Attributes:
        name: Name of the schema.
        version: Version of the schema, the user's own.
        fields: Rules by field.
        extra: Whether data may have other fields.
        ordered: Whether fields must come in this order.
        axes: Least and largest size of named axes.
        rows: Least and largest number of rows.
        label: Field of the labels.
        duplicates: Largest share of rows that repeat an earlier one; None does not look.
        duplicate_fields: Fields that tell whether rows are the same; all by default.
        conflicts: Largest share of rows that have another label than an equal row before; None does not look.
        near_duplicates: Rows that are almost copies.
        series: Rules of rows in time.
        relations: Rules of fields together.
        outliers: Detectors of ``outliers``, and how abnormal rows may be to them.
        domain: Rules of the user's own, registered by ``gate.rule``.
        contributors: Rules of those who made the data.
        false_alarm: Probability that the tests against trusted data, all together, refuse a batch that comes from
            where the trusted data came from.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.gate import Field, Schema
        >>> schema = Schema(fields={"x": Field(dtype="float32", shape=(2,), low=0, high=1), "y": Field(values=(0, 1))})
        >>> x, y = np.array([[0.5, 0.25], [3.0, float("nan")]], np.float32), np.array([0, 7])
        >>> report = schema.check((x, y))
        >>> report.counts["range"], report.counts["missing"], report.counts["values"], report.bad_rows.tolist()
        (1, 1, 1, [False, True])
    """

    name: str = "schema"
    version: str = "1"
    fields: dict[str, Field] = field(default_factory=dict)
    extra: bool = True
    ordered: bool = False
    axes: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    rows: tuple[int, int | None] | None = None
    label: str = LABELS
    duplicates: float | None = None
    duplicate_fields: tuple[str, ...] | None = None
    conflicts: float | None = None
    near_duplicates: NearDuplicates | None = None
    series: Series | None = None
    relations: tuple[Relation, ...] = ()
    outliers: tuple[Outliers, ...] = ()
    domain: tuple[DomainRule, ...] = ()
    contributors: Contributors | None = None
    false_alarm: float = 1e-3

    def __post_init__(self) -> None:
        for name, rule in self.fields.items():
            _refuse_field(name, rule)
        if not 0 < self.false_alarm < 1:
            raise SchemaError(f"[Schema] false_alarm must lie between 0 and 1 but is {self.false_alarm}")
        for what in ("duplicates", "conflicts"):
            _refuse_share(what, getattr(self, what))
        for i, relation in enumerate(self.relations):
            if not relation.right:
                raise SchemaError(f"[Schema] relations[{i}].right must name a field but is empty")
            if relation.op not in get_args(Operator):
                raise SchemaError(f"[Schema] relations[{i}].op must be an operator but is {relation.op!r}")

        for i, limit in enumerate(self.outliers):
            _refuse_outliers(f"outliers[{i}]", limit)

    @property
    def has_text(self) -> bool:
        """Whether rules of text are among the fields."""
        return any(r.pattern is not None or r.max_length is not None or r.clean_text for r in self.fields.values())

    @classmethod
    def infer(
        cls,
        data: Any,
        *,
        quantiles: tuple[float, float] = (0.001, 0.999),
        margin: float = 1.0,
        false_alarm: float = 1e-3,
        detector: Any = None,
        name: str = "schema",
        version: str = "1",
    ) -> "Schema":
        """Infer a schema from data that are trusted.

        Two kinds of rules come of it. Hard limits: dtypes, shapes, the values of labels, and the range that was seen,
        widened on both sides; what breaks them is counted row by row. And tests against the trusted data, none of
        which assumes a distribution but for that of means: values beyond the quantiles, means, missing values and
        class shares. They refuse a batch from the same source with the probability ``false_alarm``, all together.

        Args:
            data: As ``check`` takes it.
            quantiles: Lower and upper quantile of the tests.
            margin: How far hard limits lie outside of the values seen, in their range (largest minus least).
            false_alarm: Of the tests.
            detector: A detector of ``outliers``, to be fitted here: to one half of the rows, all floating columns
                together. Limits come from its scores of the other half. ``save`` writes it beside the schema.
            name: Name of the schema.
            version: Version of the schema.

        Returns:
            Schema: To be looked at, edited and saved.

        Raises:
            ValueError: An argument is wrong, or there are no rows.

        Example:
            >>> import numpy as np
            >>> from mlx_bulwark.gate import Schema
            >>> rng = np.random.default_rng(0)
            >>> schema = Schema.infer((rng.normal(size=(500, 3)), rng.integers(0, 2, 500)))
            >>> schema.check((rng.normal(size=(500, 3)), rng.integers(0, 2, 500))).ok
            True
            >>> schema.check((1000 * rng.normal(size=(500, 3)), rng.integers(0, 2, 500))).ok
            False
        """
        from .infer import infer_fields

        low, high = quantiles
        if not 0 <= low < high <= 1:
            raise ValueError(f"[Schema.infer] quantiles must rise from 0 or more to 1 or less but are {quantiles}")
        if not margin >= 0:
            raise ValueError(f"[Schema.infer] margin must be 0 or more but is {margin}")
        batch = Batch(data)
        if not batch.rows:
            raise ValueError("[Schema.infer] data must have rows but have none")
        fields = infer_fields(batch, quantiles, margin)
        outliers: tuple[Outliers, ...] = ()
        if detector is not None:
            from .detectors import infer_outliers

            outliers = infer_outliers(batch, LABELS, detector, high)
        return cls(name=name, version=version, fields=fields, extra=False, outliers=outliers, false_alarm=false_alarm)

    @classmethod
    def from_json(cls, text: str) -> "Schema":
        """Read a schema from JSON. What it does not know is refused with its place.

        Raises:
            SchemaError: The text is no schema.
        """
        try:
            plain = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        except RecursionError:
            raise SchemaError("[Schema] JSON must not be nested this deeply") from None
        except json.JSONDecodeError as e:
            raise SchemaError(f"[Schema] JSON must parse but does not: {e}") from None
        if not isinstance(plain, dict):
            raise SchemaError(f"[Schema] JSON must be an object but is a {type(plain).__name__}")
        version = plain.pop("format", None)
        if version != FORMAT or isinstance(version, bool):
            raise SchemaError(f"[Schema] format must be {FORMAT} but is {version!r}")
        try:
            schema: Schema = from_plain(cls, plain, "schema")
        except RecursionError:
            raise SchemaError("[Schema] JSON must not be nested this deeply") from None
        return schema

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Schema":
        """Read a schema from a JSON file, and the detectors that it names from beside it.

        Raises:
            SchemaError: The file holds no schema, or a detector is not there or not the one that it names.
            OSError: It cannot be read.
        """
        size = Path(path).stat().st_size
        if size > _MOST_BYTES:
            raise SchemaError(f"[Schema] {path} must have at most {_MOST_BYTES} bytes but has {size}")
        try:
            schema = cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as e:
            raise SchemaError(f"[Schema] {path} must be UTF-8 but is not: {e}") from None
        if schema.outliers:
            from .detectors import load_beside

            load_beside(schema.outliers, Path(path).parent)
        return schema

    def to_json(self) -> str:
        """Return the schema as JSON, what has its default left out."""
        return json.dumps({"format": FORMAT, **to_plain(self)}, indent=1, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schema to a JSON file, whole or not at all, and before it its detectors beside it."""
        if self.outliers:
            from .detectors import save_beside

            save_beside(self.outliers, Path(path).parent)
        part = Path(path).with_name(Path(path).name + ".part")
        part.write_text(self.to_json() + "\n", encoding="utf-8")
        part.replace(path)

    def with_field(self, name: str, **rules: Any) -> "Schema":
        """Return the schema with rules of one field changed.

        Example:
            >>> from mlx_bulwark.gate import Field, Schema
            >>> Schema(fields={"x": Field(low=0)}).with_field("x", high=1).fields["x"].high
            1
        """
        return replace(self, fields={**self.fields, name: replace(self.fields.get(name, Field()), **rules)})

    def check(self, data: Any, *, frame_schema: Any = None, statistics: bool = False) -> ValidationReport:
        """Hold data against all rules.

        Args:
            data: An array ``[n, ...]`` (NumPy or MLX), ``(features, labels)``, a mapping of arrays by name, a
                structured array, or a pandas or Arrow table.
            frame_schema: A ``pandera.DataFrameSchema`` that tables are held against too.
            statistics: Report mean and standard deviation of all numeric fields; otherwise of those whose rules read
                them, which is quicker.

        Returns:
            ValidationReport: Every rule with its count.

        Raises:
            ValueError: The data are no fields with rows, or a domain rule is not registered.

        Example:
            >>> import numpy as np
            >>> from mlx_bulwark.gate import Field, Schema
            >>> Schema(fields={"age": Field(low=0, high=150)}).check({"age": np.array([4, -1, 200])}).counts["range"]
            2
        """
        return self._run(data, frame_schema, statistics=statistics)[1]

    def validate(
        self,
        data: Any,
        policy: Policy = "raise",
        *,
        quarantine: "str | os.PathLike[str] | Quarantine | None" = None,
        frame_schema: Any = None,
        audit_log: "AppendsLines | None" = None,
    ) -> Validated:
        """Let data pass or not.

        Args:
            data: As ``check`` takes it.
            policy: ``"raise"`` raises on any finding; ``"drop"`` leaves out rows that break a rule, keeps them in the
                quarantine and raises if a rule about the data as a whole is broken; ``"report"`` lets all pass.
            quarantine: File or ``Quarantine`` that gets the dropped rows, their numbers and the reasons. A file that
                exists is appended to.
            frame_schema: As of ``check``.
            audit_log: A ``provenance.AuditLog``, which gets a line with what was found before the data pass or not.

        Returns:
            Validated: The data and the report.

        Raises:
            GateError: The data do not pass; it has the report.
            ValueError: An argument is wrong.

        Example:
            >>> import numpy as np, os, tempfile
            >>> from mlx_bulwark.gate import Field, Schema, read_quarantine
            >>> file = os.path.join(tempfile.mkdtemp(), "dropped.jsonl")
            >>> schema = Schema(fields={"x": Field(low=0, high=1)})
            >>> schema.validate(np.array([0.5, 7.0, 0.25]), "drop", quarantine=file).data
            array([0.5 , 0.25])
            >>> [(d.row, d.reasons[0]["rule"], d.values["x"]) for d in read_quarantine(file)]
            [(1, 'range', 7.0)]
        """
        if policy not in get_args(Policy):
            raise ValueError(f"[Schema.validate] policy must be one of {', '.join(get_args(Policy))} but is {policy!r}")
        if policy == "drop" and quarantine is None:
            raise ValueError("[Schema.validate] quarantine must be given under the policy 'drop' but is None")
        check, report = self._run(data, frame_schema)
        return self._judged(data, check, report, policy, quarantine, audit_log)

    def _run(
        self, data: Any, frame_schema: Any = None, memory: Any = None, statistics: bool = False
    ) -> tuple[Check, ValidationReport]:
        check = Check(self, Batch(data), memory, statistics)
        if frame_schema is not None:
            from .frames import check_frame

            check_frame(check, data, frame_schema)
        return check, check.run()

    def _judged(
        self,
        data: Any,
        check: Check,
        report: ValidationReport,
        policy: str,
        quarantine: Any,
        audit_log: "AppendsLines | None",
        first_row: int = 0,
    ) -> Validated:
        if audit_log is not None:
            broken = {rule: count for rule, count in report.counts.items() if count}
            rows = {"first_row": first_row, "rows": report.rows, "bad_rows": int(report.bad_rows.sum())}
            audit_log.append("gate.validate", schema=report.schema, policy=policy, broken=broken, **rows)
        if policy == "report" or report.ok:
            return Validated(data, report)
        if policy == "raise" or not all(r.droppable for r in report.findings):
            report.raise_if_bad()
        kept = quarantine if isinstance(quarantine, Quarantine) else Quarantine(quarantine)
        kept.write(check, report, first_row)
        report.dropped = int(report.bad_rows.sum())
        return Validated(take(data, ~report.bad_rows), report)


def _refuse_field(name: str, rule: Field) -> None:
    for what in ("missing", "infinite"):
        _refuse_share(f"fields.{name}.{what}", getattr(rule, what))
    if rule.axis is not None and rule.axis < 0:
        raise SchemaError(f"[Schema] fields.{name}.axis must be 0 or more but is {rule.axis}")
    if rule.axis is not None and rule.shape is not None and rule.axis >= len(rule.shape):
        raise SchemaError(f"[Schema] fields.{name}.axis must be an axis of shape {list(rule.shape)} but is {rule.axis}")
    lists = [b for b in (rule.low, rule.high) if isinstance(b, tuple)]
    if lists and (rule.axis is None or len({len(b) for b in lists}) > 1):
        raise SchemaError(
            f"[Schema] fields.{name}: lists of low and high must be as long as each other and have an axis"
        )
    bounds = [(b if isinstance(b, tuple) else (b,)) for b in (rule.low, rule.high) if b is not None]
    if any(math.isnan(v) for b in bounds for v in b):
        raise SchemaError(f"[Schema] fields.{name}: low and high must be numbers but have NaN")
    if len(bounds) == 2:
        wide = max(map(len, bounds))
        low, high = (b * wide if len(b) == 1 else b for b in bounds)
        if any(a > b for a, b in zip(low, high, strict=True)):
            raise SchemaError(f"[Schema] fields.{name}.low must be at most high but is above it")
    _refuse_lengths(name, rule)
    for what in ("earliest", "latest"):
        moment = getattr(rule, what)
        if moment is not None and not _MOMENT.fullmatch(moment):
            raise SchemaError(f"[Schema] fields.{name}.{what} must be ISO 8601 in UTC but is {moment!r:.40}")
        try:
            np.datetime64("NaT" if moment is None else moment, "us")
        except ValueError as e:
            raise SchemaError(f"[Schema] fields.{name}.{what} must be a moment but {e}") from None
    if rule.pattern is not None:
        try:
            re.compile(rule.pattern)
        except re.error as e:
            raise SchemaError(f"[Schema] fields.{name}.pattern must be a regular expression but {e}") from None


def _refuse_lengths(name: str, rule: Field) -> None:
    """Lists run along the channels, so they are as long as each other."""
    lists = {}
    if rule.trusted is not None:
        names = "values", "low", "high", "outside", "mean", "std"
        lists = {f"trusted.{k}": getattr(rule.trusted, k) for k in names if getattr(rule.trusted, k)}
    if lists and {"trusted.low", "trusted.high", "trusted.outside"} & set(lists):
        lists |= {f"trusted.{k}": getattr(rule.trusted, k) for k in ("values", "low", "high", "outside")}
    if "trusted.mean" in lists or "trusted.std" in lists:
        lists |= {f"trusted.{k}": getattr(rule.trusted, k) for k in ("values", "mean", "std")}
    if rule.outlier is not None:
        both = {"outlier.center": rule.outlier.center, "outlier.scale": rule.outlier.scale}
        lists |= {k: v for k, v in both.items() if isinstance(v, tuple)}
    lists |= {k: v for k in ("low", "high") if isinstance(v := getattr(rule, k), tuple)}
    if len({len(v) for v in lists.values()}) > 1:
        told = ", ".join(f"{k} {len(v)}" for k, v in lists.items())
        raise SchemaError(f"[Schema] fields.{name}: lists must be as long as each other but have lengths {told}")
    if rule.axis is None and any(len(v) != 1 for v in lists.values()):
        raise SchemaError(f"[Schema] fields.{name}: lists must have one entry without an axis but have more or none")


def _refuse_outliers(where: str, rule: Outliers) -> None:
    _refuse_share(f"{where}.share", rule.share)
    if not rule.fields:
        raise SchemaError(f"[Schema] {where}.fields must name a field but is empty")
    if not math.isfinite(rule.limit):
        raise SchemaError(f"[Schema] {where}.limit must be finite but is {rule.limit}")
    if rule.trusted is not None and not 0 < rule.trusted[1] <= rule.trusted[0]:
        raise SchemaError(f"[Schema] {where}.trusted must be rows and how many of them but is {list(rule.trusted)}")


def _refuse_share(where: str, share: float | None) -> None:
    if share is not None and not 0 <= share <= 1:
        raise SchemaError(f"[Schema] {where} must be a share from 0 to 1 but is {share}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for k, v in pairs:
        if k in found:
            raise SchemaError(f"[Schema] {k} must stand once in an object but stands twice")
        found[k] = v
    return found


def _no_constant(name: str) -> Any:
    raise SchemaError(f"[Schema] JSON must have finite numbers but has {name}")
