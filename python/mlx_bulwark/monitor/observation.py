"""What a monitor sees of a model at work: predictions, confidences, and rows of few numbers that stand for the rest."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from ..poison.features import _flat, _Tap

Array = np.ndarray[Any, Any]
Outputs = Literal["logits", "probabilities"]
MOST_COLUMNS = 16  # inputs of so many numbers are looked at one by one


class Observation(NamedTuple):
    """What a model's output says.

    Attributes:
        classes: int64 ``[r]``, the largest output of each row, -1 where a row is not valid.
        confidences: float32 ``[r]``, its probability.
        valid: bool ``[r]``, whether a row is free of NaN and of infinite values that leave no distribution.
    """

    classes: Array
    confidences: Array
    valid: Array


def observe(output: mx.array, outputs: Outputs, *beside: mx.array) -> Observation:
    """Read an output ``[..., classes]``, all rows at once, and evaluate what is wanted beside it in the same pass."""
    if not output.size:
        return Observation(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool))
    rows = output.reshape(-1, output.shape[-1])
    if rows.dtype != mx.float32:
        rows = rows.astype(mx.float32)
    largest = mx.max(rows, axis=-1)
    if outputs == "logits":
        total = mx.logsumexp(rows, axis=-1)
        confidences = mx.exp(largest - total)
    else:
        total, confidences = mx.sum(rows, axis=-1), largest
    valid = mx.isfinite(total)
    classes = mx.where(valid, mx.argmax(rows, axis=-1).astype(mx.int32), -1)
    mx.eval(output, classes, confidences, valid, *beside)
    return Observation(np.array(classes).astype(np.int64), np.array(confidences), np.array(valid))


def check_output(where: str, output: Any, classes: int | None) -> mx.array:
    """Refuse what has no class scores in its last axis."""
    found = f"type {type(output).__name__}" if not isinstance(output, mx.array) else f"shape {list(output.shape)}"
    if not isinstance(output, mx.array) or output.ndim < 2 or output.shape[-1] < 2:
        raise ValueError(f"[{where}] output must be [..., classes], 2 classes or more, but has {found}; give scores=")
    if classes is not None and output.shape[-1] != classes:
        raise ValueError(f"[{where}] output must have the {classes} classes of the baseline but has {found}")
    if not mx.issubdtype(output.dtype, mx.floating):
        raise ValueError(f"[{where}] output must be floats but has {output.dtype}")
    return output


def flattened(x: Any) -> mx.array:
    """Rows as float32 ``[n, d]``, not evaluated."""
    x = x if isinstance(x, mx.array) else mx.array(np.asarray(x, np.float32))
    rows: mx.array = x.astype(mx.float32).reshape(len(x), math.prod(x.shape[1:]))
    return rows


def numbers(x: Any) -> Array:
    """The same as a NumPy array."""
    return np.array(flattened(x))


def are_tokens(x: Any) -> bool:
    """Whether rows are numbers of words, which no projection makes sense of."""
    return x.ndim == 2 and x.dtype in (mx.int32, mx.int64, mx.uint32, np.int32, np.int64, np.uint32)


def projection(width: int, dimensions: int, seed: int) -> Array | None:
    """Random directions ``[width, dimensions]``; None where rows are narrow enough to be looked at as they are."""
    if width <= MOST_COLUMNS:
        return None
    directions = np.random.default_rng(seed).standard_normal((width, dimensions)) / np.sqrt(width)
    return np.asarray(directions, np.float32)


def summary(rows: mx.array, directions: mx.array | None) -> mx.array:
    """float32 ``[n, k]``: rows along random directions, their mean and their standard deviation; narrow rows as is.

    In MLX, as the model itself: the threads of a second BLAS would spin beside it.
    """
    if directions is None:
        return rows
    return mx.concatenate([rows @ directions, rows.mean(axis=1, keepdims=True), mx.std(rows, axis=1, keepdims=True)], 1)


def drawn(rows: int, most: int, *seed: int) -> Array:
    """Which rows are looked at closely: at most ``most``, all with the same probability, the same after a restart."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False, shuffle=False))


def run_listening(
    model: Callable[..., Any], layer: str | None, x: Any, *args: Any, **kwargs: Any
) -> tuple[Any, str, mx.array | None]:
    """A model's output, and what its last layer, or the named one, was given."""
    tap = _Tap(model, layer)  # type: ignore[arg-type]  # a module: others have no layer
    with tap.listening():
        output = model(x, *args, **kwargs)
    if tap.last is None:
        return output, "", None
    name, given = tap.last
    return output, name, _flat("Monitor", name, given, len(x))
