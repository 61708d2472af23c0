"""The picture of a run."""

import io
from pathlib import Path
from typing import Any

from .figures import Figures

PRIVATE, PLAIN, LIMIT = "#1f5fa8", "#8a8a8a", "#c23b22"


def draw(figures: Figures, path: Path) -> None:
    """Draw accuracy and epsilon over the steps, and the distribution of gradient norms, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 5.6), layout="constrained")
    FigureCanvasAgg(picture)
    picture.suptitle(_title(figures), fontsize=12)
    grid = picture.add_gridspec(2, 2, width_ratios=(1.1, 1), height_ratios=(1.5, 1))
    top = picture.add_subplot(grid[0, 0])
    _draw_accuracy(top, figures)
    _draw_epsilon(picture.add_subplot(grid[1, 0], sharex=top), figures)
    _draw_norms(picture.add_subplot(grid[:, 1]), figures)
    data = io.BytesIO()
    picture.savefig(data, format="png", dpi=130)
    path.write_bytes(data.getvalue())


def _title(figures: Figures) -> str:
    stopped = f" (interrupted after {figures.steps})" if figures.interrupted else ""
    return (
        f"mlx-bulwark demo: {figures.dataset}, {figures.steps_planned} DP-SGD steps{stopped}, "
        f"expected batch {figures.batch_size}\n"
        f"epsilon {figures.epsilon:.2f} spent of {figures.epsilon_target:g} at delta {figures.delta:g}, "
        f"{figures.backend} backend"
    )


def _draw_accuracy(axes: Any, figures: Figures) -> None:
    steps = figures.curve["step"]
    lines = (
        ("nonprivate_test_accuracy", "without privacy (no epsilon at all)", PLAIN, "--"),
        ("test_accuracy", "private", PRIVATE, "-"),
    )
    for name, label, color, style in lines:
        values = [100 * v for v in figures.curve[name]]
        last = f": {values[-1]:.1f} %" if values else ""
        axes.plot(steps, values, style, color=color, label=label + last, marker="o", markersize=3)
    axes.set_title("Accuracy on held-out test images, never trained on", fontsize=10)
    axes.set(ylabel="test accuracy (%)", ylim=(0, 102), xlim=(0, figures.steps_planned))
    axes.tick_params(labelbottom=False)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)


def _draw_epsilon(axes: Any, figures: Figures) -> None:
    axes.plot(figures.curve["step"], figures.curve["epsilon"], color=PRIVATE, marker="o", markersize=3)
    axes.axhline(figures.epsilon_target, color=LIMIT, linestyle=":", label=f"target {figures.epsilon_target:g}")
    axes.set(xlabel="step", ylabel="epsilon spent", ylim=(0, 1.15 * figures.epsilon_target))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)


def _draw_norms(axes: Any, figures: Figures) -> None:
    axes.set_title("Per-sample gradient norms of all steps: not covered by epsilon", fontsize=10)
    axes.set(xlabel="norm before the clip (all below 1e-6 at 1e-6)", ylabel="share of examples (%)", xscale="log")
    if not figures.norm_counts or figures.max_grad_norm is None:
        axes.text(0.5, 0.5, "no step was taken", ha="center", transform=axes.transAxes)
        return
    total = sum(figures.norm_counts)
    clip = f"clip at {figures.max_grad_norm:g}: {100 * (figures.clip_fraction or 0):.0f} % lie beyond"
    axes.stairs(
        [100 * n / total for n in figures.norm_counts], figures.norm_edges, fill=True, color=PRIVATE, alpha=0.55
    )
    axes.axvline(figures.max_grad_norm, color=LIMIT, label=clip)
    axes.margins(y=0.15)
    axes.set_xlim(
        min(figures.norm_edges[0], figures.max_grad_norm / 10), max(figures.norm_edges[-1], figures.max_grad_norm * 10)
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=9)
