"""Values that tell the label by themselves: what a trigger at a fixed place looks like in the inputs."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .classes import Array, Detection, by_class, checked_labels

BINS = 8
LEAST_COUNT = 8  # rows with a value, for it to tell anything
MOST_COLUMNS = 4096
CONFIDENCE = 2.5  # standard errors that a share of rows is lowered by
TELLING = 2.5  # log odds of the label above its own, from which a value counts


def telling_values(x: Any, y: Any) -> Detection:
    """How much each row holds of values that all but prove its label.

    A value of a column is a bin of it, without the column's most frequent value. Of each value the share of rows with
    the row's label is estimated, lowered by its error, and its log odds are compared to those of the label itself; what
    exceeds 2.5 is summed over the row's columns. Natural values seldom prove anything; the pixels of a trigger, always
    at the same place and always with the same label, do, also where no label is wrong.

    A trigger that moves, or that hides in columns where everything occurs as in photographs, is not seen.

    Args:
        x: Inputs ``[n, ...]``, numbers; all but the first axis are columns, which share a unit where there are three
            axes or more. Of more than 4,096 columns every so many are looked at.
        y: Labels ``[n]``, integers >= 0.

    Returns:
        Detection: Scores, and of each class the logarithm of 1 + the mean of its 8 highest scores.

    Raises:
        ValueError: An argument has a wrong shape or dtype, or inputs are not finite.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison import telling_values
        >>> x, y = np.random.default_rng(0).uniform(size=(400, 20)), np.arange(400) % 4
        >>> x[y == 2, 0] = np.where(np.arange(100) < 40, 5.0, 0.5)
        >>> np.flatnonzero(telling_values(x, y).scores > 0).tolist() == np.flatnonzero(y == 2)[:40].tolist()
        True

    Source:
        This package; the idea that a trigger is a strong feature by itself: A. Khaddaj et al., "Rethinking Backdoor
        Attacks", 2023.
    """
    columns = input_rows("telling_values", x)
    y = checked_labels("telling_values", y, len(columns))
    scores = np.zeros(len(y))
    for told in _by_column(columns, y, np.ndim(x) > 2):
        scores += told
    statistics = {label: float(np.log1p(np.sort(scores[r])[-LEAST_COUNT:].mean())) for label, r in by_class(y)}
    return Detection(scores, statistics)


def telling_columns(x: Array, y: Array, rows: Array) -> Array:
    """bool ``[columns]``: in which columns the values of at least half of these rows tell the label."""
    columns = input_rows("telling_columns", x)
    step = _step(columns)
    told = np.array([(told[rows] > 0).mean() >= 0.5 for told in _by_column(columns, y, np.ndim(x) > 2)], bool)
    return np.repeat(told, step)[: columns.shape[1]]


def _by_column(columns: Array, y: Array, wide: bool) -> Iterator[Array]:
    """What each column tells of each row's label, ``[n]``."""
    if not columns.size:
        return
    columns = columns[:, :: _step(columns)]
    low = np.full(columns.shape[1], columns.min()) if wide else columns.min(axis=0)
    high = np.full(columns.shape[1], columns.max()) if wide else columns.max(axis=0)
    odds = _log_odds(np.bincount(y, minlength=int(y.max()) + 1) / len(y))
    for j in range(columns.shape[1]):
        yield _told(columns[:, j], y, float(low[j]), float(high[j]), odds)


def _step(columns: Array) -> int:
    return max(1, -(-int(columns.shape[1]) // MOST_COLUMNS))


def input_rows(where: str, x: Any) -> Array:
    """Inputs as float64 ``[n, columns]``, or an error that says what is wrong and how often."""
    x = np.asarray(x)
    if x.ndim < 2 or x.dtype.kind not in "biuf":
        raise ValueError(f"[{where}] x must be numbers [n, ...] but has {x.dtype} of shape {list(x.shape)}")
    rows: Array = x.reshape(len(x), int(np.prod(x.shape[1:]))).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ValueError(
            f"[{where}] x must be finite but has NaN or infinity in {len(bad)} of {len(x)} rows, the first {bad[0]}"
        )
    return rows


def _told(column: Array, y: Array, low: float, high: float, odds: Array) -> Array:
    values, places, counts = np.unique(column, return_inverse=True, return_counts=True)
    if len(values) < 2 or not high > low:
        return np.zeros(len(y))
    usual = places.ravel() == counts.argmax()
    bins = np.minimum(((column - low) / (high - low) * BINS).astype(int), BINS - 1)
    bins[usual] = BINS
    table = np.zeros((BINS + 1, len(odds)))
    np.add.at(table, (bins, y), 1)
    totals = table.sum(axis=1, keepdims=True)
    told = _log_odds(_lower(table, np.maximum(totals, 1))) - odds - TELLING
    told[(totals < LEAST_COUNT).ravel()] = 0
    told[BINS] = 0
    found: Array = np.maximum(told, 0)[bins, y]
    return found


def _lower(counts: Array, totals: Array) -> Array:
    """Wilson's lower bound of a share."""
    share, square = counts / totals, CONFIDENCE**2
    spread = CONFIDENCE * np.sqrt(share * (1 - share) / totals + square / (4 * totals**2))
    bound: Array = (share + square / (2 * totals) - spread) / (1 + square / totals)
    return bound


def _log_odds(share: Array) -> Array:
    inside = np.clip(share, 1e-3, 1 - 1e-3)
    found: Array = np.log(inside / (1 - inside))
    return found
