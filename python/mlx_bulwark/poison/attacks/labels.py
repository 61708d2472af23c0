"""Poison in the labels alone."""

from typing import Any

import numpy as np

from .base import Array, Poisoned, check_class, check_labels, chosen, eligible_rows, replaced


def label_flip(
    x: Any,
    y: Any,
    *,
    rate: float,
    target: int | None = None,
    source: int | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> Poisoned:
    """Give some rows a wrong label: any other one at random, or that of a target class.

    Args:
        x: Inputs, anything with a length; they stay as they are.
        y: Labels ``[n]``, integers >= 0.
        rate: Share of all n rows: exactly ``round(rate * n)`` get a wrong label, drawn from all, from those that are
            not of the target class, or from those of the source class.
        target: The label that they get; None: one of the other classes, each as likely.
        source: Take rows of this class alone.
        num_classes: Classes that a random label is drawn from; None: one more than the largest label.
        seed: Of the rows and the labels.

    Returns:
        Poisoned: The set, without a trigger, and its rows with a wrong label.

    Raises:
        ValueError: An argument has a wrong value or shape, or there are too few rows to poison.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison.attacks import label_flip
        >>> y = np.array([0, 1, 2, 1])
        >>> label_flip(np.zeros((4, 2)), y, rate=0.5, source=1, target=2).y.tolist()
        [0, 2, 2, 2]

    Source:
        B. Biggio, B. Nelson, P. Laskov, "Support Vector Machines Under Adversarial Label Noise", 2011.
    """
    op = "label_flip"
    labels = check_labels(op, y, len(x))
    classes = _classes(op, labels, num_classes)
    goal = None if target is None else check_class(op, "target", target)
    if goal is not None:
        eligible, what = eligible_rows(op, labels, goal, source)
    elif source is not None:
        wanted = check_class(op, "source", source)
        eligible, what = np.flatnonzero(labels == wanted), f"rows of class {wanted}"
    else:
        eligible, what = np.arange(len(labels)), "rows"
    indices, rng = chosen(op, rate, len(labels), eligible, what, seed)
    if goal is None:
        labels[indices] = _others(rng, labels[indices], classes)
    else:
        labels[indices] = goal
    return Poisoned(_copied(x), labels, indices, None, goal)


def _classes(op: str, labels: Array, num_classes: Any) -> int:
    least = int(labels.max(initial=0)) + 1
    classes = max(least, 2) if num_classes is None else check_class(op, "num_classes", num_classes)
    if classes < max(least, 2):
        raise ValueError(f"[{op}] num_classes must be at least {max(least, 2)}, as y has it, but is {num_classes!r}")
    return classes


def _others(rng: np.random.Generator, labels: Array, classes: int) -> Array:
    """Other classes, each as likely."""
    return (labels + rng.integers(1, classes, len(labels))) % classes


def _copied(x: Any) -> Any:
    return replaced(x, np.zeros(0, np.int64), None) if hasattr(x, "dtype") else list(x)
