"""Attacks that are made on one model and used against another."""

import copy

import mlx.core as mx

from .base import Array, Attack, Model, Task, check_model


class Transfer(Attack):
    """Adversarial inputs that an attack makes on a surrogate, judged by the model that is attacked.

    The model is asked twice, for the input and for what the surrogate gave: whoever has no access to gradients can do
    as much. All steps are taken on the surrogate where the attack lets one choose (``early_stop``): what barely fools
    one model seldom fools another. Radius, norm, bounds and goal are those of the attack.

    Args:
        attack: Any attack of this package.
        surrogate: The model that it is made on, as ``model`` of ``Attack``.

    Raises:
        ValueError: The surrogate is in training mode although it must not be.
        TypeError: An argument has a wrong type.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import FGSM, Transfer
        >>> model = lambda x: mx.stack([x[:, 0], 1 - x[:, 0]], axis=1)
        >>> surrogate = lambda x: 10 * model(x) + 1
        >>> found = Transfer(FGSM(eps=0.25), surrogate)(model, mx.array([[0.625, 0.5]]), mx.array([0]))
        >>> found.success.tolist(), found.queries.tolist()
        ([True], [2])

    Source:
        N. Papernot, P. McDaniel, I. Goodfellow, "Transferability in Machine Learning", 2016.
    """

    def __init__(self, attack: Attack, surrogate: Model) -> None:
        if not isinstance(attack, Attack):
            raise TypeError(f"[Transfer] attack must be an Attack but has type {type(attack).__name__}")
        check_model("Transfer", surrogate)
        super().__init__(
            eps=attack.eps, norm=attack.norm, targeted=attack.targeted, bounds=attack.bounds, seed=attack.seed
        )
        self.attack, self.surrogate = copy.copy(attack), surrogate
        if hasattr(attack, "early_stop"):
            self.attack.early_stop = False  # type: ignore[attr-defined]

    def _perturb(self, model: Model, task: Task, key: mx.array) -> tuple[mx.array, Array]:
        check_model("Transfer", self.surrogate)
        found, queries = self.attack._perturb(self.surrogate, task, key)
        return found, 0 * queries
