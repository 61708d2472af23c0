"""Distillation: plain, and the "defensive" one, which is broken."""

from typing import Any, Literal, get_args

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..attacks.losses import cross_entropy
from ..smoothing.bounds import check_positive
from .inputs import Model, check_batch, evaluation_mode, logits_of
from .loop import History, fit
from .losses import Reduction, check_share, log_softmax, reduced

Kind = Literal["plain", "defensive"]


def temperature_loss(
    model: Model, x: mx.array, y: mx.array, temperature: float, *, reduction: Reduction = "mean"
) -> mx.array:
    """Cross-entropy of logits divided by a temperature: what the teacher of defensive distillation is trained with.

    Args:
        model: Takes ``[b, *shape]``, returns logits ``[b, c]``.
        x: Inputs ``[b, *shape]``, float32, float16 or bfloat16.
        y: Classes ``[b]``, integers.
        temperature: T > 0.
        reduction: ``"mean"``, or ``"none"`` for one loss an input.

    Returns:
        array: The loss, a scalar or ``[b]``.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.training import temperature_loss
        >>> model, x, y = nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> loss, gradients = nn.value_and_grad(model, temperature_loss)(model, x, y, 20.0)
        >>> loss.shape
        ()

    Source:
        N. Papernot et al., "Distillation as a Defense to Adversarial Perturbations against Deep Neural Networks", 2016.
    """
    check_batch("temperature_loss", x, y)
    check_positive("temperature_loss", "temperature", temperature)
    return reduced(cross_entropy(logits_of(model, x) / temperature, y), reduction)


def distillation_loss(
    student: Model,
    x: mx.array,
    y: mx.array,
    teacher_logits: mx.array,
    temperature: float,
    *,
    kind: Kind = "plain",
    hard_weight: float = 0.0,
    reduction: Reduction = "mean",
) -> mx.array:
    """Cross-entropy of a student against the teacher's predictions at a temperature T.

    ``"plain"`` (Hinton): ``(1 - w) * T^2 * H(teacher at T, student at T) + w * H(y, student at 1)``; the factor keeps
    the size of gradients. ``"defensive"`` (Papernot): ``H(teacher at T, student at T)``, without the factor.

    Args:
        student: Takes ``[b, *shape]``, returns logits ``[b, c]``.
        x: Inputs ``[b, *shape]``, float32, float16 or bfloat16.
        y: Classes ``[b]``, integers; they count where ``hard_weight`` is above 0.
        teacher_logits: ``[b, c]``, of the teacher in evaluation mode, at temperature 1. They are constants.
        temperature: T > 0. The student is evaluated at 1.
        kind: ``"plain"`` or ``"defensive"``.
        hard_weight: w, in [0, 1]; 0 where defensive.
        reduction: ``"mean"``, or ``"none"`` for one loss an input.

    Returns:
        array: The loss, a scalar or ``[b]``.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.training import distillation_loss
        >>> teacher, student, x, y = nn.Linear(4, 3), nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> loss, gradients = nn.value_and_grad(student, distillation_loss)(student, x, y, teacher(x), 4.0)
        >>> loss.shape
        ()

    Source:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015; N. Papernot et al.,
        "Distillation as a Defense to Adversarial Perturbations against Deep Neural Networks", 2016.
    """
    where = "distillation_loss"
    check_batch(where, x, y)
    _check(where, temperature, kind, hard_weight)
    logits = logits_of(student, x)
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"[{where}] teacher_logits must have the shape of the student's, {logits.shape}, but has "
            f"{teacher_logits.shape}"
        )
    target = mx.softmax(mx.stop_gradient(teacher_logits).astype(mx.float32) / temperature, axis=1)
    soft = -(target * log_softmax(logits / temperature)).sum(axis=1)
    if kind == "plain":
        soft = (1 - hard_weight) * temperature**2 * soft
    if hard_weight:
        soft = soft + hard_weight * cross_entropy(logits, y)
    return reduced(soft, reduction)


def distill(
    teacher: nn.Module,
    student: nn.Module,
    temperature: float,
    data: tuple[Any, Any],
    optimizer: optim.Optimizer,
    epochs: int,
    *,
    kind: Kind = "plain",
    hard_weight: float = 0.0,
    batch_size: int = 128,
    **settings: Any,
) -> History:
    """Train a student on what a teacher predicts. The teacher is asked once for every input, in evaluation mode.

    Plain distillation of an adversarially trained teacher hands on part of its robustness. Defensive distillation is
    here to be studied: it is no defense. Trained at T and evaluated at 1, the student has logits T times as large, so
    that the gradient of the cross-entropy vanishes, and attacks that follow it fail; the attack of Carlini and Wagner,
    which follows the logits, succeeds as ever. There the teacher is trained at T as well, with `temperature_loss`.

    Args:
        teacher: The trained teacher; it is not changed.
        student: The student; changed in place.
        temperature: T > 0. The student is evaluated at 1.
        data: Inputs ``[n, *shape]`` and classes ``[n]``, numpy or mlx.
        optimizer: Any MLX optimizer.
        epochs: Passes over the data.
        kind: ``"plain"`` (Hinton) or ``"defensive"`` (Papernot), as `distillation_loss` tells.
        hard_weight: Weight of the classes themselves, in [0, 1]; 0 where defensive.
        batch_size: Inputs of a step.
        settings: Other arguments of `fit`.

    Returns:
        History: What `fit` returns.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> from mlx_bulwark.training import distill
        >>> x, y = mx.random.normal((32, 4)), mx.zeros(32, mx.int32)
        >>> history = distill(nn.Linear(4, 3), nn.Linear(4, 3), 4.0, (x, y), optim.SGD(0.1), 2, batch_size=16)
        >>> len(history.losses)
        2

    Source:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015; N. Papernot et al.,
        "Distillation as a Defense to Adversarial Perturbations against Deep Neural Networks", 2016; N. Carlini,
        D. Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017.
    """
    _check("distill", temperature, kind, hard_weight)
    if teacher is student:
        raise ValueError("[distill] student must be another model than the teacher but is the same")
    x, y = data
    said = []
    with evaluation_mode(teacher):
        for start in range(0, len(x), batch_size):
            said.append(np.array(logits_of(teacher, mx.array(x[start : start + batch_size]))))

    def loss(model: Model, x: mx.array, y: mx.array, logits: mx.array) -> mx.array:
        return distillation_loss(model, x, y, logits, temperature, kind=kind, hard_weight=hard_weight)

    logits = np.concatenate(said) if said else np.zeros((0, 1), np.float32)
    return fit(student, loss, (x, y, logits), optimizer, epochs, batch_size=batch_size, **settings)


def _check(where: str, temperature: Any, kind: Any, hard_weight: Any) -> None:
    check_positive(where, "temperature", temperature)
    if kind not in get_args(Kind):
        raise ValueError(f"[{where}] kind must be 'plain' or 'defensive' but is {kind!r}")
    check_share(where, "hard_weight", hard_weight)
    if kind == "defensive" and hard_weight:
        raise ValueError(f"[{where}] hard_weight must be 0 where kind is 'defensive' but is {hard_weight!r}")
