"""The fast gradient method."""

import mlx.core as mx

from ..ops.step import Norm
from .losses import Loss, LossName
from .pgd import PGD


class FGSM(PGD):
    """One step of the radius' length along the gradient, from the input itself.

    Args:
        eps: Radius of the ball and length of the step, in the unit of the input: a number >= 0, or float32 ``[B]``.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        random_start: Start from a random place of the ball.
        targeted: Lower the loss of the ``targets`` instead of raising that of ``y``.
        bounds: Lowest and highest value of a valid input.
        loss: ``"cross_entropy"``, ``"margin"``, ``"dlr"``, or a function of logits ``[B, C]`` and classes ``[B]`` that
            returns ``[B]``.
        seed: Of the random start.
        compile: Compile the step of a ``nn.Module``; None: on a GPU. A plain function is never compiled.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import FGSM
        >>> model = lambda x: mx.stack([x[:, 0], 1 - x[:, 0]], axis=1)
        >>> found = FGSM(eps=0.25)(model, mx.array([[0.625, 0.5]]), mx.array([0]))
        >>> found.success.tolist(), found.adversarial.tolist()
        ([True], [[0.375, 0.5]])

    Source:
        I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and Harnessing Adversarial Examples", 2015.
    """

    _stretch = 1.0

    def __init__(
        self,
        eps: float | mx.array,
        *,
        norm: Norm = "linf",
        random_start: bool = False,
        targeted: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        loss: LossName | Loss = "cross_entropy",
        seed: int = 0,
        compile: bool | None = None,
    ) -> None:
        super().__init__(
            eps,
            norm=norm,
            steps=1,
            random_start=random_start,
            targeted=targeted,
            bounds=bounds,
            loss=loss,
            early_stop=False,
            seed=seed,
            compile=compile,
        )
