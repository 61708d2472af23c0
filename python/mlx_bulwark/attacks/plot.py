"""The picture of robust accuracy over the attack's radius."""

import io
import os
from collections.abc import Mapping
from pathlib import Path


def plot_robust_accuracy(
    curves: Mapping[str, Mapping[float, float]], path: str | os.PathLike[str], *, unit: str = "radius", title: str = ""
) -> None:
    """Draw robust accuracy over radius, one curve a name.

    Args:
        curves: Name of the curve -> radius -> robust accuracy in [0, 1].
        path: PNG file.
        unit: Words below the axis of radii.
        title: Words above the picture.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There is no curve, or one is empty.
        OSError: The file cannot be written.

    Example:
        >>> import tempfile, pathlib
        >>> from mlx_bulwark.attacks import plot_robust_accuracy
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "robust.png"
        >>> plot_robust_accuracy({"PGD": {0.0: 0.98, 0.1: 0.6, 0.2: 0.03}}, file)
        >>> file.stat().st_size > 1000
        True

    Source:
        N. Carlini et al., "On Evaluating Adversarial Robustness", 2019, section 4.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('[plot] matplotlib is missing; pip install "mlx-bulwark[demo]" brings it') from e

    if not curves or not all(curves.values()):
        raise ValueError(f"[plot_robust_accuracy] curves must have points but are {dict(curves)}")
    picture = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    for name, curve in curves.items():
        radii = sorted(curve)
        axes.plot(radii, [curve[r] for r in radii], marker="o", markersize=4, label=name)
    axes.set(xlabel=unit, ylabel="robust accuracy", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
    data = io.BytesIO()
    picture.savefig(data, format="png", dpi=130)
    Path(path).write_bytes(data.getvalue())
