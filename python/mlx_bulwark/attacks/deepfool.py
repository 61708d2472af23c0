"""DeepFool: to the nearest boundary of the linearised model, again and again."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..ops.step import Norm
from .apgd import likely_classes
from .base import Array, Attack, Model, Remaining, Task, predicted
from .gradients import boundaries_of, compiled, nearest
from .losses import TINY

STRIDE = 0.5  # of the way to a boundary: whole steps pass it where the model bends, and end further away
LEAST = 1e-4  # of the bounds' width, which a step adds: halves of a way never arrive


class DeepFool(Attack):
    """The least change by steps to the nearest boundary of the model, as its gradients at each point show it.

    Fast and close to the least change, but without a search: it shows where the boundary is, not that none is nearer.
    A step goes half of the way that the published one does, and does not count values that lie on a bound and would
    leave it: what it finds is nearer.

    Args:
        eps: Changes beyond this radius are no success: a number >= 0, float32 ``[B]``, or None for no limit.
        norm: ``"l2"`` or ``"linf"``.
        steps: Steps at most; each takes one gradient a class that is looked at.
        overshoot: Share by which the change goes beyond the boundary.
        candidates: Classes that are looked at: those with the largest logits of x.
        targeted: Lead the model to the ``targets``.
        bounds: Lowest and highest value of a valid input.
        compile: Compile a step of a ``nn.Module``; None: on a GPU. A plain function is never compiled.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import DeepFool
        >>> model = lambda x: mx.stack([x[:, 0], 1 - x[:, 0]], axis=1)
        >>> found = DeepFool()(model, mx.array([[0.75, 0.5]]), mx.array([0]))
        >>> found.success.item(), round(found.distances.item(), 3)
        (True, 0.25)

    Source:
        S. Moosavi-Dezfooli, A. Fawzi, P. Frossard, "DeepFool: A Simple and Accurate Method to Fool Deep Neural
        Networks", 2016.
    """

    def __init__(
        self,
        eps: float | mx.array | None = None,
        *,
        norm: Norm = "l2",
        steps: int = 50,
        overshoot: float = 0.02,
        candidates: int = 10,
        targeted: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        compile: bool | None = None,
    ) -> None:
        super().__init__(eps=eps, norm=norm, targeted=targeted, bounds=bounds)
        if norm == "l1":
            raise self._error("norm must be 'l2' or 'linf' but is 'l1'")
        self.steps, self.candidates = self._count("steps", steps), self._count("candidates", candidates, least=2)
        self.overshoot, self.compile = self._number("overshoot", overshoot), compile

    def _perturb(self, model: Model, task: Task, key: mx.array) -> tuple[mx.array, Array]:
        rivals = task.y[:, None]  # of a targeted attack: not looked at
        queries = np.zeros(len(task), np.int32)
        if not self.targeted:
            rivals = mx.stack(likely_classes(self._logits(model, task.x), task.y, self.candidates - 1), axis=1)
            queries += 1
        step = compiled(self._step(model), model, self.compile)
        remaining, found = Remaining(len(task)), mx.array(task.x)
        shift, goal = mx.zeros(task.x.shape), task.y if task.targets is None else task.targets
        arrays = [task.x, goal, rivals]
        for _ in range(self.steps + 1):
            x, shift, classes = step(shift, arrays)
            queries[remaining.rows[remaining.alive]] += rivals.shape[1]
            fooled = np.array((classes == arrays[1]) if self.targeted else (classes != arrays[1])) & remaining.alive
            if fooled.any():
                found[mx.array(remaining.rows[fooled])] = x[mx.array(np.flatnonzero(fooled))]
                if (taken := remaining.retire(fooled)) is not None:
                    shift, *arrays = (a[taken] for a in (shift, *arrays))
                if not remaining:
                    break
            mx.async_eval(shift)
        return found, queries

    def _step(self, model: Model) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
        boundaries = boundaries_of(model, self.targeted)

        def step(shift: mx.array, arrays: list[mx.array]) -> tuple[mx.array, mx.array, mx.array]:
            origin, goal, rivals = arrays
            moved = origin.astype(mx.float32) + (1 + self.overshoot) * shift
            x = mx.clip(moved, *self.bounds).astype(origin.dtype)
            leads, grads, logits = boundaries(x, goal, rivals)
            # A value on a bound cannot go further: counted as if it could, it would take up the steps.
            rows, (low, high) = x.astype(mx.float32).reshape(len(x), -1), self.bounds
            free = mx.where(grads > 0, rows < high, rows > low)
            lead, w = nearest(leads, mx.where(free, grads, 0), self.norm)
            if self.norm == "l2":
                dual = mx.linalg.norm(w, axis=1)
                direction = w / (dual[:, None] + TINY)
            else:
                dual, direction = mx.abs(w).sum(axis=1), mx.sign(w)
            move = direction * (STRIDE * mx.abs(lead) / (dual + TINY) + LEAST * (high - low))[:, None]
            wide = origin.astype(mx.float32)
            return x, mx.clip(wide + shift + move.reshape(shift.shape), *self.bounds) - wide, predicted(logits)

        return step
