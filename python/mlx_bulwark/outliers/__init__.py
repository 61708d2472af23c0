"""Outlier detectors: which rows of a table, which texts, which images do not belong."""

try:
    import sklearn as _sklearn
except ImportError as e:
    raise ImportError('[outliers] scikit-learn is missing; pip install "mlx-bulwark[outliers]" brings it') from e

from . import storage as _storage
from .base import Explanation, OutlierDetector
from .ensemble import Ensemble, PerClass
from .files import ScoredFile, score_file
from .forest import IsolationForest
from .linear import Mahalanobis, PCAReconstruction
from .neighbors import KNN, LOF
from .storage import load
from .tails import COPOD, ECOD, HBOS, RobustZ

del _sklearn

_storage.register(
    COPOD, ECOD, HBOS, KNN, LOF, Ensemble, IsolationForest, Mahalanobis, PCAReconstruction, PerClass, RobustZ
)

__all__ = [
    "COPOD",
    "ECOD",
    "HBOS",
    "KNN",
    "LOF",
    "Ensemble",
    "Explanation",
    "IsolationForest",
    "Mahalanobis",
    "OutlierDetector",
    "PCAReconstruction",
    "PerClass",
    "RobustZ",
    "ScoredFile",
    "load",
    "score_file",
]
