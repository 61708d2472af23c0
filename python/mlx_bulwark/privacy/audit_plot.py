"""The picture of an audit."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .audit import AuditReport

INCLUDED, EXCLUDED, LIMIT = "#1f5fa8", "#8a8a8a", "#c23b22"


def draw(report: "AuditReport", path: Path) -> None:
    """Draw scores and bounds into a PNG file."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('[plot] matplotlib is missing; pip install "mlx-bulwark[demo]" brings it') from e

    picture = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(picture)
    picture.suptitle(
        f"{report.canaries} canaries, {report.attack.method}: epsilon >= {report.epsilon:.2f} with "
        f"{100 * report.confidence:g} % confidence, <= {report.accounted_epsilon:.2f} accounted, delta {report.delta:g}"
        + (": REFUTED" if report.violated else ""),
        fontsize=12,
    )
    scores, bounds = picture.subplots(1, 2)
    _draw_scores(scores, report)
    _draw_bounds(bounds, report)
    data = io.BytesIO()
    picture.savefig(data, format="png", dpi=130)
    path.write_bytes(data.getvalue())


def _draw_scores(axes: Any, report: "AuditReport") -> None:
    edges = np.histogram_bin_edges(report.scores, bins=50)
    for name, which, color in (("included", report.included, INCLUDED), ("left out", ~report.included, EXCLUDED)):
        axes.hist(report.scores[which], edges, color=color, alpha=0.55, label=f"{name}: {int(which.sum())}")
    axes.set_title(f"Scores of the canaries, AUC {report.attack.auc:.3f}", fontsize=10)
    axes.set(xlabel="score", ylabel="canaries")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)


def _draw_bounds(axes: Any, report: "AuditReport") -> None:
    guesses = [bound.guesses for bound in report.bounds]
    axes.plot(guesses, [b.epsilon for b in report.bounds], "o-", color=INCLUDED, label="lower bound")
    axes.plot(guesses, [b.ceiling for b in report.bounds], "--", color=EXCLUDED, label="with every guess right")
    if np.isfinite(report.accounted_epsilon):
        axes.axhline(report.accounted_epsilon, color=LIMIT, linestyle=":", label="accounted")
    axes.set_title("Lower bound over the number of guesses, confidence shared by all", fontsize=10)
    axes.set(xlabel="guesses, the rest abstained from", ylabel="epsilon", xscale="log")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
