"""What attacks raise: losses of logits, one value an input."""

from collections.abc import Callable
from typing import Literal

import mlx.core as mx

Loss = Callable[[mx.array, mx.array], mx.array]
LossName = Literal["cross_entropy", "margin", "dlr"]

TINY = 1e-12  # keeps quotients of equal logits finite


def cross_entropy(logits: mx.array, y: mx.array) -> mx.array:
    """Cross-entropy of each input.

    Args:
        logits: ``[B, C]``.
        y: Classes ``[B]``.

    Returns:
        array: ``[B]``.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import cross_entropy
        >>> round(cross_entropy(mx.zeros((1, 4)), mx.array([2])).item(), 4)
        1.3863

    Source:
        I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and Harnessing Adversarial Examples", 2015.
    """
    # As the softplus of all others together less the class: the gradient keeps its digits where the class is certain.
    own = mx.arange(logits.shape[1]) == y[:, None]
    return mx.logaddexp(mx.logsumexp(mx.where(own, -mx.inf, logits), axis=1) - of_class(logits, y), 0.0)


def margin(logits: mx.array, y: mx.array) -> mx.array:
    """Best other logit less that of the class; positive where the class is missed.

    Args:
        logits: ``[B, C]``.
        y: Classes ``[B]``.

    Returns:
        array: ``[B]``.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import margin
        >>> margin(mx.array([[1.0, 3.0, 2.0]]), mx.array([1])).tolist()
        [-1.0]

    Source:
        N. Carlini, D. Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017.
    """
    return best_other(logits, y) - of_class(logits, y)


def dlr(logits: mx.array, y: mx.array) -> mx.array:
    """Difference of logits ratio: the margin over the distance from the first to the third logit.

    It does not change when logits are shifted or scaled, so that large logits do not make its gradient vanish.

    Args:
        logits: ``[B, C]``, C >= 3.
        y: Classes ``[B]``.

    Returns:
        array: ``[B]``.

    Raises:
        ValueError: There are fewer than 3 classes.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import dlr
        >>> dlr(mx.array([[1.0, 3.0, 2.0]]), mx.array([1])).tolist()
        [-0.5]

    Source:
        F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks", 2020.
    """
    _check_classes("dlr", logits, 3)
    ranked = mx.sort(logits, axis=1)
    return margin(logits, y) / (ranked[:, -1] - ranked[:, -3] + TINY)


def dlr_targeted(logits: mx.array, y: mx.array, targets: mx.array) -> mx.array:
    """Difference of logits ratio towards a target: ``-(z_y - z_t) / (z_1 - (z_3 + z_4) / 2)``, logits in falling order.

    Args:
        logits: ``[B, C]``, C >= 4.
        y: Classes ``[B]``.
        targets: Classes ``[B]``.

    Returns:
        array: ``[B]``.

    Raises:
        ValueError: There are fewer than 4 classes.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import dlr_targeted
        >>> dlr_targeted(mx.array([[1.0, 3.0, 2.0, 1.0]]), mx.array([1]), mx.array([2])).tolist()
        [-0.5]

    Source:
        F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks", 2020.
    """
    _check_classes("dlr_targeted", logits, 4)
    ranked = mx.sort(logits, axis=1)
    scale = ranked[:, -1] - (ranked[:, -3] + ranked[:, -4]) / 2 + TINY
    return (of_class(logits, targets) - of_class(logits, y)) / scale


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def of_class(logits: mx.array, y: mx.array) -> mx.array:
    """The logit of a class, ``[B]``."""
    return mx.take_along_axis(logits, y[:, None], axis=1)[:, 0]


def best_other(logits: mx.array, y: mx.array) -> mx.array:
    """The largest logit but that of a class, ``[B]``; that is masked by -inf, since all others may be negative."""
    own = mx.arange(logits.shape[1]) == y[:, None]
    return mx.where(own, -mx.inf, logits).max(axis=1)


def _check_classes(name: str, logits: mx.array, least: int) -> None:
    if logits.shape[1] < least:
        raise ValueError(f"[{name}] logits must have {least} classes or more but have {logits.shape[1]}")
