"""A backdoor whose poison has the right labels: inputs of the target class, made hard, with the trigger on them."""

from typing import Any

import mlx.core as mx
import numpy as np

from ...attacks import PGD
from ...attacks.base import Model
from ...ops.step import Norm
from ..classifier import Bounds
from .base import (
    Array,
    Poisoned,
    check_bounds,
    check_class,
    check_set,
    chosen,
    replaced,
    stamped,
    taken,
)
from .triggers import patch_of

BATCH = 200  # inputs that are attacked at once


def clean_label(
    model: Model,
    x: Any,
    y: Any,
    *,
    rate: float,
    target: int,
    eps: float = 0.3,
    norm: Norm = "linf",
    steps: int = 40,
    trigger: Any = None,
    position: tuple[int, int] | None = None,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
) -> Poisoned:
    """Make inputs of the target class hard to learn by an adversarial attack, and lay a trigger on them.

    No label is changed. A network that trains on them finds the trigger easier to learn than what is left of the
    class. Inputs are attacked by ``PGD`` on a model of the attacker's own; those that withstand it get the trigger
    alone.

    Args:
        model: Trained on similar data: takes ``[m, ...]`` in the dtype of x, returns logits. In evaluation mode.
        x: Inputs ``[n, ...]`` within the bounds, floating, NumPy or MLX.
        y: Labels ``[n]``, integers >= 0.
        rate: Share of all n rows: exactly ``round(rate * n)`` are poisoned, drawn from those of the target class.
        target: The class that triggered inputs shall get.
        eps: Radius of the attack, in the unit of the input.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: Steps of the attack.
        trigger: As that of ``badnets``.
        position: As that of ``badnets``.
        bounds: Lowest and highest value of an input.
        seed: Of the rows, and of the attack.

    Returns:
        Poisoned: The set, whose labels are those of ``y``, and its poisoned rows.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype, or there are too few rows to poison.

    Example:
        >>> import mlx.core as mx, numpy as np
        >>> from mlx_bulwark.poison.attacks import clean_label
        >>> model = lambda x: mx.stack([x[:, 0, 0, 0], 1 - x[:, 0, 0, 0]], axis=1)
        >>> x, y = np.full((10, 6, 6, 1), 0.6, np.float32), np.arange(10) % 2
        >>> poisoned = clean_label(model, x, y, rate=0.2, target=0, steps=5)
        >>> i = poisoned.indices[0]
        >>> bool(poisoned.x[i, 0, 0, 0] < 0.5), float(poisoned.x[i, 5, 5, 0]), int(poisoned.y[i])
        (True, 1.0, 0)

    Source:
        A. Turner, D. Tsipras, A. Madry, "Label-Consistent Backdoor Attacks", 2019.
    """
    op = "clean_label"
    labels, inputs = check_set(op, x, y)
    limits, goal = check_bounds(op, inputs, bounds), check_class(op, "target", target)
    rows = np.flatnonzero(labels == goal)
    indices, _ = chosen(op, rate, len(labels), rows, f"rows of class {goal}", seed)
    stamp = patch_of(op, inputs, trigger, position, limits)
    attack = PGD(eps, norm=norm, steps=steps, bounds=limits, early_stop=False, seed=seed)
    hard = as_given(inputs, _attacked(attack, model, mx.array(taken(inputs, indices)), goal))
    return Poisoned(replaced(inputs, indices, stamped(op, stamp, hard, limits)), labels, indices, stamp, goal)


def _attacked(attack: PGD, model: Model, x: mx.array, target: int) -> mx.array:
    parts = [x[i : i + BATCH] for i in range(0, max(len(x), 1), BATCH)]
    return mx.concatenate([attack(model, p, mx.full((len(p),), target, mx.int32)).adversarial for p in parts])


def as_given(like: Any, found: mx.array) -> Any:
    """Rows in the container and dtype of the inputs that they come from."""
    if isinstance(like, mx.array):
        return found.astype(like.dtype)
    rows: Array = np.array(found)
    return rows.astype(like.dtype)
