"""Defenses for MLX: fused kernels, and differentially private training on top of them."""

from . import _native
from ._native import backend
from .ops.clip import ClipFactors, ClippedNorms, clip_and_sum, clip_factors, clipped_sum, sample_sq_norms
from .ops.noise import (
    add_gaussian,
    advance_counter,
    bit_blocks_used,
    blocks_used,
    gaussian,
    key_from_seed,
    random_bits,
    random_key,
)
from .privacy import (
    AdaptiveClipping,
    Batch,
    Batches,
    CheckReport,
    ClippedGradients,
    PrivacyEngine,
    PrivacyError,
    PrivateOptimizer,
    Sensitivity,
    compute_epsilon,
    find_noise_multiplier,
)

__all__ = [
    "AdaptiveClipping",
    "Batch",
    "Batches",
    "CheckReport",
    "ClipFactors",
    "ClippedGradients",
    "ClippedNorms",
    "PrivacyEngine",
    "PrivacyError",
    "PrivateOptimizer",
    "Sensitivity",
    "add_gaussian",
    "advance_counter",
    "backend",
    "bit_blocks_used",
    "blocks_used",
    "clip_and_sum",
    "clip_factors",
    "clipped_sum",
    "compute_epsilon",
    "find_noise_multiplier",
    "gaussian",
    "key_from_seed",
    "random_bits",
    "random_key",
    "sample_sq_norms",
]
__version__ = "0.1.0"

_native.use_from_environment()
