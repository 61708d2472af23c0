"""Where dropped rows are kept: one line of JSON a row, with its number, its values and the reasons."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .report import GateError, ValidationReport

if TYPE_CHECKING:
    from .check import Check

MOST_BYTES = 1 << 30
_CONSTANTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Dropped:
    """A row that was dropped.

    Attributes:
        row: Its number in the data, or since the beginning of the stream.
        schema: Name and version of the schema.
        reasons: Rule, place, limit and finding of everything that it breaks.
        values: Its values by field; arrays as NumPy's.
    """

    row: int
    schema: str
    reasons: list[dict[str, str]]
    values: dict[str, Any]


class Quarantine:
    """A file that dropped rows are appended to, of bounded size.

    Args:
        path: The file; it is made with the first row.
        max_bytes: Its largest size. What no longer fits is not dropped: the data are refused instead.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int = MOST_BYTES) -> None:
        self.path, self.max_bytes = Path(path), max_bytes

    def write(self, check: Check, report: ValidationReport, first_row: int = 0) -> None:
        """Append all bad rows of a batch, and wait until they are on the disk.

        Raises:
            GateError: They do not fit.
            OSError: The file cannot be written.
        """
        room = self.max_bytes - (self.path.stat().st_size if self.path.exists() else 0)
        lines: list[str] = []
        for row in np.flatnonzero(report.bad_rows).tolist():
            lines.append(_line(check, report, row, first_row))
            room -= len(lines[-1].encode()) + 1
            if room < 0:
                raise GateError(
                    f"[gate] quarantine {self.path} must stay within {self.max_bytes} bytes but would not", report
                )
        with self.path.open("a", encoding="utf-8") as f:
            f.writelines(line + "\n" for line in lines)
            f.flush()
            os.fsync(f.fileno())


def read_quarantine(path: str | os.PathLike[str]) -> Iterator[Dropped]:
    """Read what was dropped, row by row.

    Args:
        path: File of a quarantine.

    Yields:
        Dropped: Number, reasons and values of a row.

    Raises:
        ValueError: A line is not one of a quarantine.
        OSError: The file cannot be read.
    """
    with Path(path).open(encoding="utf-8") as f:
        for i, line in enumerate(f, 1):
            try:
                entry = json.loads(line)
                values = {k: _read(v) for k, v in entry["values"].items()}
                yield Dropped(entry["row"], entry["schema"], entry["reasons"], values)
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(
                    f"[read_quarantine] line {i} of {path} must be a dropped row but is not: {e}"
                ) from None


def _line(check: Check, report: ValidationReport, row: int, first_row: int) -> str:
    reasons = [{"rule": r.rule, "where": r.where, "limit": r.limit, "found": r.found} for r in check.reasons(row)]
    values = {k: _write(a[row]) for k, a in check.batch.arrays.items() if row < len(a)}
    entry = {"row": first_row + row, "schema": report.schema, "reasons": reasons, "values": values}
    return json.dumps(entry, allow_nan=False)


def _write(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "O":
            return {"list": [_write(v) for v in value.ravel()]}
        plain = np.ascontiguousarray(value)
        data = base64.b64encode(plain.tobytes()).decode("ascii")
        return {"dtype": plain.dtype.str, "shape": list(value.shape), "base64": data}
    if isinstance(value, (np.datetime64, np.timedelta64)):
        return {"text": str(value)}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value if value is None or isinstance(value, (str, int, float, bool)) else {"text": str(value)}


def _read(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "number" in value:
        return _CONSTANTS[value["number"]]
    if "list" in value:
        return [_read(v) for v in value["list"]]
    if "text" in value:
        return value["text"]
    raw = base64.b64decode(value["base64"], validate=True)
    return np.frombuffer(raw, np.dtype(value["dtype"])).reshape(value["shape"])
