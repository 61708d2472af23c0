"""SPECTRE: features whitened by what a clean class looks like, so that poison stands out in every direction."""

from typing import Any

import numpy as np
from scipy.linalg import solve_triangular

from .classes import Array, Detection, by_class, checked, principal
from .classifier import integer

STARTS, STEPS = 6, 10
SHARPNESS = 4.0  # of quantum entropy: between the norm (0) and the top direction alone (infinity)


def spectre(features: Any, y: Any, *, components: int = 10, seed: int = 0) -> Detection:
    """Quantum entropy scores of features that are whitened by a robust estimate of each class's mean and covariance.

    The covariance is that of the half of the rows that lie closest together. What it does not explain has a variance
    above 1 after whitening, and the directions of it count most.

    Args:
        features: Float ``[n, d]``, as of ``penultimate_features``.
        y: Labels ``[n]``, integers >= 0.
        components: Principal components of a class that are looked at, at most d.
        seed: Of the starts.

    Returns:
        Detection: Scores, and of each class the logarithm of the largest variance after whitening.

    Raises:
        ValueError: An argument has a wrong shape, dtype or value, or features are not finite.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison import spectre
        >>> features = np.random.default_rng(0).normal(size=(200, 4)) * [9.0, 1.0, 1.0, 1.0]
        >>> features[:20, 3] += 8  # less than the first direction varies
        >>> sorted(np.argsort(-spectre(features, np.zeros(200, int)).scores)[:20].tolist()) == list(range(20))
        True

    Source:
        J. Hayase et al., "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics", 2021; P. Rousseeuw,
        K. Van Driessen, "A Fast Algorithm for the Minimum Covariance Determinant Estimator", 1999.
    """
    features, y = checked("spectre", features, y)
    integer("spectre", "components", components, 1)
    generator = np.random.default_rng(seed)
    scores, statistics = np.zeros(len(y)), {}
    for label, rows in by_class(y):
        points = principal(features[rows], min(components, len(rows) // 4))
        if not points.shape[1]:
            statistics[label] = 0.0
            continue
        mean, factor = robust_covariance(points, generator)
        whitened = solve_triangular(factor, (points - mean).T, lower=True).T
        scores[rows], top = _quantum_entropy(whitened)
        statistics[label] = float(np.log(top))
    return Detection(scores, statistics)


def robust_covariance(points: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Mean and Cholesky factor of the covariance of the half of the rows with the least determinant."""
    n, d = points.shape
    half = (n + d + 1) // 2
    best, found = np.inf, (points.mean(axis=0), np.eye(d))
    for start in range(STARTS):
        rows = generator.permutation(n)[: d + 1] if start else np.argsort(np.square(points).sum(axis=1))[:half]
        for _ in range(STEPS):
            mean, factor = _estimate(points[rows], points)
            new = np.sort(np.argsort(_distances(points, mean, factor), kind="stable")[:half])
            if len(new) == len(rows) and (new == rows).all():
                break
            rows = new
        mean, factor = _estimate(points[rows], points)
        size = float(np.log(np.diagonal(factor)).sum())
        if size < best:
            best, found = size, (mean, factor)
    mean, factor = found
    # half of the rows of a normal distribution lie where the distances have their median
    consistent = float(np.median(_distances(points, mean, factor))) / (d * (1 - 2 / (9 * d)) ** 3)
    return mean, factor * np.sqrt(max(consistent, 1e-12))


def _estimate(rows: Array, points: Array) -> tuple[Array, Array]:
    mean = rows.mean(axis=0)
    covariance = (rows - mean).T @ (rows - mean) / max(len(rows) - 1, 1)
    floor = 1e-6 * float(np.square(points).mean())
    factor: Array = np.linalg.cholesky(covariance + floor * np.eye(rows.shape[1]))
    return mean, factor


def _distances(points: Array, mean: Array, factor: Array) -> Array:
    squares: Array = np.square(solve_triangular(factor, (points - mean).T, lower=True)).sum(axis=0)
    return squares


def _quantum_entropy(whitened: Array) -> tuple[Array, float]:
    values, directions = np.linalg.eigh(whitened.T @ whitened / len(whitened))
    top = max(float(values[-1]), 1e-12)
    # the paper's exponent, alpha (S - I) / (|S| - 1), where |S| is above 1; constants cancel
    weights = np.exp(SHARPNESS * (values - top) / max(top - 1, 1.0))
    scores: Array = np.square(whitened @ directions) @ (weights / weights.sum())
    return scores, top
