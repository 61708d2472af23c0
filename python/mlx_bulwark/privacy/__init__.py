"""Differentially private training."""

from .accounting import compute_epsilon, find_noise_multiplier
from .batches import Batch, Batches
from .check import CheckReport
from .clipping import AdaptiveClipping, Sensitivity
from .engine import PrivacyEngine
from .optimizer import ClippedGradients, PrivateOptimizer
from .taps import PrivacyError

__all__ = [
    "AdaptiveClipping",
    "Batch",
    "Batches",
    "CheckReport",
    "ClippedGradients",
    "PrivacyEngine",
    "PrivacyError",
    "PrivateOptimizer",
    "Sensitivity",
    "compute_epsilon",
    "find_noise_multiplier",
]
