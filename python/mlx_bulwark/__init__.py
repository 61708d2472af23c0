"""Defenses for MLX: fused kernels, and differentially private training on top of them."""

from . import _native
from ._native import backend
from .ops.clip import ClipFactors, ClippedNorms, clip_and_sum, clip_factors, clipped_sum, sample_sq_norms
from .ops.ghost import (
    LayerGradients,
    conv_clipped_sum,
    conv_sample_grads,
    conv_sq_norms,
    embedding_clipped_sum,
    embedding_linear_products,
    embedding_sq_norms,
    linear_clipped_sum,
    linear_sample_grads,
    linear_sq_norms,
)
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
    Fix,
    LayerReport,
    PrivacyEngine,
    PrivacyError,
    PrivateOptimizer,
    Sensitivity,
    ValidationReport,
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
    "Fix",
    "LayerGradients",
    "LayerReport",
    "PrivacyEngine",
    "PrivacyError",
    "PrivateOptimizer",
    "Sensitivity",
    "ValidationReport",
    "add_gaussian",
    "advance_counter",
    "backend",
    "bit_blocks_used",
    "blocks_used",
    "clip_and_sum",
    "clip_factors",
    "clipped_sum",
    "compute_epsilon",
    "conv_clipped_sum",
    "conv_sample_grads",
    "conv_sq_norms",
    "embedding_clipped_sum",
    "embedding_linear_products",
    "embedding_sq_norms",
    "find_noise_multiplier",
    "gaussian",
    "key_from_seed",
    "linear_clipped_sum",
    "linear_sample_grads",
    "linear_sq_norms",
    "random_bits",
    "random_key",
    "sample_sq_norms",
]
__version__ = "0.1.0"

_native.use_from_environment()
