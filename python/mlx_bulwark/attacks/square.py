"""Square attack: random search over windows of the input, by scores alone."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.step import Norm, _rounded_towards, projected_step
from .base import Array, Attack, Model, Remaining, Task, column
from .gradients import compiled
from .losses import TINY, cross_entropy, margin

HALVED_AT = 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000  # of 10,000 iterations
TILES = 5  # along each side of the first L2 and L1 change
DECAY = {"l2": 2, "l1": 4}  # of a tile's rings, with their distance from its middle


class Square(Attack):
    """Random search: each query tries another value in one window and keeps what lowers the margin. No gradients.

    Linf starts from vertical stripes of +-eps and sets square windows to +-eps. L2 and L1 start from a grid of tiles
    and move the change of one window into another. Windows shrink by the published schedule. The default is the
    Square attack of AutoAttack's standard version. Each input draws its own windows.

    Inputs are images ``[B, H, W, C]`` with channels last, sequences ``[B, T, C]`` or vectors ``[B, d]``, whose windows
    are segments; of ``[B, D, ..., H, W, C]`` the axes before W are taken as one.

    Args:
        eps: Radius of the ball, in the unit of the input: a number >= 0, or float32 ``[B]``.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        queries: Forward passes that an input may cost, with the two that judge it before and after; >= 3.
        p_init: Share of the input that the first windows cover, in (0, 1].
        rescale_schedule: Stretch the schedule, which is made for 10,000 queries, to ``queries``.
        targeted: Lower the cross-entropy of the ``targets`` instead of the margin of ``y``.
        bounds: Lowest and highest value of a valid input.
        seed: Of all windows and signs.
        compile: Compile a step of a ``nn.Module``; None: on a GPU. A plain function is never compiled.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import Square
        >>> model = lambda x: mx.stack([x.sum(axis=(1, 2, 3)), 8 + 0 * x[:, 0, 0, 0]], axis=1)
        >>> x = mx.stack([mx.full((4, 4, 1), 0.6), mx.full((4, 4, 1), 0.9)])
        >>> found = Square(eps=0.2, queries=100)(model, x, mx.array([0, 0]))
        >>> found.success.tolist(), found.queries[1].item()
        ([True, False], 100)

    Source:
        M. Andriushchenko et al., "Square Attack: A Query-Efficient Black-Box Adversarial Attack via Random Search",
        2020; F. Croce, M. Hein, "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers", 2021 (L1).
    """

    def __init__(
        self,
        eps: float | mx.array,
        *,
        norm: Norm = "linf",
        queries: int = 5000,
        p_init: float = 0.8,
        rescale_schedule: bool = False,
        targeted: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        compile: bool | None = None,
    ) -> None:
        super().__init__(eps=eps, norm=norm, targeted=targeted, bounds=bounds, seed=seed)
        if eps is None:
            raise self._error("eps must be a number or float32 [B] but is None")
        self.queries = self._count("queries", queries, least=3)
        self.p_init = self._number("p_init", p_init, above=True)
        if self.p_init > 1:
            raise self._error(f"p_init must be in (0, 1] but is {p_init!r}")
        self.rescale_schedule, self.compile = bool(rescale_schedule), compile

    def _share(self, iteration: int) -> float:
        """Of the input that a window covers."""
        if self.rescale_schedule:
            iteration = int(iteration / self.queries * 10_000)
        return math.ldexp(self.p_init, -sum(iteration > i for i in HALVED_AT))

    def _sides(self, iteration: int, height: int, width: int) -> tuple[int, int]:
        area = self._share(iteration) * height * width
        side = round(area if height == 1 else math.sqrt(area))
        if self.norm != "linf":
            side = max(side, 3)
            side += side % 2 == 0
        side = max(side, 1)
        return min(side, height), min(side, width)

    def _perturb(self, model: Model, task: Task, key: mx.array) -> tuple[mx.array, Array]:
        shape = task.x.shape
        channels = 1 if task.x.ndim == 2 else shape[-1]
        width = shape[1] if task.x.ndim == 2 else shape[-2]
        image = (math.prod(shape[1:]) // max(width * channels, 1), width, channels)
        if not math.prod(image):
            return task.x, np.zeros(len(task), np.int32)
        draws = _Draws(np.array(key).tolist(), len(task), image, self.norm)
        start = self._start(task.x.reshape(-1, *image), task.eps, draws)
        return self._search(self._step(model), task, start, draws, image)

    def _start(self, x: mx.array, eps: mx.array, draws: "_Draws") -> mx.array:
        wide = x.astype(mx.float32)
        change, eps = mx.array(draws.first()), column(eps, x)
        if self.norm == "linf":
            change = change * eps
        elif self.norm == "l2":
            change = change / (_size(change, "l2") + TINY) * eps
        return self._within(wide + change, x, eps)

    def _within(self, wide: mx.array, x: mx.array, eps: mx.array) -> mx.array:
        """Candidates as the model sees them: in the ball, the bounds and the dtype of x."""
        origin = x.astype(mx.float32)
        if self.norm == "l1":
            zeros = mx.zeros_like(wide)
            wide = projected_step(wide, zeros, origin, mx.reshape(eps, (-1,)), 0.0, "l1", self.bounds)
        return _rounded_towards(origin, mx.clip(wide, *self.bounds), x.dtype)

    def _step(self, model: Model) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
        """A function that proposes windows, asks the model, and keeps what is better."""

        def measure(best: mx.array, tried: mx.array, loss: mx.array, arrays: list[mx.array]) -> Any:
            x, goal = arrays[:2]
            logits = model(tried.reshape(x.shape)).astype(mx.float32)
            lead = margin(logits, goal)
            fooled = lead < 0 if self.targeted else lead > 0
            if not self.targeted:  # NaN is no class
                fooled = mx.logical_or(fooled, mx.isnan(logits).any(axis=1))
            new = cross_entropy(logits, goal) if self.targeted else -lead
            better = mx.logical_or(new < loss, fooled)
            return mx.where(column(better, best), tried, best), mx.where(new < loss, new, loss), fooled

        def step(best: mx.array, loss: mx.array, arrays: list[mx.array], drawn: list[mx.array]) -> Any:
            x, eps = arrays[0].reshape(best.shape), column(arrays[2], best)
            propose = _square if self.norm == "linf" else _moved
            wide = propose(best.astype(mx.float32), x.astype(mx.float32), eps, self.norm, drawn)
            return measure(best, self._within(wide, x, eps), loss, arrays)

        def first(best: mx.array, loss: mx.array, arrays: list[mx.array]) -> Any:
            return measure(best, best, loss, arrays)

        ask = compiled(step, model, self.compile)
        return lambda best, loss, arrays, drawn: ask(best, loss, arrays, drawn) if drawn else first(best, loss, arrays)

    def _search(
        self, step: Callable[..., Any], task: Task, best: mx.array, draws: "_Draws", image: tuple[int, ...]
    ) -> tuple[mx.array, Array]:
        remaining, found, queries = Remaining(len(task)), mx.array(best), np.zeros(len(task), np.int32)
        loss = mx.full((len(task),), math.inf)
        arrays = [task.x, task.y if task.targets is None else task.targets, task.eps]
        for i in range(self.queries - 2):
            drawn = [] if i == 0 else draws.windows(self._sides(i - 1, *image[:2]), remaining.rows)
            best, loss, fooled = step(best, loss, arrays, drawn)
            queries[remaining.rows[remaining.alive]] += 1
            done = np.array(fooled) & remaining.alive
            if done.any():
                found[mx.array(remaining.rows[done])] = best[mx.array(np.flatnonzero(done))]
                if (taken := remaining.retire(done)) is not None:
                    best, loss, *arrays = (a[taken] for a in (best, loss, *arrays))
                if not remaining:
                    break
        if remaining:
            last = np.flatnonzero(remaining.alive)
            found[mx.array(remaining.rows[last])] = best[mx.array(last)]
        return found.reshape(task.x.shape), queries


class _Draws:
    """What each input draws: for all inputs in every query, so that no input's draws depend on which are done."""

    def __init__(self, seed: list[int], n: int, image: tuple[int, ...], norm: Norm) -> None:
        self._rng, self._n, self._image, self._norm = np.random.default_rng(seed), n, image, norm

    def _signs(self, *shape: int) -> Array:
        return (2 * self._rng.integers(0, 2, shape, np.int8) - 1).astype(np.float32)

    def first(self) -> Array:
        """Stripes of +-1 from top to bottom, or tiles of random signs and directions, float32 ``[n, H, W, C]``."""
        height, width, channels = self._image
        if self._norm == "linf":
            return np.broadcast_to(self._signs(self._n, 1, width, channels), (self._n, *self._image))
        change = np.zeros((self._n, *self._image), np.float32)
        (high, down), (wide, across) = (
            (max(side // TILES, 1), side // max(side // TILES, 1)) for side in (height, width)
        )
        top, left = (height - down * high) // 2, (width - across * wide) // 2
        tiles = tables(high, wide, self._norm)
        for i in range(down):
            for j in range(across):
                ways = tiles[self._rng.integers(0, 2, self._n)][..., None] * self._signs(self._n, 1, 1, channels)
                rows, columns = top + i * high, left + j * wide
                change[:, rows : rows + high, columns : columns + wide] = ways
        return change

    def windows(self, sides: tuple[int, int], rows: Array) -> list[mx.array]:
        """Places, signs and, but for Linf, the places to be emptied and the change within the window."""
        height, width, channels = self._image
        places = [self._rng.integers(0, (height - sides[0] + 1, width - sides[1] + 1), (self._n, 2), np.int32)]
        signs = self._signs(self._n, 1, 1, channels)
        size = mx.array(np.array(sides, np.int32))
        if self._norm == "linf":
            return [mx.array(places[0][rows]), size, mx.array(signs[rows])]
        places.append(self._rng.integers(0, (height - sides[0] + 1, width - sides[1] + 1), (self._n, 2), np.int32))
        way = self._rng.integers(0, 2, self._n, np.int32)[rows]
        both = np.zeros((2, height, width), np.float32)
        both[:, : sides[0], : sides[1]] = tables(*sides, self._norm)
        return [mx.array(a) for a in (places[0][rows], size, signs[rows], places[1][rows], way, both)]


def _inside(places: mx.array, size: mx.array, like: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """bool ``[n, H, W, 1]``: the windows; and how far from their corners each row and column is."""
    down = mx.arange(like.shape[1])[None] - places[:, :1]
    right = mx.arange(like.shape[2])[None] - places[:, 1:]
    rows, columns = (mx.logical_and(a >= 0, a < size[i]) for i, a in enumerate((down, right)))
    return mx.logical_and(rows[:, :, None, None], columns[:, None, :, None]), down, right


def _square(best: mx.array, x: mx.array, eps: mx.array, norm: Norm, drawn: list[mx.array]) -> mx.array:
    places, size, signs = drawn
    return mx.where(_inside(places, size, best)[0], x + signs * eps, best)


def _moved(best: mx.array, x: mx.array, eps: mx.array, norm: Norm, drawn: list[mx.array]) -> mx.array:
    """Empty one window and put its length, and what the ball leaves, into another one's change."""
    places, size, signs, emptied, way, both = drawn
    change, (here, down, right) = best - x, _inside(places, size, best)
    there = _inside(emptied, size, best)[0]
    flat = mx.clip(down, 0, None)[:, :, None] * best.shape[2] + mx.clip(right, 0, None)[:, None]
    flat = mx.minimum(flat, both[0].size - 1) + (way * both[0].size)[:, None, None]
    tile = both.reshape(-1)[flat][..., None] * signs
    old, used = mx.where(here, change, 0), mx.where(mx.logical_or(here, there), change, 0)
    new = mx.where(here, tile + old / (_size(old, norm, (1, 2)) + TINY), 0)
    new = new / (_size(new, norm, (1, 2)) + TINY)
    channels, whole, windows = best.shape[3], _size(change, norm), _size(used, norm, (1, 2))
    if norm == "l2":
        length = mx.sqrt(mx.maximum(eps**2 - whole**2, 0) / channels + windows**2)
    else:
        length = (mx.maximum(eps - whole, 0) / channels + windows) * channels
    change = mx.where(here, new * length, mx.where(there, 0, change))
    if norm == "l2":
        change = change / (_size(change, "l2") + TINY) * eps
    return x + change


def _size(change: mx.array, norm: Norm, axes: tuple[int, ...] = (1, 2, 3)) -> mx.array:
    if norm == "l1":
        return mx.abs(change).sum(axis=axes, keepdims=True)
    return mx.sqrt(mx.square(change).sum(axis=axes, keepdims=True))


@lru_cache(maxsize=64)
def tables(height: int, width: int, norm: Norm) -> Array:
    """The change of a window of norm 1, float32 ``[2, height, width]``: a bump beside a dent, across and down."""
    ways = [_halves(height, width, norm), _halves(width, height, norm).T]
    if min(height, width) == 1:  # a segment has one direction
        ways = [ways[0] if height > 1 else ways[1]] * 2
    return np.stack(ways).astype(np.float32)


def _halves(height: int, width: int, norm: Norm) -> Array:
    upper = height // 2
    both = [_bump(upper, width, norm)] if upper else []
    whole: Array = np.concatenate([*both, -_bump(height - upper, width, norm)])
    return _of_norm_1(whole, norm)


def _bump(height: int, width: int, norm: Norm) -> Array:
    """Rings around the middle, each adding to those inside of it."""
    bump: Array = np.zeros((height, width))
    top, left = height // 2, width // 2
    for ring in range(max(top, left) + 1):
        rows, columns = slice(max(top - ring, 0), top + ring + 1), slice(max(left - ring, 0), left + ring + 1)
        bump[rows, columns] += 1 / (ring + 1) ** DECAY[norm]
    return _of_norm_1(bump, norm)


def _of_norm_1(change: Array, norm: Norm) -> Array:
    change /= np.linalg.norm(change) if norm == "l2" else np.abs(change).sum()
    return change
