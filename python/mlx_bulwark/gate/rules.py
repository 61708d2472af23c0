"""What a schema can say: rules of fields, of rows, of time, of fields together and of contributors, as plain data."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Scalar = str | int | float | bool
Bound = float | tuple[float, ...] | None
Operator = Literal["<", "<=", "==", "!=", "correlates", "determines", "padded"]


class SchemaError(ValueError):
    """A schema cannot be used: what it says has a wrong name, type or value; the message says where."""


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """How far a value may lie from the middle, in robust standard deviations.

    Attributes:
        center: Median of the trusted values; one, or one a channel.
        scale: 1.4826 times their median absolute deviation; a scale of 0 switches the rule off there.
        limit: Largest ``|value - center| / scale``.
    """

    center: float | tuple[float, ...]
    scale: float | tuple[float, ...]
    limit: float


@dataclass(frozen=True, kw_only=True)
class Trusted:
    """What trusted data were like, for tests at the schema's false-alarm rate. Lists have one entry a channel.

    Attributes:
        rows: How many rows they had.
        values: Finite values a channel.
        low: Lower quantile, one of the values.
        high: Upper quantile, one of the values.
        outside: How many of the values are at or beyond ``low`` and ``high``.
        mean: Mean.
        std: Standard deviation.
        missing: Missing values.
        counts: Of a field with few different values, how often each occurs.
    """

    rows: int
    values: tuple[int, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    outside: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    missing: int = 0
    counts: dict[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Field:
    """Rules of one field: a column, an array of rows, or the labels.

    Attributes:
        dtype: ``"float32"`` and the like, ``"text"``, ``"datetime"``, or a family: ``"floating"``, ``"integer"``,
            ``"number"``; None for any.
        shape: Shape of one row. A number is that size; a name is any size, the same wherever the name stands; None is
            any size. A name that the schema's ``axes`` lists lies in these limits.
        required: Whether the field must be there.
        axis: Axis of one row along which lists run, one entry a channel: a column of ``[n, d]`` has axis 0, a
            color channel of ``[n, h, w, c]`` axis 2. None makes all values of the field one channel.
        low: Least value; one, or one a channel.
        high: Largest value.
        earliest: First moment of a field of datetimes, ISO 8601 in UTC: ``"2020-01-31"`` or ``"2020-01-31T12:00:00"``.
        latest: Last moment.
        missing: Largest share of missing values: NaN, NaT, None.
        infinite: Largest share of infinite values.
        values: Values that are allowed; labels are such.
        shares: Least and largest share of rows with a value, by the value as text: the class balance.
        mean: Least and largest mean of every channel.
        std: Least and largest standard deviation of every channel.
        distinct: Least and largest number of different values.
        unique: Whether no row repeats the value of an earlier one, as of a key; missing ones do not count.
        outlier: Robust limit.
        pattern: Regular expression that the whole of a text matches.
        max_length: Most characters of a text.
        clean_text: Refuse what a wrong encoding leaves: replacement and control characters, UTF-8 read as Latin-1.
        trusted: What trusted data were like; ``Schema.infer`` writes it.
    """

    dtype: str | None = None
    shape: tuple[int | str | None, ...] | None = None
    required: bool = True
    axis: int | None = None
    low: Bound = None
    high: Bound = None
    earliest: str | None = None
    latest: str | None = None
    missing: float = 0.0
    infinite: float = 0.0
    values: tuple[Scalar, ...] | None = None
    shares: dict[str, tuple[float, float]] | None = None
    mean: tuple[float, float] | None = None
    std: tuple[float, float] | None = None
    distinct: tuple[int, int | None] | None = None
    unique: bool = False
    outlier: Outlier | None = None
    pattern: str | None = None
    max_length: int | None = None
    clean_text: bool = False
    trusted: Trusted | None = None


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Rows that are almost copies of others.

    Attributes:
        distance: Euclidean distance up to which two rows are copies.
        share: Largest share of rows that are copies of another.
        fields: Fields that are compared; by default all numeric ones but the label.
    """

    distance: float
    share: float = 0.0
    fields: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """Rules of rows in time.

    Attributes:
        time: Field of the time, numbers or datetimes.
        group: Field that tells series apart; each is judged alone.
        strict: Whether equal times are refused too.
        max_gap: Largest step of time; seconds, for datetimes.
        max_jump: Largest step of a field between neighbours in time, by field.
        max_run: Most rows in sequence with one value, by field: a sensor that hangs.
    """

    time: str
    group: str | None = None
    strict: bool = True
    max_gap: float | None = None
    max_jump: dict[str, float] | None = None
    max_run: dict[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A rule of fields together.

    Attributes:
        left: Field on the left.
        op: ``"<"``, ``"<="``, ``"=="`` or ``"!="`` between left and the sum of the fields on the right;
            ``"correlates"``: Pearson's correlation lies in ``within``; ``"determines"``: rows that share a left value
            share a right value; ``"padded"``: behind the length on the right, rows of left hold only ``value``, and
            before it never.
        right: Field or fields on the right.
        tolerance: Difference up to which numbers count as equal.
        within: Least and largest correlation.
        value: What pads.
    """

    left: str
    op: Operator
    right: tuple[str, ...]
    tolerance: float = 0.0
    within: tuple[float, float] | None = None
    value: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """How abnormal rows may be to a fitted detector of ``outliers``, over several columns together.

    Attributes:
        detector: Name of its file, beside that of the schema: safetensors, no code.
        hash: Hash of all that the detector is; another one is refused.
        fields: Fields whose columns it takes, in its order. Rows with missing or infinite values there are not scored.
        limit: Largest ``anomaly_score``.
        share: Largest share of scored rows above the limit.
        trusted: Of trusted rows that the detector was not fitted to: how many, and how many had this score or a higher
            one. With it the share is tested at the schema's false-alarm rate instead.
    """

    detector: str
    hash: str
    fields: tuple[str, ...]
    limit: float
    share: float = 0.0
    trusted: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class DomainRule:
    """A registered function that says of each row whether it is right; see ``gate.rule``.

    Attributes:
        name: Name it was registered by.
        version: Version it was registered by; another one is refused.
        share: Largest share of rows that are not right.
    """

    name: str
    version: str
    share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Contributors:
    """Rules of those who made the data.

    Attributes:
        field: Field that names the contributor or source of a row.
        known: Contributors that are allowed; by default all.
        max_share: Largest share of rows of one contributor.
        max_rows: Most rows of one contributor.
        score: Field of the trust in a row's contributor.
        min_score: Least score.
        item: Field that names what was labelled; several contributors label the same item.
        min_agreement: Least share of a contributor's labels that agree with most of the others' on the same item. It
            counts as broken once the exact upper confidence limit of that share is below.
        confidence: Of that limit.
    """

    field: str
    known: tuple[str, ...] | None = None
    max_share: float | None = None
    max_rows: int | None = None
    score: str | None = None
    min_score: float | None = None
    item: str | None = None
    min_agreement: float | None = None
    confidence: float = 0.999


def to_plain(rule: Any) -> Any:
    """A rule as what JSON knows, without what has its default."""
    if is_dataclass(rule):
        kept = ((f.name, getattr(rule, f.name), f.default) for f in fields(rule))
        return {name: to_plain(value) for name, value, default in kept if value != default}
    if isinstance(rule, Mapping):
        return {str(k): to_plain(v) for k, v in rule.items()}
    return [to_plain(v) for v in rule] if isinstance(rule, (list, tuple)) else rule


def from_plain(kind: Any, plain: Any, where: str) -> Any:
    """A value of a type from what JSON gave, or an error that names the place."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _rule(kind, plain, where)
    if origin in (Union, types.UnionType):
        return _one_of(arguments, plain, where)
    if origin is Literal:
        if plain not in arguments:
            raise SchemaError(f"[Schema] {where} must be one of {', '.join(map(repr, arguments))} but is {plain!r}")
        return plain
    if origin is tuple:
        return _tuple(arguments, plain, where)
    if origin is dict:
        if not isinstance(plain, dict) or not all(isinstance(k, str) for k in plain):
            raise SchemaError(f"[Schema] {where} must be an object but is {_named(plain)}")
        return {k: from_plain(arguments[1], v, f"{where}.{k}") for k, v in plain.items()}
    if kind is float and isinstance(plain, int) and not isinstance(plain, bool):
        return float(plain)
    if not isinstance(plain, kind) or (isinstance(plain, bool) and kind is not bool):
        raise SchemaError(f"[Schema] {where} must be {_words(kind)} but is {_named(plain)}")
    return plain


def _rule(kind: Any, plain: Any, where: str) -> Any:
    if not isinstance(plain, dict):
        raise SchemaError(f"[Schema] {where} must be an object but is {_named(plain)}")
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind) if f.init}
    if unknown := sorted(set(map(str, plain)) - set(known)):
        raise SchemaError(f"[Schema] {where} must have only {', '.join(known)} but has {', '.join(unknown)}")
    values = {k: from_plain(hints[k], v, f"{where}.{k}") for k, v in plain.items()}
    try:
        return kind(**values)
    except TypeError as e:
        raise SchemaError(f"[Schema] {where}: {str(e).rpartition('() ')[2]}") from None


def _one_of(kinds: tuple[Any, ...], plain: Any, where: str) -> Any:
    if plain is None and type(None) in kinds:
        return None
    kinds = tuple(k for k in kinds if k is not type(None))
    if len(kinds) == 1:
        return from_plain(kinds[0], plain, where)
    exact = [k for k in kinds if isinstance(k, type) and type(plain) is k]
    for kind in exact or kinds:
        try:
            return from_plain(kind, plain, where)
        except SchemaError:
            continue
    raise SchemaError(f"[Schema] {where} must be {' or '.join(map(_words, kinds))} but is {_named(plain)}")


def _tuple(kinds: tuple[Any, ...], plain: Any, where: str) -> Any:
    if not isinstance(plain, (list, tuple)):
        raise SchemaError(f"[Schema] {where} must be a list but is {_named(plain)}")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(from_plain(kinds[0], v, f"{where}[{i}]") for i, v in enumerate(plain))
    if len(plain) != len(kinds):
        raise SchemaError(f"[Schema] {where} must be a list of {len(kinds)} but has {len(plain)}")
    return tuple(from_plain(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, plain, strict=True)))


def _words(kind: Any) -> str:
    names = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(kind, "a list" if get_origin(kind) is tuple else "an object")


def _named(plain: Any) -> str:
    return "null" if plain is None else f"{plain!r:.60}"
