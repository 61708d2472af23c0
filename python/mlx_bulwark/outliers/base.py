"""What all detectors share: scikit-learn's conventions over scores that the kernels make."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from . import storage
from ._types import Float32, Float64, Floats, Ints
from .frame import Frame, frame_of
from .inputs import admit

storage.register(Frame)

Contamination = float | Literal["auto"]
BLOCK_ROWS = 65536  # scored at a time: bounds the memory of a call


@dataclass(frozen=True)
class Explanation:
    """Which columns made the scores of some rows.

    Attributes:
        contributions: ``[n, d]``, float64, in the unit of the anomaly score: what each column adds to it.
        columns: Names of the d columns.
    """

    contributions: Float64
    columns: list[str]

    def top(self, row: int, count: int = 3) -> list[tuple[str, float]]:
        """The columns that add most to a row's score, the largest first.

        Args:
            row: Which of the explained rows.
            count: How many columns at most; those that add nothing are left out.

        Returns:
            list: Pairs of a name and what it adds.

        Example:
            >>> import numpy as np
            >>> from mlx_bulwark.outliers import RobustZ
            >>> x = np.random.default_rng(0).normal(size=(100, 3))
            >>> RobustZ().fit(x).explain([[0.0, 9.0, 0.0]]).top(0, 1)[0][0]
            'column 1'
        """
        adds = self.contributions[row]
        order = np.argsort(-adds, kind="stable")[:count]
        return [(self.columns[j], float(adds[j])) for j in order if adds[j] > 0]


class OutlierDetector(OutlierMixin, BaseEstimator, ABC):
    """Base of the detectors.

    What a detector learns is frozen at ``fit``: the score of a row never depends on the rows that are scored beside it.

    Attributes:
        offset_: Threshold: ``decision_function`` is ``score_samples - offset_``.
        training_scores_: ``[n]``, float64, ``score_samples`` of the training rows. Where a detector compares rows with
            each other, a training row is not compared with itself.
        n_features_in_: Number of columns.
        feature_names_in_: Their names, where all are strings.
    """

    contamination: Contamination
    _least_rows = 2
    _auto_offset: float | None = None  # threshold of contamination="auto", where the scores have an absolute meaning

    @abstractmethod
    def fit(self, X: Any, y: Any = None) -> Any:
        """Learn what is normal.

        Args:
            X: ``[n, d]``, numbers: NumPy or MLX array, list, or dataframe.
            y: Not used.

        Returns:
            OutlierDetector: Itself.

        Raises:
            ValueError: X has NaN, inf or text, or too few rows; or a parameter is out of range.

        Example:
            >>> import numpy as np
            >>> from mlx_bulwark.outliers import ECOD
            >>> ECOD().fit(np.random.default_rng(0).normal(size=(100, 3))).n_features_in_
            3
        """

    def score_samples(self, X: Any) -> Float64:
        """Score rows, the lower the more abnormal.

        Args:
            X: ``[n, d]``, as of ``fit``.

        Returns:
            ndarray: ``[n]``, float64.

        Raises:
            ValueError: X has NaN, inf or text, or other columns than at ``fit``.

        Example:
            >>> import numpy as np
            >>> from mlx_bulwark.outliers import ECOD
            >>> detector = ECOD().fit(np.random.default_rng(0).normal(size=(100, 3)))
            >>> ordinary, far = detector.score_samples([[0.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
            >>> bool(far < ordinary)
            True
        """
        return -self._scores_of(self._framed(X))

    def anomaly_score(self, X: Any) -> Float64:
        """Score rows, the higher the more abnormal: ``-score_samples(X)``, the sign of PyOD.

        Args:
            X: ``[n, d]``, as of ``fit``.

        Returns:
            ndarray: ``[n]``, float64.

        Raises:
            ValueError: As of ``score_samples``.

        Example:
            >>> import numpy as np
            >>> from mlx_bulwark.outliers import RobustZ
            >>> detector = RobustZ().fit(np.random.default_rng(0).normal(size=(100, 3)))
            >>> bool(detector.anomaly_score([[0.0, 9.0, 0.0]])[0] > 2)
            True
        """
        return -self.score_samples(X)

    def decision_function(self, X: Any) -> Float64:
        """How far rows are above the threshold; negative ones are outliers.

        Args:
            X: ``[n, d]``, as of ``fit``.

        Returns:
            ndarray: ``[n]``, float64, ``score_samples(X) - offset_``.

        Raises:
            ValueError: As of ``score_samples``.

        Example:
            >>> import numpy as np
            >>> from mlx_bulwark.outliers import ECOD
            >>> detector = ECOD().fit(np.random.default_rng(0).normal(size=(100, 3)))
            >>> bool(detector.decision_function([[9.0, 9.0, 9.0]])[0] < 0)
            True
        """
        scores: Float64 = self.score_samples(X)
        return scores - self.offset_

    def predict(self, X: Any) -> Ints:
        """Tell outliers, -1, from the others, +1.

        Args:
            X: ``[n, d]``, as of ``fit``.

        Returns:
            ndarray: ``[n]``, int64.

        Raises:
            ValueError: As of ``score_samples``.

        Example:
            >>> import numpy as np
            >>> from mlx_bulwark.outliers import ECOD
            >>> detector = ECOD().fit(np.random.default_rng(0).normal(size=(100, 3)))
            >>> detector.predict([[0.0, 0.0, 0.0], [9.0, 9.0, 9.0]]).tolist()
            [1, -1]
        """
        return labels(self.decision_function(X))

    def explain(self, X: Any) -> Explanation:
        """Tell which columns made the scores.

        Args:
            X: ``[n, d]``, as of ``fit``.

        Returns:
            Explanation: What each column adds to the anomaly score of each row.

        Raises:
            ValueError: As of ``score_samples``.

        Example:
            >>> import numpy as np
            >>> from mlx_bulwark.outliers import ECOD
            >>> detector = ECOD().fit(np.random.default_rng(0).normal(size=(100, 3)))
            >>> int(detector.explain([[0.0, 9.0, 0.0]]).contributions.argmax())
            1
        """
        return self._explanation(self._contributions(self._framed(X)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted detector to a safetensors file, for ``mlx_bulwark.outliers.load``.

        Args:
            path: The file.

        Raises:
            OSError: It cannot be written.
            ValueError: A parameter is no number, string or detector.

        Example:
            >>> import numpy as np, os, tempfile
            >>> from mlx_bulwark.outliers import ECOD
            >>> detector = ECOD().fit(np.random.default_rng(0).normal(size=(100, 3)))
            >>> detector.save(os.path.join(tempfile.mkdtemp(), "ecod.safetensors"))
        """
        check_is_fitted(self)
        storage.save(self, path)

    @abstractmethod
    def _prepared(self, x: Floats) -> Any:
        """Admitted rows as ``_scores_of`` takes them."""

    @abstractmethod
    def _scores_of(self, x: Any) -> Float64:
        """Anomaly scores of prepared rows."""

    @abstractmethod
    def _contributions(self, x: Any) -> Floats:
        """What each column adds to the scores of prepared rows."""

    def _check_parameters(self) -> None:
        check_contamination(self, self.contamination, auto=self._auto_offset is not None)

    def _framed(self, X: Any) -> Any:
        check_is_fitted(self)
        return self._prepared(admit(self, X, reset=False))

    def _threshold(self, scores: Float64) -> float:
        if self.contamination == "auto":
            assert self._auto_offset is not None
            return self._auto_offset
        return quantile(scores, float(self.contamination))

    def _explanation(self, contributions: Floats) -> Explanation:
        names = getattr(self, "feature_names_in_", None)
        columns = [f"column {j}" for j in range(contributions.shape[1])] if names is None else [str(n) for n in names]
        return Explanation(np.asarray(contributions, dtype=np.float64), columns)


class SingleDetector(OutlierDetector):
    """A detector that looks at rows through a frame of its own, block by block."""

    def fit(self, X: Any, y: Any = None) -> Any:
        """As of ``OutlierDetector``."""
        self._check_parameters()
        x = admit(self, X, reset=True, least=self._least_rows)
        self.frame_ = self._frame(x)
        z = self.frame_.apply(x)
        self._fit(z)
        self.training_scores_ = -np.asarray(self._training(z), dtype=np.float64)
        self.offset_ = self._threshold(self.training_scores_)
        return self

    def _frame(self, x: Floats) -> Frame:
        return frame_of(x, per_column=True)

    @abstractmethod
    def _fit(self, x: Float32) -> None:
        """Learn from framed rows."""

    @abstractmethod
    def _score(self, x: mx.array) -> Any:
        """Anomaly scores of a block of rows."""

    def _score_known(self, x: mx.array) -> Any:
        """Scores by which a row that equals a training row scores as that row did."""
        return self._score(x)

    def _training(self, x: Float32) -> Floats:
        """Anomaly scores of the training rows."""
        return self._scores_of(x)

    def _contributions_known(self, x: Float32) -> Floats:
        """What ``_score_known`` is made of."""
        return self._contributions(x)

    def _prepared(self, x: Floats) -> Any:
        return self.frame_.apply(x)

    def _scores_of(self, x: Float32) -> Float64:
        return self._blocks(x, self._score)

    def _blocks(self, x: Float32, score: Callable[[mx.array], Any]) -> Float64:
        blocks = [score(mx.array(x[i : i + BLOCK_ROWS])) for i in range(0, len(x), BLOCK_ROWS)]
        return np.concatenate([np.asarray(b, dtype=np.float64) for b in blocks])


def labels(decision: Float64) -> Ints:
    """-1 where the decision function is negative, else +1."""
    return np.where(decision < 0, -1, 1).astype(np.int64)


def quantile(scores: Float64, share: float) -> float:
    """Quantile between two scores, as NumPy's; the upper one where the lower is infinite."""
    with np.errstate(invalid="ignore"):
        found = float(np.percentile(scores, 100 * share))
    return found if np.isfinite(found) else float(np.percentile(scores, 100 * share, method="higher"))


def check_contamination(detector: Any, contamination: Any, *, auto: bool) -> None:
    """Refuse a share of outliers that is none."""
    if auto and isinstance(contamination, str) and contamination == "auto":
        return
    number = isinstance(contamination, (int, float, np.integer, np.floating)) and not isinstance(contamination, bool)
    if not number or not 0 < contamination <= 0.5:
        raise ValueError(
            f"[{type(detector).__name__}] contamination must be {'auto or ' * auto}above 0 and at most 0.5 but is "
            f"{contamination!r}"
        )


def check_choice(detector: Any, name: str, choices: tuple[str, ...]) -> None:
    """Refuse a parameter that is none of its choices."""
    value = getattr(detector, name)
    if value not in choices:
        raise ValueError(f"[{type(detector).__name__}] {name} must be one of {', '.join(choices)} but is {value!r}")


def check_count(detector: Any, name: str) -> int:
    """A parameter that counts something."""
    value = getattr(detector, name)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"[{type(detector).__name__}] {name} must be a whole number from 1 but is {value!r}")
    return int(value)


def frame_scale(frame: Frame) -> float:
    """The one scale of a frame that has no scale a column."""
    return float(frame.scale[0])
