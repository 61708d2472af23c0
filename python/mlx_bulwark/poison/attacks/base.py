"""What every maker of poison shares: its result, the choice of rows, the checks, and how often a backdoor opens."""

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ...attacks.base import Model, check_model, predicted
from ..classifier import SLACK, Bounds, interval

Array = np.ndarray[Any, Any]
Trigger = Callable[[Any], Any]


class Poisoned(NamedTuple):
    """A poisoned training set. The set that it was made from is left as it was."""

    x: Any
    """Inputs ``[n, ...]`` in the container and dtype that they came in; rows that are not poisoned are bit-equal."""
    y: Array
    """int64 ``[n]``: the labels to train on."""
    indices: Array
    """int64, ascending: the rows that were poisoned."""
    trigger: Trigger | None
    """Stamps a batch of test inputs as an attacker would; None where the attack needs no change of a test input."""
    target: int | None
    """The class that the attack aims at; None where there is none."""


def attack_success_rate(model: Model, x: Any, y: Any, poisoned: Poisoned, *, batch_size: int = 256) -> float:
    """Share of triggered test inputs that a model puts into the target class. Those of that class are left out.

    Args:
        model: Takes inputs ``[m, ...]``, returns logits ``[m, C]``.
        x: Test inputs ``[n, ...]`` without trigger, NumPy or MLX, which reach the model as MLX; or a list of texts,
            which reaches it as a list.
        y: Their classes ``[n]``, integers.
        poisoned: The attack, which must have a trigger and a target.
        batch_size: Inputs of a forward pass.

    Returns:
        float: The share, 0 to 1.

    Raises:
        ValueError: The attack has no trigger or target, or no input is of another class.

    Example:
        >>> import mlx.core as mx, numpy as np
        >>> from mlx_bulwark.poison.attacks import attack_success_rate, badnets
        >>> x, y = np.zeros((8, 6, 6, 1), np.float32), np.arange(8) % 2
        >>> poisoned = badnets(x, y, rate=0.25, target=0)
        >>> model = lambda x: mx.stack([x[:, 5, 5, 0], 1 - x[:, 5, 5, 0]], axis=1)
        >>> attack_success_rate(model, x, y, poisoned)
        1.0

    Source:
        T. Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017.
    """
    op = "attack_success_rate"
    check_model(op, model)
    labels = check_labels(op, y, len(x))
    if poisoned.trigger is None or poisoned.target is None:
        raise ValueError(f"[{op}] poisoned must have a trigger and a target but has not")
    rows = np.flatnonzero(labels != poisoned.target)
    if not len(rows):
        raise ValueError(f"[{op}] x must have inputs of other classes than the target {poisoned.target} but has none")
    hits = 0
    for i in range(0, len(rows), batch_size):
        inputs = poisoned.trigger(taken(x, rows[i : i + batch_size]))
        logits = model(mx.array(inputs) if isinstance(inputs, np.ndarray) else inputs)
        hits += int(np.array(predicted(logits) == poisoned.target).sum())
    return hits / len(rows)


def check_set(op: str, x: Any, y: Any) -> tuple[Array, Any]:
    """Labels int64 ``[n]``, and the inputs."""
    if not isinstance(x, (np.ndarray, mx.array)) or x.ndim < 2:
        has = f"shape {x.shape}" if isinstance(x, (np.ndarray, mx.array)) else f"type {type(x).__name__}"
        raise ValueError(f"[{op}] x must be a NumPy or MLX array [n, ...] but has {has}")
    return check_labels(op, y, len(x)), x


def check_labels(op: str, y: Any, n: int) -> Array:
    """Labels as int64 ``[n]``, a copy."""
    labels = np.array(y)
    if labels.shape != (n,) or (n and not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"[{op}] y must be integers of shape ({n},), [n], but has {labels.dtype} {labels.shape}")
    if n and labels.min() < 0:
        raise ValueError(f"[{op}] y must be >= 0 but has {labels.min()} at row {labels.argmin()}")
    return labels.astype(np.int64)


def check_class(op: str, name: str, value: Any) -> int:
    """A class as an int."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or number < 0:
        raise ValueError(f"[{op}] {name} must be a class, an integer >= 0, but is {value!r}")
    return number


def check_bounds(op: str, x: Any, bounds: Any) -> Bounds:
    """The bounds, once all inputs are seen to be within."""
    low, high = interval(op, bounds)
    if count := outside(x, (low, high)):
        raise ValueError(f"[{op}] x must be finite and within the bounds {bounds} but has {count} rows that are not")
    return low, high


def outside(x: Any, bounds: Bounds) -> int:
    """Rows with a value that is no number within the bounds."""
    low, high = bounds[0] - SLACK, bounds[1] + SLACK
    if not x.size:
        return 0
    rows = x.reshape(len(x), -1)
    if isinstance(x, mx.array):
        return len(x) - int(np.array(mx.logical_and(rows >= low, rows <= high).all(axis=1)).sum())
    return len(x) - int(((rows >= low) & (rows <= high)).all(axis=1).sum())


def check_number(op: str, name: str, value: Any, *, high: float = math.inf, above: bool = False) -> float:
    """A number in [0, high], or in (0, high]."""
    number = float(value) if hasattr(value, "__float__") and not isinstance(value, bool) else math.nan
    if not ((number > 0 if above else number >= 0) and number <= high and math.isfinite(number)):
        interval = f"{'(' if above else '['}0, {high:g}]"
        raise ValueError(f"[{op}] {name} must be a number in {interval} but is {value!r}")
    return number


def chosen(op: str, rate: Any, n: int, eligible: Array, what: str, seed: Any) -> tuple[Array, np.random.Generator]:
    """Draw ``round(rate * n)`` of the eligible rows, ascending; and the generator, for what else is random."""
    share = check_number(op, "rate", rate, high=1.0)
    rng = np.random.default_rng(check_class(op, "seed", seed))
    count = round(share * n)
    if share and not count:
        raise ValueError(f"[{op}] rate must take at least one of {n} rows but is {rate!r}")
    if count > len(eligible):
        raise ValueError(f"[{op}] rate must take no more than the {len(eligible)} {what} but takes {count}")
    return np.sort(rng.choice(eligible, count, replace=False)).astype(np.int64), rng


def eligible_rows(op: str, y: Array, target: int, source: Any) -> tuple[Array, str]:
    """Rows that a backdoor to the target may take, and what they are called."""
    if source is None:
        return np.flatnonzero(y != target), f"rows of other classes than {target}"
    source = check_class(op, "source", source)
    if source == target:
        raise ValueError(f"[{op}] source must differ from target but both are {target}")
    return np.flatnonzero(y == source), f"rows of class {source}"


def taken(x: Any, rows: Array) -> Any:
    """Some rows of an array of either kind, or of a list."""
    if isinstance(x, (list, tuple)):
        return [x[i] for i in rows]
    return x[mx.array(rows)] if isinstance(x, mx.array) else x[rows]


def replaced(x: Any, rows: Array, new: Any) -> Any:
    """A copy with other rows."""
    out = mx.array(x) if isinstance(x, mx.array) else np.array(x)
    if len(rows):
        out[mx.array(rows) if isinstance(x, mx.array) else rows] = new
    return out


def stamped(op: str, trigger: Trigger, x: Any, bounds: Bounds) -> Any:
    """Inputs with the trigger on them, once they are seen to be valid inputs still."""
    found = trigger(x)
    if type(found) is not type(x) or found.shape != x.shape or found.dtype != x.dtype:
        has = f"{found.dtype} {found.shape}" if isinstance(found, (np.ndarray, mx.array)) else type(found).__name__
        raise ValueError(f"[{op}] trigger must return {type(x).__name__} {x.dtype} {x.shape} but returns {has}")
    if count := outside(found, bounds):
        raise ValueError(f"[{op}] trigger must stay within the bounds {bounds} but leaves them in {count} rows")
    return found
