"""Certificates for training sets whose labels an attacker has flipped."""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import linalg, special

from .bounds import ABSTAIN, Array, check_count, check_positive, is_number

CHUNK = 1 << 22  # weights of training labels that are in memory at once


class LabelFlipCertificates(NamedTuple):
    """What ``certify_label_flips`` found, one entry for each test row."""

    prediction: Array
    """int64: the class, ABSTAIN (-1) where none has a lower bound above 1/2."""
    flips: Array
    """int64: how many training labels may be changed, in any way, without changing the prediction."""
    lower_bound: Array
    """float64: lower bound on the probability of the class under random flips."""


def label_flip_radius(p: Any, q: float, *, num_classes: int = 2) -> Any:
    """Turn the probability of a class under random label flips into a number of flips that cannot change it.

    The largest r below ``log(4 p (1 - p)) / (2 (1 - 2q) log(q / (1 - q)))``, for two classes. The denominator is twice
    the divergence between the random labels of a row before and after its label was changed.

    Args:
        p: Lower bound on the probability that the classifier, trained on randomly flipped labels, chooses the class;
            a number or an array, in [0, 1].
        q: Probability with which every training label is replaced by another one, in (0, 1 - 1 / num_classes).
        num_classes: Number of classes.

    Returns:
        int64: Number of labels; 0 where p is at most 1/2.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> from mlx_bulwark.smoothing import label_flip_radius
        >>> [int(label_flip_radius(0.999, q)) for q in (0.2, 0.4)]
        [3, 34]

    Source:
        E. Rosenfeld, E. Winston, P. Ravikumar, Z. Kolter, "Certified Robustness to Label-Flipping Attacks via
        Randomized Smoothing", 2020.
    """
    _check_flips("label_flip_radius", q, num_classes)
    p = np.asarray(p, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"[label_flip_radius] p must be in [0, 1] but is {p}")
    return _flips(1.0 - p, q, num_classes)


def certify_label_flips(
    features: Any,
    labels: Any,
    test_features: Any,
    q: float,
    *,
    num_classes: int = 2,
    regularization: float | None = None,
) -> LabelFlipCertificates:
    """Classify by ridge regression under random label flips, and certify against flips by an attacker.

    The certified classifier chooses the class that least squares on fixed features, trained on labels that are each
    replaced at random with probability q, chooses most often. Its output is linear in the labels, so the probability
    is bounded by Chernoff's inequality, exactly and without sampling. The features must not depend on the labels.

    Args:
        features: Float ``[n, d]``, the training rows; an array of NumPy or MLX.
        labels: Integers ``[n]`` in [0, num_classes), as the attacker may have left them.
        test_features: Float ``[m, d]``.
        q: Probability with which every training label is replaced by another one, in (0, 1 - 1 / num_classes). The
            larger, the more flips are certified and the fewer rows.
        num_classes: Number of classes.
        regularization: Added to the diagonal of X^T X, > 0; by default its trace / 32. Little of it lets a few
            labels decide, and few flips are certified. It may be chosen from features, never from labels.

    Returns:
        LabelFlipCertificates: ``prediction``, ``flips`` and ``lower_bound``, each ``[m]``.

    Raises:
        ValueError: An argument has a wrong value or shape, or a feature is not finite.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.smoothing import certify_label_flips
        >>> x = np.linspace(-1, 1, 200)[:, None]
        >>> found = certify_label_flips(x, (x[:, 0] > 0).astype(int), [[-0.9], [0.9]], q=0.3)
        >>> found.prediction.tolist(), found.flips.tolist()
        ([0, 1], [17, 17])

    Source:
        E. Rosenfeld, E. Winston, P. Ravikumar, Z. Kolter, "Certified Robustness to Label-Flipping Attacks via
        Randomized Smoothing", 2020.
    """
    where = "certify_label_flips"
    _check_flips(where, q, num_classes)
    x, tests = _matrix(where, "features", features), _matrix(where, "test_features", test_features)
    y = np.asarray(labels)
    if tests.shape[1] != x.shape[1]:
        raise ValueError(f"[{where}] test_features must have {x.shape[1]} columns but has {tests.shape[1]}")
    if y.shape != (len(x),) or y.dtype.kind not in "iu" or (len(y) and not 0 <= y.min() <= y.max() < num_classes):
        raise ValueError(f"[{where}] labels must be {len(x)} integers in [0, {num_classes}) but has {y!r}")
    moments = x.T @ x
    if regularization is None:
        regularization = float(np.trace(moments)) / 32 or 1.0
    check_positive(where, "regularization", regularization)
    solved = linalg.solve(moments + regularization * np.eye(x.shape[1]), x.T, assume_a="pos")
    rows = max(1, CHUNK // max(1, len(x)))
    parts = [_certify(tests[i : i + rows] @ solved, y, q, num_classes) for i in range(0, len(tests), rows)]
    if not parts:
        return LabelFlipCertificates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    prediction, flips, lower_bound = (np.concatenate(part) for part in zip(*parts, strict=True))
    return LabelFlipCertificates(prediction, np.minimum(flips, len(y)), lower_bound)


def _certify(weights: Array, labels: Array, q: float, num_classes: int) -> tuple[Array, Array, Array]:
    """Certificates of the test rows whose scores are ``weights @ one_hot(labels)``."""
    expected = weights @ _expected_labels(labels, q, num_classes)
    prediction = expected.argmax(1)
    log_failure = np.full(len(weights), -np.inf)
    for other in range(num_classes):
        rows = np.flatnonzero(prediction != other)
        for own in np.unique(prediction[rows]):
            chosen = rows[prediction[rows] == own]
            bound = _log_chernoff(weights[chosen], labels, int(own), other, q, num_classes)
            log_failure[chosen] = np.logaddexp(log_failure[chosen], bound)
    failure = np.exp(np.minimum(log_failure, 0.0))
    certain = failure < 0.5
    flips = np.where(certain, _flips(failure, q, num_classes), 0)
    return np.where(certain, prediction, ABSTAIN), flips, 1.0 - failure


def _expected_labels(labels: Array, q: float, num_classes: int) -> Array:
    other = q / (num_classes - 1)
    return other + (1 - q - other) * np.eye(num_classes)[labels]


def _log_chernoff(weights: Array, labels: Array, own: int, other: int, q: float, num_classes: int) -> Array:
    """Log of Chernoff's bound on the probability that ``other`` scores at least as much as ``own``.

    The difference of the scores is a sum of independent terms, each the weight of a row times +1, -1 or 0. The log of
    its moment generating function at -t is convex: Newton's steps, safeguarded by bisection, find its minimum.
    """
    probabilities = _expected_labels(labels, q, num_classes)
    with np.errstate(divide="ignore"):
        plus, minus = np.log(probabilities[:, own]), np.log(probabilities[:, other])
        rest = (
            np.log(np.maximum(1.0 - probabilities[:, own] - probabilities[:, other], 0.0)) if num_classes > 2 else None
        )
    scale = np.abs(weights).max(1, keepdims=True)
    w = weights / np.where(scale > 0, scale, 1.0)
    low, high = np.zeros(len(w)), np.full(len(w), 1.0)

    def at(t: Array) -> tuple[Array, Array, Array]:
        x = w * t[:, None]
        terms = [plus - x, minus + x] + ([] if rest is None else [np.broadcast_to(rest, x.shape)])
        log_moment = special.logsumexp(terms, axis=0)
        up, down = np.exp(terms[0] - log_moment), np.exp(terms[1] - log_moment)
        mean = w * (down - up)
        variance = w * w * (down + up) - mean * mean
        return log_moment.sum(1), mean.sum(1), variance.sum(1)

    for _ in range(60):  # until the slope at the upper end is positive; where it never is, any t bounds
        rising = at(high)[1] > 0
        if rising.all():
            break
        high = np.where(rising, high, 2 * high)
    t = np.zeros(len(w))
    best = np.zeros(len(w))
    for _ in range(60):
        value, slope, curvature = at(t)
        best = np.minimum(best, value)
        low, high = np.where(slope < 0, t, low), np.where(slope >= 0, t, high)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = t - slope / curvature
        t_next = np.where((step > low) & (step < high), step, (low + high) / 2)
        if (np.abs(t_next - t) <= 1e-9 * (1 + t)).all():
            break
        t = t_next
    return best


def _flips(failure: Any, q: float, num_classes: int) -> Any:
    """Largest number of flips strictly below the bound: at the bound itself two classes may tie."""
    other = q / (num_classes - 1)
    divergence = (1 - q - other) * math.log((1 - q) / other)
    u = np.minimum(np.asarray(failure, np.float64), 0.5)
    with np.errstate(divide="ignore"):
        bound = -(np.log(4 * u) + np.log1p(-u)) / (2 * divergence)
    largest = np.iinfo(np.int64).max
    return np.where(np.isinf(bound), largest, np.maximum(np.ceil(np.minimum(bound, 1e18)) - 1, 0)).astype(np.int64)[()]


def _check_flips(where: str, q: Any, num_classes: Any) -> None:
    check_count(where, "num_classes", num_classes)
    if num_classes < 2:
        raise ValueError(f"[{where}] num_classes must be 2 or more but is {num_classes}")
    if not is_number(q) or not 0 < q < 1 - 1 / num_classes:
        raise ValueError(f"[{where}] q must be a number in (0, {1 - 1 / num_classes:g}) but is {q!r}")


def _matrix(where: str, name: str, x: Any) -> Array:
    matrix = np.asarray(x, np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"[{where}] {name} must have 2 axes but has shape {matrix.shape}")
    if bad := int((~np.isfinite(matrix)).sum()):
        raise ValueError(f"[{where}] {name} must be finite but has {bad} values that are not")
    return matrix
