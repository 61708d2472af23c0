"""HopSkipJump: the least change, by the model's decisions alone."""

import math
from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.step import Norm
from .base import NO_CLASS, Array, Attack, AttackResult, Model, Task, check_model, predicted

NOISE = 100  # uniform inputs that are tried for a start
OTHERS = 10  # inputs of the batch that are tried where noise does not fool
FIRST_DELTA = 0.1  # share of the bounds by which the first estimate looks around
MOST = 10_000  # queries of an estimate
RESERVE = 20  # queries that are kept for the step and the way back to the boundary
LEAST = 10  # queries of an estimate: fewer give no direction
HALVINGS = 25  # of a distance, until float32 has no more digits


class HopSkipJump(Attack):
    """Decision-based: walks along the boundary to the nearest input of another class. Sees labels only.

    From noise that fools, a bisection leads to the boundary. There the share of fooled points around estimates the
    boundary's direction, a step is halved until it fools, and a bisection leads back; the estimates take more queries
    as they go. Each input has its own noise, steps and budget, and is done once it is inside ``eps``, if that is given.
    The model may return logits or integer labels ``[m]``; of logits nothing but the largest one's place is used. Where
    noise does not fool, inputs of the batch that have another class, or the target, are tried as starts.

    Args:
        eps: Radius of the ball: a number >= 0, or float32 ``[B]``; an input is done as soon as it is inside. None: use
            all queries and return the least change.
        norm: ``"l2"`` or ``"linf"``.
        queries: Forward passes that an input may cost, with the two that judge it before and after; >= 3.
        initial_estimates: Queries of the first estimate; that of step t takes ``sqrt(t)`` times as many.
        targeted: Make the model decide for the ``targets``.
        bounds: Lowest and highest value of a valid input.
        batch_size: Inputs that the model is asked for at once.
        seed: Of all noise.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import HopSkipJump
        >>> labels = lambda x: (x.sum(axis=1) < 1.0).astype(mx.int32)
        >>> found = HopSkipJump(queries=500)(labels, mx.array([[0.75, 0.75]]), mx.array([0]))
        >>> found.success.item(), round(found.distances.item(), 1), found.queries.item() <= 500
        (True, 0.4, True)

    Source:
        J. Chen, M. Jordan, M. Wainwright, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack", 2020.
    """

    def __init__(
        self,
        eps: float | mx.array | None = None,
        *,
        norm: Norm = "l2",
        queries: int = 5000,
        initial_estimates: int = 100,
        targeted: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(eps=eps, norm=norm, targeted=targeted, bounds=bounds, seed=seed)
        if norm == "l1":
            raise self._error("norm must be 'l2' or 'linf' but is 'l1'")
        self.queries = self._count("queries", queries, least=3)
        self.initial_estimates = self._count("initial_estimates", initial_estimates, least=LEAST)
        self.batch_size = self._count("batch_size", batch_size)

    def __call__(self, model: Model, x: mx.array, y: mx.array, *, targets: mx.array | None = None) -> AttackResult:
        """Attack a batch, as ``Attack`` does; the model may return integer labels ``[m]`` in place of logits."""
        check_model(type(self).__name__, model)
        known = [np.array(a) for a in (y, targets) if isinstance(a, (mx.array, np.ndarray)) and a.size]
        classes = max([2, *(int(a.max()) + 1 for a in known)])
        return super().__call__(Decisions(model, classes), x, y, targets=targets)

    def _perturb(self, model: Model, task: Task, key: mx.array) -> tuple[mx.array, Array]:
        return _Walk(self, model, task, np.array(key).tolist()).run()


class Decisions:
    """A model of which only the decision can be seen: 1 at its class and 0 elsewhere, NaN where it gives NaN."""

    def __init__(self, model: Model, classes: int) -> None:
        self._model, self._classes = model, classes

    def __call__(self, x: mx.array) -> mx.array:
        """``[m, C]``."""
        answer = self._model(x)
        if not isinstance(answer, mx.array) or answer.shape[:1] != x.shape[:1]:
            return answer  # refused by the attack, in its words
        if answer.ndim == 1 and mx.issubdtype(answer.dtype, mx.integer):
            self._classes = max(self._classes, int(np.array(answer).max()) + 1)
            labels, classes = answer.astype(mx.int32), self._classes
        elif answer.ndim == 2:
            labels, classes = predicted(answer), answer.shape[1]
        else:
            return answer
        decided = (labels[:, None] == mx.arange(classes)).astype(mx.float32)
        return mx.where((labels == NO_CLASS)[:, None], mx.nan, decided)


class _Walk:
    """One attack; arrays have one row an input, float32 on the host."""

    def __init__(self, attack: HopSkipJump, model: Model, task: Task, seed: list[int]) -> None:
        self._attack, self._model, self._task = attack, model, task
        self._origin = np.array(task.x.astype(mx.float32))
        self._x = self._origin.copy()  # on the boundary, on its far side
        self._best, self._nearest = self._origin.copy(), np.full(len(task), np.inf)
        self._left = np.full(len(task), attack.queries - 2)
        self._eps = np.array(task.eps) if attack.eps is not None else np.full(len(task), -1.0)
        self._size = max(math.prod(task.x.shape[1:]), 1)
        # A generator an input: nothing depends on the other inputs.
        self._rngs = [np.random.default_rng([*seed, row]) for row in range(len(task))]

    def run(self) -> tuple[mx.array, Array]:
        walking = self._started()
        walking = self._back_to_boundary(walking, self._x[walking])
        for step in range(1, self._attack.queries):
            walking = walking[(self._left[walking] >= RESERVE + LEAST) & (self._nearest[walking] > self._eps[walking])]
            if not len(walking):
                break
            moved, points = self._stepped(walking, self._direction(walking, step), step)
            self._back_to_boundary(moved, points)
        spent = self._attack.queries - 2 - self._left
        return mx.array(self._best), spent.astype(np.int32)

    def _fools(self, rows: Array, points: Array) -> tuple[Array, Array]:
        """Whether points fool, asked in the dtype of the inputs and paid for, and the points in that dtype."""
        fooled, held = np.zeros(len(rows), bool), points
        np.subtract.at(self._left, rows, 1)
        for i in range(0, len(rows), self._attack.batch_size):
            part = slice(i, i + self._attack.batch_size)
            asked = mx.array(points[part]).astype(self._task.x.dtype)
            fooled[part] = np.array(self._task.take(rows[part]).reached(self._model(asked)))
            if asked.dtype != mx.float32:
                held = held if held is not points else points.copy()
                held[part] = np.array(asked.astype(mx.float32))
        return fooled, held

    def _started(self) -> Array:
        """Rows that have a start."""
        low, high = self._attack.bounds
        shape, waiting = self._origin.shape[1:], np.arange(len(self._origin))
        tries = [None] * NOISE + self._others()
        for others in tries:
            waiting = waiting[self._left[waiting] > 0]
            if not len(waiting):
                break
            if others is None:
                points = np.stack([self._rngs[r].uniform(low, high, shape).astype(np.float32) for r in waiting])
                rows = waiting
            else:
                rows = waiting[others[waiting] >= 0]
                points = self._origin[others[rows]]
            if len(rows):
                fooled, points = self._fools(rows, points)
                self._x[rows[fooled]] = points[fooled]
                self._keep(rows[fooled], points[fooled])
                waiting = np.setdiff1d(waiting, rows[fooled])
        return np.flatnonzero(np.isfinite(self._nearest))

    def _others(self) -> list[Any]:
        """For each row some rows of other classes, or of its target; -1 where there are no more."""
        y = np.array(self._task.y)
        goals = None if self._task.targets is None else np.array(self._task.targets)
        found = np.full((OTHERS, len(y)), -1)
        for row in range(len(y)):
            rivals = np.flatnonzero(y != y[row] if goals is None else y == goals[row])[:OTHERS]
            found[: len(rivals), row] = rivals
        return list(found)

    def _keep(self, rows: Array, points: Array) -> None:
        far = self._distance(rows, points)
        nearer = far < self._nearest[rows]
        self._best[rows[nearer]], self._nearest[rows[nearer]] = points[nearer], far[nearer]

    def _distance(self, rows: Array, points: Array) -> Array:
        moved = np.abs(points.astype(np.float64) - self._origin[rows]).reshape(len(rows), self._size)
        size: Array = moved.max(axis=1) if self._attack.norm == "linf" else np.linalg.norm(moved, axis=1)
        return size

    def _back_to_boundary(self, rows: Array, points: Array) -> Array:
        """Bisect between the inputs and points that fool."""
        linf = self._attack.norm == "linf"
        self._x[rows] = points
        low = np.zeros(len(rows))
        high = self._distance(rows, points) if linf else np.ones(len(rows))
        enough = high / (self._size**2 if linf else self._size**1.5)
        ends = points.copy()
        for _ in range(HALVINGS):
            open_ = np.flatnonzero((high - low > enough) & (self._left[rows] > 0))
            if not len(open_):
                break
            middle = (low[open_] + high[open_]) / 2
            tried = self._between(rows[open_], ends[open_], middle)
            fooled, tried = self._fools(rows[open_], tried)
            high[open_[fooled]], low[open_[~fooled]] = middle[fooled], middle[~fooled]
            self._x[rows[open_[fooled]]] = tried[fooled]
        self._keep(rows, self._x[rows])
        return rows

    def _between(self, rows: Array, ends: Array, share: Array) -> Array:
        share = share.reshape(-1, *(1 for _ in ends.shape[1:])).astype(np.float32)
        origin = self._origin[rows]
        between: Array = np.clip(ends, origin - share, origin + share)
        if self._attack.norm == "l2":
            between = origin + share * (ends - origin)
        return between

    def _direction(self, rows: Array, step: int) -> Array:
        """Estimates of the boundary's normals, or their signs."""
        low, high = self._attack.bounds
        wanted = min(int(self._attack.initial_estimates * math.sqrt(step)), MOST)
        counts = np.minimum(wanted, self._left[rows] - RESERVE)
        delta = self._distance(rows, self._x[rows]) / self._size
        if step == 1:
            delta[:] = FIRST_DELTA * (high - low)
        delta = np.maximum(delta, np.finfo(np.float32).eps * max(abs(low), abs(high)))
        directions: Array = np.zeros_like(self._x[rows])
        for i, row in enumerate(rows):  # one input's estimate fills the model's batch
            noise = self._noise(row, counts[i])
            points = np.clip(self._x[row] + np.float32(delta[i]) * noise, low, high).astype(np.float32)
            fooled, points = self._fools(np.full(counts[i], row), points)
            noise = (points - self._x[row]) / delta[i]
            sign = np.where(fooled, 1.0, -1.0)
            if abs(sign.mean()) < 1:
                sign -= sign.mean()
            directions[i] = np.tensordot(sign, noise, axes=1) / counts[i]
        if self._attack.norm == "linf":
            directions = np.sign(directions)
        else:
            size = np.linalg.norm(directions.reshape(len(rows), self._size), axis=1)
            directions /= np.maximum(size, 1e-12).reshape(-1, *(1 for _ in directions.shape[1:]))
        return directions

    def _noise(self, row: int, count: int) -> Array:
        rng, shape = self._rngs[row], (count, *self._origin.shape[1:])
        if self._attack.norm == "l2":
            noise = rng.standard_normal(shape, np.float32)
        else:
            noise = 2 * rng.random(shape, np.float32) - 1
        size = np.linalg.norm(noise.reshape(count, self._size), axis=1).reshape(-1, *(1 for _ in shape[1:]))
        unit: Array = noise / np.maximum(size, 1e-12)
        return unit

    def _stepped(self, rows: Array, directions: Array, step: int) -> tuple[Array, Array]:
        """Rows and points after steps that are halved until they fool; rows whose budget ends before stay behind."""
        length = self._distance(rows, self._x[rows]) / math.sqrt(step)
        points, arrived, waiting = self._x[rows], np.zeros(len(rows), bool), np.arange(len(rows))
        for _ in range(HALVINGS):
            waiting = waiting[self._left[rows[waiting]] > 0]
            if not len(waiting):
                break
            size = length[waiting].reshape(-1, *(1 for _ in points.shape[1:])).astype(np.float32)
            tried = np.clip(self._x[rows[waiting]] + size * directions[waiting], *self._attack.bounds)
            fooled, tried = self._fools(rows[waiting], tried.astype(np.float32))
            points[waiting[fooled]], arrived[waiting[fooled]] = tried[fooled], True
            length[waiting] /= 2
            waiting = waiting[~fooled]
        return rows[arrived], points[arrived]
