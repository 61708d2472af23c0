"""Auto-PGD: projected gradient ascent whose step lengths follow from its own progress."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..ops.step import Norm, projected_step
from .base import Array, Attack, Model, Remaining, Task, column, predicted
from .gradients import Objective, compiled, largest, objective_of, with_gradient
from .losses import Loss, LossName, dlr_targeted

MOMENTUM = 0.75  # share of the new step; the rest repeats the last one
PROGRESS = 0.75  # share of a window's steps that must improve, or the step is halved
FIRST_WINDOW, SHORTER, SHORTEST = 22, 3, 6  # percent of the steps

# Of L1: the step moves the largest coordinates of the gradient, their number follows from the best point's support.
L1_WINDOW = 4  # percent of the steps
L1_SHARE, L1_GROWTH, L1_SETTLED, L1_SHRINK, L1_SHORTEST = 0.2, 1.5, 0.95, 1.5, 10.0
L1_RADII = ((3.0, 30), (2.0, 30), (1.0, 40))  # multiples of the radius, and their percent of the steps


class _State(NamedTuple):
    """One run; every array has one row an input."""

    x: mx.array
    old: mx.array  # the point before x
    grad: mx.array  # at x
    loss: mx.array  # at the last point that was tried
    best: mx.array
    best_grad: mx.array
    best_loss: mx.array
    best_before: mx.array  # best_loss at the last checkpoint
    halved: mx.array  # whether the step was halved there
    improved: mx.array  # steps since then that raised the loss
    length: mx.array  # of a step
    share: mx.array  # of the coordinates that a step moves in L1
    support: mx.array  # coordinates of the best point that differed from the input's at the last checkpoint


class APGD(Attack):
    """Auto-PGD: the step starts at twice the radius and is halved at checkpoints where too few steps made progress.

    Checkpoints, momentum and rules are the published ones and there is nothing to tune. In L1 the step follows the
    sparsity of the best point, and the radius shrinks to ``eps`` in three stages, as published. An input is done at its
    first success.

    Args:
        eps: Radius of the ball, in the unit of the input: a number >= 0, or float32 ``[B]``.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: Steps from each start.
        restarts: Starts; later ones are given to the inputs that still resist.
        loss: ``"cross_entropy"``, ``"dlr"``, ``"margin"``, or a function of logits ``[B, C]`` and classes ``[B]`` that
            returns ``[B]``. A targeted attack with ``"dlr"`` raises the targeted form.
        target_classes: Try as many of the most likely other classes one after the other, each by the targeted
            difference of logits ratio in place of ``loss``; any wrong class is a success (APGD-T). Wants C >= 4.
        targeted: Lower the loss of the ``targets`` instead of raising that of ``y``.
        bounds: Lowest and highest value of a valid input.
        random_start: Start on the surface of the ball; without, the first start is the input itself.
        seed: Of the random starts.
        compile: Compile a step of a ``nn.Module``; None: on a GPU. A plain function is never compiled.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import APGD
        >>> model = lambda x: mx.stack([x[:, 0], 1 - x[:, 0]], axis=1)
        >>> APGD(eps=0.2, steps=20)(model, mx.array([[0.6, 0.5], [0.9, 0.5]]), mx.array([0, 0])).success.tolist()
        [True, False]

    Source:
        F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks", 2020; F. Croce, M. Hein, "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers",
        2021.
    """

    def __init__(
        self,
        eps: float | mx.array,
        *,
        norm: Norm = "linf",
        steps: int = 100,
        restarts: int = 1,
        loss: LossName | Loss = "cross_entropy",
        target_classes: int | None = None,
        targeted: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        random_start: bool = True,
        seed: int = 0,
        compile: bool | None = None,
    ) -> None:
        super().__init__(eps=eps, norm=norm, targeted=targeted, bounds=bounds, seed=seed)
        if eps is None:
            raise self._error("eps must be a number or float32 [B] but is None")
        self.steps, self.restarts = self._count("steps", steps), self._count("restarts", restarts)
        self.random_start, self.compile = bool(random_start), compile
        self._objective = objective_of(type(self).__name__, loss, self.targeted)
        self.target_classes = None
        if target_classes is not None:
            self.target_classes = self._count("target_classes", target_classes)
            if self.targeted:
                raise self._error("target_classes must not be given to a targeted attack but is too")
            self._objective = dlr_targeted

    def _perturb(self, model: Model, task: Task, key: mx.array) -> tuple[mx.array, Array]:
        queries = np.zeros(len(task), np.int32)
        targets = [task.y if task.targets is None else task.targets]
        if self.target_classes is not None:
            targets = likely_classes(self._logits(model, task.x), task.y, self.target_classes)
            queries += 1
        climb = _Climb(model, self._objective, self)
        best, resisting = mx.array(task.x), np.arange(len(task))
        keys = mx.random.split(key, len(targets) * self.restarts)
        for i, start_key in enumerate(keys):
            rows = mx.array(resisting)
            run = task.take(rows)
            found, success, spent = climb.run(
                run, targets[i // self.restarts][rows], start_key, plain=i % self.restarts == 0
            )
            best[rows] = found
            queries[resisting] += spent
            resisting = resisting[~success]
            if not len(resisting):
                break
        return best, queries


def likely_classes(logits: mx.array, y: mx.array, count: int) -> list[mx.array]:
    """The most likely classes but ``y``, best first, int32 ``[B]`` each."""
    own = mx.arange(logits.shape[1]) == y[:, None]
    order = mx.argsort(mx.where(own, mx.inf, -logits), axis=1).astype(mx.int32)
    return [order[:, i] for i in range(min(count, logits.shape[1] - 1))]


def checkpoints(steps: int) -> Iterator[int]:
    """The steps after which progress is judged: p_1 = .22, p_(j+1) = p_j + max(p_j - p_(j-1) - .03, .06)."""
    place, window = 0, FIRST_WINDOW
    while place + window <= 100:
        place += window
        yield -(-place * steps // 100)
        window = max(window - SHORTER, SHORTEST)


class _Climb:
    """Runs of one attack against one model."""

    def __init__(self, model: Model, objective: Objective, attack: APGD) -> None:
        self.attack, self.norm, self.bounds = attack, attack.norm, attack.bounds
        self._gradient = with_gradient(model, objective)
        self._measure = compiled(self._gradient_and_class, model, attack.compile)
        self._step = compiled(self._advance, model, attack.compile)

    def run(self, task: Task, targets: mx.array, key: mx.array, *, plain: bool) -> tuple[mx.array, Array, Array]:
        """The first success of each input or its best point, which of the two, and the passes spent."""
        attack = self.attack
        start = task.x if plain and not attack.random_start else self._start(task, key)
        if self.norm != "l1":
            return self._stage(task, targets, start, attack.steps)
        queries, left, found, success = np.zeros(len(task), np.int32), attack.steps, start, np.zeros(len(task), bool)
        for scale, percent in L1_RADII:
            steps = min(left, -(-attack.steps * percent // 100)) if scale > 1 else left
            left -= steps
            if steps:
                wide = Task(task.x, task.y, task.targets, scale * task.eps)
                found, success, spent = self._stage(
                    wide, targets, self._projected(found, wide), steps, may_stop=scale == 1
                )
                queries += spent
        return found, success, queries

    def _start(self, task: Task, key: mx.array) -> mx.array:
        if self.norm == "linf":
            shift = mx.random.uniform(-1, 1, task.x.shape, key=key)
            size = mx.abs(shift).reshape(len(task), -1).max(axis=1)
        else:
            shift = mx.random.normal(task.x.shape, key=key)
            size = mx.linalg.norm(shift.reshape(len(task), -1), axis=1)
        if self.norm != "l1":
            shift = shift * column(task.eps / size, shift)
        return self._projected((task.x.astype(mx.float32) + shift).astype(task.x.dtype), task)

    def _projected(self, x: mx.array, task: Task) -> mx.array:
        return projected_step(x, mx.zeros_like(x), task.x, task.eps, 0.0, self.norm, self.bounds)

    def _stage(
        self, task: Task, targets: mx.array, start: mx.array, steps: int, may_stop: bool = True
    ) -> tuple[mx.array, Array, Array]:
        remaining, arrays = Remaining(len(task)), [task.x, task.y, targets, task.eps]
        goal = task.y if task.targets is None else task.targets
        found, success, queries = mx.array(start), np.zeros(len(task), bool), np.ones(len(task), np.int32)
        grad, loss, classes = self._measure(start, task.y, targets)
        state = self._first(task, start, grad, loss)
        checks = set(range(0, steps, max(L1_WINDOW * steps // 100, 1)) if self.norm == "l1" else checkpoints(steps))
        for i in range(steps + 1):
            if i:
                state, classes = self._step(state, mx.array(MOMENTUM if i > 1 else 1.0), arrays)
                state = _State(*state)
                queries[remaining.rows[remaining.alive]] += 1
            tried = state.x
            if i in checks and 0 < i < steps:
                state = self._checked(state, arrays, i - max((c for c in checks if c < i), default=0))
            if may_stop:
                fooled = np.array((classes == goal) if self.attack.targeted else (classes != goal)) & remaining.alive
                if fooled.any():
                    rows, places = remaining.rows[fooled], mx.array(np.flatnonzero(fooled))
                    found[mx.array(rows)], success[rows] = tried[places], True
                    if (taken := remaining.retire(fooled)) is not None:
                        state, goal = _State(*(a[taken] for a in state)), goal[taken]
                        arrays = [a[taken] for a in arrays]
                    if not remaining:
                        return found, success, queries
            mx.async_eval(*state)
        last = np.flatnonzero(remaining.alive)
        found[mx.array(remaining.rows[last])] = state.best[mx.array(last)]
        return found, success, queries

    def _first(self, task: Task, x: mx.array, grad: mx.array, loss: mx.array) -> _State:
        zeros = mx.zeros(len(task))
        length = (1.0 if self.norm == "l1" else 2.0) * task.eps
        support = _support(x, task.x)
        size = max(x[0].size, 1)
        share = mx.where(support > 0, support / size / L1_GROWTH, L1_SHARE)
        return _State(x, x, grad, loss, x, grad, loss, loss, zeros + 1, zeros, length, share, support)

    def _gradient_and_class(self, x: mx.array, y: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        grad, loss, logits = self._gradient(x, y, targets)
        return grad, mx.where(mx.isnan(loss), -mx.inf, loss), predicted(logits)

    def _advance(self, state: Any, momentum: mx.array, arrays: list[mx.array]) -> tuple[list[mx.array], mx.array]:
        s, (origin, y, targets, eps) = _State(*state), arrays
        if self.norm == "l1":
            x = projected_step(s.x, largest(s.grad, s.share), origin, eps, s.length, self.norm, self.bounds)
        else:
            x = projected_step(s.x, s.grad, origin, eps, s.length, self.norm, self.bounds)
            wide = s.x.astype(mx.float32)
            mixed = wide + momentum * (x - wide) + (1 - momentum) * (wide - s.old)
            x = projected_step(mixed.astype(x.dtype), s.grad, origin, eps, 0.0, self.norm, self.bounds)
        grad, loss, classes = self._gradient_and_class(x, y, targets)
        better = loss > s.best_loss
        following = s._replace(
            x=x,
            old=s.x,
            grad=grad,
            loss=loss,
            best=mx.where(column(better, x), x, s.best),
            best_grad=mx.where(column(better, x), grad, s.best_grad),
            best_loss=mx.where(better, loss, s.best_loss),
            improved=s.improved + (loss > s.loss),
        )
        return list(following), classes

    def _checked(self, s: _State, arrays: list[mx.array], window: int) -> _State:
        """What a checkpoint changes."""
        origin, eps = arrays[0], arrays[3]
        if self.norm != "l1":
            stuck = mx.logical_and(s.halved == 0, s.best_before >= s.best_loss)
            back = mx.logical_or(s.improved <= PROGRESS * window, stuck)
            s = s._replace(
                length=mx.where(back, s.length / 2, s.length),
                halved=back.astype(mx.float32),
                best_before=s.best_loss,
                improved=mx.zeros_like(s.improved),
            )
        else:
            support = _support(s.best, origin)
            back = support < L1_SETTLED * s.support
            length = mx.maximum(mx.where(back, eps, s.length / L1_SHRINK), eps / L1_SHORTEST)
            s = s._replace(length=length, share=support / max(origin[0].size, 1) / L1_GROWTH, support=support)
        wide = column(back, s.x)
        return s._replace(x=mx.where(wide, s.best, s.x), grad=mx.where(wide, s.best_grad, s.grad))


def _support(x: mx.array, origin: mx.array) -> mx.array:
    """How many coordinates differ, float32 ``[B]``."""
    return (x != origin).reshape(len(x), -1).sum(axis=1).astype(mx.float32)
