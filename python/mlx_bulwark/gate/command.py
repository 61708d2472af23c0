"""What ``mlx-bulwark gate`` does; each returns its exit status."""

import json
import sys
from pathlib import Path
from typing import Any

from ..readers import ReadError, read
from .quarantine import Quarantine
from .report import GateError
from .schema import Schema

OK, FOUND, MISUSED = 0, 1, 2


def check(data: Path, schema: Path, quarantine: Path | None, max_bytes: int, as_json: bool) -> int:
    """Hold a file against a schema; with a quarantine, keep there what breaks rules of rows."""
    try:
        rules = Schema.load(schema)
    except (ValueError, OSError) as e:
        return _refused(e, MISUSED, as_json)
    try:
        run, report = rules._run(read(data, max_bytes=max_bytes), statistics=True)
        if quarantine is not None and report.bad_rows.any():
            Quarantine(quarantine).write(run, report)
    except (ReadError, GateError) as e:
        return _refused(e, FOUND, as_json)
    except (ValueError, OSError, ImportError) as e:
        return _refused(e, MISUSED, as_json)
    if as_json:
        print(report.to_json())
    else:
        report.show()
    return OK if report.ok else FOUND


def infer(
    data: Path, out: Path | None, as_json: bool, *, max_bytes: int, detector: str | None = None, **options: Any
) -> int:
    """Infer a schema from a file that is trusted; a detector is written beside it."""
    try:
        if detector is not None:
            if out is None:
                raise ValueError("--detector wants --out: the detector is written beside the schema")
            from ..outliers.command import unfitted

            options["detector"] = unfitted(detector, None, 0, new_rows=True)
        schema = Schema.infer(read(data, max_bytes=max_bytes), name=data.stem, **options)
        if out is not None:
            schema.save(out)
    except (ValueError, OSError, ImportError) as e:
        return _refused(e, MISUSED, as_json)
    if out is None or as_json:
        print(schema.to_json())
    else:
        print(f"{out}: {len(schema.fields)} fields")
    return OK


def _refused(error: Exception, code: int, as_json: bool) -> int:
    words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    if as_json:
        print(json.dumps({"ok": False, "error": words}))
    print(f"mlx-bulwark: {words}", file=sys.stderr)
    return code
