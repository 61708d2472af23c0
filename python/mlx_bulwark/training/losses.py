"""Losses of adversarial training, for any training loop of MLX.

Each takes what ``adversarial_inputs`` takes, attacks the model as it stands, and returns the loss at what it found. One
step costs ``steps`` passes of the attack and one training pass, of two forwards for TRADES and MART, and no more.
Random starts come from ``mx.random``: in a compiled step ``mx.random.state`` belongs to the inputs and outputs, as with
dropout.
"""

import math
from typing import Any, Literal, get_args

import mlx.core as mx

from ..attacks.losses import cross_entropy
from ..ops.step import Norm
from ..smoothing.bounds import is_number
from .inputs import Eps, Model, adversarial_inputs, ascend, check_batch, logits_of

Reduction = Literal["mean", "none"]


def adversarial_loss(
    model: Model,
    x: mx.array,
    y: mx.array,
    eps: Eps,
    *,
    norm: Norm = "linf",
    steps: int = 10,
    alpha: Eps | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    random_start: bool = True,
    adversarial: mx.array | None = None,
    reduction: Reduction = "mean",
    key: mx.array | None = None,
) -> mx.array:
    """Cross-entropy on adversarial inputs: adversarial training by projected gradient descent (Madry et al.).

    Args:
        model: Takes ``[b, *shape]``, returns logits ``[b, c]``. The attack sees it in evaluation mode.
        x: Inputs ``[b, *shape]`` within ``bounds``, float32, float16 or bfloat16.
        y: Classes ``[b]``, integers.
        eps: Radius of the ball, in the unit of ``x``: a number, or float32 ``[b]``, one an input.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: Steps of the attack.
        alpha: Length of a step in the same norm, by default ``2.5 * eps / steps``.
        bounds: Lowest and highest value of an input.
        random_start: Start from random places of the ball, not from the inputs.
        adversarial: Adversarial inputs that are there already, of the shape of ``x``; none are sought then.
        reduction: ``"mean"``, or ``"none"`` for one loss an input, as `mlx_bulwark.PrivacyEngine` wants them.
        key: Key of ``mx.random``; by default its global state.

    Returns:
        array: The loss, a scalar or ``[b]``.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.training import adversarial_loss
        >>> model, x, y = nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> loss, gradients = nn.value_and_grad(model, adversarial_loss)(model, x, y, 0.1, steps=3)
        >>> loss.shape
        ()

    Source:
        A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018.
    """
    _check("adversarial_loss", x, y, adversarial, reduction)
    if adversarial is None:
        adversarial = adversarial_inputs(
            model,
            x,
            y,
            eps,
            norm=norm,
            steps=steps,
            alpha=alpha,
            bounds=bounds,
            random_start=random_start,
            key=key,
        )
    return reduced(cross_entropy(logits_of(model, adversarial), y), reduction)


def fast_adversarial_loss(
    model: Model,
    x: mx.array,
    y: mx.array,
    eps: Eps,
    *,
    norm: Norm = "linf",
    alpha: Eps | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    reduction: Reduction = "mean",
    key: mx.array | None = None,
) -> mx.array:
    """Cross-entropy after one step from a random start: "fast" adversarial training (FGSM-RS), two passes a step.

    It can fail all at once: within an epoch the model learns to resist single steps and nothing else (catastrophic
    overfitting). Watch its accuracy under an attack of many steps, as `fit` does with ``attack``.

    Args:
        model: Takes ``[b, *shape]``, returns logits ``[b, c]``. The attack sees it in evaluation mode.
        x: Inputs ``[b, *shape]`` within ``bounds``, float32, float16 or bfloat16.
        y: Classes ``[b]``, integers.
        eps: Radius of the ball, in the unit of ``x``: a number, or float32 ``[b]``, one an input.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        alpha: Length of the step in the same norm, by default ``1.25 * eps``.
        bounds: Lowest and highest value of an input.
        reduction: ``"mean"``, or ``"none"`` for one loss an input.
        key: Key of ``mx.random``; by default its global state.

    Returns:
        array: The loss, a scalar or ``[b]``.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.training import fast_adversarial_loss
        >>> model, x, y = nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> loss, gradients = nn.value_and_grad(model, fast_adversarial_loss)(model, x, y, 0.1)
        >>> loss.shape
        ()

    Source:
        E. Wong, L. Rice, Z. Kolter, "Fast is Better than Free: Revisiting Adversarial Training", 2020.
    """
    length = 1.25 * eps if alpha is None else alpha
    return adversarial_loss(
        model, x, y, eps, norm=norm, steps=1, alpha=length, bounds=bounds, reduction=reduction, key=key
    )


def trades_loss(
    model: Model,
    x: mx.array,
    y: mx.array,
    eps: Eps,
    *,
    beta: float = 6.0,
    norm: Norm = "linf",
    steps: int = 10,
    alpha: Eps | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    adversarial: mx.array | None = None,
    reduction: Reduction = "mean",
    key: mx.array | None = None,
) -> mx.array:
    """Cross-entropy on clean inputs, and ``beta * KL(f(x) || f(x'))`` where x' maximises the divergence (TRADES).

    The attack starts from random places of the ball: at the input itself the divergence has no slope. What it moves
    away from is the prediction of the training pass, so that the clean inputs are passed through the model once.

    Args:
        model: Takes ``[b, *shape]``, returns logits ``[b, c]``. The attack sees it in evaluation mode.
        x: Inputs ``[b, *shape]`` within ``bounds``, float32, float16 or bfloat16.
        y: Classes ``[b]``, integers.
        eps: Radius of the ball, in the unit of ``x``: a number, or float32 ``[b]``, one an input.
        beta: Weight of the divergence, >= 0: larger is more robust and less accurate.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: Steps of the attack.
        alpha: Length of a step in the same norm, by default ``2.5 * eps / steps``.
        bounds: Lowest and highest value of an input.
        adversarial: Adversarial inputs that are there already, of the shape of ``x``; none are sought then.
        reduction: ``"mean"``, or ``"none"`` for one loss an input, as `mlx_bulwark.PrivacyEngine` wants them.
        key: Key of ``mx.random``; by default its global state.

    Returns:
        array: The loss, a scalar or ``[b]``.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.training import trades_loss
        >>> model, x, y = nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> loss, gradients = nn.value_and_grad(model, trades_loss)(model, x, y, 0.1, steps=3)
        >>> loss.shape
        ()

    Source:
        H. Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", 2019.
    """
    _check("trades_loss", x, y, adversarial, reduction)
    check_weight("trades_loss", "beta", beta)
    logits = logits_of(model, x)
    if adversarial is None:
        target = mx.stop_gradient(logits)
        adversarial = ascend(
            model,
            x,
            lambda found: divergence(target, found),
            eps,
            norm=norm,
            steps=steps,
            alpha=alpha,
            bounds=bounds,
            random_start=True,
            key=key,
        )
    each = cross_entropy(logits, y) + beta * divergence(logits, logits_of(model, adversarial))
    return reduced(each, reduction)


def mart_loss(
    model: Model,
    x: mx.array,
    y: mx.array,
    eps: Eps,
    *,
    beta: float = 5.0,
    norm: Norm = "linf",
    steps: int = 10,
    alpha: Eps | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    random_start: bool = True,
    adversarial: mx.array | None = None,
    reduction: Reduction = "mean",
    key: mx.array | None = None,
) -> mx.array:
    """Adversarial training that minds misclassified inputs more (MART).

    ``-log p_y(x') - log(1 - max of p_k(x') over k != y) + beta * KL(p(x) || p(x')) * (1 - p_y(x))``, where x' maximises
    the cross-entropy.

    Args:
        model: Takes ``[b, *shape]``, returns logits ``[b, c]``. The attack sees it in evaluation mode.
        x: Inputs ``[b, *shape]`` within ``bounds``, float32, float16 or bfloat16.
        y: Classes ``[b]``, integers.
        eps: Radius of the ball, in the unit of ``x``: a number, or float32 ``[b]``, one an input.
        beta: Weight of the divergence, >= 0; lambda in the paper.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: Steps of the attack.
        alpha: Length of a step in the same norm, by default ``2.5 * eps / steps``.
        bounds: Lowest and highest value of an input.
        random_start: Start from random places of the ball, not from the inputs.
        adversarial: Adversarial inputs that are there already, of the shape of ``x``; none are sought then.
        reduction: ``"mean"``, or ``"none"`` for one loss an input, as `mlx_bulwark.PrivacyEngine` wants them.
        key: Key of ``mx.random``; by default its global state.

    Returns:
        array: The loss, a scalar or ``[b]``.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.training import mart_loss
        >>> model, x, y = nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> loss, gradients = nn.value_and_grad(model, mart_loss)(model, x, y, 0.1, steps=3)
        >>> loss.shape
        ()

    Source:
        Y. Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", 2020.
    """
    _check("mart_loss", x, y, adversarial, reduction)
    check_weight("mart_loss", "beta", beta)
    if adversarial is None:
        adversarial = adversarial_inputs(
            model,
            x,
            y,
            eps,
            norm=norm,
            steps=steps,
            alpha=alpha,
            bounds=bounds,
            random_start=random_start,
            key=key,
        )
    clean, attacked = logits_of(model, x), logits_of(model, adversarial)
    missed = 1 - mx.exp(-cross_entropy(clean, y))
    each = cross_entropy(attacked, y) + _against_rival(attacked, y) + beta * divergence(clean, attacked) * missed
    return reduced(each, reduction)


def label_smoothing_loss(
    model: Model, x: mx.array, y: mx.array, *, smoothing: float = 0.1, reduction: Reduction = "mean"
) -> mx.array:
    """Cross-entropy against softened labels: the baseline without an attack.

    What it buys against weak attacks is for the most part hidden gradients: evaluate it with strong ones.

    Args:
        model: Takes ``[b, *shape]``, returns logits ``[b, c]``.
        x: Inputs ``[b, *shape]``, float32, float16 or bfloat16.
        y: Classes ``[b]``, integers.
        smoothing: Share of the label that is spread evenly over all classes, in [0, 1].
        reduction: ``"mean"``, or ``"none"`` for one loss an input.

    Returns:
        array: The loss, a scalar or ``[b]``.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.training import label_smoothing_loss
        >>> model, x, y = nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> loss, gradients = nn.value_and_grad(model, label_smoothing_loss)(model, x, y, smoothing=0.2)
        >>> loss.shape
        ()

    Source:
        C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016.
    """
    _check("label_smoothing_loss", x, y, None, reduction)
    check_share("label_smoothing_loss", "smoothing", smoothing)
    logits = logits_of(model, x)
    evenly = -log_softmax(logits).mean(axis=1)
    return reduced((1 - smoothing) * cross_entropy(logits, y) + smoothing * evenly, reduction)


def divergence(logits: mx.array, others: mx.array) -> mx.array:
    """KL of two predictions, ``[b]``."""
    log_p, log_q = log_softmax(logits), log_softmax(others)
    each: mx.array = (mx.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return each


def log_softmax(logits: mx.array) -> mx.array:
    """Log of the softmax. That of mlx.nn is compiled, and has no derivative where one derivative is inside another."""
    return logits - mx.logsumexp(logits, axis=1, keepdims=True)


def check_weight(where: str, name: str, value: Any) -> None:
    """Refuse what is not a finite number >= 0."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"[{where}] {name} must be a finite number >= 0 but is {value!r}")


def check_share(where: str, name: str, value: Any) -> None:
    """Refuse what is not a number in [0, 1]."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"[{where}] {name} must be a number in [0, 1] but is {value!r}")


def _against_rival(logits: mx.array, y: mx.array) -> mx.array:
    """``-log(1 - p)`` of the likeliest class but y: from the others' logits, since 1 - p has no digits where p is 1."""
    classes = mx.arange(logits.shape[1])
    rival = mx.argmax(mx.where(classes == y[:, None], -mx.inf, logits), axis=1)
    rest = mx.where(classes == rival[:, None], -mx.inf, logits)
    return mx.logsumexp(logits, axis=1) - mx.logsumexp(rest, axis=1)


def reduced(each: mx.array, reduction: Reduction) -> mx.array:
    """One loss an input, or their mean."""
    mean: mx.array = each.mean()
    return each if reduction == "none" else mean


def _check(where: str, x: Any, y: Any, adversarial: Any, reduction: Any) -> None:
    check_batch(where, x, y)
    if adversarial is not None and (not isinstance(adversarial, mx.array) or adversarial.shape != x.shape):
        has = (
            f"shape {adversarial.shape}" if isinstance(adversarial, mx.array) else f"type {type(adversarial).__name__}"
        )
        raise ValueError(f"[{where}] adversarial must be an array of x's shape {x.shape} but has {has}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"[{where}] reduction must be 'mean' or 'none' but is {reduction!r}")
