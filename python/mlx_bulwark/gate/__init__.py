"""The gate: what is checked before an array is trusted, in training and at inference."""

from .inputs import GateCounts, GatedOutput, InputError, InputGate
from .squeezing import JPEG, BitDepth, FeatureSqueezing, MedianSmoothing, straight_through

__all__ = [
    "JPEG",
    "BitDepth",
    "FeatureSqueezing",
    "GateCounts",
    "GatedOutput",
    "InputError",
    "InputGate",
    "MedianSmoothing",
    "straight_through",
]
