"""Confident learning: labels that a model which did not learn them from that row contradicts."""

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from .classes import Array, Detection, by_class, checked, checked_labels

LEAST = 1e-12


class LabelNoise(NamedTuple):
    """Labels that are likely wrong."""

    detection: Detection
    """Scores are log odds of the likeliest other label against the given one; statistics are the share of a class's
    rows whose label is an issue."""
    issues: Array
    """bool ``[n]``: the row is confidently of another class than its label says."""
    joint: Array
    """float64 ``[c, c]``: estimated joint distribution of given (rows) and true (columns) labels."""


def label_noise(probabilities: Any, y: Any) -> LabelNoise:
    """Find wrong labels by confident learning.

    A row is confidently of a class where its probability of that class is at least the mean of it among the rows with
    that label. Rows that are confidently of another class than their label are counted in the joint distribution, and
    are issues.

    Args:
        probabilities: ``[n, c]``, of each row by a model that was not trained on it, such as ``cross_fitted``. The
            model's own, of its training rows, have learned wrong labels too, and show fewer.
        y: Labels ``[n]``, integers from 0 to c - 1.

    Returns:
        LabelNoise: Scores, issues and the joint distribution.

    Raises:
        ValueError: An argument has a wrong shape, dtype or value.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison import label_noise
        >>> probabilities = np.array([[0.9, 0.1]] * 3 + [[0.1, 0.9]] * 3)
        >>> label_noise(probabilities, np.array([0, 0, 1, 1, 1, 1])).issues.tolist()
        [False, False, True, False, False, False]

    Source:
        C. Northcutt, L. Jiang, I. Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", 2021.
    """
    p, y = checked_probabilities("label_noise", probabilities, y)
    n, c = p.shape
    rows = np.arange(n)
    present = np.bincount(y, minlength=c) > 0
    thresholds = np.array([p[y == k, k].mean() if present[k] else np.inf for k in range(c)])
    confident = np.where(p >= thresholds, p, -1.0)
    suggested = confident.argmax(axis=1) if n else np.zeros(0, int)
    counted = confident.max(axis=1, initial=-1) >= 0
    issues = counted & (suggested != y)
    counts = np.zeros((c, c))
    np.add.at(counts, (y[counted], suggested[counted]), 1)
    others = p.copy()
    others[rows, y] = 0
    scores = np.log(np.maximum(others.max(axis=1, initial=0), LEAST)) - np.log(np.maximum(p[rows, y], LEAST))
    statistics = {label: float(issues[r].mean()) for label, r in by_class(y)}
    return LabelNoise(Detection(scores, statistics), issues, _calibrated(counts, y))


def cross_fitted(features: Any, y: Any, *, folds: int = 5, regularization: float = 1.0, seed: int = 0) -> Array:
    """Probabilities of each row's classes by a last layer that was fitted without it.

    The layer is a multinomial logistic regression on standardised features, once for each fold. The features
    themselves are of a model that may have seen the row.

    Args:
        features: Float ``[n, d]``, as of ``penultimate_features``.
        y: Labels ``[n]``, integers >= 0.
        folds: Parts, each predicted from the others.
        regularization: Half of it times the squared weights is added to the sum of losses.
        seed: Of the folds.

    Returns:
        array: float64 ``[n, c]``, c one more than the largest label.

    Raises:
        ValueError: An argument has a wrong shape, dtype or value, or features are not finite.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison import cross_fitted
        >>> features = np.repeat([[0.0], [9.0]], 20, axis=0)
        >>> cross_fitted(features, np.repeat([0, 1], 20)).argmax(axis=1).tolist() == [0] * 20 + [1] * 20
        True

    Source:
        C. Northcutt, L. Jiang, I. Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", 2021.
    """
    features, y = checked("cross_fitted", features, y)
    if folds < 2 or not regularization > 0:
        raise ValueError(
            f"[cross_fitted] folds must be 2 or more and regularization > 0 but are {folds} and {regularization}"
        )
    n, c = len(y), int(y.max(initial=-1)) + 1
    deviation = features.std(axis=0) if n else np.ones(features.shape[1])
    constant = deviation <= 1e-12 * np.abs(features).max(axis=0, initial=0)
    x = np.where(
        constant, 0.0, (features - features.mean(axis=0) if n else features) / np.where(constant, 1, deviation)
    )
    x = np.concatenate([x, np.ones((n, 1))], axis=1)
    part = _folds(y, folds, np.random.default_rng(seed))
    found, start = np.full((n, c), 1 / max(c, 1)), np.zeros(c * x.shape[1])
    for k in range(folds):
        inside = part != k
        if inside.any() and (~inside).any():
            start = _regression(x[inside], y[inside], c, regularization, start)
            found[~inside] = softmax(x[~inside] @ start.reshape(c, -1).T, axis=1)
    return found


def checked_probabilities(where: str, probabilities: Any, y: Any) -> tuple[Array, Array]:
    """Probabilities as float64 ``[n, c]`` and labels as int64 ``[n]`` below c."""
    p = np.asarray(probabilities)
    if p.ndim != 2 or p.dtype.kind != "f":
        raise ValueError(f"[{where}] probabilities must be floats [n, c] but have {p.dtype} of shape {list(p.shape)}")
    y = checked_labels(where, y, len(p))
    p = p.astype(np.float64)
    bad = np.flatnonzero(~((p >= 0).all(axis=1) & (np.abs(p.sum(axis=1) - 1) < 1e-3)))
    if len(bad):
        raise ValueError(f"[{where}] probabilities must be >= 0 and sum to 1 but do not in {len(bad)} rows, "
                         f"the first {bad[0]}")  # fmt: skip
    if len(y) and y.max() >= p.shape[1]:
        raise ValueError(f"[{where}] y must be below the {p.shape[1]} classes of probabilities but has {y.max()}")
    return p, y


def _calibrated(counts: Array, y: Array) -> Array:
    """Counts as a distribution whose rows agree with how often each label is given."""
    given = np.bincount(y, minlength=len(counts)).astype(np.float64)
    sums = counts.sum(axis=1)
    joint = np.where(sums[:, None] > 0, counts / np.where(sums > 0, sums, 1)[:, None], np.eye(len(counts)))
    joint = joint * given[:, None]
    total = joint.sum()
    calibrated: Array = joint / total if total else joint
    return calibrated


def _folds(y: Array, folds: int, generator: np.random.Generator) -> Array:
    """A fold for each row, all folds alike in every class."""
    part = np.zeros(len(y), int)
    for label in np.unique(y):
        rows = generator.permutation(np.flatnonzero(y == label))
        part[rows] = (np.arange(len(rows)) + generator.integers(folds)) % folds
    return part


def _regression(x: Array, y: Array, classes: int, regularization: float, start: Array) -> Array:
    rows = np.arange(len(y))

    def loss(flat: Array) -> tuple[float, Array]:
        weights = flat.reshape(classes, -1)
        logits = log_softmax(x @ weights.T, axis=1)
        residual = np.exp(logits)
        residual[rows, y] -= 1
        penalty = 0.5 * regularization * float(np.square(weights[:, :-1]).sum())
        gradient = residual.T @ x
        gradient[:, :-1] += regularization * weights[:, :-1]
        return penalty - float(logits[rows, y].sum()), gradient.ravel()

    found: Array = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 40}).x
    return found
