"""The gate: what is checked before an array is trusted, in training and at inference."""

from .inputs import GateCounts, GatedOutput, InputError, InputGate

__all__ = [
    "GateCounts",
    "GatedOutput",
    "InputError",
    "InputGate",
]
