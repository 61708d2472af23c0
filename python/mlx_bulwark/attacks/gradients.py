"""Gradients of what an attack raises, with the logits of the same pass."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..ops.step import Norm, usable
from .base import Model
from .losses import LOSSES, TINY, Loss, LossName, dlr_targeted, margin, of_class

Objective = Callable[[mx.array, mx.array, mx.array], mx.array]  # logits, y, targets; the attack raises it


def objective_of(where: str, loss: LossName | Loss, targeted: bool) -> Objective:
    """The loss of the class, to be raised, or of the target, to be lowered."""
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(f"[{where}] loss must be {', '.join(map(repr, LOSSES))} or a function but is {loss!r}")
    if not targeted:
        each = loss if callable(loss) else LOSSES[loss]
        return lambda logits, y, targets: each(logits, y)
    if loss == "dlr":
        return dlr_targeted
    each = loss if callable(loss) else LOSSES[loss]
    return lambda logits, y, targets: -each(logits, targets)


def with_gradient(model: Model, objective: Objective) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
    """A function of ``(x, y, targets)``: the gradient, the objective ``[m]`` and the logits ``[m, C]``.

    What is not finite in a gradient is left in it: ``projected_step`` counts it as 0, so that a sample without a usable
    gradient stays where it is; who uses the gradient otherwise calls ``usable``.
    """

    def total(x: mx.array, y: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        logits = model(x).astype(mx.float32)
        each = objective(logits, y, targets)
        if each.shape != y.shape:
            raise ValueError(f"[attack] loss must return one value an input, {y.shape}, but has shape {each.shape}")
        return each.sum(), each, logits

    differentiated = mx.value_and_grad(total)

    def gradient(x: mx.array, y: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        (_, each, logits), grad = differentiated(x, y, targets)
        return grad, each, logits

    return gradient


def compiled(step: Callable[..., Any], model: Model, compile: bool | None) -> Callable[..., Any]:
    """The step, compiled where it is wanted and can be."""
    if not compiles(model, compile):
        return step
    assert isinstance(model, nn.Module)
    state = [model.state, mx.random.state]
    return mx.compile(step, inputs=state, outputs=state)


def compiles(model: Model, compile: bool | None) -> bool:
    """Whether steps are compiled: only where the model is a module, since then all that it reads and writes is known.

    On the CPU a compiled network is no faster and a compiler takes seconds, so that None compiles on a GPU alone.
    """
    return isinstance(model, nn.Module) and (mx.default_device() == mx.gpu if compile is None else compile)


def boundaries_of(model: Model, targeted: bool) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
    """A function of ``(x, goal, rivals)``: leads ``[K, m]``, their gradients ``[K, m, d]``, and the logits ``[m, C]``.

    A lead is the logit of a rival, ``[m, K]``, less that of ``goal``; where the goal is a target: its logit less the
    best other. A boundary is where a lead is 0. What is not a number in a gradient is 0.
    """

    def lead(x: mx.array, goal: mx.array, rival: mx.array | None) -> tuple[mx.array, mx.array, mx.array]:
        logits = model(x).astype(mx.float32)
        each = -margin(logits, goal) if rival is None else of_class(logits, rival) - of_class(logits, goal)
        return each.sum(), each, logits

    differentiated = mx.value_and_grad(lead)

    def boundaries(x: mx.array, goal: mx.array, rivals: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        leads, grads = [], []
        for rival in [None] if targeted else [rivals[:, k] for k in range(rivals.shape[1])]:
            (_, each, logits), grad = differentiated(x, goal, rival)
            leads.append(each)
            grads.append(usable(grad).astype(mx.float32).reshape(len(x), -1))
        return mx.stack(leads), mx.stack(grads), logits

    return boundaries


def nearest(leads: mx.array, grads: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    """The lead ``[m]`` and the gradient ``[m, d]`` of the nearest boundary of a linear model, by the dual norm."""
    size = mx.linalg.norm(grads, axis=2) if norm == "l2" else mx.abs(grads).sum(axis=2)
    if norm == "l1":
        size = mx.abs(grads).max(axis=2)
    index = mx.argmin(mx.abs(leads) / (size + TINY), axis=0)[None]
    return mx.take_along_axis(leads, index, axis=0)[0], mx.take_along_axis(grads, index[..., None], axis=0)[0]


def largest(grad: mx.array, share: float | mx.array) -> mx.array:
    """Signs of the largest coordinates of each gradient, zeros elsewhere."""
    grad = usable(grad)
    rows = mx.abs(grad.astype(mx.float32)).reshape(len(grad), -1)
    d = rows.shape[1]
    place = mx.clip(mx.array((1 - share) * d).astype(mx.int32), 0, d - 1)
    least = mx.take_along_axis(mx.sort(rows, axis=1), mx.broadcast_to(place, (len(rows),))[:, None], axis=1)
    return mx.where(rows >= least, mx.sign(grad).reshape(rows.shape), 0).reshape(grad.shape).astype(grad.dtype)
