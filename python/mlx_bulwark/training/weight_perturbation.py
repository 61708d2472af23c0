"""Adversarial weight perturbation."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from .losses import check_weight
from .refusals import refuse_private

LossFunction = Callable[..., mx.array]


class AdversarialWeightPerturbation:
    """Training steps whose gradient is taken at weights that were moved against the model (AWP).

    Each weight of two axes or more moves by ``gamma`` times its own norm along the gradient of the loss; there the
    gradient of the step is taken, and the optimizer applies it to the weights as they were. One step costs two training
    passes. What the loss gets is made once, before the step: hand it adversarial inputs, or they are sought twice.

    It is refused under the privacy engine: the perturbation is made from the whole batch without noise.

    Args:
        model: The model.
        optimizer: Any MLX optimizer.
        loss_fn: ``loss_fn(model, *arrays)``, a scalar.
        gamma: Size of the perturbation relative to each weight, >= 0.

    Raises:
        ValueError: An argument has a wrong value.
        PrivacyError: The optimizer is one of a privacy engine.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> from mlx_bulwark.training import AdversarialWeightPerturbation, adversarial_inputs, adversarial_loss
        >>> model, x, y = nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> def loss_fn(model, x, y, adversarial):
        ...     return adversarial_loss(model, x, y, 0.1, adversarial=adversarial)
        >>> step = AdversarialWeightPerturbation(model, optim.SGD(0.1), loss_fn)
        >>> step(x, y, adversarial_inputs(model, x, y, 0.1, steps=3)).shape
        ()

    Source:
        D. Wu, S. Xia, Y. Wang, "Adversarial Weight Perturbation Helps Robust Generalization", 2020.
    """

    def __init__(
        self, model: nn.Module, optimizer: optim.Optimizer, loss_fn: LossFunction, *, gamma: float = 0.005
    ) -> None:
        refuse_private("AdversarialWeightPerturbation", optimizer)
        check_weight("AdversarialWeightPerturbation", "gamma", gamma)
        self.model, self.optimizer, self.gamma = model, optimizer, float(gamma)
        self._loss_and_grad = nn.value_and_grad(model, loss_fn)

    def __call__(self, *arrays: Any) -> mx.array:
        """Take one step.

        Args:
            arrays: What the loss takes after the model.

        Returns:
            array: The loss at the perturbed weights, a scalar.
        """
        weights = tree_map(lambda a: a, self.model.trainable_parameters())
        statistics = tree_map(lambda a: a, self.model.parameters())
        _, ascent = self._loss_and_grad(self.model, *arrays)
        self.model.update(statistics)  # this pass leaves no trace in the running statistics of batch norm
        self.model.update(tree_map(self._perturbed, weights, ascent))
        loss: mx.array
        loss, gradients = self._loss_and_grad(self.model, *arrays)
        self.model.update(weights)
        self.optimizer.update(self.model, gradients)
        return loss

    def _perturbed(self, weight: mx.array, gradient: mx.array) -> mx.array:
        if weight.ndim < 2:
            return weight
        wide, ascent = weight.astype(mx.float32), gradient.astype(mx.float32)
        ascent = ascent / mx.maximum(mx.abs(ascent).max(), 1e-30)  # the squares of small gradients vanish
        length = mx.linalg.norm(ascent.reshape(-1))
        direction = mx.where(length > 0, ascent / length, 0)
        return (wide + self.gamma * mx.linalg.norm(wide.reshape(-1)) * direction).astype(weight.dtype)
