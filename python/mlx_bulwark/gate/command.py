"""What ``mlx-bulwark gate`` does."""

from pathlib import Path

from .quarantine import Quarantine
from .readers import MAX_BYTES, read
from .report import ValidationReport
from .schema import Schema


def check(data: Path, schema: Path, *, quarantine: Path | None = None, max_bytes: int = MAX_BYTES) -> ValidationReport:
    """Hold a file against a schema; with a quarantine, keep there what breaks rules of rows."""
    rules = Schema.load(schema)
    run, report = rules._run(read(data, max_bytes=max_bytes))
    if quarantine is not None and report.bad_rows.any():
        Quarantine(quarantine).write(run, report)
    return report


def infer(
    data: Path,
    *,
    quantiles: tuple[float, float],
    margin: float,
    false_alarm: float,
    max_bytes: int = MAX_BYTES,
) -> Schema:
    """Infer a schema from a file that is trusted."""
    return Schema.infer(
        read(data, max_bytes=max_bytes),
        quantiles=quantiles,
        margin=margin,
        false_alarm=false_alarm,
        name=data.stem,
    )
