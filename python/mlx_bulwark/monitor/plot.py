"""Pictures of control charts."""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

POINTS, CENTER, LIMIT, SIGNAL = "#1f5fa8", "#5f6b76", "#b3541e", "#c2182b"
LINES = ("#1f5fa8", "#2b8a3e", "#8a4fa0", "#a67c00", "#1c8a8a", "#7a4a2a")
MANY = 2000  # points: beyond, the curve of an SVG is a picture within it


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        label: Of the axis of values.
        curves: Name -> values ``[n]``, NaN where there is none; the first is drawn with points.
        center: Of the process; None where there is none.
        lower: Limits ``[n]``, NaN where there is none.
        upper: The same.
        marks: Index and height of each point that is out of control.
        missing: Indices of what was not finite.
    """

    label: str
    curves: dict[str, Array]
    center: float | None = None
    lower: Array | None = None
    upper: Array | None = None
    marks: list[tuple[int, float]] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)


def draw(panels: list[Panel], title: str, path: str | os.PathLike[str] | None) -> str | None:
    """Draw panels below each other: into a file, SVG or PNG by its suffix, or return the text of an SVG."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('[plot] matplotlib is missing; pip install "mlx-bulwark[demo]" brings it') from e

    kind = "svg" if path is None else Path(path).suffix.lower().lstrip(".")
    if kind not in ("svg", "png"):
        raise ValueError(f"[plot] path must end in .svg or .png but is {os.fspath(path or '')!r}")
    # The same values give the same text; letters stay letters, which can be read aloud.
    with matplotlib.rc_context({"svg.hashsalt": "mlx-bulwark", "svg.fonttype": "none"}):
        picture = Figure(figsize=(8, 0.6 + 3 * len(panels)), layout="constrained")
        FigureCanvasAgg(picture)
        for axes, panel in zip(picture.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _draw_panel(axes, panel)
        if title:
            picture.suptitle(title, fontsize=12)
        data = io.BytesIO()
        picture.savefig(data, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    if path is None:
        return data.getvalue().decode()
    Path(path).write_bytes(data.getvalue())
    return None


def _draw_panel(axes: Any, panel: Panel) -> None:
    for i, (name, values) in enumerate(panel.curves.items()):
        many = len(values) > MANY
        marker = "o" if len(panel.curves) < 3 and not many else ""
        axes.plot(values, marker=marker, markersize=3, linewidth=1, color=LINES[i % len(LINES)], label=name, zorder=2)
        axes.lines[-1].set_rasterized(many)
    if panel.center is not None:
        axes.axhline(panel.center, color=CENTER, linewidth=1, label=f"centre {panel.center:.4g}", zorder=1)
    for limits, name in ((panel.upper, "limit"), (panel.lower, "")):
        if limits is not None and np.isfinite(limits).any():
            axes.step(np.arange(len(limits)), limits, where="mid", color=LIMIT, linestyle="--", linewidth=1)
            axes.lines[-1].set_label(name or "_nolegend_")
            axes.lines[-1].set_rasterized(len(limits) > MANY)
    if panel.marks:
        index, height = zip(*panel.marks, strict=True)
        axes.scatter(
            index, height, marker="X", s=50, color=SIGNAL, label=f"out of control: {len(set(index))}", zorder=3
        )
        axes.collections[-1].set_rasterized(len(index) > MANY)
    if panel.missing:
        axes.plot(panel.missing, [0.02] * len(panel.missing), "|", color=SIGNAL, transform=axes.get_xaxis_transform())
        axes.lines[-1].set_label(f"not finite: {len(panel.missing)}")
    axes.set(xlabel="number of the value", ylabel=panel.label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if panel.curves:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
