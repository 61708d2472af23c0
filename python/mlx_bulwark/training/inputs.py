"""Adversarial inputs for a training step: the inner maximisation, as part of its graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..attacks.losses import cross_entropy
from ..ops.noise import FLOATS
from ..ops.step import Norm, projected_step
from ..ops.step import random_start as start_in_ball
from ..smoothing.bounds import check_count

Model = Callable[[mx.array], mx.array]
Eps = float | mx.array


def adversarial_inputs(
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
    key: mx.array | None = None,
) -> mx.array:
    """Projected gradient ascent of the cross-entropy: what adversarial training trains on.

    Takes all its steps for all inputs and asks nothing of the host, so that it is part of a compiled training step.
    The attacks of `mlx_bulwark.attacks` are for evaluation: they judge, and retire what they have broken.

    The model is in evaluation mode meanwhile, as in the code of TRADES and MART: dropout is off, batch norm uses its
    running statistics and does not move them, and each row depends on itself alone.

    Args:
        model: Takes ``[b, *shape]``, returns logits ``[b, c]``.
        x: Inputs ``[b, *shape]`` within ``bounds``, float32, float16 or bfloat16.
        y: Classes ``[b]``, integers.
        eps: Radius of the ball, in the unit of ``x``: a number, or float32 ``[b]``, one an input.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: Steps, each a forward and a backward pass.
        alpha: Length of a step in the same norm, by default ``2.5 * eps / steps``.
        bounds: Lowest and highest value of an input.
        random_start: Start from random places of the ball, not from the inputs.
        key: Key of ``mx.random``; by default its global state.

    Returns:
        array: Of the shape and dtype of ``x``; a constant of a derivative.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.training import adversarial_inputs
        >>> x, y = mx.full((8, 4), 0.5), mx.zeros(8, mx.int32)
        >>> worst = adversarial_inputs(nn.Linear(4, 3), x, y, 0.125, steps=5)
        >>> mx.abs(worst - x).max().item()
        0.125

    Source:
        A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018.
    """
    check_batch("adversarial_inputs", x, y)
    return ascend(
        model,
        x,
        lambda logits: cross_entropy(logits, y),
        eps,
        norm=norm,
        steps=steps,
        alpha=alpha,
        bounds=bounds,
        random_start=random_start,
        key=key,
    )


def ascend(
    model: Model,
    x: mx.array,
    objective: Callable[[mx.array], mx.array],
    eps: Eps,
    *,
    norm: Norm,
    steps: int,
    alpha: Eps | None,
    bounds: tuple[float, float] | None,
    random_start: bool,
    key: mx.array | None,
) -> mx.array:
    """Inputs of the ball that raise an objective of float32 logits, ``[b]``; one pass a step."""
    check_count("adversarial_inputs", "steps", steps)
    length = 2.5 * eps / steps if alpha is None else alpha
    found = start_in_ball(x, eps, norm, bounds, seed=fresh_key(key)) if random_start else mx.stop_gradient(x)
    gradient = mx.grad(lambda inputs: objective(logits_of(model, inputs)).sum())
    with evaluation_mode(model):
        for _ in range(steps):
            found = projected_step(found, gradient(found), x, eps, length, norm, bounds)
    return mx.stop_gradient(found)


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.eval()
    try:
        yield
    finally:
        for module, training in modes:  # parents come before their children, whose own mode so has the last word
            module.train(training)


def logits_of(model: Model, x: mx.array) -> mx.array:
    """Logits in float32."""
    return model(x).astype(mx.float32)


def fresh_key(key: mx.array | None) -> mx.array:
    """The key, or one drawn from the global state, which a compiled step has among its inputs."""
    return mx.random.randint(0, 1 << 31, (2,), mx.uint32) if key is None else key


def check_batch(where: str, x: Any, y: Any) -> None:
    """Refuse what is no batch of inputs and classes."""
    if not isinstance(x, mx.array) or x.dtype not in FLOATS or x.ndim < 2:
        has = f"{x.dtype} of shape {x.shape}" if isinstance(x, mx.array) else f"type {type(x).__name__}"
        raise ValueError(f"[{where}] x must be a float32, float16 or bfloat16 array [b, *shape] but has {has}")
    if not isinstance(y, mx.array) or not mx.issubdtype(y.dtype, mx.integer) or y.shape != (len(x),):
        has = f"{y.dtype} of shape {y.shape}" if isinstance(y, mx.array) else f"type {type(y).__name__}"
        raise ValueError(f"[{where}] y must be {len(x)} integers, one for each row of x, but has {has}")
