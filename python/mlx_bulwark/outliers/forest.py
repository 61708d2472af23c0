"""Isolation forest: scikit-learn grows the trees, and what is kept of them are plain arrays that MLX walks."""

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from sklearn import ensemble

from . import storage
from ._types import Float32, Float64, Floats
from .base import Contamination, SingleDetector

_WALKED_AT_ONCE = 1 << 21  # rows times trees
_EULER = float(np.euler_gamma)


class Forest(NamedTuple):
    """Trees one after another; a leaf is its own child, so that every walk may take as many steps.

    Attributes:
        feature: ``[nodes]``, int32.
        threshold: ``[nodes]``, float32; smaller and equal values go left.
        children: ``[nodes, 2]``, int32, left and right.
        length: ``[nodes]``, float32: expected length of the path of a row that ends here.
        roots: ``[trees]``, int32.
        steps: Depth of the deepest tree.
        typical: Expected length of a path, to which all are compared.
    """

    feature: mx.array
    threshold: mx.array
    children: mx.array
    length: mx.array
    roots: mx.array
    steps: int
    typical: float


storage.register(Forest)


class IsolationForest(SingleDetector):
    """How few random cuts set a row apart.

    scikit-learn's isolation forest, with its parameters and scores, between 0 and 1. The trees are kept as arrays, can
    be saved without pickle, and are walked by MLX.

    Args:
        n_estimators: Number of trees.
        max_samples: Rows that a tree is grown on: a number, a share, or ``"auto"`` for 256.
        contamination: Share of the training rows that ``predict`` calls outliers, or ``"auto"``: scores above 0.5.
        max_features: Columns that a tree may cut: a number or a share.
        bootstrap: Whether a tree's rows are drawn with replacement.
        random_state: Seed.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.outliers import IsolationForest
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> IsolationForest(random_state=0).fit(x).predict([[0.0, 0.0], [6.0, 6.0]]).tolist()
        [1, -1]

    Source:
        Liu, Ting and Zhou, "Isolation Forest" (2008).
    """

    _auto_offset = -0.5

    def __init__(
        self,
        n_estimators: int = 100,
        *,
        max_samples: int | float | str = "auto",
        contamination: Contamination = "auto",
        max_features: int | float = 1.0,
        bootstrap: bool = False,
        random_state: Any = None,
    ) -> None:
        self.n_estimators = n_estimators
        self.max_samples = max_samples
        self.contamination = contamination
        self.max_features = max_features
        self.bootstrap = bootstrap
        self.random_state = random_state

    def _fit(self, x: Float32) -> None:
        grown = ensemble.IsolationForest(
            n_estimators=self.n_estimators,
            max_samples=self.max_samples,
            max_features=self.max_features,
            bootstrap=self.bootstrap,
            random_state=self.random_state,
        ).fit(x)
        self.max_samples_ = int(grown.max_samples_)
        self.forest_ = _planted(grown)
        self.usual_ = np.median(x, axis=0)

    def _check_loaded(self) -> None:
        """Indices of a file may point anywhere, and MLX looks there."""
        f = self.forest_
        nodes = f.feature.size
        inside = [
            (np.array(a) >= 0).all() and (np.array(a) < limit).all()
            for a, limit in ((f.feature, self.n_features_in_), (f.children, nodes), (f.roots, nodes))
        ]
        if not all(inside) or f.children.shape != (nodes, 2) or not f.length.size == f.threshold.size == nodes:
            raise ValueError("a node of a tree points outside")

    def _score(self, x: mx.array) -> Any:
        rows = max(1, _WALKED_AT_ONCE // self.forest_.roots.size)
        return np.concatenate([self._walk(x[i : i + rows]) for i in range(0, len(x), rows)])

    def _walk(self, x: mx.array) -> Float64:
        f = self.forest_
        node = mx.broadcast_to(f.roots, (len(x), f.roots.size))
        for _ in range(f.steps):
            right = mx.take_along_axis(x, f.feature[node], axis=1) > f.threshold[node]
            node = f.children.reshape(-1)[2 * node + right]
        lengths = np.array(f.length[node]).astype(np.float64).sum(axis=1)
        return np.exp2(-lengths / (f.roots.size * f.typical))

    def _contributions(self, x: Float32) -> Floats:
        """What the score falls by when a column takes its usual value."""
        scores = self._scores_of(x)
        lost = np.empty(x.shape, np.float64)
        for j, usual in enumerate(self.usual_):
            without = x.copy()
            without[:, j] = usual
            lost[:, j] = scores - self._scores_of(without)
        return lost


def _planted(grown: Any) -> Forest:
    trees = [e.tree_ for e in grown.estimators_]
    starts = np.cumsum([0, *(t.node_count for t in trees)])
    feature, threshold, children, length = [], [], [], []
    for tree, columns, start in zip(trees, grown.estimators_features_, starts[:-1], strict=True):
        nodes = np.arange(tree.node_count)
        inner = tree.children_left >= 0
        feature.append(np.where(inner, np.asarray(columns)[np.where(inner, tree.feature, 0)], 0))
        threshold.append(_rounded_down(np.where(inner, tree.threshold, 0.0)))
        both = np.stack([tree.children_left, tree.children_right], axis=1)
        children.append(np.where(inner[:, None], both, nodes[:, None]) + start)
        length.append(_depths(both, inner) + _average_path_length(tree.n_node_samples))
    return Forest(
        mx.array(np.concatenate(feature).astype(np.int32)),
        mx.array(np.concatenate(threshold)),
        mx.array(np.concatenate(children).astype(np.int32)),
        mx.array(np.concatenate(length).astype(np.float32)),
        mx.array(starts[:-1].astype(np.int32)),
        max(int(t.max_depth) for t in trees),
        max(float(_average_path_length(np.array([grown._max_samples]))[0]), 1e-300),
    )


def _rounded_down(threshold: Float64) -> Float32:
    """The largest float32 that is no larger: float32 rows fall to the same side of it."""
    rounded = threshold.astype(np.float32)
    return np.where(rounded > threshold, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def _depths(children: Any, inner: Any) -> Float64:
    depth = np.zeros(len(children))
    for node in np.flatnonzero(inner):  # parents come before their children
        depth[children[node]] = depth[node] + 1
    return depth


def _average_path_length(samples: Any) -> Float64:
    """Expected length of an unsuccessful search in a binary tree of so many rows."""
    n = np.asarray(samples, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        many = 2 * (np.log(n - 1) + _EULER) - 2 * (n - 1) / n
    return np.where(n <= 1, 0.0, np.where(n == 2, 1.0, many))
