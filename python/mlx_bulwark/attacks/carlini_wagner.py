"""Carlini and Wagner's attack: the least change in L2."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..ops.step import _rounded_towards, usable
from .base import Array, Attack, Model, Remaining, Task, column
from .gradients import compiled
from .losses import margin

INSIDE = 0.9  # of the reach of tanh that the bounds take: closer to 1, values on a bound hardly ever leave it
NEVER = 1e10  # the upper end of a search that has not succeeded yet
BETA1, BETA2, TINY = 0.9, 0.999, 1e-8  # of Adam
LOOKS = 10  # in a search, for progress
PROGRESS = 0.9999
RATE, REACH = 0.01, 1.0  # of Adam: its rate, and how far in tanh space its steps must be able to go


class _State(NamedTuple):
    """One row an input: Adam in tanh space, and the best that was found."""

    w: mx.array
    first: mx.array
    second: mx.array
    best: mx.array
    best_size: mx.array  # squared
    fooled: mx.array  # at this weight
    loss: mx.array


class CarliniWagnerL2(Attack):
    """The least L2 change that fools the model, by Adam in tanh space and a search for the weight of each input.

    ``|x' - x|^2 + c * max(z_y - max_{i != y} z_i, -confidence)`` is lowered; c is searched for each input on its own,
    by factors of 10 up to the first success and then by halving. An input whose loss makes no progress leaves its
    search early, and no other with it.

    The bounds lie at 0.9 of the reach of tanh, and what leaves them is clipped: in the published form the ground of a
    digit, which lies on a bound, hardly moves in some hundred steps.

    Args:
        eps: Changes beyond this L2 radius are no success: a number >= 0, float32 ``[B]``, or None for no limit.
        binary_search_steps: Weights that are tried.
        steps: Steps of Adam at each weight, each a forward and a backward pass.
        learning_rate: Of Adam. None: 0.01 as published, or ``1 / steps`` for fewer than 100 steps, which would not get
            to the boundary.
        initial_const: The first weight c.
        confidence: By how much the wrong logit must lead.
        abort_early: Let inputs leave a search whose loss has not fallen in a tenth of the steps.
        targeted: Lead the model to the ``targets``.
        bounds: Lowest and highest value of a valid input.
        compile: Compile a step of a ``nn.Module``; None: on a GPU. A plain function is never compiled.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import CarliniWagnerL2
        >>> model = lambda x: mx.stack([x[:, 0], 1 - x[:, 0]], axis=1)
        >>> found = CarliniWagnerL2(steps=100, initial_const=1.0)(model, mx.array([[0.75, 0.5]]), mx.array([0]))
        >>> found.success.item(), 0.25 < found.distances.item() < 0.2501
        (True, True)

    Source:
        N. Carlini, D. Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017.
    """

    def __init__(
        self,
        eps: float | mx.array | None = None,
        *,
        binary_search_steps: int = 9,
        steps: int = 1000,
        learning_rate: float | None = None,
        initial_const: float = 0.01,
        confidence: float = 0.0,
        abort_early: bool = True,
        targeted: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        compile: bool | None = None,
    ) -> None:
        super().__init__(eps=eps, norm="l2", targeted=targeted, bounds=bounds)
        self.binary_search_steps = self._count("binary_search_steps", binary_search_steps)
        self.steps = self._count("steps", steps)
        rate = max(RATE, REACH / self.steps) if learning_rate is None else learning_rate
        self.learning_rate = self._number("learning_rate", rate, above=True)
        self.initial_const = self._number("initial_const", initial_const, above=True)
        self.confidence = self._number("confidence", confidence)
        self.abort_early, self.compile = bool(abort_early), compile

    def _perturb(self, model: Model, task: Task, key: mx.array) -> tuple[mx.array, Array]:
        n, step = len(task), compiled(self._step(model), model, self.compile)
        low, high, weight = np.zeros(n), np.full(n, NEVER), np.full(n, self.initial_const)
        best, best_size = task.x, mx.full((n,), mx.inf)
        queries = np.zeros(n, np.int32)
        for _ in range(self.binary_search_steps):
            best, best_size, fooled, spent = self._search(step, task, weight, best, best_size)
            queries += spent
            low, high = np.where(fooled, low, weight), np.where(fooled, weight, high)
            weight = np.where(high < NEVER, (low + high) / 2, weight * 10)
        return best, queries

    def _search(
        self, step: Callable[..., Any], task: Task, weight: Array, best: mx.array, best_size: mx.array
    ) -> tuple[mx.array, mx.array, Array, Array]:
        """Adam at one weight an input: the best so far, whether this weight succeeded, and the passes spent."""
        remaining, goal = Remaining(len(task)), task.y if task.targets is None else task.targets
        w = self._to_tanh(task.x)
        zeros = mx.zeros(len(task))
        state = _State(w, mx.zeros_like(w), mx.zeros_like(w), best, best_size, zeros > 0, zeros)
        arrays = [task.x, goal, mx.array(weight.astype(np.float32))]
        fooled, queries = np.zeros(len(task), bool), np.zeros(len(task), np.int32)
        best, best_size, least = mx.array(best), mx.array(best_size), np.full(len(task), np.inf)
        look = max(self.steps // LOOKS, 1)
        for t in range(1, self.steps + 1):
            state = _State(*step(state, mx.array(float(t)), arrays))
            queries[remaining.rows[remaining.alive]] += 1
            mx.async_eval(*state)
            ends = t == self.steps
            if not ends and not (self.abort_early and t % look == 0):
                continue
            loss = np.array(state.loss)
            done = remaining.alive & (ends | ~(loss <= PROGRESS * least))
            least = loss
            if done.any():
                rows, places = mx.array(remaining.rows[done]), mx.array(np.flatnonzero(done))
                best[rows], best_size[rows] = state.best[places], state.best_size[places]
                fooled[remaining.rows[done]] = np.array(state.fooled)[done]
                if (taken := remaining.retire(done)) is not None:
                    state, arrays = _State(*(a[taken] for a in state)), [a[taken] for a in arrays]
                    least = least[np.array(taken)]
                if not remaining:
                    break
        return best, best_size, fooled, queries

    def _step(self, model: Model) -> Callable[..., list[mx.array]]:
        sign = 1.0 if self.targeted else -1.0

        def objective(w: mx.array, x: mx.array, goal: mx.array, weight: mx.array) -> tuple[mx.array, ...]:
            wide, origin = self._from_tanh(w), x.astype(mx.float32)
            inside = mx.clip(mx.stop_gradient(wide), *self.bounds)
            rounded = mx.stop_gradient(_rounded_towards(origin, inside, x.dtype))
            size = mx.square(wide - origin).reshape(len(x), -1).sum(axis=1)
            # What the model sees is what would be returned; the gradient is that of the point as it came from tanh.
            seen = rounded + (wide - mx.stop_gradient(wide)).astype(x.dtype)
            lead = sign * margin(model(seen).astype(mx.float32), goal)
            each = size + weight * mx.maximum(lead, -self.confidence)
            return each.sum(), each, lead, size, rounded

        differentiated = mx.value_and_grad(objective)

        def step(state: Any, t: mx.array, arrays: list[mx.array]) -> list[mx.array]:
            s = _State(*state)
            x = arrays[0]
            (_, each, lead, size, rounded), grad = differentiated(s.w, *arrays)
            grad = usable(grad)
            fooled = lead < 0 if self.confidence == 0 else lead <= -self.confidence
            better = mx.logical_and(fooled, size < s.best_size)
            first, second = BETA1 * s.first + (1 - BETA1) * grad, BETA2 * s.second + (1 - BETA2) * mx.square(grad)
            scaled = mx.sqrt(second / (1 - BETA2**t)) + TINY
            w = s.w - self.learning_rate * first / (1 - BETA1**t) / scaled
            best = mx.where(column(better, x), rounded, s.best)
            best_size = mx.where(better, size, s.best_size)
            return [w, first, second, best, best_size, mx.logical_or(s.fooled, fooled), each]

        return step

    def _to_tanh(self, x: mx.array) -> mx.array:
        low, high = self.bounds
        return mx.arctanh(INSIDE * mx.clip((2 * x.astype(mx.float32) - low - high) / (high - low), -1, 1))

    def _from_tanh(self, w: mx.array) -> mx.array:
        low, high = self.bounds
        return low + (high - low) * (mx.tanh(w) / INSIDE + 1) / 2
