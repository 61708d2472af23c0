"""The arrays that a compiled step takes and returns: what changes from step to step must be an input of it."""

import math
from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.noise import random_key
from .clipping import Clipping
from .events import Event


class EngineState(dict[str, Any]):
    """Arrays of an engine. Holds the noise key: never shown, copied to disk or logged.

    ``noise``: key and counter. ``steps``: how many were charged. ``max_grad_norm`` and ``noise_std``, the standard
    deviation of the noise on a clipped sum, are arrays so that schedules move them under ``mx.compile`` without a
    retrace; a mechanism or clipping mode may add arrays of its own.
    """

    def __repr__(self) -> str:
        return f"<engine state: {', '.join(self)} (secret)>"


def new_state(event: Event, clipping: Clipping, steps: int) -> EngineState:
    """State of a run that begins or goes on after a number of steps, under a fresh key."""
    state = EngineState(
        noise=EngineState(key=random_key(), counter=mx.zeros((2,), mx.uint32)), steps=mx.array(steps, mx.uint32)
    )
    set_scale(state, event, clipping)
    return state


def set_scale(state: EngineState, event: Event, clipping: Clipping) -> None:
    """Write an event's clipping norm and noise into the state; float32 rounds the one down and the other up."""
    sigma, norm = clipping.noise_ratio(event.mechanism.noise_multiplier), event.mechanism.max_grad_norm
    if clipping.quantile:  # it moves the norm, and the noise with it: rounding the product must not lower the noise
        state["noise_ratio"] = mx.array(_float32(sigma * (1 + 2.0**-22), math.inf))
        state.setdefault("max_grad_norm", mx.array(_float32(norm, -math.inf)))
        state["noise_std"] = state["max_grad_norm"] * state["noise_ratio"]
        return
    state["max_grad_norm"] = mx.array(_float32(norm, -math.inf))
    state["noise_std"] = mx.array(_float32(sigma * norm, math.inf) if sigma else 0.0)


def _float32(value: float, towards: float) -> float:
    rounded = np.float32(value)
    wrong = float(rounded) < value if towards > 0 else float(rounded) > value
    return float(np.nextafter(rounded, np.float32(towards)) if wrong else rounded)


def is_traced(*arrays: mx.array) -> bool:
    """Tell whether there are placeholders of mx.compile. Eager arrays start to be computed."""
    try:
        mx.async_eval(*arrays)
    except ValueError:
        return True
    return False
