"""Spectral signatures: poison that pulls its class along one direction."""

from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.tails import spectral_scores
from .classes import Detection, by_class, checked


def spectral_signatures(features: Any, y: Any) -> Detection:
    """Squared projections of each class's centred features on the direction in which they vary most.

    A class's statistic is the share of its variance in that direction.

    Args:
        features: Float ``[n, d]``, as of ``penultimate_features``.
        y: Labels ``[n]``, integers >= 0.

    Returns:
        Detection: Scores, 0 in classes with fewer than 20 rows, and statistics of the other classes.

    Raises:
        ValueError: An argument has a wrong shape or dtype, or features are not finite.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison import spectral_signatures
        >>> features = np.random.default_rng(0).normal(size=(100, 8))
        >>> features[:5, 3] += 9
        >>> sorted(np.argsort(-spectral_signatures(features, np.zeros(100, int)).scores)[:5].tolist())
        [0, 1, 2, 3, 4]

    Source:
        B. Tran, J. Li, A. Madry, "Spectral Signatures in Backdoor Attacks", 2018.
    """
    features, y = checked("spectral_signatures", features, y)
    scores, statistics = np.zeros(len(y)), {}
    for label, rows in by_class(y):
        own = features[rows]
        centred = own - own.mean(axis=0)  # here, in float64: an offset would cost float32 its digits
        largest = float(np.abs(centred).max(initial=0))
        if not largest:
            statistics[label] = 0.0
            continue
        found = np.array(spectral_scores(mx.array((centred / largest).astype(np.float32))), np.float64)
        scores[rows] = found * largest**2
        statistics[label] = float(scores[rows].sum() / np.square(centred).sum())
    return Detection(scores, statistics)
