"""Projected gradient descent, and its single step."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.step import Norm, projected_step, random_start, usable
from .base import Array, Attack, Model, Remaining, Task, predicted
from .gradients import compiled, largest, objective_of, with_gradient
from .losses import Loss, LossName

L1_SHARE = 0.01  # of the coordinates that a step in L1 moves, at least one: steps along all of them go nowhere


class PGD(Attack):
    """Projected gradient ascent of a loss, from random starts (Madry et al.), with momentum if wanted (MI-FGSM).

    A step in L1 moves the hundredth of the coordinates that have the largest gradients (sparse L1 descent).
    An input is done as soon as one of its steps fools the model, unless ``early_stop`` is off.

    Args:
        eps: Radius of the ball, in the unit of the input: a number >= 0, or float32 ``[B]``.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: Steps from each start, each a forward and a backward pass.
        alpha: Length of a step in the same norm, in the unit of the input; by default ``2.5 * eps / steps``.
        restarts: Starts; later ones are given to the inputs that still resist.
        random_start: Start from random places of the ball; without, the first start is the input itself.
        momentum: Share of the past gradients in a step, 0 for none, 1 for MI-FGSM.
        targeted: Lower the loss of the ``targets`` instead of raising that of ``y``.
        bounds: Lowest and highest value of a valid input.
        loss: ``"cross_entropy"``, ``"margin"``, ``"dlr"``, or a function of logits ``[B, C]`` and classes ``[B]`` that
            returns ``[B]``.
        early_stop: End each input at its first success. Without, all steps are taken and the last one counts, as
            attacks that are transferred to another model want it.
        seed: Of the random starts.
        compile: Compile a step of a ``nn.Module``; None: on a GPU. A plain function is never compiled.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import PGD
        >>> model = lambda x: mx.stack([x[:, 0], 1 - x[:, 0]], axis=1)
        >>> x, y = mx.array([[0.6, 0.5], [0.9, 0.5]]), mx.array([0, 0])
        >>> found = PGD(eps=0.2, steps=5)(model, x, y)
        >>> found.success.tolist(), found.adversarial[1].tolist() == x[1].tolist()
        ([True, False], True)

    Source:
        A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018; Y. Dong et al.,
        "Boosting Adversarial Attacks with Momentum", 2018; F. Tramer, D. Boneh, "Adversarial Training and Robustness
        for Multiple Perturbations", 2019 (L1).
    """

    _stretch = 2.5  # how often all steps together would cross the radius

    def __init__(
        self,
        eps: float | mx.array,
        *,
        norm: Norm = "linf",
        steps: int = 40,
        alpha: float | None = None,
        restarts: int = 1,
        random_start: bool = True,
        momentum: float = 0.0,
        targeted: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        loss: LossName | Loss = "cross_entropy",
        early_stop: bool = True,
        seed: int = 0,
        compile: bool | None = None,
    ) -> None:
        super().__init__(eps=eps, norm=norm, targeted=targeted, bounds=bounds, seed=seed)
        if eps is None:
            raise self._error("eps must be a number or float32 [B] but is None")
        self.steps, self.restarts = self._count("steps", steps), self._count("restarts", restarts)
        self.alpha = None if alpha is None else self._number("alpha", alpha)
        self.momentum = self._number("momentum", momentum)
        self.random_start, self.early_stop, self.compile = bool(random_start), bool(early_stop), compile
        self._objective = objective_of(type(self).__name__, loss, self.targeted)

    def _perturb(self, model: Model, task: Task, key: mx.array) -> tuple[mx.array, Array]:
        step = self._step(model)
        best, queries = mx.array(task.x), np.zeros(len(task), np.int32)
        resisting = np.arange(len(task))
        for restart, start_key in enumerate(mx.random.split(key, self.restarts)):
            rows, start = mx.array(resisting), task.x
            if self.random_start or restart:
                start = random_start(task.x, task.eps, self.norm, self.bounds, seed=start_key)
            run = task.take(rows)
            found, spent = self._run(step, run, start[rows])
            best[rows] = found
            queries[resisting] += spent
            if restart + 1 < self.restarts:
                queries[resisting] += 1
                resisting = resisting[~np.array(run.reached(self._logits(model, found)))]
                if not len(resisting):
                    break
        return best, queries

    def _step(self, model: Model) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
        gradient = with_gradient(model, self._objective)

        def step(x: mx.array, velocity: mx.array, task: list[mx.array]) -> tuple[mx.array, mx.array, mx.array]:
            origin, y, targets, eps, alpha = task
            grad, _, logits = gradient(x, y, targets)
            if self.momentum:
                velocity = self.momentum * velocity + _by_l1(grad)
                grad = velocity.astype(x.dtype)
            if self.norm == "l1":
                grad = largest(grad, L1_SHARE)
            return projected_step(x, grad, origin, eps, alpha, self.norm, self.bounds), velocity, predicted(logits)

        return compiled(step, model, self.compile)

    def _run(self, step: Callable[..., Any], task: Task, x: mx.array) -> tuple[mx.array, Array]:
        """The first success of each input, or where its last step ends."""
        remaining, best, queries = Remaining(len(task)), mx.array(x), np.zeros(len(task), np.int32)
        velocity = mx.zeros(x.shape if self.momentum else (len(x),))
        alpha = self._stretch * task.eps / self.steps if self.alpha is None else mx.full(task.eps.shape, self.alpha)
        goal = task.y if task.targets is None else task.targets
        arrays = [task.x, task.y, goal, task.eps, alpha]
        for _ in range(self.steps):
            following, velocity, found = step(x, velocity, arrays)
            queries[remaining.rows[remaining.alive]] += 1
            if self.early_stop:
                fooled = np.array((found == arrays[2]) if self.targeted else (found != arrays[1])) & remaining.alive
                if fooled.any():
                    best[mx.array(remaining.rows[fooled])] = x[mx.array(np.flatnonzero(fooled))]
                    if (taken := remaining.retire(fooled)) is not None:
                        following, velocity, *arrays = (a[taken] for a in (following, velocity, *arrays))
                    if not remaining:
                        return best, queries
            x = following
            mx.async_eval(x, velocity)
        last = np.flatnonzero(remaining.alive)
        best[mx.array(remaining.rows[last])] = x[mx.array(last)]
        return best, queries


def _by_l1(grad: mx.array) -> mx.array:
    """Gradients over their mean size, float32; zeros where there are none."""
    rows = usable(grad).astype(mx.float32).reshape(len(grad), -1)
    size = mx.abs(rows).mean(axis=1, keepdims=True)
    return mx.where(size > 0, rows / size, 0).reshape(grad.shape)
