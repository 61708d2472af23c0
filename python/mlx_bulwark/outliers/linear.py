"""Detectors that learn a covariance: Mahalanobis distances, and what principal components leave over."""

import warnings
from typing import Any

import mlx.core as mx
import numpy as np
from scipy.linalg import solve_triangular
from sklearn.covariance import LedoitWolf, MinCovDet

from ..ops.tails import mahalanobis
from ._types import Float32, Float64, Floats
from .base import Contamination, SingleDetector, check_choice

COVARIANCES = ("empirical", "ledoit_wolf", "mcd")
_FLOOR = 1e-10  # of the largest variance: a direction with less is one that the training rows do not leave


class Mahalanobis(SingleDetector):
    """Distance from the center of the data, in units of its covariance.

    The anomaly score is the squared distance. A direction in which the training rows do not vary (a constant column, a
    column that repeats another) has a small floor of variance in place of none: rows that leave it score far out.

    Args:
        covariance: ``"empirical"``; ``"ledoit_wolf"``, shrunk, for few rows; or ``"mcd"``, the minimum covariance
            determinant, which outliers among the training rows do not move.
        contamination: Share of the training rows that ``predict`` calls outliers, above 0 and at most 0.5.
        support_fraction: Share of the rows that ``"mcd"`` trusts; by default the least, (n + d + 1) / 2 of n.
        random_state: Seed of ``"mcd"``.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.outliers import Mahalanobis
        >>> x = np.random.default_rng(0).normal(size=(200, 2)) @ [[1.0, 0.9], [0.0, 0.1]]
        >>> Mahalanobis().fit(x).predict([[1.0, 0.9], [1.0, -0.9]]).tolist()
        [1, -1]

    Source:
        Rousseeuw and Van Driessen, "A Fast Algorithm for the Minimum Covariance Determinant Estimator" (1999); Ledoit
        and Wolf, "A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices" (2004).
    """

    def __init__(
        self,
        covariance: str = "empirical",
        *,
        contamination: Contamination = 0.1,
        support_fraction: float | None = None,
        random_state: int | None = None,
    ) -> None:
        self.covariance = covariance
        self.contamination = contamination
        self.support_fraction = support_fraction
        self.random_state = random_state

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "covariance", COVARIANCES)

    def _fit(self, x: Float32) -> None:
        center, unit = _standard(x)
        location, covariance = self._estimate((x - center) / unit)
        self.location_ = center + location * unit
        self.cholesky_ = np.linalg.cholesky(_floored(covariance)) * unit[:, None]

    def _estimate(self, x: Float64) -> tuple[Float64, Float64]:
        """Center and covariance of standardized rows."""
        if self.covariance == "empirical":
            return x.mean(axis=0), _covariance(x)
        if self.covariance == "ledoit_wolf":
            model = LedoitWolf().fit(x)
            return model.location_, model.covariance_
        return self._robust(x)

    def _robust(self, x: Float64) -> tuple[Float64, Float64]:
        """Minimum covariance determinant among the directions in which the rows vary."""
        variances, directions = np.linalg.eigh(_covariance(x))
        directions = directions[:, variances > _least(variances)]
        if not directions.shape[1]:
            return np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
        model = MinCovDet(support_fraction=self.support_fraction, random_state=self.random_state)
        with warnings.catch_warnings():  # the floor takes care of what these are about
            warnings.filterwarnings("ignore", "The covariance matrix associated to your dataset is not full rank")
            warnings.filterwarnings("ignore", "Determinant has increased")
            try:
                model.fit(x @ directions)
            except ValueError as e:
                if "covariance matrix of the support data is equal to 0" not in str(e):
                    raise
                return np.median(x, axis=0), np.zeros((x.shape[1], x.shape[1]))  # most rows are one and the same
        return directions @ model.location_, directions @ model.covariance_ @ directions.T

    def _score(self, x: mx.array) -> Any:
        center, factor = (mx.array(a.astype(np.float32)) for a in (self.location_, self.cholesky_))
        scores = np.array(mahalanobis(x, center, factor), np.float64)
        far = ~np.isfinite(scores)  # beyond float32
        if far.any():
            scores[far] = np.square(self._whitened(np.array(x)[far])).sum(axis=0)
        return scores

    def _whitened(self, x: Float32) -> Float64:
        return np.asarray(solve_triangular(self.cholesky_, (x - self.location_).T, lower=True))

    def _contributions(self, x: Float32) -> Floats:
        """Each column's term of the quadratic form; terms may be negative, and add up to the score."""
        turned = solve_triangular(self.cholesky_, self._whitened(x), lower=True, trans="T")
        return (x - self.location_) * np.asarray(turned).T


class PCAReconstruction(SingleDetector):
    """What is left of a row when its principal components are taken away.

    Columns are standardized first. The anomaly score is the squared length of what the components do not hold, by
    default in units of its variance in each direction. Directions without variance are treated as by ``Mahalanobis``.

    Args:
        n_components: How many components: a whole number below that of the columns, or the share of the variance that
            they hold at least, above 0 and below 1 (one direction at least is left over).
        weighted: Whether each direction that is left over counts in units of its own variance.
        contamination: Share of the training rows that ``predict`` calls outliers, above 0 and at most 0.5.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.outliers import PCAReconstruction
        >>> x = np.random.default_rng(0).normal(size=(200, 2)) @ [[1.0, 0.9], [0.0, 0.1]]
        >>> PCAReconstruction(1).fit(x).predict([[1.0, 0.9], [1.0, -0.9]]).tolist()
        [1, -1]

    Source:
        Shyu et al., "A Novel Anomaly Detection Scheme Based on Principal Component Classifier" (2003).
    """

    def __init__(
        self, n_components: int | float = 0.5, *, weighted: bool = True, contamination: Contamination = 0.1
    ) -> None:
        self.n_components = n_components
        self.weighted = weighted
        self.contamination = contamination

    def _check_parameters(self) -> None:
        super()._check_parameters()
        n = self.n_components
        whole = isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 1
        if not whole and not (isinstance(n, float) and 0 < n < 1):
            raise ValueError(
                f"[PCAReconstruction] n_components must be a whole number from 1, or above 0 and below 1, but is {n!r}"
            )

    def _fit(self, x: Float32) -> None:
        center, unit = _standard(x)
        variances, directions = np.linalg.eigh(_covariance((x - center) / unit))
        variances, directions = variances[::-1], directions[:, ::-1]
        self.n_components_ = self._count(variances)
        scale = np.sqrt(np.maximum(variances, _least(variances))) if self.weighted else np.ones_like(variances)
        self.location_ = center
        self.residual_ = (directions / scale)[:, self.n_components_ :] / unit[:, None]

    def _count(self, variances: Float64) -> int:
        if isinstance(self.n_components, float):
            total = max(float(variances.sum()), np.finfo(float).tiny)
            held = np.cumsum(variances) / total
            return min(int(np.searchsorted(held, self.n_components)) + 1, len(variances) - 1)
        if self.n_components >= len(variances):
            raise ValueError(
                f"[PCAReconstruction] n_components must be below n_features = {len(variances)} but is "
                f"{self.n_components}: nothing would be left over"
            )
        return int(self.n_components)

    def _score(self, x: mx.array) -> Any:
        return np.square(self._left_over(np.array(x))).sum(axis=1)

    def _left_over(self, x: Float32) -> Float64:
        return (x - self.location_) @ self.residual_

    def _contributions(self, x: Float32) -> Floats:
        """Each column's term of the quadratic form; terms may be negative, and add up to the score."""
        return (x - self.location_) * (self._left_over(x) @ self.residual_.T)


def _standard(x: Float32) -> tuple[Float64, Float64]:
    """Means and standard deviations of the columns; 1 for a constant one."""
    center, spread = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    return center, np.where(spread > 0, spread, 1.0)


def _covariance(x: Float64) -> Float64:
    return np.cov(x, rowvar=False, bias=True).reshape(x.shape[1], -1)


def _least(variances: Float64) -> float:
    return _FLOOR * max(float(variances.max()), _FLOOR)


def _floored(covariance: Float64) -> Float64:
    """The same covariance, but for directions with hardly any variance."""
    variances, directions = np.linalg.eigh(covariance)
    least = _least(variances)
    if variances[0] >= least:
        return covariance
    return (directions * np.maximum(variances, least)) @ directions.T
