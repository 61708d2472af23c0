"""Detectors that look at one column after the other: tails, histograms and robust z-scores."""

from typing import Any

import mlx.core as mx
import numpy as np

from ..ops import tails as ops
from . import storage
from ._types import Float32, Floats
from .base import Contamination, SingleDetector, check_choice, check_count
from .frame import Frame

storage.register(ops.QuantileTable, ops.HistogramTable)
LARGEST_Z = 1e6  # of a value off a constant column


class ECOD(SingleDetector):
    """How far out in the tails of its columns a row lies, against the empirical distributions of the training rows.

    No parameter to tune, linear in rows and columns. The distributions are frozen: PyOD puts the rows that are scored
    into them, so that many copies of one outlier make it look ordinary; here a row scores the same in any company. A
    training row scores exactly as in a fit of PyOD, and a value beyond all training rows as the most extreme one.

    Args:
        aggregation: ``"per_feature"`` adds the larger tail of each column, as PyOD does; ``"paper"`` takes the largest
            of the sums over the left tails, the right tails, and those that the skewness chooses.
        contamination: Share of the training rows that ``predict`` calls outliers, above 0 and at most 0.5.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.outliers import ECOD
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> ECOD().fit(x).predict([[0.0, 0.0], [4.0, 4.0]]).tolist()
        [1, -1]

    Source:
        Li et al., "ECOD: Unsupervised Outlier Detection Using Empirical Cumulative Distribution Functions" (2022).
    """

    _method = "ecod"

    def __init__(self, aggregation: str = "per_feature", *, contamination: Contamination = 0.1) -> None:
        self.aggregation = aggregation
        self.contamination = contamination

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "aggregation", ops.AGGREGATIONS)

    def _fit(self, x: Float32) -> None:
        self.table_ = ops.quantile_table(mx.array(x))

    def _check_loaded(self) -> None:
        counts = np.array(self.table_.counts)
        if (counts < 0).any() or (counts > self.table_.values.shape[1]).any():
            raise ValueError("a column has more values than there are")

    def _score(self, x: mx.array) -> Any:
        return ops.tail_scores(x, self.table_, self._method, self.aggregation)

    def _contributions(self, x: Float32) -> Floats:
        return np.array(ops.tail_scores(mx.array(x), self.table_, self._method, self.aggregation, per_column=True))


class COPOD(ECOD):
    """Tails of the columns as ``ECOD``, put together by a copula.

    ``aggregation="per_feature"`` takes, column by column, the tail that the skewness chooses or the mean of both, the
    larger one; ``"paper"`` is the same as that of ECOD.

    Args:
        aggregation: ``"per_feature"`` or ``"paper"``.
        contamination: Share of the training rows that ``predict`` calls outliers, above 0 and at most 0.5.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.outliers import COPOD
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> COPOD().fit(x).predict([[0.0, 0.0], [4.0, 4.0]]).tolist()
        [1, -1]

    Source:
        Li et al., "COPOD: Copula-Based Outlier Detection" (2020).
    """

    _method = "copod"


class HBOS(SingleDetector):
    """How empty the histogram bins of a row's values are.

    Columns are brought to a range of 1 first, so that units do not matter: the density of a bin is that beside one of
    values spread evenly. A value on an edge scores as the bin below it, as in PyOD.

    Args:
        n_bins: Bins of equal width a column, at most 4096.
        alpha: Density that is added to every bin's, above 0; a full column of even values has 1.
        tol: How far outside of the histogram, in widths of a bin, a value still counts as in the bin beside it.
        contamination: Share of the training rows that ``predict`` calls outliers, above 0 and at most 0.5.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.outliers import HBOS
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> HBOS().fit(x).predict([[0.0, 0.0], [4.0, 4.0]]).tolist()
        [1, -1]

    Source:
        Goldstein and Dengel, "Histogram-Based Outlier Score (HBOS)" (2012).
    """

    def __init__(
        self, n_bins: int = 10, *, alpha: float = 0.1, tol: float = 0.5, contamination: Contamination = 0.1
    ) -> None:
        self.n_bins = n_bins
        self.alpha = alpha
        self.tol = tol
        self.contamination = contamination

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_count(self, "n_bins")

    def _frame(self, x: Floats) -> Frame:
        low, high = (f(axis=0).astype(np.float64) for f in (x.min, x.max))
        half = np.maximum(high / 2 - low / 2, np.finfo(float).tiny)  # the difference of two numbers may overflow
        return Frame(low, np.where(high > low, 0.5 / half, 1.0))

    def _fit(self, x: Float32) -> None:
        self.constant_ = (x == x[0]).all(axis=0)
        self.table_ = ops.histogram_table(mx.array(x), self.n_bins, self.alpha)

    def _score(self, x: mx.array) -> Any:
        return ops.histogram_scores(self._inside(x), self.table_, self.tol)

    def _contributions(self, x: Float32) -> Floats:
        """How much emptier a value's bin is than the fullest of its column."""
        scores = ops.histogram_scores(self._inside(mx.array(x)), self.table_, self.tol, per_column=True)
        return np.array(scores) - np.array(self.table_.scores).min(axis=1)

    def _inside(self, x: mx.array) -> mx.array:
        """The value of a constant column lies on an edge, whose bin below is empty: go up a little, to its own."""
        values = np.array(x)
        return mx.array(np.where(self.constant_, np.nextafter(values, np.float32(np.inf)), values))


class RobustZ(SingleDetector):
    """How many robust standard deviations the values of a row are from the medians, on average over the columns.

    A column most of whose values are equal has a median absolute deviation of 0: there the mean absolute deviation
    takes its place. A value off a constant column counts as a million.

    Args:
        contamination: Share of the training rows that ``predict`` calls outliers, above 0 and at most 0.5.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.outliers import RobustZ
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> RobustZ().fit(x).predict([[0.0, 0.0], [4.0, 4.0]]).tolist()
        [1, -1]

    Source:
        Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (1993).
    """

    def __init__(self, *, contamination: Contamination = 0.1) -> None:
        self.contamination = contamination

    def _fit(self, x: Float32) -> None:
        center, scale = (np.array(a) for a in ops.robust_scale(ops.quantile_table(mx.array(x))))
        from_center = np.abs(x.astype(np.float64) - center).mean(axis=0)
        self.center_ = mx.array(center)
        self.scale_ = mx.array(np.where(scale > 0, scale, np.sqrt(np.pi / 2) * from_center).astype(np.float32))

    def _score(self, x: mx.array) -> Any:
        return self._sizes(x).mean(axis=1)

    def _contributions(self, x: Float32) -> Floats:
        return self._sizes(mx.array(x)) / x.shape[1]

    def _sizes(self, x: mx.array) -> Floats:
        z = np.array(ops.robust_zscore(x, self.center_, self.scale_)).astype(np.float64)
        return np.minimum(np.abs(z), LARGEST_Z)
