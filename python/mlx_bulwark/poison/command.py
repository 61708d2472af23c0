"""What ``mlx-bulwark scan`` does."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..readers import ReadError, read
from ..smoothing.command import NAMES, OptionError, load_model
from .classes import Array
from .inspect import InspectReport, inspect
from .scan import ScanReport, scan, scan_features
from .values import input_rows

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class ScanOptions:
    """Options of the command, as it documents them."""

    data: Path
    label: str | None
    model: str | None
    weights: Path | None
    trusted: Path | None
    expected_rate: float | None
    false_alarm_rate: float
    batch_size: int
    seed: int
    plot: Path | None
    progress: bool


@dataclass(frozen=True, eq=False)
class ScanFindings:
    """What was found in the data, and in the model where one was given."""

    scanned: ScanReport
    inspected: InspectReport | None

    @property
    def accused(self) -> bool:
        """Whether either was accused."""
        return self.scanned.accused or (self.inspected is not None and self.inspected.accused)

    def to_dict(self) -> dict[str, Any]:
        """The report of the scan, and under ``model_inspection`` that of the model."""
        told = self.scanned.to_json()
        if self.inspected is not None:
            told["model_inspection"] = self.inspected.to_json()
        return told

    def print(self, console: "Console", worst: int) -> None:
        """Print tables, the verdict and the worst rows."""
        console.print(self.scanned.table(), markup=False, soft_wrap=True)
        if self.inspected is not None:
            console.print(self.inspected.table(), markup=False, soft_wrap=True)
        p = self.scanned.p_value
        found = f"{len(self.scanned.suspects):,} suspects" if self.scanned.accused else "not accused of poison"
        console.print(f"{len(self.scanned.y):,} rows, {found}, p {'unknown' if p is None else f'{p:.2g}'}")
        for row in self.scanned.ranking[:worst].tolist():
            console.print(f"row {row}: {self.scanned.reason(row)}", markup=False)


def run_scan(options: ScanOptions) -> ScanFindings:
    """Scan a file, by a model's features or by its own columns."""
    x, y = load_labelled(options.data, options.label)
    common: dict[str, Any] = {
        "expected_rate": options.expected_rate,
        "false_alarm_rate": options.false_alarm_rate,
        "seed": options.seed,
        "progress": options.progress,
    }
    held = None if options.trusted is None else load_labelled(options.trusted, options.label)
    if options.model is None:
        findings = ScanFindings(_scanned_alone(options, x, y, held, common), None)
    else:
        model: Any = load_model(options.model, options.weights)
        model.eval()
        scanned = scan(model, x, y, trusted=held, batch_size=options.batch_size, **common)
        findings = ScanFindings(scanned, None if held is None else inspect(model, held, progress=options.progress))
    if options.plot is not None:
        span = (float(x.min()), float(x.max())) if x.size else (0.0, 1.0)
        findings.scanned.plot(options.plot, x, bounds=span if span[0] < span[1] else (0.0, 1.0))
    return findings


def _scanned_alone(options: ScanOptions, x: Array, y: Array, held: Any, common: dict[str, Any]) -> ScanReport:
    """Columns stand for the features, each in units of its deviation."""
    if options.weights is not None:
        raise OptionError("--weights must come with --model but does not")
    rows = input_rows("scan", x)
    scale = rows.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    clean = None if held is None else (input_rows("scan", held[0]) / scale, held[1], held[0])
    return scan_features(rows / scale, y, inputs=x, trusted=clean, **common)


def load_labelled(path: Path, label: str | None) -> tuple[Array, Array]:
    """Inputs and labels of a file: arrays x and y, or the columns of a table beside the one of labels."""
    try:
        arrays = read(path)
    except ReadError as e:
        raise OptionError(str(e)) from None
    names = next((names for names in NAMES if set(names) <= set(arrays)), None)
    if label is None and names is not None:
        return arrays[names[0]], _labels(path, arrays[names[1]])
    label = "label" if label is None else label
    if label not in arrays:
        raise OptionError(f"--label must name the column of labels but {path} has {', '.join(arrays)}, not {label}")
    columns = {name: a for name, a in arrays.items() if name != label}
    words = [name for name, a in columns.items() if a.ndim != 1 or a.dtype.kind not in "biuf"]
    if words or not columns:
        raise OptionError(
            f"{path} must have columns of numbers beside {label} but {', '.join(words) or 'none'} are not"
        )
    return np.stack([a.astype(np.float64) for a in columns.values()], axis=1), _labels(path, arrays[label])


def _labels(path: Path, y: Array) -> Array:
    if y.ndim != 1:
        raise OptionError(f"labels of {path} must be one a row but have shape {list(y.shape)}")
    if y.dtype.kind not in "iu":
        raise OptionError(f"labels of {path} must be integers but have dtype {y.dtype}")
    return y
