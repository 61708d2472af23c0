"""Two-sample tests and distances: whether two samples come from one distribution, and how far apart they are."""

import math
import warnings
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from scipy import stats

from ..ops.mmd import mmd

Array = np.ndarray[Any, np.dtype[Any]]

EXACT = 100  # rows of the larger sample up to which the KS test counts paths
LEAST_EXPECTED = 5  # rows of a category in each sample, below which the chi-square distribution is a bad guess
FLOOR = 1e-4  # of a share in the PSI, whose logarithm must be finite
HIDDEN = 32  # units of the classifier
TRAINING_STEPS = 40  # few: with more it learns its rows by heart


class TwoSample(NamedTuple):
    """Result of a test.

    Attributes:
        statistic: What the test computes.
        p_value: Probability of a statistic as large where both samples come from one distribution.
        effect: How far apart the samples are, whatever their sizes: 0 is not at all.
    """

    statistic: float
    p_value: float
    effect: float


class PSI(NamedTuple):
    """Population stability index.

    Attributes:
        value: The index.
        null_mean: About its mean where nothing has drifted: an index near it says nothing.
        bins: Bins that it was computed over.
    """

    value: float
    null_mean: float
    bins: int


def kolmogorov_smirnov(reference: Any, new: Any) -> TwoSample:
    """Compare the distribution functions of two samples of numbers.

    They are compared between values, never within a run of ties. With ties the p-value is an upper bound.

    Args:
        reference: Numbers ``[n]``, without NaN.
        new: Numbers ``[m]``, without NaN.

    Returns:
        TwoSample: The statistic, also the effect, is the largest difference of the distribution functions.

    Example:
        >>> from mlx_bulwark.gate import kolmogorov_smirnov
        >>> kolmogorov_smirnov([1, 2, 3, 4], [3, 4, 5, 6]).statistic
        0.5

    Source:
        J. Hodges, "The Significance Probability of the Smirnov Two-Sample Test", 1958; ``scipy.stats.ks_2samp``.
    """
    x, y = np.asarray(reference), np.asarray(new)
    method = "exact" if max(len(x), len(y)) <= EXACT else "asymp"
    with warnings.catch_warnings():  # where paths cannot be counted scipy goes on without, and says so
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning)
        found = stats.ks_2samp(x, y, method=method)
    return TwoSample(float(found.statistic), float(found.pvalue), float(found.statistic))


def chi_square(reference: Any, new: Any) -> TwoSample:
    """Compare how often categories occur.

    Categories that are expected in fewer than 5 rows of a sample are taken together, the rarest first.

    Args:
        reference: Counts ``[k]``.
        new: Counts ``[k]`` of the same categories.

    Returns:
        TwoSample: The effect is the total variation distance: the share of rows that have moved.

    Example:
        >>> from mlx_bulwark.gate import chi_square
        >>> found = chi_square([50, 50], [80, 20])
        >>> round(found.statistic, 2), round(found.effect, 2)
        (19.78, 0.3)

    Source:
        K. Pearson, 1900; ``scipy.stats.chi2_contingency`` without Yates's correction.
    """
    counts = np.asarray([reference, new], np.float64)
    sizes = counts.sum(axis=1)
    effect = float(np.abs(counts[0] / sizes[0] - counts[1] / sizes[1]).sum() / 2)
    table = _pooled(counts)
    if table.shape[1] < 2:
        return TwoSample(0.0, 1.0, effect)
    found = stats.chi2_contingency(table, correction=False)
    return TwoSample(float(found.statistic), float(found.pvalue), effect)


def population_stability_index(reference: Any, new: Any) -> PSI:
    """Population stability index of counts by bin.

    Args:
        reference: Counts ``[b]`` in bins that the reference has set.
        new: Counts ``[b]``.

    Returns:
        PSI: Sum of ``(p - q) ln(p / q)``, shares at least 0.0001; and what to hold it against: with b bins, n and m
        rows its mean is about ``(b - 1) (1 / n + 1 / m)`` where nothing has drifted, which the customary limits of 0.1
        and 0.25 do not know of.

    Example:
        >>> from mlx_bulwark.gate import population_stability_index
        >>> found = population_stability_index([50, 50], [80, 20])
        >>> round(found.value, 3), found.null_mean
        (0.416, 0.02)

    Source:
        B. Yurdakul, J. Naranjo, "Statistical properties of the population stability index", 2020.
    """
    counts = np.asarray([reference, new], np.float64)
    n, m = counts.sum(axis=1).tolist()
    p, q = np.maximum(counts / counts.sum(axis=1, keepdims=True), FLOOR)
    bins = int((counts.sum(axis=0) > 0).sum())
    return PSI(float(((p - q) * np.log(p / q)).sum()), (bins - 1) * (1 / n + 1 / m), bins)


def wasserstein(reference: Any, new: Any) -> float:
    """Earth mover's distance of two samples of numbers, in their unit.

    Args:
        reference: Finite numbers ``[n]``.
        new: Finite numbers ``[m]``.

    Returns:
        float: Area between the distribution functions.

    Example:
        >>> from mlx_bulwark.gate import wasserstein
        >>> wasserstein([0, 1], [2, 3])
        2.0

    Source:
        ``scipy.stats.wasserstein_distance``.
    """
    return float(stats.wasserstein_distance(np.asarray(reference, np.float64), np.asarray(new, np.float64)))


def maximum_mean_discrepancy(reference: Any, new: Any, permutations: int = 199, seed: int = 0) -> TwoSample:
    """Compare two samples of rows as a whole, correlations included, by a kernel.

    Args:
        reference: Numbers ``[n, d]``, columns of one scale.
        new: Numbers ``[m, d]``.
        permutations: Of the rows; the p-value is ``(1 + as large) / (1 + permutations)``.
        seed: Of the permutations.

    Returns:
        TwoSample: The statistic is the unbiased square of the MMD, the effect its root, 0 where it is negative.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.gate import maximum_mean_discrepancy
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> maximum_mean_discrepancy(x[:100], x[100:] + 1).p_value
        0.005

    Source:
        A. Gretton et al., "A Kernel Two-Sample Test", 2012.
    """
    x, y = (mx.array(np.asarray(rows, np.float32)) for rows in (reference, new))
    found = mmd(x, y, permutations=permutations, seed=seed)
    assert found.p_value is not None
    return TwoSample(found.statistic, found.p_value, math.sqrt(max(found.statistic, 0.0)))


def classifier_two_sample(reference: Any, new: Any, seed: int = 0) -> TwoSample:
    """Train a small classifier to tell the samples apart, and test what it has learned on rows that it has not seen.

    Under no drift labels of held-out rows are exchangeable whatever the classifier is, so that the rank test of its
    scores is valid.

    Args:
        reference: Numbers ``[n, d]``, columns of one scale.
        new: Numbers ``[m, d]``.
        seed: Of the split into halves, and of the classifier.

    Returns:
        TwoSample: The statistic is the area under the ROC curve on the held-out half, the effect what it has above 0.5.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.gate import classifier_two_sample
        >>> x = np.random.default_rng(0).normal(size=(400, 2))
        >>> classifier_two_sample(x[:200], x[200:] + 1).statistic > 0.75
        True

    Source:
        D. Lopez-Paz, M. Oquab, "Revisiting Classifier Two-Sample Tests", 2017.
    """
    generator = np.random.default_rng(seed)
    samples = [generator.permutation(np.asarray(rows, np.float32)) for rows in (reference, new)]
    old, new = (rows[: len(rows) // 2] for rows in samples)
    score = _classifier(old, new, seed)
    old_scores, new_scores = (score(rows[len(rows) // 2 :]) for rows in samples)
    found = stats.mannwhitneyu(new_scores, old_scores, alternative="greater")
    area = float(found.statistic) / (len(old_scores) * len(new_scores))
    return TwoSample(area, float(found.pvalue), max(area - 0.5, 0.0))


def benjamini_hochberg(p_values: Any) -> Array:
    """Adjust p-values: those at most q are findings of which a share of q is expected to be false.

    Args:
        p_values: ``[k]``, of tests that are independent or positively dependent.

    Returns:
        ndarray: float64 ``[k]``.

    Example:
        >>> from mlx_bulwark.gate import benjamini_hochberg
        >>> benjamini_hochberg([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.04, 0.04]

    Source:
        Y. Benjamini, Y. Hochberg, "Controlling the False Discovery Rate", 1995.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(-p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1))
    return adjusted


def _pooled(counts: Array) -> Array:
    """Counts with categories taken together, the rarest first, until each is expected often enough in both samples."""
    table = counts[:, np.argsort(counts.sum(axis=0), kind="stable")]
    share = table.sum(axis=1).min() / max(table.sum(), 1)
    together = np.cumsum(table.sum(axis=0))
    rare = int((table.sum(axis=0) * share < LEAST_EXPECTED).sum())
    while rare and rare < table.shape[1] and together[rare - 1] * share < LEAST_EXPECTED:
        rare += 1
    if not rare:
        return table
    return np.concatenate([table[:, :rare].sum(axis=1, keepdims=True), table[:, rare:]], axis=1)


def _classifier(reference: Array, new: Array, seed: int) -> Any:
    """Score of rows, higher for those like the new ones; both samples weigh the same."""
    x = mx.array(np.concatenate([reference, new]))
    y = mx.concatenate([mx.zeros(len(reference)), mx.ones(len(new))])
    weights = mx.where(y == 1, 0.5 / len(new), 0.5 / len(reference))
    model = _network(x.shape[1], seed)
    optimizer = optim.AdamW(3e-3, weight_decay=0.1)

    def loss(model: nn.Module) -> mx.array:
        return (nn.losses.binary_cross_entropy(model(x)[:, 0], y, reduction="none") * weights).sum()

    step = nn.value_and_grad(model, loss)
    for _ in range(TRAINING_STEPS):
        _, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
    return lambda rows: np.array(model(mx.array(rows))[:, 0]).astype(np.float64)


def _network(width: int, seed: int) -> nn.Module:
    """A perceptron whose first weights come from the seed alone."""
    key = mx.random.key(seed)
    layers = [nn.Linear(width, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)]
    model = nn.Sequential(*layers)
    for layer in model.layers[::2]:
        key, mine = mx.random.split(key)
        layer.weight = mx.random.normal(layer.weight.shape, key=mine) / math.sqrt(layer.weight.shape[1])
        layer.bias = mx.zeros_like(layer.bias)
    return model
