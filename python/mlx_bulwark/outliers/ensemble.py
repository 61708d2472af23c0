"""Several detectors as one, and one detector for each class."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import erf
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from . import storage
from ._types import Float64, Floats, Ints
from .base import Contamination, Explanation, OutlierDetector, check_choice, labels
from .forest import IsolationForest
from .inputs import admit
from .linear import Mahalanobis
from .neighbors import KNN, LOF
from .tails import HBOS

COMBINATIONS = ("probability", "rank")


class Ensemble(OutlierDetector):
    """The mean opinion of several detectors, each brought to the same scale by its scores of the training rows.

    Detectors of neighbours are used as with ``novelty=False``: a row that equals a training row is that row, and no
    neighbour of itself, so that fit and predict agree.

    Args:
        detectors: Unfitted detectors; by default KNN, LOF, HBOS, IsolationForest and Mahalanobis.
        combination: ``"probability"``: the Gaussian tail probability of a score among those of the training rows, 0
            below their mean, so that what a detector finds ordinary does not count against what another finds far out.
            ``"rank"``: the share of the training rows with lower scores.
        contamination: Share of the training rows that ``predict`` calls outliers, above 0 and at most 0.5.
        random_state: Seed of the isolation forest among the detectors by default.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.outliers import ECOD, KNN, Ensemble
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> Ensemble([ECOD(), KNN()]).fit(x).predict([[0.0, 0.0], [4.0, 4.0]]).tolist()
        [1, -1]

    Source:
        Kriegel et al., "Interpreting and Unifying Outlier Scores" (2011).
    """

    def __init__(
        self,
        detectors: list[OutlierDetector] | None = None,
        *,
        combination: str = "probability",
        contamination: Contamination = 0.1,
        random_state: Any = None,
    ) -> None:
        self.detectors = detectors
        self.combination = combination
        self.contamination = contamination
        self.random_state = random_state

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "combination", COMBINATIONS)
        if self.detectors is not None:
            wrong = [type(d).__name__ for d in self.detectors if not isinstance(d, OutlierDetector)]
            if wrong or not self.detectors:
                raise ValueError(
                    f"[Ensemble] detectors must be at least one detector of mlx_bulwark.outliers but are "
                    f"{', '.join(wrong) or 'none'}"
                )

    def fit(self, X: Any, y: Any = None) -> Any:
        """Fit all detectors; as ``OutlierDetector.fit``.

        Args:
            X: ``[n, d]``, numbers: NumPy or MLX array, list, or dataframe.
            y: Not used.

        Returns:
            Ensemble: Itself.

        Raises:
            ValueError: As of the detectors.

        Example:
            >>> import numpy as np
            >>> from mlx_bulwark.outliers import ECOD, RobustZ, Ensemble
            >>> x = np.random.default_rng(0).normal(size=(200, 2))
            >>> len(Ensemble([ECOD(), RobustZ()]).fit(x).detectors_)
            2
        """
        self._check_parameters()
        x = admit(self, X, reset=True, least=self._least_rows)
        self.detectors_ = [clone(d).fit(x) for d in self._chosen(len(x))]
        # By the scores of their training rows, which are not their own neighbours
        self.levels_ = [np.sort(-d.training_scores_) for d in self.detectors_]
        self.training_scores_ = -self._combined([-d.training_scores_ for d in self.detectors_])
        self.offset_ = self._threshold(self.training_scores_)
        return self

    def _chosen(self, rows: int) -> list[Any]:
        if self.detectors is not None:
            return self.detectors
        k = max(1, rows - 1)
        forest = IsolationForest(random_state=self.random_state)
        return [KNN(min(5, k)), LOF(min(20, k)), HBOS(), forest, Mahalanobis()]

    def _prepared(self, x: Floats) -> Floats:
        return x  # each detector has a frame of its own

    def _scores_of(self, x: Floats) -> Float64:
        return self._combined([_known_scores(d, x) for d in self.detectors_])

    def _combined(self, scores: list[Float64]) -> Float64:
        scale = _probability if self.combination == "probability" else _rank
        return np.mean([scale(s, level) for s, level in zip(scores, self.levels_, strict=True)], axis=0)

    def _contributions(self, x: Floats) -> Floats:
        """The columns' shares of each detector's score, weighted by what it adds to the whole."""
        scale = _probability if self.combination == "probability" else _rank
        total = np.zeros(x.shape)
        for d, level in zip(self.detectors_, self.levels_, strict=True):
            adds = scale(_known_scores(d, x), level) / len(self.detectors_)
            parts = np.maximum(_known_contributions(d, x), 0)
            sums = parts.sum(axis=1, keepdims=True)
            total += adds[:, None] * parts / np.where(sums > 0, sums, 1.0)
        return total


def _known_scores(detector: Any, x: Floats) -> Float64:
    if isinstance(detector, Ensemble):
        return detector._scores_of(x)
    known: Float64 = detector._blocks(detector._prepared(x), detector._score_known)
    return known


def _known_contributions(detector: Any, x: Floats) -> Any:
    if isinstance(detector, Ensemble):
        return detector._contributions(x)
    return detector._contributions_known(detector._prepared(x))


def _probability(scores: Float64, level: Float64) -> Float64:
    finite = level[np.isfinite(level)]
    tiny = np.finfo(float).tiny
    unit = max(float(np.abs(finite).max(initial=0)), tiny)  # squares of the largest distances would overflow
    mean, spread = (float((finite / unit).mean()), float((finite / unit).std())) if len(finite) else (0.0, 0.0)
    with np.errstate(over="ignore"):
        z = (scores / unit - mean) / max(np.sqrt(2) * spread, tiny)
    return np.maximum(0, erf(z))


def _rank(scores: Float64, level: Float64) -> Float64:
    """Share of lower training scores, those that are equal by half."""
    below, up_to = (np.searchsorted(level, scores, side=side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(level))


class PerClass(BaseEstimator):
    """A detector for each class of labelled data: what is odd in its own class, such as a mislabelled row.

    Args:
        detector: An unfitted detector; each class gets a clone. With a detector of neighbours, ``novelty`` has the
            meaning that it has there.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.outliers import Mahalanobis, PerClass
        >>> x = np.concatenate([np.random.default_rng(0).normal(size=(100, 2)) + m for m in (0, 9)])
        >>> y = np.repeat(["cat", "dog"], 100)
        >>> y[7] = "dog"
        >>> int(PerClass(Mahalanobis("mcd", random_state=0)).fit(x, y).training_scores_.argmin())
        7

    Source:
        Tran, Li and Madry, "Spectral Signatures in Backdoor Attacks" (2018), for looking at each class alone.
    """

    def __init__(self, detector: OutlierDetector) -> None:
        self.detector = detector

    def fit(self, X: Any, y: Any) -> Any:
        """Fit a detector to each class.

        Args:
            X: ``[n, d]``, numbers.
            y: ``[n]``, labels: integers or strings.

        Returns:
            PerClass: Itself.

        Raises:
            ValueError: As of the detector; or a class has fewer than two rows, or y not n labels.

        Example:
            >>> from mlx_bulwark.outliers import RobustZ, PerClass
            >>> PerClass(RobustZ()).fit([[0.0], [1.0], [5.0], [6.0]], ["a", "a", "b", "b"]).classes_.tolist()
            ['a', 'b']
        """
        x = admit(self, X, reset=True, least=2)
        y = self._labels(x, y)
        self.classes_, of, counts = np.unique(y, return_inverse=True, return_counts=True)
        if (counts < 2).any():
            few = ", ".join(repr(c) for c in self.classes_[counts < 2].tolist())
            raise ValueError(f"[PerClass] each class must have two rows at least but these have one: {few}")
        self.detectors_ = [clone(self.detector).fit(x[of == c]) for c in range(len(self.classes_))]
        self.training_scores_ = np.empty(len(x))
        self.offset_ = np.array([d.offset_ for d in self.detectors_])
        for c, d in enumerate(self.detectors_):
            self.training_scores_[of == c] = d.training_scores_
        return self

    def fit_predict(self, X: Any, y: Any) -> Ints:
        """Fit a detector to each class and tell the outliers of each, -1, from the others, +1.

        Args:
            X: ``[n, d]``, numbers.
            y: ``[n]``, labels.

        Returns:
            ndarray: ``[n]``, int64.

        Raises:
            ValueError: As of ``fit``.

        Example:
            >>> from mlx_bulwark.outliers import KNN, PerClass
            >>> x, y = [[0.0], [0.1], [0.2], [9.0], [9.1], [9.2], [0.1]], [0, 0, 0, 1, 1, 1, 1]
            >>> PerClass(KNN(1)).fit_predict(x, y).tolist()
            [1, 1, 1, 1, 1, 1, -1]
        """
        self.fit(X, y)
        of = np.searchsorted(self.classes_, np.asarray(y))
        return labels(self.training_scores_ - self.offset_[of])

    def score_samples(self, X: Any, y: Any) -> Float64:
        """Score rows in the classes that they are labelled with, the lower the more abnormal.

        Args:
            X: ``[n, d]``, numbers.
            y: ``[n]``, labels.

        Returns:
            ndarray: ``[n]``, float64.

        Raises:
            ValueError: As of the detector; or a label that was not there at ``fit``.

        Example:
            >>> from mlx_bulwark.outliers import RobustZ, PerClass
            >>> detector = PerClass(RobustZ()).fit([[0.0], [1.0], [5.0], [6.0]], ["a", "a", "b", "b"])
            >>> detector.score_samples([[0.5], [0.5]], ["a", "b"]).round(2).tolist()
            [-0.0, -6.74]
        """
        return self._of_each(X, y, lambda detector, x: detector.score_samples(x))

    def anomaly_score(self, X: Any, y: Any) -> Float64:
        """Score rows in their classes, the higher the more abnormal: ``-score_samples(X, y)``.

        Args:
            X: ``[n, d]``, numbers.
            y: ``[n]``, labels.

        Returns:
            ndarray: ``[n]``, float64.

        Raises:
            ValueError: As of ``score_samples``.

        Example:
            >>> from mlx_bulwark.outliers import RobustZ, PerClass
            >>> detector = PerClass(RobustZ()).fit([[0.0], [1.0], [5.0], [6.0]], ["a", "a", "b", "b"])
            >>> detector.anomaly_score([[0.5]], ["b"]).round(2).tolist()
            [6.74]
        """
        return -self.score_samples(X, y)

    def decision_function(self, X: Any, y: Any) -> Float64:
        """How far rows are above the thresholds of their classes; negative ones are outliers.

        Args:
            X: ``[n, d]``, numbers.
            y: ``[n]``, labels.

        Returns:
            ndarray: ``[n]``, float64.

        Raises:
            ValueError: As of ``score_samples``.

        Example:
            >>> from mlx_bulwark.outliers import RobustZ, PerClass
            >>> detector = PerClass(RobustZ()).fit([[0.0], [1.0], [5.0], [6.0]], ["a", "a", "b", "b"])
            >>> bool(detector.decision_function([[0.5]], ["b"])[0] < 0)
            True
        """
        return self._of_each(X, y, lambda detector, x: detector.decision_function(x))

    def predict(self, X: Any, y: Any) -> Ints:
        """Tell outliers of their classes, -1, from the others, +1.

        Args:
            X: ``[n, d]``, numbers.
            y: ``[n]``, labels.

        Returns:
            ndarray: ``[n]``, int64.

        Raises:
            ValueError: As of ``score_samples``.

        Example:
            >>> from mlx_bulwark.outliers import RobustZ, PerClass
            >>> detector = PerClass(RobustZ()).fit([[0.0], [1.0], [5.0], [6.0]], ["a", "a", "b", "b"])
            >>> detector.predict([[0.5], [0.5]], ["a", "b"]).tolist()
            [1, -1]
        """
        return labels(self.decision_function(X, y))

    def explain(self, X: Any, y: Any) -> Explanation:
        """Tell which columns made the scores of rows in their classes.

        Args:
            X: ``[n, d]``, numbers.
            y: ``[n]``, labels.

        Returns:
            Explanation: What each column adds to the anomaly score of each row.

        Raises:
            ValueError: As of ``score_samples``.

        Example:
            >>> from mlx_bulwark.outliers import RobustZ, PerClass
            >>> detector = PerClass(RobustZ()).fit([[0.0], [1.0], [5.0], [6.0]], ["a", "a", "b", "b"])
            >>> detector.explain([[0.5]], ["b"]).contributions.round(2).tolist()
            [[6.74]]
        """
        contributions = self._of_each(X, y, lambda detector, x: detector.explain(x).contributions)
        names = getattr(self, "feature_names_in_", [f"column {j}" for j in range(self.n_features_in_)])
        return Explanation(contributions, [str(n) for n in names])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted detectors to a safetensors file, for ``mlx_bulwark.outliers.load``.

        Args:
            path: The file.

        Raises:
            OSError: It cannot be written.
            ValueError: A parameter is no number, string or detector.

        Example:
            >>> import os, tempfile
            >>> from mlx_bulwark.outliers import RobustZ, PerClass
            >>> detector = PerClass(RobustZ()).fit([[0.0], [1.0], [5.0], [6.0]], ["a", "a", "b", "b"])
            >>> detector.save(os.path.join(tempfile.mkdtemp(), "classes.safetensors"))
        """
        check_is_fitted(self)
        storage.save(self, path)

    def _labels(self, x: Floats, y: Any) -> Any:
        y = np.asarray(y)
        if y.shape != (len(x),) or y.dtype.kind not in "iubUO":
            raise ValueError(
                f"[PerClass] y must be {len(x)} integers or strings but has shape {list(y.shape)} and dtype {y.dtype}"
            )
        return y.astype(str) if y.dtype.kind == "O" else y

    def _of_each(self, X: Any, y: Any, f: Callable[[Any, Any], Any]) -> Any:
        check_is_fitted(self)
        x = admit(self, X, reset=False)
        y = self._labels(x, y)
        if unknown := sorted(set(y.tolist()) - set(self.classes_.tolist())):
            raise ValueError(f"[PerClass] y must have labels that were there at fit but has {unknown[:5]}")
        members = [(y == c, d) for c, d in zip(self.classes_, self.detectors_, strict=True) if (y == c).any()]
        parts = [(rows, f(d, x[rows])) for rows, d in members]
        found = np.empty((len(x), *parts[0][1].shape[1:]))
        for rows, part in parts:
            found[rows] = part
        return found
