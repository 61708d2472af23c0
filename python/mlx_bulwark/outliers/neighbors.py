"""Detectors that compare a row with its nearest neighbours among the training rows."""

import warnings
from abc import abstractmethod
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from ..ops.neighbors import knn
from ._types import Float32, Float64, Floats, Ints
from .base import (
    BLOCK_ROWS,
    Contamination,
    Explanation,
    SingleDetector,
    check_choice,
    check_count,
    frame_scale,
    labels,
)
from .frame import Frame, frame_of
from .inputs import admit

METRICS = ("euclidean", "cosine")
METHODS = ("largest", "mean", "median")
FARTHEST = float(np.finfo(np.float64).max) / 8192  # rows may lie farther apart than float64 tells; sums stay finite
_TERMS_AT_ONCE = 1 << 24  # rows times neighbours times columns

# Which training row each row is, if any; "twin": the one that equals it, if any.
Own = Ints | Literal["twin"] | None


def _has_novelty(detector: Any) -> bool:
    if detector.novelty:
        return True
    raise AttributeError(
        f"[{type(detector).__name__}] rows beside the training ones can be scored with novelty=True only; the labels "
        "of the training rows are what fit_predict returns, and their scores stand in training_scores_"
    )


def _has_no_novelty(detector: Any) -> bool:
    if not detector.novelty:
        return True
    raise AttributeError(
        f"[{type(detector).__name__}] fit_predict is there with novelty=False only: with novelty=True predict is for "
        "rows beside the training ones"
    )


class _NeighborDetector(SingleDetector):
    n_neighbors: int
    metric: str
    novelty: bool

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_count(self, "n_neighbors")
        check_choice(self, "metric", METRICS)

    def _frame(self, x: Floats) -> Frame:
        frame = frame_of(x, per_column=False)
        # The angle between rows is that seen from zero.
        return frame._replace(center=np.zeros_like(frame.center)) if self.metric == "cosine" else frame

    def _fit(self, x: Float32) -> None:
        self.n_neighbors_ = min(int(self.n_neighbors), len(x) - 1)
        if self.n_neighbors_ < self.n_neighbors:
            warnings.warn(
                f"[{type(self).__name__}] n_neighbors must be below the {len(x)} rows but is {self.n_neighbors}: "
                f"{self.n_neighbors_} are taken",
                stacklevel=3,
            )
        self.reference_ = mx.array(x)

    def _training(self, x: Float32) -> Floats:
        return self._from_neighbors(*self._neighbors(x, np.arange(len(x))))

    def _score(self, x: mx.array) -> Any:
        return self._from_neighbors(*self._neighbors(np.array(x), None))

    def _score_known(self, x: mx.array) -> Any:
        return self._from_neighbors(*self._neighbors(np.array(x), "twin"))

    def _neighbors(self, x: Float32, own: Own) -> tuple[Float64, Ints]:
        """Distances and indices of the neighbours among the training rows, without the row itself where it is one."""
        if not isinstance(own, str):
            return self._nearest(x, self.n_neighbors_, own)
        distances, indices = self._nearest(x, self.n_neighbors_ + 1, None)
        twin = distances[:, :1] == 0
        distances, indices = (np.where(twin, a[:, 1:], a[:, :-1]) for a in (distances, indices))
        return distances, indices

    def _nearest(self, x: Float32, k: int, own: Ints | None) -> tuple[Float64, Ints]:
        found = []
        for i in range(0, len(x), BLOCK_ROWS):
            exclude = None if own is None else mx.array(own[i : i + BLOCK_ROWS].astype(np.int32))
            block = mx.array(x[i : i + BLOCK_ROWS])
            found.append([np.array(a) for a in knn(block, self.reference_, k, self.metric, exclude=exclude)])
        distances, indices = (np.concatenate(a) for a in zip(*found, strict=True))
        unit = 1.0 if self.metric == "cosine" else frame_scale(self.frame_)
        with np.errstate(over="ignore"):
            return np.minimum(distances.astype(np.float64) / unit, FARTHEST), indices

    @abstractmethod
    def _from_neighbors(self, distances: Float64, indices: Ints) -> Float64:
        """Anomaly scores of rows with these neighbours."""

    @available_if(_has_no_novelty)
    def fit_predict(self, X: Any, y: Any = None) -> Ints:
        """Learn from rows and tell which of them are outliers; with ``novelty=False``.

        Args:
            X: ``[n, d]``, as of ``fit``.
            y: Not used.

        Returns:
            ndarray: ``[n]``, int64, -1 for outliers, else +1. No row was its own neighbour.

        Raises:
            ValueError: As of ``fit``.

        Example:
            >>> from mlx_bulwark.outliers import KNN
            >>> KNN(2).fit_predict([[0.0], [0.1], [0.2], [0.3], [0.4], [9.0]]).tolist()
            [1, 1, 1, 1, 1, -1]
        """
        self.fit(X)
        return labels(self.training_scores_ - self.offset_)

    @available_if(_has_novelty)
    def score_samples(self, X: Any) -> Float64:
        """Score rows beside the training ones, the lower the more abnormal; with ``novelty=True``.

        Args:
            X: ``[n, d]``, as of ``fit``. A training row among them finds itself as a neighbour.

        Returns:
            ndarray: ``[n]``, float64.

        Raises:
            ValueError: X has NaN, inf or text, or other columns than at ``fit``.

        Example:
            >>> from mlx_bulwark.outliers import KNN
            >>> KNN(2, novelty=True).fit([[0.0], [1.0], [2.0], [3.0]]).score_samples([[5.0]]).tolist()
            [-3.0]
        """
        return super().score_samples(X)

    anomaly_score = available_if(_has_novelty)(SingleDetector.anomaly_score)
    decision_function = available_if(_has_novelty)(SingleDetector.decision_function)
    predict = available_if(_has_novelty)(SingleDetector.predict)

    def explain(self, X: Any, *, training_rows: Any = None) -> Explanation:
        """Tell which columns made the scores: in which the neighbours are far.

        Args:
            X: ``[n, d]``, as of ``fit``.
            training_rows: ``[n]``, integers: which training rows these are, so that none is its own neighbour; None for
                others, with ``novelty=True``.

        Returns:
            Explanation: What each column adds to the anomaly score of each row.

        Raises:
            ValueError: As of ``score_samples``; or ``training_rows`` are not n numbers of training rows.

        Example:
            >>> from mlx_bulwark.outliers import KNN
            >>> x = [[0.0, 0.0], [0.1, 0.0], [0.0, 0.1], [0.0, 7.0]]
            >>> KNN(2).fit(x).explain(x[3:], training_rows=[3]).contributions.round(2).tolist()
            [[0.0, 7.0]]
        """
        check_is_fitted(self)
        x = self.frame_.apply(admit(self, X, reset=False))
        if training_rows is None:
            _has_novelty(self)
            return self._explanation(self._terms(x, None))
        own = np.asarray(training_rows)
        total = len(self.training_scores_)
        if own.shape != (len(x),) or own.dtype.kind not in "iu" or not ((own >= 0) & (own < total)).all():
            raise ValueError(
                f"[{type(self).__name__}] training_rows must be {len(x)} whole numbers below {total} but is "
                f"{training_rows!r}"
            )
        return self._explanation(self._terms(x, own.astype(np.int64)))

    def _contributions(self, x: Float32) -> Floats:
        return self._terms(x, None)

    def _contributions_known(self, x: Float32) -> Floats:
        return self._terms(x, "twin")

    def _terms(self, x: Float32, own: Own) -> Float64:
        rows = max(1, _TERMS_AT_ONCE // (self.n_neighbors_ * x.shape[1]))
        parts = [slice(i, i + rows) for i in range(0, len(x), rows)]
        return np.concatenate([self._terms_of(x[p], own[p] if isinstance(own, np.ndarray) else own) for p in parts])

    def _terms_of(self, x: Float32, own: Own) -> Float64:
        """The score, divided among the columns as the squared differences from the neighbours are."""
        distances, indices = self._neighbors(x, own)
        scores = self._from_neighbors(distances, indices)
        near = np.array(self.reference_[mx.array(indices.astype(np.int32))], np.float64)
        here = x.astype(np.float64)
        if self.metric == "cosine":
            near, here = _unit(near), _unit(here)
        squares = np.square(near - here[:, None])
        sums = squares.sum(axis=2)
        # Each neighbour's distance is divided first, then neighbours count as they do in the score.
        largest = distances.max(axis=1, keepdims=True)
        weight = self._weights(distances) * (distances / np.where(largest > 0, largest, 1.0))
        shares = np.einsum("nk,nkd->nd", weight / np.where(sums > 0, sums, 1.0), squares)
        total = shares.sum(axis=1, keepdims=True)
        finite = np.where(np.isfinite(scores), scores, 1.0)[:, None]
        return finite * (shares / np.where(total > 0, total, 1.0))

    def _weights(self, distances: Float64) -> Float64:
        return np.full(distances.shape, 1 / distances.shape[1])


class KNN(_NeighborDetector):
    """Distance to the k-th nearest training row, or the mean or median of the k distances.

    As in scikit-learn's LOF, ``novelty=False`` is for the training rows themselves, by ``fit_predict`` and
    ``training_scores_``: none is its own neighbour. With ``novelty=True`` other rows are scored. The threshold is that
    of the training rows without themselves in both, so that it means the same for rows that were not there at ``fit``.

    Args:
        n_neighbors: k; at most the other training rows are taken, with a warning.
        method: ``"largest"``, ``"mean"`` or ``"median"``.
        metric: ``"euclidean"`` or ``"cosine"`` (one minus it).
        contamination: Share of the training rows that are called outliers, above 0 and at most 0.5.
        novelty: Whether rows beside the training ones are to be scored.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.outliers import KNN
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> KNN(novelty=True).fit(x).predict([[0.0, 0.0], [4.0, 4.0]]).tolist()
        [1, -1]

    Source:
        Ramaswamy, Rastogi and Shim, "Efficient Algorithms for Mining Outliers from Large Data Sets" (2000).
    """

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        method: str = "largest",
        metric: str = "euclidean",
        contamination: Contamination = 0.1,
        novelty: bool = False,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.method = method
        self.metric = metric
        self.contamination = contamination
        self.novelty = novelty

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "method", METHODS)

    def _from_neighbors(self, distances: Float64, indices: Ints) -> Float64:
        return (distances * self._weights(distances)).sum(axis=1)

    def _weights(self, distances: Float64) -> Float64:
        k = distances.shape[1]
        weights = np.zeros(k)
        if self.method == "largest":
            weights[-1] = 1
        elif self.method == "mean":
            weights[:] = 1 / k
        else:
            weights[(k - 1) // 2] += 0.5
            weights[k // 2] += 0.5
        return np.broadcast_to(weights, distances.shape)


class LOF(_NeighborDetector):
    """Local outlier factor: how much sparser it is around a row than around its neighbours.

    Scores are those of scikit-learn's ``LocalOutlierFactor``, with one difference: rows with more than
    ``n_neighbors`` copies of themselves have an infinite density, and rows beside them score infinity, with a warning.
    There scikit-learn has large numbers that mean nothing. Exactly ``n_neighbors`` neighbours count, of equally distant
    ones those that come first.

    Args:
        n_neighbors: k; at most the other training rows are taken, with a warning.
        metric: ``"euclidean"`` or ``"cosine"`` (one minus it).
        contamination: Share of the training rows that are called outliers; or ``"auto"``: factors above 1.5.
        novelty: Whether rows beside the training ones are to be scored, as in scikit-learn.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.outliers import LOF
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> LOF(novelty=True).fit(x).predict([[0.0, 0.0], [4.0, 4.0]]).tolist()
        [1, -1]

    Source:
        Breunig et al., "LOF: Identifying Density-Based Local Outliers" (2000).
    """

    _auto_offset = -1.5

    def __init__(
        self,
        n_neighbors: int = 20,
        *,
        metric: str = "euclidean",
        contamination: Contamination = "auto",
        novelty: bool = False,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.contamination = contamination
        self.novelty = novelty

    def _training(self, x: Float32) -> Floats:
        distances, indices = self._neighbors(x, np.arange(len(x)))
        self.reach_ = distances[:, -1].copy()
        self.density_ = self._density(distances, indices)
        if crowded := int(np.isinf(self.density_).sum()):
            warnings.warn(
                f"[LOF] rows must have at most n_neighbors copies of themselves for a finite density, but {crowded} of "
                f"{len(x)} rows have more than {self.n_neighbors_}: rows beside them score infinity",
                stacklevel=3,
            )
        return self._from_neighbors(distances, indices)

    @property
    def negative_outlier_factor_(self) -> Float64:
        """``training_scores_``, by the name that scikit-learn has for them."""
        return self.training_scores_

    def _density(self, distances: Float64, indices: Ints) -> Float64:
        with np.errstate(divide="ignore"):
            return 1 / np.maximum(distances, self.reach_[indices]).mean(axis=1)

    def _from_neighbors(self, distances: Float64, indices: Ints) -> Float64:
        own, around = self._density(distances, indices), self.density_[indices].mean(axis=1)
        both = np.isinf(own) & np.isinf(around)  # among copies of itself: as dense as its neighbours
        with np.errstate(invalid="ignore"):
            return np.where(both, 1.0, around / own)


def _unit(x: Float64) -> Float64:
    """Rows of length 1, and those of zeros."""
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(lengths > 0, lengths, 1.0)
