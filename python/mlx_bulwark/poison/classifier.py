"""What the inspection of a model shares: checks of a classifier and of inputs, what the model says, and its tests."""

import math
from typing import Any

import mlx.core as mx
import numpy as np

from ..attacks.base import check_model
from ..convolutions import faster_convolutions

Array = np.ndarray[Any, Any]
Bounds = tuple[float, float]

SLACK = 1e-6  # of the bounds: what rounding may take
LEAST_CLASSES = 5  # from which on the spread of the others is known at all


def inputs_of(op: str, name: str, x: Any, *, least: int = 0, shape: tuple[int, ...] | None = None) -> Array:
    """Inputs as float32 ``[n, ...]`` in NumPy, finite."""
    if not isinstance(x, (np.ndarray, mx.array)) or x.ndim < 2:
        has = f"shape {x.shape}" if isinstance(x, (np.ndarray, mx.array)) else f"type {type(x).__name__}"
        raise ValueError(f"[{op}] {name} must be a NumPy or MLX array [n, ...] but has {has}")
    if isinstance(x, mx.array):
        floating, rows = mx.issubdtype(x.dtype, mx.floating), np.array(x.astype(mx.float32))
    else:
        floating, rows = x.dtype.kind == "f", x.astype(np.float32)
    if not floating:
        raise ValueError(f"[{op}] {name} must be floats, as the model takes them, but has {x.dtype}")
    if shape is not None and rows.shape[1:] != shape:
        raise ValueError(f"[{op}] {name} must have inputs of shape {shape} but has {rows.shape[1:]}")
    if len(rows) < least:
        raise ValueError(f"[{op}] {name} must have {least} inputs or more but has {len(rows)}")
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))
        raise ValueError(f"[{op}] {name} must be finite but has {len(bad)} inputs that are not, the first {bad[0]}")
    return rows


def bounds_of(op: str, name: str, rows: Array, bounds: Any) -> Bounds:
    """The bounds, once all inputs are seen to be within."""
    low, high = interval(op, bounds)
    slack = SLACK * max(1.0, abs(low), abs(high))
    if rows.size and (rows.min() < low - slack or rows.max() > high + slack):
        raise ValueError(
            f"[{op}] {name} must be within the bounds ({low:g}, {high:g}) "
            f"but has values from {rows.min():g} to {rows.max():g}"
        )
    return low, high


def interval(op: str, bounds: Any) -> Bounds:
    """Two finite numbers that increase."""
    try:
        low, high = (float(b) for b in bounds)
    except (TypeError, ValueError):
        raise ValueError(f"[{op}] bounds must be two numbers but is {bounds!r}") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"[{op}] bounds must be finite and increase but is {bounds!r}")
    return low, high


def labels_of(op: str, y: Any, n: int, classes: int) -> Array:
    """Labels as int64 ``[n]``."""
    labels = np.array(y)
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise ValueError(f"[{op}] labels must be integers of shape ({n},), [n], but has {labels.dtype} {labels.shape}")
    if n and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"[{op}] labels must be in [0, {classes}), the model's classes, "
            f"but has labels from {labels.min()} to {labels.max()}"
        )
    return labels.astype(np.int64)


def integer(op: str, name: str, value: Any, least: int) -> int:
    """An integer that is large enough."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"[{op}] {name} must be an integer >= {least} but is {value!r}")
    return int(value)


def share(op: str, name: str, value: Any) -> float:
    """A number above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0 < value < 1:
        raise ValueError(f"[{op}] {name} must be a number above 0 and below 1 but is {value!r}")
    return float(value)


def positive(op: str, name: str, value: Any) -> float:
    """A finite number above 0."""
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"[{op}] {name} must be a finite number above 0 but is {value!r}")
    return float(value)


def logits_of(op: str, model: Any, x: Array, batch_size: int = 256) -> Array:
    """Logits float32 ``[n, C]`` of inputs ``[n, ...]``, finite, C >= 2."""
    check_model(op, model)
    found: list[Array] = []
    with faster_convolutions(model):
        for start in range(0, max(len(x), 1), batch_size):  # of no input one of zeros tells the classes
            batch = x[start : start + batch_size] if len(x) else np.zeros((1, *x.shape[1:]), np.float32)
            found.append(np.array(_checked(op, model(mx.array(batch)), len(batch))))
    logits = np.concatenate(found)[: len(x)]
    if logits.shape[1] < 2:
        raise ValueError(f"[{op}] model must have 2 classes or more but has {logits.shape[1]}")
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise ValueError(
            f"[{op}] model must return finite logits but has NaN or infinity in {len(bad)} of {len(logits)} rows, "
            f"the first {bad[0]}"
        )
    return logits


def _checked(op: str, logits: Any, rows: int) -> mx.array:
    if not isinstance(logits, mx.array) or logits.ndim != 2 or len(logits) != rows:
        has = f"shape {logits.shape}" if isinstance(logits, mx.array) else f"type {type(logits).__name__}"
        raise ValueError(f"[{op}] model must return logits of shape ({rows}, C), [B, C], but has {has}")
    return logits.astype(mx.float32)


def least_clean(rate: float) -> int:
    """Clean scores from which on a threshold can keep this rate of false alarms."""
    return math.ceil(1 / rate - 1 - 1e-9)


def least_rate(rate: float, clean: int) -> float:
    """The rate, or the least that so many clean scores can keep."""
    return max(rate, 1 / (clean + 1) + 1e-9)


def rank_of(rate: float, clean: int) -> int:
    """The extreme one of so many clean scores that a new one is beyond at this rate, or less often.

    A new clean score is as likely to come at any of the ``clean + 1`` ranks, whatever the distribution.
    """
    return math.floor(rate * (clean + 1) + 1e-9)


def outlier_p_value(value: float, others: Array, least_spread: float = 0.0) -> float:
    """Of a value so far above the others, picked as the highest: Student's t of a new one, times the values."""
    from scipy.special import stdtr

    deviation = max(float(others.std(ddof=1)), least_spread) * math.sqrt(1 + 1 / len(others))
    above = value - float(others.mean())
    t = above / deviation if deviation else math.copysign(math.inf, above) if above else 0.0
    return min(1.0, (len(others) + 1) * float(stdtr(len(others) - 1, -t)))
