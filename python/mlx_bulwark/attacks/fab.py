"""Fast adaptive boundary attack: the least change, by steps onto boundaries within the bounds."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..ops.step import Norm
from .apgd import likely_classes
from .base import SLACK, Array, Attack, Model, Remaining, Task, column, predicted
from .gradients import boundaries_of, compiled, compiles, nearest
from .losses import TINY

ROUNDS = 12  # of Newton's method, which ends after a few; before its end a move is too short, never too long
LEAST = 1e-8  # of a distance
FINAL = 10  # halvings between the input and what was found


class FAB(Attack):
    """The least change in a norm: steps onto the nearest boundary of the linearised model, held close to the input.

    Each step lands on the hyperplane that stands for the boundary, by the shortest way that stays in the bounds, from
    the current point and from the input; between the two it goes on. Behind the boundary it turns back towards the
    input. The loss has no part in it, so that masked gradients of a loss do not stop it.

    Args:
        eps: Radius of the ball: a number >= 0, or float32 ``[B]``; an input is done as soon as a change inside is
            found. None: take all steps and return the least change, halved in on along the way to the input.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: Steps from each start, each a forward and a backward pass and one more forward pass.
        restarts: Starts; later ones are from random places, given to the inputs that still resist.
        target_classes: Try as many of the most likely other classes one after the other (FAB-T). None: in each step the
            nearest boundary of all classes, for a gradient a class.
        targeted: Lead the model to the ``targets``; ``target_classes`` plays no part.
        bounds: Lowest and highest value of a valid input.
        alpha_max: Largest share of the step from the input.
        eta: How far a step overshoots the boundary, >= 1.
        beta: What is kept of the change when the boundary is crossed, in (0, 1).
        seed: Of the random starts.
        compile: Compile a step of a ``nn.Module``; None: on a GPU. A plain function is never compiled.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import FAB
        >>> model = lambda x: mx.stack([x[:, 0], 1 - x[:, 0]], axis=1)
        >>> found = FAB(norm="l2", steps=20)(model, mx.array([[0.75, 0.5]]), mx.array([0]))
        >>> found.success.item(), 0.25 < found.distances.item() < 0.2501
        (True, True)

    Source:
        F. Croce, M. Hein, "Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack", 2020.
    """

    def __init__(
        self,
        eps: float | mx.array | None = None,
        *,
        norm: Norm = "linf",
        steps: int = 100,
        restarts: int = 1,
        target_classes: int | None = 9,
        targeted: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        seed: int = 0,
        compile: bool | None = None,
    ) -> None:
        super().__init__(eps=eps, norm=norm, targeted=targeted, bounds=bounds, seed=seed)
        self.steps, self.restarts = self._count("steps", steps), self._count("restarts", restarts)
        self.target_classes = None if target_classes is None else self._count("target_classes", target_classes)
        self.alpha_max, self.eta = self._number("alpha_max", alpha_max), self._number("eta", eta, least=1.0)
        self.beta, self.compile = self._number("beta", beta, above=True), compile
        if self.beta >= 1:
            raise self._error(f"beta must be in (0, 1) but is {beta!r}")

    def _perturb(self, model: Model, task: Task, key: mx.array) -> tuple[mx.array, Array]:
        queries = np.ones(len(task), np.int32)
        rivals = self._rivals(self._logits(model, task.x), task)
        step = compiled(self._step(model, not compiles(model, self.compile)), model, self.compile)
        best, best_size = mx.array(task.x), mx.full((len(task),), mx.inf)
        resisting = np.arange(len(task))
        keys = mx.random.split(key, len(rivals) * self.restarts)
        for i, start_key in enumerate(keys):
            rows = mx.array(resisting)
            run = task.take(rows)
            start = self._start(run, best_size[rows], start_key) if i % self.restarts else run.x
            arrays = [best[rows], best_size[rows], rivals[i // self.restarts][rows]]
            found, size, spent = self._run(step, run, start, *arrays)
            best[rows], best_size[rows] = found, size
            queries[resisting] += spent
            if self.eps is not None:
                resisting = resisting[np.array(size > run.eps)]
                if not len(resisting):
                    break
        if self.eps is None:
            best = self._searched(model, task, best)
            queries += FINAL
        return best, queries

    def _searched(self, model: Model, task: Task, best: mx.array) -> mx.array:
        """Bisection between the input and the best point."""
        low, high = mx.zeros(len(task)), mx.ones(len(task))
        origin, shift = task.x.astype(mx.float32), best.astype(mx.float32) - task.x.astype(mx.float32)
        found = best
        for _ in range(FINAL):
            middle = (low + high) / 2
            x = (origin + column(middle, shift) * shift).astype(task.x.dtype)
            fooled = task.reached(self._logits(model, x))
            found = mx.where(column(fooled, x), x, found)
            low, high = mx.where(fooled, low, middle), mx.where(fooled, middle, high)
            mx.async_eval(found, low, high)
        return found

    def _rivals(self, logits: mx.array, task: Task) -> list[mx.array]:
        """Of each run the classes ``[n, K]`` whose boundaries count."""
        if self.targeted:
            return [task.y[:, None]]  # not looked at
        likely = likely_classes(logits, task.y, self.target_classes or logits.shape[1])
        return [c[:, None] for c in likely] if self.target_classes else [mx.stack(likely, axis=1)]

    def _start(self, task: Task, best_size: mx.array, key: mx.array) -> mx.array:
        """A random place, half as far away as the radius or what was found."""
        limit = mx.minimum(best_size, task.eps)
        shift = mx.random.normal(task.x.shape, key=key)
        if self.norm == "linf":
            shift = mx.random.uniform(-1, 1, task.x.shape, key=key)
        far = mx.where(mx.isfinite(limit), limit / 2, 0)
        moved = task.x + column(far / (_size(shift, self.norm) + TINY), shift) * shift
        return mx.clip(moved, *self.bounds).astype(task.x.dtype)

    def _run(
        self,
        step: Callable[..., list[mx.array]],
        task: Task,
        x: mx.array,
        best: mx.array,
        size: mx.array,
        rivals: mx.array,
    ) -> tuple[mx.array, mx.array, Array]:
        """What is nearest so far, how far it is, and the passes spent."""
        remaining, queries = Remaining(len(task)), np.zeros(len(task), np.int32)
        found, found_size = mx.array(best), mx.array(size)
        goal = task.y if task.targets is None else task.targets
        state, arrays = [x, best, size], [task.x, goal, rivals, task.eps]
        for i in range(self.steps):
            state = step(state, arrays)
            queries[remaining.rows[remaining.alive]] += rivals.shape[1] + 1
            mx.async_eval(*state)
            done = remaining.alive & (i + 1 == self.steps)
            if self.eps is not None:
                done |= remaining.alive & np.array(state[2] <= arrays[3])
            if done.any():
                rows, places = mx.array(remaining.rows[done]), mx.array(np.flatnonzero(done))
                found[rows], found_size[rows] = state[1][places], state[2][places]
                if (taken := remaining.retire(done)) is not None:
                    state, arrays = [a[taken] for a in state], [a[taken] for a in arrays]
                if not remaining:
                    break
        return found, found_size, queries

    def _step(self, model: Model, early: bool) -> Callable[..., list[mx.array]]:
        boundaries, (low, high) = boundaries_of(model, self.targeted), self.bounds

        def step(state: list[mx.array], arrays: list[mx.array]) -> list[mx.array]:
            (x, best, best_size), (origin, goal, rivals, _) = state, arrays
            leads, grads, _ = boundaries(x, goal, rivals)
            lead, w = nearest(leads, grads, self.norm)
            here, home = (a.astype(mx.float32).reshape(len(x), -1) for a in (x, origin))
            # The hyperplane is lead + w (z - x) = 0.
            from_here = to_hyperplane(here, w, -lead, low, high, self.norm, early)
            rise = -lead + (w * (here - home)).sum(axis=1)
            from_home = to_hyperplane(home, w, rise, low, high, self.norm, early)
            near, far = (mx.maximum(_size(d, self.norm), LEAST) for d in (from_here, from_home))
            share = mx.minimum(near / (near + far), self.alpha_max)[:, None]
            moved = (here + self.eta * from_here) * (1 - share) + (home + self.eta * from_home) * share
            x = mx.clip(moved, low, high).reshape(x.shape).astype(x.dtype)
            classes = predicted(model(x).astype(mx.float32))
            fooled = classes == goal if self.targeted else classes != goal
            size = _size(x.astype(mx.float32) - origin.astype(mx.float32), self.norm)
            better = mx.logical_and(fooled, size < best_size)
            best, best_size = mx.where(column(better, x), x, best), mx.where(better, size, best_size)
            back = (origin + self.beta * (x - origin)).astype(x.dtype)
            return [mx.where(column(fooled, x), back, x), best, best_size]

        return step


def to_hyperplane(
    x: mx.array, w: mx.array, rise: mx.array, low: float, high: float, norm: Norm, early: bool = True
) -> mx.array:
    """The shortest moves ``[m, d]`` with ``w . move = rise`` that keep x in the bounds; as far as they let it go.

    Each coordinate moves along its slope by as much as the norm grants, until its bound. In linf that is the same for
    all, in l2 in proportion to the slope: how much is found by Newton's method, from below, on a concave function that
    is linear in pieces. In l1 the steepest coordinates go first. ``early`` ends Newton's method where nothing moves any
    more, which what is being compiled cannot see.
    """
    w = w * mx.where(rise < 0, -1.0, 1.0)[:, None]
    rise, slope = mx.abs(rise)[:, None], mx.abs(w)
    room = mx.maximum(mx.where(w > 0, high - x, x - low), 0)  # where there is no slope nothing moves by it
    if norm == "l1":
        order = mx.argsort(-slope, axis=1)
        gains = mx.take_along_axis(slope * room, order, axis=1)
        before = mx.cumsum(gains, axis=1, inclusive=False)
        part = mx.clip((rise - before) / mx.maximum(gains, TINY), 0, 1)
        moves = mx.put_along_axis(mx.zeros_like(room), order, part, axis=1) * room
    else:
        moves = _at_equal_pace(slope, room, rise, norm, early)
    return mx.sign(w) * moves


def _at_equal_pace(slope: mx.array, room: mx.array, rise: mx.array, norm: Norm, early: bool) -> mx.array:
    """Newton's method for the reach at which all coordinates together gain the rise."""
    gains = slope * room
    growths, last = (slope, room) if norm == "linf" else (mx.square(slope), room / mx.maximum(slope, TINY))
    reach = mx.zeros_like(rise)
    for _ in range(ROUNDS):
        free = reach < last
        growth = mx.where(free, growths, 0).sum(axis=1, keepdims=True)
        gain = mx.where(free, 0, gains).sum(axis=1, keepdims=True)
        further = mx.maximum(mx.where(growth > 0, (rise - gain) / mx.maximum(growth, TINY), reach), reach)
        ends = early and not (further > (1 + SLACK) * reach).any().item()
        reach = further
        if ends:
            break
    return mx.minimum(reach if norm == "linf" else reach * slope, room)


def _size(moved: mx.array, norm: Norm) -> mx.array:
    rows = mx.abs(moved).reshape(len(moved), -1)
    if norm == "linf":
        return rows.max(axis=1)
    return rows.sum(axis=1) if norm == "l1" else mx.sqrt(mx.square(rows).sum(axis=1))
