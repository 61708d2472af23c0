"""Adversarial training under the privacy engine: an example and its adversarial twin are one unit."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..ops.step import Norm
from .inputs import adversarial_inputs, check_batch

Twins = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]


def adversarial_twins(
    model: nn.Module,
    eps: float,
    *,
    norm: Norm = "linf",
    steps: int = 10,
    alpha: float | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    random_start: bool = True,
) -> Twins:
    """Turn the second of every two copies into an adversarial input: private adversarial training.

    Give it to ``engine.batches(data, augment=..., multiplicity=2)``: the engine then holds an example and its twin for
    one unit, and averages their gradients before the one clip. The guarantee stays that of the engine: a twin depends
    on its own example, on the weights, which are noised, and on random numbers of its own; the attack runs in
    evaluation mode, sums the loss of the rows, and nothing in it mixes them.

    Free adversarial training, adversarial weight perturbation and universal perturbations do mix them, and are refused
    under the engine; ``engine.check`` finds what a loss of one's own mixes. `trades_loss` and `mart_loss` can be
    private too, where one row holds the clean and the adversarial input:
    ``trades_loss(model, x, y, eps, adversarial=twin, reduction="none")``.

    Args:
        model: The model that is trained; its weights at the time of each batch count.
        eps: Radius of the ball, in the unit of the input: a number.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: Steps of the attack.
        alpha: Length of a step in the same norm, by default ``2.5 * eps / steps``.
        bounds: Lowest and highest value of an input.
        random_start: Start from random places of the ball, not from the inputs.

    Returns:
        A function of inputs ``[p, *shape]`` and classes ``[p]``, each twice in a row, that returns them with every
        second input adversarial.

    Raises:
        ValueError: (from the function) An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim, numpy as np, mlx_bulwark as bw
        >>> from mlx_bulwark.training import adversarial_twins
        >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
        >>> model, optimizer = nn.Linear(4, 2), engine.wrap(optim.SGD(0.1))
        >>> def loss_fn(model, x, y):
        ...     return nn.losses.cross_entropy(model(x), y, reduction="none")
        >>> step = engine.compiled_step(model, optimizer, loss_fn)
        >>> data = np.zeros((100, 4), np.float32), np.zeros(100, np.int32)
        >>> twins = adversarial_twins(model, 0.1, steps=3)
        >>> for batch in engine.batches(data, steps=2, augment=twins, multiplicity=2):
        ...     mx.eval(step(batch), model.state, optimizer.state, engine.state)

    Source:
        A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018; S. De et al., "Unlocking
        High-Accuracy Differentially Private Image Classification through Scale", 2022.
    """

    def perturbed(x: mx.array, y: mx.array) -> mx.array:
        return adversarial_inputs(
            model, x, y, eps, norm=norm, steps=steps, alpha=alpha, bounds=bounds, random_start=random_start
        )

    state = [model.state, mx.random.state]
    run = mx.compile(perturbed, inputs=state, outputs=[mx.random.state])

    def twins(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        check_batch("adversarial_twins", x, y)
        both = mx.array(x)
        both[1::2] = run(x[1::2], y[1::2])
        return both, y

    return twins
