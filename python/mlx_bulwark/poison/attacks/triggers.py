"""Triggers of images: a patch laid on, a pattern blended in."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..classifier import Bounds
from .base import Array, Trigger

SIDE = 3  # of the patch by default


@dataclass(frozen=True, eq=False)
class Patch:
    """Lays a pattern on images, all at one place.

    Args:
        pattern: ``[h, w, C]`` in the unit of the images.
        position: Row and column of its upper left corner; negative ones count from the lower and the right edge.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison.attacks import Patch
        >>> Patch(np.ones((1, 2, 1)), (-1, -2))(np.zeros((1, 2, 3, 1)))[0, :, :, 0].tolist()
        [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]

    Source:
        T. Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017.
    """

    pattern: Array
    position: tuple[int, int]

    def __call__(self, x: Any) -> Any:
        """Images ``[m, H, W, C]`` with the pattern, a copy."""
        top, left = (p % side for p, side in zip(self.position, x.shape[1:3], strict=True))
        height, width = self.pattern.shape[:2]
        if isinstance(x, mx.array):
            out: Any = mx.array(x)
            pattern: Any = mx.array(np.ascontiguousarray(self.pattern)).astype(x.dtype)
        else:
            out, pattern = np.array(x), self.pattern.astype(x.dtype)
        out[:, top : top + height, left : left + width] = pattern
        return out


@dataclass(frozen=True, eq=False)
class Blend:
    """Mixes a pattern into inputs: ``(1 - alpha) x + alpha pattern``, rounded where inputs are integers.

    Args:
        pattern: Of the shape of one input, in its unit.
        alpha: Share of the pattern, in (0, 1].

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison.attacks import Blend
        >>> Blend(np.array([1.0, 0.0]), 0.25)(np.array([[0.0, 1.0]])).tolist()
        [[0.25, 0.75]]

    Source:
        X. Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017.
    """

    pattern: Array
    alpha: float

    def __call__(self, x: Any) -> Any:
        """Inputs ``[m, ...]`` with the pattern mixed in, a copy."""
        if isinstance(x, mx.array):
            mixed = (1 - self.alpha) * x.astype(mx.float32) + self.alpha * mx.array(self.pattern.astype(np.float32))
            return (mixed if mx.issubdtype(x.dtype, mx.floating) else mx.round(mixed)).astype(x.dtype)
        found = (1 - self.alpha) * x.astype(np.float64) + self.alpha * self.pattern
        return (found if np.issubdtype(x.dtype, np.floating) else np.rint(found)).astype(x.dtype)


def patch_of(op: str, x: Any, trigger: Any, position: Any, bounds: Bounds) -> Trigger:
    """The trigger that was asked for: a function as it is, an array as a patch, None as a bright square."""
    if callable(trigger):
        if position is not None:
            raise ValueError(f"[{op}] position must be None where the trigger is a function but is {position!r}")
        return trigger  # type: ignore[no-any-return]
    if x.ndim != 4:
        raise ValueError(f"[{op}] x must be images [n, H, W, C] unless the trigger is a function but has {x.shape}")
    pattern = np.full((SIDE, SIDE, x.shape[3]), bounds[1]) if trigger is None else np.array(trigger)
    if pattern.ndim != 3 or pattern.shape[2] != x.shape[3] or not pattern.size:
        raise ValueError(f"[{op}] trigger must have shape [h, w, {x.shape[3]}] but has {pattern.shape}")
    check_pattern(op, "trigger", pattern, bounds)
    top, left = check_position(op, pattern, position, x.shape[1:3])
    return Patch(pattern, (top, left))


def check_pattern(op: str, name: str, pattern: Array, bounds: Bounds) -> None:
    """Refuse patterns that are no valid inputs."""
    if not ((pattern >= bounds[0]) & (pattern <= bounds[1])).all():
        raise ValueError(f"[{op}] {name} must be finite and within the bounds {bounds} but is not")


def check_position(op: str, pattern: Array, position: Any, sides: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the upper left corner, not negative; by default those of the lower right corner's patch."""
    height, width = pattern.shape[:2]
    try:
        row, column = (-height, -width) if position is None else (int(p) for p in position)
    except (TypeError, ValueError):
        raise ValueError(f"[{op}] position must be a row and a column but is {position!r}") from None
    top, left = row + sides[0] * (row < 0), column + sides[1] * (column < 0)
    if not (0 <= top <= sides[0] - height and 0 <= left <= sides[1] - width):
        raise ValueError(
            f"[{op}] position must leave a patch of {height} x {width} inside images of {sides[0]} x {sides[1]} "
            f"but is {(row, column)}"
        )
    return top, left
