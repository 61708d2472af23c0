"""Tables through pandera: rules of text, and the dataframe schemas that users have."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .check import Check
    from .schema import Schema

_REFUSED = {"Cc", "Cs", "Co", "Cn"}  # control characters, halves of pairs, private and unassigned ones
_LIMITS = {
    "pattern": "match its pattern",
    "max_length": "be no longer than its limit",
    "encoding": "be text that was decoded rightly",
}


def pandera() -> Any:
    """The library, or an error that names the extra."""
    try:
        import pandera.pandas
    except ImportError as e:
        raise ImportError('[gate] pandera is missing; pip install "mlx-bulwark[gate]" brings it') from e
    return pandera.pandas


def to_pandera(schema: Schema) -> Any:
    """The rules of a schema's columns as a ``pandera.DataFrameSchema``: those of types, ranges, values and text.

    Args:
        schema: Fields whose rows are single values.

    Returns:
        pandera.DataFrameSchema: For dataframes; budgets, statistics and rules of rows have no counterpart there.

    Raises:
        ImportError: pandera is missing.

    Example:
        >>> import pandas as pd
        >>> from mlx_bulwark.gate import Field, Schema, to_pandera
        >>> frames = to_pandera(Schema(fields={"age": Field(low=0, high=150)}))
        >>> len(frames.validate(pd.DataFrame({"age": [3.0, 4.0]})))
        2
    """
    pa = pandera()
    columns = {}
    for name, rule in schema.fields.items():
        checks = _text_checks(pa, rule)
        if rule.low is not None:
            checks.append(pa.Check.ge(rule.low, name="range"))
        if rule.high is not None:
            checks.append(pa.Check.le(rule.high, name="range"))
        if rule.values is not None:
            checks.append(pa.Check.isin(list(rule.values), name="values"))
        dtype = rule.dtype if rule.dtype not in ("text", "datetime", "floating", "integer", "number") else None
        columns[name] = pa.Column(dtype, checks, nullable=rule.missing > 0, unique=rule.unique, required=rule.required)
    return pa.DataFrameSchema(columns, strict=not schema.extra, ordered=schema.ordered)


def check_text(check: Check) -> None:
    """Hold the rules of all fields of text, in one validation."""
    import pandas as pd

    pa = pandera()
    arrays = check.batch.arrays
    rules = {
        n: r
        for n, r in check.schema.fields.items()
        if n in arrays and arrays[n].dtype.kind == "O" and arrays[n].ndim == 1
    }
    checks = {n: _text_checks(pa, r) for n, r in rules.items()}
    columns = {n: pa.Column(None, c, nullable=True) for n, c in checks.items() if c}
    if not columns:
        return
    n = check.batch.rows
    frame = pd.DataFrame({name: pd.Series(_texts(arrays[name][:n]), dtype=object) for name in columns})
    failed = _failures(pa.DataFrameSchema(columns), frame)
    for name in columns:
        for c in checks[name]:
            bad = np.zeros(n, bool)
            bad[failed.get((name, c.name), [])] = True
            check.rows(c.name, name, bad, _LIMITS[c.name], "{} rows do not")


def check_frame(check: Check, data: Any, frame_schema: Any) -> None:
    """Hold a table against a user's dataframe schema; each of its checks is a rule."""
    import pandas as pd

    pandera()
    if hasattr(data, "to_pandas"):
        data = data.to_pandas()
    frame = data if isinstance(data, pd.DataFrame) else pd.DataFrame(check.batch.arrays)
    n = len(frame)
    failed = _failures(frame_schema, frame.reset_index(drop=True))
    for (column, name), places in failed.items():
        rows = [p for p in places if p is not None]
        if rows:
            bad = np.zeros(n, bool)
            bad[rows] = True
            check.rows(f"pandera:{name}", column, bad, f"pass {name}", "{} rows do not")
        else:
            check.data(f"pandera:{name}", column, len(places), f"pass {name}", "does not")
    if not failed:
        check.holds("pandera", "data", "pass its dataframe schema")


def clean(text: str) -> bool:
    """Whether a text shows no trace of a wrong encoding."""
    if text.isascii():
        return all(c.isprintable() or c in "\t\n\r" for c in text)
    if any(c == "\ufffd" or (c not in "\t\n\r" and unicodedata.category(c) in _REFUSED) for c in text):
        return False
    for wrong in ("latin-1", "cp1252"):
        try:
            text.encode(wrong).decode("utf-8")
        except (UnicodeEncodeError, UnicodeDecodeError):
            continue
        return False  # bytes of UTF-8 that were read one by one
    return True


def _texts(a: Any) -> list[Any]:
    return [None if v is None or (isinstance(v, float) and v != v) else str(v) for v in a]


def _text_checks(pa: Any, rule: Any) -> list[Any]:
    checks = []
    if rule.pattern is not None:
        checks.append(pa.Check(lambda s: s.str.fullmatch(rule.pattern), name="pattern"))
    if rule.max_length is not None:
        checks.append(pa.Check(lambda s: s.str.len() <= rule.max_length, name="max_length"))
    if rule.clean_text:
        checks.append(pa.Check(clean, element_wise=True, name="encoding"))
    return checks


def _failures(schema: Any, frame: Any) -> dict[tuple[str, str], list[Any]]:
    from pandera.errors import SchemaErrors

    try:
        schema.validate(frame, lazy=True)
    except SchemaErrors as e:
        found: dict[tuple[str, str], list[Any]] = {}
        for case in e.failure_cases.to_dict("records"):
            place = case["index"]
            row = None if place is None or place != place else int(place)
            found.setdefault((str(case["column"]), str(case["check"])), []).append(row)
        return found
    return {}
