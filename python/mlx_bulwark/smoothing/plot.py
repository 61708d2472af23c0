"""The picture of certified accuracy over radius."""

import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .table import CertifiedTable


def plot_certified_accuracy(
    tables: Mapping[str, CertifiedTable], path: str | os.PathLike[str], *, unit: str = "L2 radius", title: str = ""
) -> None:
    """Draw certified accuracy over radius, a curve for each table.

    Args:
        tables: Name of the curve, such as ``"sigma 0.25"``, -> its table, with one row or more.
        path: PNG file.
        unit: Words below the axis of radii.
        title: Words above the picture.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There is no table, or one has no rows.
        OSError: The file cannot be written.

    Example:
        >>> import tempfile, pathlib
        >>> from mlx_bulwark.smoothing import CertifiedTable, Row, plot_certified_accuracy
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "certified.png"
        >>> plot_certified_accuracy({"sigma 0.25": CertifiedTable((Row(0, 7, 7, 0.5, True, 1.0),))}, file)
        >>> file.stat().st_size > 1000
        True

    Source:
        J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019, figure 6.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('[plot] matplotlib is missing; pip install "mlx-bulwark[demo]" brings it') from e

    if not tables or not all(table.rows for table in tables.values()):
        raise ValueError(f"[plot_certified_accuracy] tables must have rows but are {dict(tables)}")
    picture = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    for name, table in tables.items():
        axes.plot(*curve(table), label=name)
    axes.set(xlabel=unit, ylabel="certified accuracy", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
    data = io.BytesIO()
    picture.savefig(data, format="png", dpi=130)
    Path(path).write_bytes(data.getvalue())


def curve(table: CertifiedTable) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the falling steps: the accuracy holds up to and with each radius."""
    reached = np.unique(np.append(table.column("radius")[table.column("correct")], 0.0))
    accuracy = table.certified_accuracy(reached)
    return np.repeat(reached, 2), np.append(np.repeat(accuracy, 2)[1:], 0.0)
