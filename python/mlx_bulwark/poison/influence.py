"""Self-influence: rows that the last layer has to bend for."""

from typing import Any

import mlx.core as mx
import numpy as np
from scipy.special import softmax

from ..ops.ghost import linear_sq_norms
from .classes import Detection, by_class, checked


def self_influence(features: Any, logits: Any, y: Any) -> Detection:
    """Squared norm of each row's gradient of the last layer: what a step on it changes its own loss by.

    Taken from the layer's inputs and the gradients of its outputs, without building a gradient.

    Args:
        features: Float ``[n, d]``, what the last layer is given.
        logits: Float ``[n, c]``, what it returns.
        y: Labels ``[n]``, integers from 0 to c - 1.

    Returns:
        Detection: Scores, and the mean of their logarithm in each class.

    Raises:
        ValueError: An argument has a wrong shape or dtype, or is not finite.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison import self_influence
        >>> found = self_influence(np.ones((2, 3)), np.array([[9.0, -9.0], [9.0, -9.0]]), np.array([0, 1]))
        >>> [round(float(s), 3) for s in found.scores]
        [0.0, 8.0]

    Source:
        G. Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent", 2020.
    """
    features, y = checked("self_influence", features, y)
    outputs, _ = checked("self_influence", logits, y)
    if len(y) and y.max() >= outputs.shape[1]:
        raise ValueError(f"[self_influence] y must be below the {outputs.shape[1]} logits but has {y.max()}")
    if not len(y):
        return Detection(np.zeros(0), {})
    gradient = softmax(outputs, axis=1)
    gradient[np.arange(len(y)), y] -= 1
    largest = float(np.abs(features).max(initial=0)) or 1.0  # squares of large features would leave float32
    inputs = np.concatenate([features / largest, np.full((len(y), 1), 1 / largest)], axis=1)
    norms = linear_sq_norms(*(mx.array(a[:, None].astype(np.float32)) for a in (inputs, gradient)))
    scores = np.array(norms, np.float64) * largest**2
    return Detection(scores, {label: float(np.log(scores[r] + 1e-12).mean()) for label, r in by_class(y)})
