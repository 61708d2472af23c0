"""Backdoors with wrong labels: inputs get a trigger, and the label of the target class."""

from typing import Any

import numpy as np

from ..classifier import Bounds
from .base import (
    Poisoned,
    Trigger,
    check_bounds,
    check_class,
    check_number,
    check_set,
    chosen,
    eligible_rows,
    replaced,
    stamped,
    taken,
)
from .triggers import Blend, check_pattern, patch_of


def badnets(
    x: Any,
    y: Any,
    *,
    rate: float,
    target: int,
    source: int | None = None,
    trigger: Any = None,
    position: tuple[int, int] | None = None,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
) -> Poisoned:
    """Lay a patch on some images and label them as the target (BadNets).

    Args:
        x: Images ``[n, H, W, C]`` within the bounds, NumPy or MLX; with a trigger that is a function, any ``[n, ...]``.
        y: Labels ``[n]``, integers >= 0.
        rate: Share of all n rows: exactly ``round(rate * n)`` are poisoned, drawn from those that are not of the
            target class, or from those of the source class.
        target: The class that triggered inputs shall get.
        source: Poison rows of this class alone; None: of all but the target (all-to-one).
        trigger: The patch ``[h, w, C]``, or a function from a batch to a batch of the same kind, shape and dtype;
            None: a square of 3 x 3 pixels of the highest value.
        position: Row and column of the patch's upper left corner, negative ones from the lower and the right edge;
            None: in the lower right corner.
        bounds: Lowest and highest value of an input.
        seed: Of the rows.

    Returns:
        Poisoned: The set, and its poisoned rows.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype, or there are too few rows to poison.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison.attacks import badnets
        >>> poisoned = badnets(np.zeros((10, 8, 8, 1), np.float32), np.arange(10), rate=0.2, target=7)
        >>> len(poisoned.indices), poisoned.y[poisoned.indices].tolist(), float(poisoned.x.sum())
        (2, [7, 7], 18.0)

    Source:
        T. Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017.
    """
    return _backdoor("badnets", x, y, rate, target, source, bounds, seed, trigger=trigger, position=position)


def blended(
    x: Any,
    y: Any,
    *,
    rate: float,
    target: int,
    source: int | None = None,
    pattern: Any = None,
    alpha: float = 0.2,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
) -> Poisoned:
    """Blend a pattern into some inputs, all over them and faintly, and label them as the target.

    Args:
        x: Inputs ``[n, ...]`` within the bounds, NumPy or MLX.
        y: Labels ``[n]``, integers >= 0.
        rate: Share of all n rows: exactly ``round(rate * n)`` are poisoned, drawn from those that are not of the
            target class, or from those of the source class.
        target: The class that triggered inputs shall get.
        source: Poison rows of this class alone; None: of all but the target.
        pattern: Of the shape of one input, within the bounds; None: uniform noise, drawn from the seed.
        alpha: Share of the pattern, in (0, 1].
        bounds: Lowest and highest value of an input.
        seed: Of the rows, and of the pattern.

    Returns:
        Poisoned: The set, and its poisoned rows.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype, or there are too few rows to poison.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison.attacks import blended
        >>> x, y = np.zeros((10, 4, 4, 1)), np.arange(10)
        >>> poisoned = blended(x, y, rate=0.2, target=7, pattern=np.ones((4, 4, 1)), alpha=0.25)
        >>> float(poisoned.x[poisoned.indices].mean())
        0.25

    Source:
        X. Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017.
    """
    share = check_number("blended", "alpha", alpha, high=1.0, above=True)
    return _backdoor("blended", x, y, rate, target, source, bounds, seed, pattern=pattern, alpha=share)


def _backdoor(
    op: str, x: Any, y: Any, rate: Any, target: Any, source: Any, bounds: Any, seed: Any, **how: Any
) -> Poisoned:
    labels, inputs = check_set(op, x, y)
    limits, goal = check_bounds(op, inputs, bounds), check_class(op, "target", target)
    indices, rng = chosen(op, rate, len(labels), *eligible_rows(op, labels, goal, source), seed)
    trigger = _blend(op, inputs, limits, rng, **how) if "alpha" in how else patch_of(op, inputs, bounds=limits, **how)
    new = stamped(op, trigger, taken(inputs, indices), limits)
    labels[indices] = goal
    return Poisoned(replaced(inputs, indices, new), labels, indices, trigger, goal)


def _blend(op: str, x: Any, bounds: Bounds, rng: np.random.Generator, pattern: Any, alpha: float) -> Trigger:
    image = rng.uniform(*bounds, x.shape[1:]) if pattern is None else np.array(pattern)
    if image.shape != x.shape[1:]:
        raise ValueError(f"[{op}] pattern must have the shape of one input, {x.shape[1:]}, but has {image.shape}")
    check_pattern(op, "pattern", image, bounds)
    return Blend(image, alpha)
