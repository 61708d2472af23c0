"""Activation clustering: poison that makes a second cluster of its class."""

from typing import Any, NamedTuple

import numpy as np

from .classes import Array, Detection, by_class, checked, principal
from .classifier import integer

STARTS = 8
MOST_ROWS = 2000  # of a silhouette, drawn at random


class Clusters(NamedTuple):
    """The two clusters of each class."""

    detection: Detection
    """Scores are silhouettes of the rows of the smaller cluster, weighed by how small it is, and 0 in the larger one;
    statistics are mean silhouettes."""
    relative_size: dict[int, float]
    """Share of the smaller cluster in its class, 0 to 0.5."""
    smaller: Array
    """bool ``[n]``: the row is in the smaller cluster, which is half of the rows of many a clean class."""


def activation_clustering(features: Any, y: Any, *, components: int = 10, seed: int = 0) -> Clusters:
    """Split each class in two by 2-means of its principal components.

    Every class has a smaller cluster, a clean one too: that alone accuses nobody. What tells is how well the two are
    apart, the silhouette, and how small the smaller one is.

    Args:
        features: Float ``[n, d]``, as of ``penultimate_features``.
        y: Labels ``[n]``, integers >= 0.
        components: Principal components of a class, at most d.
        seed: Of the starts.

    Returns:
        Clusters: Scores and silhouettes, relative sizes, and members of the smaller clusters.

    Raises:
        ValueError: An argument has a wrong shape, dtype or value, or features are not finite.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison import activation_clustering
        >>> features = np.random.default_rng(0).normal(size=(100, 8))
        >>> features[:20, 3] += 9
        >>> found = activation_clustering(features, np.zeros(100, int))
        >>> found.relative_size, sorted(np.flatnonzero(found.smaller).tolist()) == list(range(20))
        ({0: 0.2}, True)

    Source:
        B. Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", 2018.
    """
    features, y = checked("activation_clustering", features, y)
    integer("activation_clustering", "components", components, 1)
    generator = np.random.default_rng(seed)
    scores, smaller = np.zeros(len(y)), np.zeros(len(y), bool)
    statistics, sizes = {}, {}
    for label, rows in by_class(y):
        points = principal(features[rows], components)
        if not points.shape[1]:  # all rows are the same: one cluster
            statistics[label], sizes[label] = 0.0, 0.0
            continue
        inside = two_means(points, generator)
        inside = ~inside if 2 * inside.sum() > len(rows) else inside
        sampled = generator.permutation(len(rows))[:MOST_ROWS]
        widths = np.zeros(len(rows))
        widths[sampled] = silhouettes(points[sampled], inside[sampled])
        left_out = np.setdiff1d(np.arange(len(rows)), sampled)
        widths[left_out] = widths[sampled].mean()
        share = float(inside.mean())
        statistics[label], sizes[label] = float(widths[sampled].mean()), share
        smaller[rows] = inside
        scores[rows] = np.where(inside, (1 + widths) * (1 - share), 0.0)
    return Clusters(Detection(scores, statistics), sizes, smaller)


def two_means(points: Array, generator: np.random.Generator) -> Array:
    """bool ``[n]``: the split in two with the least sum of squares among several starts."""
    best, found = np.inf, np.zeros(len(points), bool)
    for _ in range(STARTS):
        first = points[generator.integers(len(points))]
        away = np.square(points - first).sum(axis=1)
        if not away.sum():
            continue
        centers = np.stack([first, points[generator.choice(len(points), p=away / away.sum())]])
        inside = np.zeros(len(points), bool)
        for _ in range(100):
            distances = np.square(points[:, None] - centers).sum(axis=2)
            new = distances[:, 1] < distances[:, 0]
            if (new == inside).all() or not new.any() or new.all():
                break
            inside = new
            centers = np.stack([points[~inside].mean(axis=0), points[inside].mean(axis=0)])
        cost = float(np.square(points - centers[inside.astype(int)]).sum())
        if inside.any() and cost < best:
            best, found = cost, inside
    return found


def silhouettes(points: Array, inside: Array) -> Array:
    """Of each row: how much farther the other cluster is than its own, -1 to 1; 0 in a cluster of one row."""
    squares = np.square(points).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))
    np.fill_diagonal(distances, 0)
    counts = np.array([(~inside).sum(), inside.sum()])
    if not counts.all():
        return np.zeros(len(points))
    sums = np.stack([distances[:, ~inside].sum(axis=1), distances[:, inside].sum(axis=1)], axis=1)
    rows, own = np.arange(len(points)), inside.astype(int)
    within = sums[rows, own] / np.maximum(counts[own] - 1, 1)
    beyond = sums[rows, 1 - own] / counts[1 - own]
    larger = np.maximum(within, beyond)
    widths: Array = np.where((counts[own] > 1) & (larger > 0), (beyond - within) / np.where(larger > 0, larger, 1), 0.0)
    return widths
