"""What ``mlx-bulwark outliers`` does: fit, score, name the worst rows and what makes them so."""

import csv
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._types import Float64, Floats
from .base import OutlierDetector, labels
from .ensemble import Ensemble
from .forest import IsolationForest
from .linear import Mahalanobis, PCAReconstruction
from .neighbors import KNN, LOF
from .storage import load
from .tables import open_table
from .tails import COPOD, ECOD, HBOS, RobustZ

REASONS = 3
LEAST_SHARE = 0.05  # of the second reason and the third
_DETECTORS: dict[str, Callable[[int], Any]] = {
    "ensemble": lambda seed: Ensemble(random_state=seed),
    "ecod": lambda seed: ECOD(),
    "copod": lambda seed: COPOD(),
    "hbos": lambda seed: HBOS(),
    "knn": lambda seed: KNN(),
    "lof": lambda seed: LOF(),
    "mahalanobis": lambda seed: Mahalanobis("mcd", random_state=seed),
    "robust-z": lambda seed: RobustZ(),
    "pca": lambda seed: PCAReconstruction(),
    "isolation-forest": lambda seed: IsolationForest(random_state=seed),
}
DETECTORS = tuple(_DETECTORS)
NEIGHBOURS = ("knn", "lof")


@dataclass(frozen=True)
class Reason:
    """A column of a row, and what usual rows have there.

    Attributes:
        column: Its name.
        value: The row's value.
        low: 5th percentile of the rows that the detector was fitted to.
        high: Their 95th percentile.
        share: Part of the score that the column makes, 0 to 1.
    """

    column: str
    value: float
    low: float
    high: float
    share: float


@dataclass(frozen=True)
class WorstRow:
    """One of the rows with the highest anomaly scores."""

    row: int
    anomaly_score: float
    outlier: bool
    reasons: list[Reason]


@dataclass(frozen=True)
class Findings:
    """What was found in a file.

    Attributes:
        file: Its name.
        reference: Name of the file that the detector was fitted to; the same file, or that of a saved detector.
        detector: The detector, as Python writes it.
        rows: Number of rows that were scored.
        columns: Names of the columns.
        threshold: Anomaly scores above are outliers.
        outliers: How many.
        worst: The worst rows, the worst first.
        scores: Anomaly scores of all rows.
    """

    file: str
    reference: str
    detector: str
    rows: int
    columns: list[str]
    threshold: float
    outliers: int
    worst: list[WorstRow]
    scores: Float64

    def write_json(self, path: Path) -> None:
        """Write all but the scores of all rows."""
        content = {"kind": "outliers"} | asdict(self)
        del content["scores"]
        path.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")

    def write_csv(self, path: Path) -> None:
        """Write row, anomaly score and label of every row, in the file's order."""
        with path.open("w", newline="") as f:
            lines = csv.writer(f, lineterminator="\n")
            lines.writerow(["row", "anomaly_score", "outlier"])
            lines.writerows([i, repr(s), int(s > self.threshold)] for i, s in enumerate(self.scores.tolist()))


def find(
    file: Path,
    *,
    detector: str = "ensemble",
    load_from: Path | None = None,
    save_to: Path | None = None,
    reference: Path | None = None,
    columns: list[str] | None = None,
    contamination: float | None = None,
    top: int = 10,
    seed: int = 0,
) -> Findings:
    """Fit a detector, or load one, score a file, and explain its worst rows."""
    model = None if load_from is None else load(load_from)
    if model is not None and columns is None and not _unnamed(file) and hasattr(model, "feature_names_in_"):
        columns = [str(n) for n in model.feature_names_in_]
    names, x = _read(file, columns)
    if model is not None:
        if not isinstance(model, OutlierDetector) or not hasattr(model, "score_samples"):
            raise ValueError(f"--load must be a detector for new rows but is {model!r}")
        usual = x
    else:
        usual = (
            x if reference is None else _read(reference, columns if reference.suffix.lower() == ".npy" else names)[1]
        )
        if usual.shape[1] != x.shape[1]:
            raise ValueError(f"--reference must have the {x.shape[1]} columns of FILE but has {usual.shape[1]}")
        model = unfitted(detector, contamination, seed, new_rows=reference is not None or save_to is not None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\[LOF\] rows must")  # infinite scores are seen in the table
            model.fit(usual)
        if not _unnamed(file):
            model.feature_names_in_ = np.array(names, dtype=object)
    if save_to is not None:
        model.save(save_to)
    own = load_from is None and reference is None
    with warnings.catch_warnings():  # the names were compared by what reads the file
        warnings.filterwarnings("ignore", "X does not have valid feature names")
        scores = -(model.training_scores_ if own else model.score_samples(x))
        order = np.argsort(-scores, kind="stable")[:top]
        adds = _contributions(model, x[order], order if own else None)
    low, high = np.percentile(usual, [5, 95], axis=0)
    threshold = -float(model.offset_)
    worst = [
        WorstRow(int(i), float(scores[i]), bool(scores[i] > threshold), _reasons(a, names, x[i], low, high))
        for i, a in zip(order, adds, strict=True)
    ]
    fitted_to = load_from or reference or file
    outliers = int((labels(-scores - model.offset_) == -1).sum())
    return Findings(str(file), str(fitted_to), repr(model), len(x), names, threshold, outliers, worst, scores)


def tell(findings: Findings) -> None:
    """Print the table of the worst rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    about = Table.grid(padding=(0, 2))
    about.add_row("file", Text(f"{findings.file}, {findings.rows:,} rows, {len(findings.columns):,} columns"))
    about.add_row("detector", Text(" ".join(findings.detector.split())))
    about.add_row("fitted to", Text("the same rows" if findings.reference == findings.file else findings.reference))
    share = findings.outliers / findings.rows
    about.add_row("outliers", f"{findings.outliers:,} ({share:.1%}), anomaly score above {findings.threshold:.4g}")
    console.print(about)
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("row", justify="right")
    table.add_column("score", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("because of (share of the score): value, usually 5 % to 95 %")
    largest = max((w.anomaly_score for w in findings.worst if np.isfinite(w.anomaly_score)), default=1.0)
    for w in findings.worst:
        filled = round(10 * min(1.0, max(0.0, w.anomaly_score / largest))) if largest > 0 else 0
        bar = Text("█" * filled, style="red" if w.outlier else "yellow") + Text("·" * (10 - filled), style="dim")
        table.add_row(f"{w.row:,}", f"{w.anomaly_score:.4g}", bar, Text("\n").join(map(_line, w.reasons)))
    console.print(table)


def draw(findings: Findings, path: Path) -> None:
    """Draw the scores: how they are distributed, and where in the file the high ones are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scores = findings.scores
    finite = np.isfinite(scores)
    ceiling = float(scores[finite].max()) if finite.any() else 1.0
    shown = np.where(finite, scores, ceiling)
    out = scores > findings.threshold
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[1, 2], layout="constrained")
    left.hist(shown[~out], bins=50, range=(shown.min(), ceiling), color="#4878a8", label=f"{(~out).sum():,} usual rows")
    left.hist(shown[out], bins=50, range=(shown.min(), ceiling), color="#c44e52", label=f"{out.sum():,} outliers")
    left.set(xlabel="anomaly score", ylabel="rows", yscale="log")
    left.legend(frameon=False)
    place = np.arange(len(scores))
    right.scatter(place[~out], shown[~out], s=4, color="#4878a8", rasterized=True)
    right.scatter(place[out], shown[out], s=12, color="#c44e52", rasterized=True)
    right.axhline(min(findings.threshold, ceiling), color="#888888", linewidth=1, linestyle="--")
    for w in findings.worst:
        at = (w.row, min(w.anomaly_score, ceiling))
        right.annotate(str(w.row), at, xytext=(4, 2), textcoords="offset points", fontsize=8)
    right.set(xlabel="row", ylabel="anomaly score")
    figure.suptitle(f"{Path(findings.file).name}: {' '.join(findings.detector.split())}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _unnamed(path: Path) -> bool:
    return path.suffix.lower() == ".npy"


def _read(path: Path, columns: list[str] | None) -> tuple[list[str], Floats]:
    table = open_table(path, columns)
    if not table.rows:
        raise ValueError(f"{path} must have rows but is empty")
    x = np.concatenate([piece for _, piece in table.chunks(0, 65536)])
    names = table.columns or columns or [str(j) for j in range(table.width)]
    return names, x


def unfitted(name: str, contamination: float | None, seed: int, *, new_rows: bool) -> Any:
    """A detector by its name."""
    if name not in _DETECTORS:
        raise ValueError(f"--detector must be one of {', '.join(DETECTORS)} but is {name}")
    model = _DETECTORS[name](seed)
    if contamination is not None:
        if not 0 < contamination <= 0.5:
            raise ValueError(f"--contamination must be above 0 and at most 0.5 but is {contamination:g}")
        model.set_params(contamination=contamination)
    if name in NEIGHBOURS and new_rows:
        model.set_params(novelty=True)
    return model


def _contributions(model: Any, x: Floats, rows: Any) -> Float64:
    if isinstance(model, (KNN, LOF)):
        return model.explain(x, training_rows=rows).contributions
    return model.explain(x).contributions


def _reasons(adds: Float64, names: list[str], x: Floats, low: Float64, high: Float64) -> list[Reason]:
    positive = np.where(np.isfinite(adds), np.maximum(adds, 0), 0)
    total = float(positive.sum())
    first = np.argsort(-positive, kind="stable")[:REASONS]
    order = [j for i, j in enumerate(first) if positive[j] > (LEAST_SHARE * total if i else 0)]
    return [Reason(names[j], float(x[j]), float(low[j]), float(high[j]), float(positive[j]) / total) for j in order]


def _line(reason: Reason) -> Any:
    from rich.text import Text

    text = Text(reason.column, style="bold")
    text.append(f" ({reason.share:.0%})", style="dim")
    return text.append(f": {reason.value:.5g}, usually {reason.low:.5g} to {reason.high:.5g}", style="")


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
