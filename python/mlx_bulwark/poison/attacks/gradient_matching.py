"""Poison without a trigger: inputs whose gradients are those that a victim with a wrong label would have."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from ...attacks.base import check_model
from ...ops.step import projected_step, random_start
from ..classifier import Bounds
from .base import Poisoned, check_bounds, check_class, check_number, check_set, chosen, replaced, taken
from .clean_label import as_given

TINY = 1e-12
Mismatch = Callable[[mx.array], tuple[mx.array, mx.array]]


def gradient_matching(
    model: nn.Module,
    x: Any,
    y: Any,
    victim: Any,
    *,
    rate: float,
    target: int,
    eps: float = 16 / 255,
    steps: int = 100,
    alpha: float | None = None,
    restarts: int = 1,
    batch_size: int = 100,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    progress: bool = False,
) -> Poisoned:
    """Perturb inputs of the target class so that who trains on them learns to give that class to a victim (Witches'
    Brew).

    No label is changed, and no test input needs a trigger. The poisons of a batch move together, by signed steps in
    the ball of the maximum norm around each, so that the gradient of their loss by the weights gets the direction of
    the gradient of the victim's loss under the target's label. The best of the steps and restarts is kept.

    Args:
        model: A network of the attacker's own, trained on similar data: takes float32 ``[m, ...]``, returns logits.
            In evaluation mode. Its trainable parameters are those whose gradients are matched.
        x: Inputs ``[n, ...]`` within the bounds, floating, NumPy or MLX.
        y: Labels ``[n]``, integers >= 0.
        victim: The test inputs that shall get the target class, ``[v, ...]``, v >= 1, within the bounds.
        rate: Share of all n rows: exactly ``round(rate * n)`` are poisoned, drawn from those of the target class.
        target: The class that the victim shall get.
        eps: Radius of the ball, in the unit of the input.
        steps: Steps from each start, each a derivative of a derivative.
        alpha: Length of a step, in the unit of the input; by default ``2.5 * eps / steps``.
        restarts: Random starts; of each batch the one whose gradient matches best is kept.
        batch_size: Poisons that are matched together.
        bounds: Lowest and highest value of an input.
        seed: Of the rows, and of the starts.
        progress: Show a progress bar.

    Returns:
        Poisoned: The set, whose labels are those of ``y``, and its poisoned rows; it has no trigger.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype, the model has nothing to train, or there are too few
            rows to poison.
        TypeError: The model is not a ``mlx.nn.Module``.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, numpy as np
        >>> from mlx_bulwark.poison.attacks import gradient_matching
        >>> x, y = np.full((10, 4), 0.5, np.float32), np.arange(10) % 2
        >>> poisoned = gradient_matching(nn.Linear(4, 2), x, y, x[:1], rate=0.2, target=1, eps=0.125, steps=5)
        >>> len(poisoned.indices), float(np.abs(poisoned.x - x).max()) <= 0.125
        (2, True)

    Source:
        J. Geiping et al., "Witches' Brew: Industrial Scale Data Poisoning via Gradient Matching", 2021.
    """
    op = "gradient_matching"
    labels, inputs = check_set(op, x, y)
    limits, goal = check_bounds(op, inputs, bounds), check_class(op, "target", target)
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{op}] model must be a mlx.nn.Module but has type {type(model).__name__}")
    check_model(op, model)
    if not tree_flatten(model.trainable_parameters()):
        raise ValueError(f"[{op}] model must have trainable parameters but has none")
    victims = _victims(op, victim, inputs, limits)
    radius = check_number(op, "eps", eps)
    counts = {"steps": steps, "restarts": restarts, "batch_size": batch_size}
    for name, value in counts.items():
        if not check_class(op, name, value):
            raise ValueError(f"[{op}] {name} must be an integer >= 1 but is {value!r}")
    length = 2.5 * radius / steps if alpha is None else check_number(op, "alpha", alpha)
    rows = np.flatnonzero(labels == goal)
    indices, _ = chosen(op, rate, len(labels), rows, f"rows of class {goal}", seed)
    origin = mx.array(taken(inputs, indices)).astype(mx.float32)
    mismatch = _mismatch(op, model, victims, goal)
    keys = mx.random.split(mx.random.key(seed), max(1, -(-len(indices) // batch_size)) * restarts)
    found = [origin[:0]]
    bar = tqdm(total=len(keys) * steps, desc=op, unit="step", disable=None if progress else True)
    with bar:
        for place, start in enumerate(range(0, len(indices), batch_size)):
            part = origin[start : start + batch_size]
            starts = [
                random_start(part, radius, "linf", limits, seed=keys[place * restarts + r]) for r in range(restarts)
            ]
            found.append(_matched(mismatch, part, starts, radius, length, limits, steps, bar.update))
    new = as_given(inputs, mx.concatenate(found))
    return Poisoned(replaced(inputs, indices, new), labels, indices, None, goal)


def _matched(
    mismatch: Mismatch, origin: mx.array, starts: list[mx.array], eps: float, alpha: float, bounds: Bounds, steps: int,
    tick: Callable[[], Any],
) -> mx.array:  # fmt: skip
    """The best poisons that the starts lead to."""
    least, best = math.inf, origin
    for x in starts:
        for step in range(steps + 1):
            value, gradient = mismatch(x)
            if (score := float(np.array(value))) < least:
                least, best = score, x
            if step == steps:
                break
            # Long steps find the place, short ones settle in it.
            length = alpha * 0.1 ** sum(step >= share * steps for share in (0.375, 0.625, 0.875))
            x = projected_step(x, -gradient, origin, eps, length, "linf", bounds)
            tick()
    return best


def _mismatch(op: str, model: nn.Module, victims: mx.array, target: int) -> Mismatch:
    """One less the cosine between the gradients of some poisons and of the victims, and its derivative."""
    by_weights = nn.value_and_grad(model, _loss)

    def gradient(x: mx.array) -> mx.array:
        _, found = by_weights(model, x, mx.full((len(x),), target, mx.int32))
        leaves: list[Any] = tree_flatten(found)  # type: ignore[assignment]
        return mx.concatenate([g.astype(mx.float32).reshape(-1) for _, g in leaves])

    wanted = gradient(victims)
    size = float(np.array(mx.linalg.norm(wanted)))
    if not (math.isfinite(size) and size > 0):
        raise ValueError(f"[{op}] victim must have a gradient by the model's weights but its norm is {size:g}")
    wanted = wanted / size

    def mismatch(x: mx.array) -> mx.array:
        found = gradient(x)
        return 1 - (found * wanted).sum() / mx.maximum(mx.linalg.norm(found), TINY)

    return mx.value_and_grad(mismatch)


def _loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x).astype(mx.float32), y, reduction="mean")


def _victims(op: str, victim: Any, x: Any, bounds: Bounds) -> mx.array:
    if not isinstance(victim, (np.ndarray, mx.array)) or victim.shape[1:] != x.shape[1:] or not len(victim):
        has = getattr(victim, "shape", type(victim).__name__)
        raise ValueError(
            f"[{op}] victim must have shape [v, {', '.join(map(str, x.shape[1:]))}], v >= 1, but has {has}"
        )
    check_bounds(op, victim, bounds)
    return mx.array(victim).astype(mx.float32)
