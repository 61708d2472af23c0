"""Schedules of noise and clipping norm: functions from the number of steps charged so far to a value."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """The same value at every step.

    Args:
        value: the value.

    Returns:
        A function from the number of steps to a value.

    Example:
        >>> from mlx_bulwark.privacy import schedules
        >>> schedules.constant(1.5)(100)
        1.5
    """
    return lambda step: value


def exponential(initial: float, rate: float) -> Schedule:
    """A value that is multiplied by a rate at every step.

    Args:
        initial: value of the first step.
        rate: factor from a step to the next, above 0.

    Returns:
        A function from the number of steps to a value.

    Example:
        >>> from mlx_bulwark.privacy import schedules
        >>> schedules.exponential(2.0, 0.5)(3)
        0.25
    """
    return lambda step: initial * rate**step


def step(initial: float, rate: float, every: int) -> Schedule:
    """A value that is multiplied by a rate after every so many steps.

    Args:
        initial: value of the first steps.
        rate: factor, above 0.
        every: number of steps that share a value.

    Returns:
        A function from the number of steps to a value.

    Example:
        >>> from mlx_bulwark.privacy import schedules
        >>> [schedules.step(2.0, 0.5, every=10)(n) for n in (0, 9, 10, 20)]
        [2.0, 2.0, 1.0, 0.5]
    """
    return lambda n: initial * rate ** (n // every)


def cosine(initial: float, final: float, steps: int) -> Schedule:
    """A value that goes from one to another along half a cosine, and stays there.

    Args:
        initial: value of the first step.
        final: value after ``steps`` steps and later.
        steps: length of the way.

    Returns:
        A function from the number of steps to a value.

    Example:
        >>> from mlx_bulwark.privacy import schedules
        >>> [round(schedules.cosine(2.0, 1.0, 10)(n), 3) for n in (0, 5, 10, 99)]
        [2.0, 1.5, 1.0, 1.0]

    Source:
        Loshchilov and Hutter 2016 (arXiv:1608.03983).
    """
    return lambda n: final + (initial - final) * (1 + math.cos(math.pi * min(n / steps, 1))) / 2
