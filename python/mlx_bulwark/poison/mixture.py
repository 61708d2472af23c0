"""Two views of a class: whether its features fall into two parts, one of which does not look like the class."""

from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import solve_triangular
from scipy.special import expit

from .classes import Array, Detection, by_class, checked, principal
from .classifier import integer

STEPS = 30
MOST_POISON = 0.7  # of a class
STRENGTH = 6.0  # log odds of a row whose neighbours all bear another label


class Mixture(NamedTuple):
    """The part of each class that does not look like it."""

    detection: Detection
    """Scores are probabilities that a row is of the odd part; a class's statistic is how much more suspect the odd part
    looks than the rest, lowered by two standard errors."""
    share: dict[int, float]
    """Size of the odd part of a class, 0 to 1."""


def class_mixture(features: Any, views: Any, y: Any, *, components: int = 10) -> Mixture:
    """Split each class into a usual and an odd part by its features, led by other views of the same rows.

    Poison gathers in the features of its class, for the model has learned to treat it alike, and it looks odd in views
    that the model has not learned, such as the labels of its inputs' neighbours. A mixture of two normal distributions
    is fitted to principal components of the features and those views together, from a start that the views give. Also
    where half of the class is poison this tells which half.

    Every class splits in two. What tells is how much odder in the views the one part is than the other, compared to
    the other classes.

    Args:
        features: Float ``[n, d]``, as of ``penultimate_features``.
        views: Float ``[n, v]``: other signs that a row is odd; about 1 where one is sure, 0 or below where it is not.
        y: Labels ``[n]``, integers >= 0.
        components: Principal components of a class.

    Returns:
        Mixture: Probabilities, how odd each class is, and sizes.

    Raises:
        ValueError: An argument has a wrong shape, dtype or value, or is not finite.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison import class_mixture
        >>> rng = np.random.default_rng(0)
        >>> features, view = rng.normal(size=(200, 8)), rng.normal(-0.7, 0.4, (200, 1))
        >>> features[:80, 3] += 9
        >>> view[:80] += 0.7  # the view alone does not tell them apart
        >>> found = class_mixture(features, view, np.zeros(200, int))
        >>> odd = found.detection.scores > 0.5
        >>> int(odd[:80].sum()) >= 78, int(odd[80:].sum()) <= 2
        (True, True)

    Source:
        This package; A. Blum, T. Mitchell, "Combining Labeled and Unlabeled Data with Co-Training", 1998.
    """
    features, y = checked("class_mixture", features, y)
    views, _ = checked("class_mixture", views, y)
    integer("class_mixture", "components", components, 1)
    scores, statistics, shares = np.zeros(len(y)), {}, {}
    for label, rows in by_class(y):
        side = views[rows]
        points = principal(features[rows], min(components, len(rows) // 8))
        scale = float(points.std()) if points.size else 1.0
        odd = _fit(np.concatenate([points / (scale or 1.0), side], axis=1), expit(STRENGTH * side.max(axis=1)))
        scores[rows], shares[label] = odd, float(odd.mean())
        statistics[label] = _contrast(side, odd)
    return Mixture(Detection(scores, statistics), shares)


def _fit(points: Array, odd: Array) -> Array:
    """Probabilities of the second part, by expectation and maximisation, from a start."""
    n, d = points.shape
    whole = np.cov(points.T).reshape(d, d)
    whole += 1e-6 * max(float(np.trace(whole)) / d, 1e-12) * np.eye(d)
    odd = 0.01 + 0.98 * odd
    for _ in range(STEPS):
        share = float(np.clip(odd.mean(), 0.5 / n, MOST_POISON))
        usual, other = (_log_density(points, weights, whole) for weights in (1 - odd, odd))
        before = odd
        odd = expit(np.clip(other - usual + np.log(share / (1 - share)), -30, 30))
        if float(np.abs(odd - before).max()) < 1e-3:
            break
    return odd


def _log_density(points: Array, weights: Array, whole: Array) -> Array:
    total, d = float(weights.sum()) + 1e-9, points.shape[1]
    centred = points - weights @ points / total
    prior = 2.0 * d  # rows that the covariance is drawn towards that of the class by, at a third of its size
    covariance = ((centred * weights[:, None]).T @ centred + prior * 0.3 * whole) / (total + prior)
    factor = np.linalg.cholesky(covariance)
    squares = np.square(solve_triangular(factor, centred.T, lower=True)).sum(axis=0)
    density: Array = -0.5 * squares - float(np.log(np.diagonal(factor)).sum())
    return density


def _contrast(views: Array, odd: Array) -> float:
    """By the view that tells most: mean of the odd part less that of the rest, less two standard errors."""
    sizes = max(float(odd.sum()), 1e-9), max(float((1 - odd).sum()), 1e-9)
    means = odd @ views / sizes[0], (1 - odd) @ views / sizes[1]
    variance = odd @ np.square(views - means[0]) / sizes[0] + 0.01
    contrast: Array = means[0] - means[1] - 2 * np.sqrt(variance / sizes[0])
    return float(contrast.max())
