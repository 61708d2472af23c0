"""Rows by class: what every detector checks, and what it returns."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
LEAST_ROWS = 20
"""Of a class, for anything to be said about it: its rows score 0 where there are fewer."""


class Detection(NamedTuple):
    """What one detector found."""

    scores: Array
    """float64 ``[n]``: higher is more suspect; comparable within a class."""
    statistics: dict[int, float]
    """By class, for those with enough rows: how much it looks like a class with poison. Higher is more so."""


def checked(where: str, features: Any, y: Any) -> tuple[Array, Array]:
    """Features as float64 ``[n, d]`` and labels as int64 ``[n]``, or an error that says what is wrong and how often."""
    features, y = np.asarray(features), np.asarray(y)
    if features.ndim != 2 or features.dtype.kind not in "fiu":
        raise ValueError(
            f"[{where}] features must be numbers [n, d] but have {features.dtype} of shape {list(features.shape)}"
        )
    labels = checked_labels(where, y, len(features))
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(
            f"[{where}] features must be finite but have NaN or infinity in {len(bad)} of {len(features)} rows, "
            f"the first {bad[0]}"
        )
    return features.astype(np.float64), labels


def checked_labels(where: str, y: Any, rows: int) -> Array:
    """Labels as int64 ``[n]``."""
    y = np.asarray(y)
    if y.shape != (rows,) or y.dtype.kind not in "iu":
        raise ValueError(f"[{where}] y must be {rows} integers but has {y.dtype} of shape {list(y.shape)}")
    if rows and y.min() < 0:
        raise ValueError(f"[{where}] y must be labels >= 0 but has {int((y < 0).sum())} below, the least {y.min()}")
    labels: Array = y.astype(np.int64)
    return labels


def by_class(y: Array, least: int = LEAST_ROWS) -> Iterator[tuple[int, Array]]:
    """Each class that has enough rows, and those rows."""
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        if len(rows) >= least:
            yield int(label), rows


def principal(rows: Array, components: int) -> Array:
    """Centred rows in the directions of most variance, at most as many as vary."""
    if not rows.size:
        return np.zeros((len(rows), 0))
    centred = rows - rows.mean(axis=0)
    centred = centred / (float(np.abs(centred).max()) or 1.0)
    variances, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    kept = int((variances > 1e-12 * max(float(variances[-1]), 1e-300)).sum())
    projected: Array = (rows - rows.mean(axis=0)) @ directions[:, ::-1][:, : min(components, kept)]
    return projected
