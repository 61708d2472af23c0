"""Deep k-NN: rows whose neighbours bear another label."""

from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.neighbors import knn
from .classes import Array, Detection, by_class, checked
from .classifier import integer


def deep_knn(features: Any, y: Any, *, k: int = 20) -> Detection:
    """How much more of each row's neighbours bear another label than bear its own.

    A row is to be dropped where its label is not the plurality of its neighbours: where its score is above 0.

    Args:
        features: Float ``[n, d]``, as of ``penultimate_features``, or the inputs themselves as rows.
        y: Labels ``[n]``, integers >= 0.
        k: Neighbours of a row, at most as many as there are.

    Returns:
        Detection: Scores, the share of the most frequent other label among the neighbours less that of the own one,
        -1 to 1; a class's statistic is the share of its rows above 0.

    Raises:
        ValueError: An argument has a wrong shape, dtype or value, or features are not finite.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison import deep_knn
        >>> features = np.repeat([[0.0], [9.0]], 50, axis=0) + np.arange(100)[:, None] / 100
        >>> y = np.repeat([0, 1], 50)
        >>> y[7] = 1
        >>> np.flatnonzero(deep_knn(features, y, k=5).scores > 0).tolist()
        [7]

    Source:
        N. Peri et al., "Deep k-NN Defense against Clean-label Data Poisoning Attacks", 2020.
    """
    features, y = checked("deep_knn", features, y)
    integer("deep_knn", "k", k, 1)
    shares = shares_among(features, features, y, k, itself=True)
    rows = np.arange(len(y))
    own = shares[rows, y] if len(y) else np.zeros(0)
    others = shares.copy()
    others[rows, y] = 0
    scores = others.max(axis=1, initial=0) - own
    return Detection(scores, {label: float((scores[r] > 0).mean()) for label, r in by_class(y)})


def shares_among(rows: Array, among: Array, y: Array, k: int, *, itself: bool) -> Array:
    """``[n, classes]``: share of each label among the k nearest; of themselves where the rows are among them."""
    classes = int(y.max(initial=0)) + 1
    k = min(k, len(among) - itself)
    if k < 1 or not len(rows):
        return np.zeros((len(rows), classes))
    middle = among.mean(axis=0)
    largest = max(float(np.abs(a - middle).max(initial=0)) for a in (rows, among)) or 1.0
    x, other = (mx.array(((a - middle) / largest).astype(np.float32)) for a in (rows, among))
    nearest = np.array((knn(x, k=k) if itself else knn(x, other, k=k)).indices)
    flat = np.repeat(np.arange(len(rows)), k) * classes + y[nearest].ravel()
    shares: Array = np.bincount(flat, minlength=len(rows) * classes).reshape(len(rows), classes) / k
    return shares
