"""Defenses for MLX: fused kernels, and differentially private training on top of them."""

from . import _native
from ._native import backend
from .ops.clip import ClipFactors, ClippedNorms, clip_and_sum, clip_factors, clipped_sum, sample_sq_norms

__all__ = ["ClipFactors", "ClippedNorms", "backend", "clip_and_sum", "clip_factors", "clipped_sum", "sample_sq_norms"]
__version__ = "0.1.0"

_native.use_from_environment()
