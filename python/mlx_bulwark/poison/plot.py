"""The picture of a scan: the scores of every class, and the worst rows."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..readers import is_image
from .classes import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .scan import ScanReport

ROWS, COLUMNS = 2, 6  # of pictures
MOST_CLASSES = 30  # whose scores are drawn


def draw_scan(report: "ScanReport", path: Path, x: Any, bounds: tuple[float, float]) -> None:
    """Write a PNG file: scores by label, suspects in another colour, and beneath them images of the worst."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('[plot] matplotlib is missing; pip install "mlx-bulwark[demo]" brings it') from e

    images = None if x is None else np.asarray(x)
    if images is not None and len(images) != len(report.y):
        raise ValueError(
            f"[ScanReport.plot] x must have the {len(report.y)} rows that were scanned but has {len(images)}"
        )
    shown = images is not None and is_image(images) and len(images) > 0
    picture = Figure(figsize=(7.2, 6.4 if shown else 3.6), layout="constrained")
    FigureCanvasAgg(picture)
    grid = picture.add_gridspec(1 + ROWS * shown, COLUMNS, height_ratios=[2.4, *[1] * (ROWS * shown)])
    _scores(picture.add_subplot(grid[0, :]), report)
    if shown and images is not None:
        rows = report.suspects if len(report.suspects) else report.ranking
        for place, row in enumerate(rows[: ROWS * COLUMNS].tolist()):
            axes = picture.add_subplot(grid[1 + place // COLUMNS, place % COLUMNS])
            _image(axes, images[row], bounds)
            axes.set_title(f"row {row}, label {report.y[row]}", fontsize=8)
    data = io.BytesIO()
    picture.savefig(data, format="png", dpi=130)
    path.write_bytes(data.getvalue())


def _scores(axes: "Axes", report: "ScanReport") -> None:
    """A column of points for each label, spread sideways; of many labels those with the highest scores."""
    labels, highest = np.unique(report.y), {}
    for label in labels.tolist():
        highest[label] = report.scores[report.y == label].max()
    drawn = sorted(sorted(highest, key=lambda label: -highest[label])[:MOST_CLASSES])
    at = np.searchsorted(drawn, report.y).clip(max=max(len(drawn) - 1, 0))
    here = np.isin(report.y, drawn)
    sideways = at + np.random.default_rng(0).uniform(-0.3, 0.3, len(at))
    suspect = np.isin(np.arange(len(report.y)), report.suspects)
    for which, colour, name in ((here & ~suspect, "#8a93a3", "rows"), (here & suspect, "#c0392b", "suspects")):
        axes.scatter(
            sideways[which], report.scores[which], s=6, c=colour, label=f"{which.sum():,} {name}", linewidths=0
        )
    axes.set_xticks(range(len(drawn)), [str(label) for label in drawn], fontsize=8)
    more = f", the {len(drawn)} of {len(labels)} with the highest scores" if len(drawn) < len(labels) else ""
    p = "unknown" if report.p_value is None else f"{report.p_value:.2g}"
    verdict = "the set is accused of poison" if report.accused else "the set is not accused"
    axes.set(xlabel=f"label{more}", ylabel="combined score", title=f"{verdict}, p {p}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _image(axes: "Axes", image: Array, bounds: tuple[float, float]) -> None:
    low, high = bounds
    scaled = np.clip((np.asarray(image, np.float64) - low) / (high - low), 0, 1)
    scaled = scaled[..., 0] if scaled.ndim == 3 and scaled.shape[-1] == 1 else scaled
    axes.imshow(scaled, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
