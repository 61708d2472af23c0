"""What every attack shares: the checks before it, the rows that are still under attack, and the judgement after it."""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..convolutions import faster_convolutions
from ..ops.noise import FLOATS
from ..ops.step import NORMS, Norm, _rounded_towards

Array = np.ndarray[Any, Any]
Model = Callable[[mx.array], mx.array]

SLACK = 1e-6  # of the ball and the bounds: what rounding may take
NO_CLASS = -1  # the prediction where logits hold NaN
SIZES = 8  # of a batch that shrinks: each is a shape for which a compiled step is traced
STATEFUL = (nn.BatchNorm, nn.Dropout, nn.Dropout2d, nn.Dropout3d)


class AttackResult(NamedTuple):
    """What an attack found; one entry an input."""

    adversarial: mx.array
    """``[B, ...]`` in the dtype of x: an input that fools the model, or x itself where the attack has none."""
    success: mx.array
    """bool ``[B]``: x was classified correctly and ``adversarial`` is not; targeted: x was not classified as the
    target, and ``adversarial`` is."""
    correct: mx.array
    """bool ``[B]``: the model classifies x correctly."""
    distances: mx.array
    """float32 ``[B]``: from x to ``adversarial`` in the attack's norm."""
    queries: mx.array
    """int32 ``[B]``: forward passes that were spent on the input, with those that judge it before and after."""


@dataclass(frozen=True)
class Task:
    """Inputs that an attack may change, and what it wants of them. All arrays have one row an input."""

    x: mx.array
    y: mx.array  # int32
    targets: mx.array | None  # int32
    eps: mx.array  # float32; inf where nothing but the bounds limits the attack

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: mx.array | Array) -> "Task":
        """The task of some rows."""
        rows = mx.array(rows)
        targets = None if self.targets is None else self.targets[rows]
        return replace(self, x=self.x[rows], y=self.y[rows], targets=targets, eps=self.eps[rows])

    def reached(self, logits: mx.array) -> mx.array:
        """bool ``[B]``: whether these logits are what the attack wants."""
        found = predicted(logits)
        return found != self.y if self.targets is None else found == self.targets


class Attack(ABC):
    """An attack on classifiers: settings at construction, then ``attack(model, x, y)``.

    A subclass writes ``_perturb``. What it returns is cast to the dtype of x, rounded towards x, and judged by the
    model in that dtype: only what lies in the ball and the bounds and fools the model is a success; everything else is
    returned as it came. Inputs whose goal is already met, or whose radius is 0, are left alone.

    Args:
        eps: Radius of the ball around each input, in the unit of the input: a number >= 0, or float32 ``[B]``, one an
            input. None, where the attack seeks the least change: no limit but the bounds.
        norm: Norm of the ball: ``"linf"``, ``"l2"`` or ``"l1"``.
        targeted: Make the model predict the ``targets`` of the call instead of anything but ``y``.
        bounds: Lowest and highest value of a valid input.
        seed: Of all that the attack draws; the same seed gives the same result.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> from mlx_bulwark.attacks import Attack, FGSM
        >>> issubclass(FGSM, Attack)
        True

    Source:
        N. Carlini et al., "On Evaluating Adversarial Robustness", 2019.
    """

    def __init__(
        self,
        *,
        eps: float | mx.array | None,
        norm: Norm = "linf",
        targeted: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        if norm not in NORMS:
            raise self._error(f"norm must be 'linf', 'l2' or 'l1' but is {norm!r}")
        self.eps = self._checked_eps(eps)
        self.norm: Norm = norm
        self.targeted = bool(targeted)
        self.bounds = self._checked_bounds(bounds)
        self.seed = self._count("seed", seed, least=0)

    def __call__(self, model: Model, x: mx.array, y: mx.array, *, targets: mx.array | None = None) -> AttackResult:
        """Attack a batch.

        Args:
            model: Takes ``[m, ...]`` in the dtype of x and any m, returns logits ``[m, C]``, C >= 2. A ``nn.Module``
                that has dropout or batch norm must be in evaluation mode.
            x: Inputs ``[B, ...]`` within the bounds, float32, float16 or bfloat16.
            y: Classes ``[B]``, integers in [0, C).
            targets: Of a targeted attack: classes ``[B]`` that differ from y.

        Returns:
            AttackResult: The adversarial inputs, where the attack succeeded, and its cost.

        Raises:
            ValueError: An argument has a wrong value, shape or dtype.
            TypeError: The model cannot be called.
        """
        check_model(type(self).__name__, model)
        task = self._task(x, y, targets)
        if not len(task):
            return AttackResult(x, *(mx.zeros(0, kind) for kind in (mx.bool_, mx.bool_, mx.float32, mx.int32)))
        with faster_convolutions(model):
            logits = self._logits(model, task.x)
            self._check_classes(task, logits.shape[1])
            correct = predicted(logits) == task.y
            untouched = correct if task.targets is None else predicted(logits) != task.targets
            rows = np.flatnonzero(np.array(mx.logical_and(untouched, task.eps > 0)))
            queries, success, adversarial = np.ones(len(task), np.int32), np.zeros(len(task), bool), task.x
            if len(rows):
                open_task = task.take(rows)
                found, spent = self._perturb(model, open_task, mx.random.key(self.seed))
                found, fooled = self._judged(model, open_task, found)
                adversarial = mx.array(task.x)
                adversarial[mx.array(rows)] = found
                success[rows] = fooled
                queries[rows] += np.asarray(spent, np.int32) + 1
        distances = distance(adversarial, task.x, self.norm)
        result = AttackResult(adversarial, mx.array(success), correct, distances, mx.array(queries))
        mx.eval(*result)
        return result

    @abstractmethod
    def _perturb(self, model: Model, task: Task, key: mx.array) -> tuple[mx.array, Array]:
        """Candidates ``[n, ...]`` for the inputs of the task, float32 or in their dtype, and the forward passes ``[n]``
        that each took."""

    def _logits(self, model: Model, x: mx.array) -> mx.array:
        logits = model(x)
        if not isinstance(logits, mx.array) or logits.ndim != 2 or len(logits) != len(x) or logits.dtype not in FLOATS:
            has = f"{logits.dtype} of shape {logits.shape}" if isinstance(logits, mx.array) else type(logits).__name__
            raise self._error(f"model must return floating logits of shape ({len(x)}, C), [B, C], but has {has}")
        return logits.astype(mx.float32)

    def _judged(self, model: Model, task: Task, found: mx.array) -> tuple[mx.array, Array]:
        """Candidates as they are returned, and whether they succeeded."""
        origin = task.x.astype(mx.float32)
        wide, far = mx.clip(found.astype(mx.float32), *self.bounds), distance(found, task.x, self.norm)
        if (far > task.eps).any().item():  # float32 lets long sums of small moves end a little outside
            wide = origin + (wide - origin) * column(mx.where(far > task.eps, (1 - SLACK) * task.eps / far, 1), wide)
        found = _rounded_towards(origin, wide, task.x.dtype)
        far = distance(found, task.x, self.norm)
        inside = mx.logical_and(far <= task.eps + SLACK, within(found, self.bounds))
        fooled = mx.logical_and(inside, task.reached(self._logits(model, found)))
        return mx.where(column(fooled, found), found, task.x), np.array(fooled)

    # Checks

    def _error(self, text: str) -> ValueError:
        return ValueError(f"[{type(self).__name__}] {text}")

    def _count(self, name: str, value: Any, *, least: int = 1) -> int:
        return checked_count(type(self).__name__, name, value, least=least)

    def _number(self, name: str, value: Any, *, least: float = 0.0, above: bool = False) -> float:
        """A finite number >= least, or > least."""
        is_number = not isinstance(value, bool) and hasattr(value, "__float__")
        number = float(value) if is_number else math.nan
        if not (math.isfinite(number) and (number > least if above else number >= least)):
            raise self._error(f"{name} must be a finite number {'>' if above else '>='} {least:g} but is {value!r}")
        return number

    def _checked_eps(self, eps: Any) -> float | mx.array | None:
        if eps is None:
            return None
        if isinstance(eps, mx.array):
            if eps.dtype != mx.float32 or eps.ndim != 1 or not bool((mx.isfinite(eps) & (eps >= 0)).all()):
                raise self._error(
                    f"eps must be a number or float32 [B], finite and >= 0, but has {eps.dtype} of shape {eps.shape}"
                    + (f" from {eps.min().item():g} to {eps.max().item():g}" if eps.size else "")
                )
            return eps
        return self._number("eps", eps)

    def _checked_bounds(self, bounds: Any) -> tuple[float, float]:
        try:
            low, high = (float(b) for b in bounds)
        except (TypeError, ValueError):
            raise self._error(f"bounds must be two numbers but is {bounds!r}") from None
        if not -math.inf < low < high < math.inf:
            raise self._error(f"bounds must be finite and increase but is {bounds!r}")
        return low, high

    def _task(self, x: Any, y: Any, targets: Any) -> Task:
        if not isinstance(x, mx.array) or x.dtype not in FLOATS or x.ndim < 2:
            has = f"{x.dtype} of shape {x.shape}" if isinstance(x, mx.array) else f"type {type(x).__name__}"
            raise self._error(f"x must be a float32, float16 or bfloat16 array [B, ...] but has {has}")
        outside = mx.logical_not(within(x, self.bounds))
        if count := outside.sum().item():
            raise self._error(
                f"x must be finite and within the bounds {self.bounds} but has {count} inputs that are not, "
                f"first input {outside.argmax().item()}"
            )
        if self.targeted != (targets is not None):
            has = "none" if self.targeted else "some although the attack is not targeted"
            raise self._error(f"targets must be given to a targeted attack, and to no other, but has {has}")
        labels, goals = self._labels("y", y, x), None if targets is None else self._labels("targets", targets, x)
        if goals is not None and (count := (goals == labels).sum().item()):
            raise self._error(f"targets must differ from y but has {count} that are the same")
        return Task(x, labels, goals, self._radii(x))

    def _labels(self, name: str, labels: Any, x: mx.array) -> mx.array:
        labels = mx.array(labels) if isinstance(labels, np.ndarray) else labels
        if not isinstance(labels, mx.array):
            raise self._error(f"{name} must be an integer array [B] but has type {type(labels).__name__}")
        if labels.shape != x.shape[:1] or not mx.issubdtype(labels.dtype, mx.integer):
            raise self._error(
                f"{name} must be an integer array of shape ({len(x)},), [B], but has {labels.dtype} of shape "
                f"{labels.shape}"
            )
        return labels.astype(mx.int32)

    def _radii(self, x: mx.array) -> mx.array:
        if isinstance(self.eps, mx.array):
            if len(self.eps) != len(x):
                raise self._error(f"eps must have one radius an input, {len(x)}, but has {len(self.eps)}")
            return self.eps
        return mx.full((len(x),), math.inf if self.eps is None else self.eps, mx.float32)

    def _check_classes(self, task: Task, classes: int) -> None:
        if classes < 2:
            raise self._error(f"model must have 2 classes or more but has {classes}")
        for name, labels in (("y", task.y), ("targets", task.targets)):
            if labels is None or labels.size == 0:
                continue
            low, high = int(np.array(labels).min()), int(np.array(labels).max())
            if low < 0 or high >= classes:
                raise self._error(f"{name} must be in [0, {classes}) but has labels from {low} to {high}")


class Normalized(nn.Module):
    """A model that wants normalised inputs, as one that takes them within bounds: ``model((x - mean) / std)``.

    Attacks, their radii and their bounds then speak of the inputs as they are stored.

    Args:
        model: Takes normalised inputs ``[m, ...]``.
        mean: A number or one an entry of the last axis, as channels are in MLX; in the unit of the input.
        std: As ``mean``, > 0.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import Normalized
        >>> Normalized(lambda x: x, mean=[0.5, 0.25], std=[0.5, 0.25])(mx.array([[1.0, 1.0]])).tolist()
        [[1.0, 3.0]]

    Source:
        J. Rauber et al., "Foolbox: A Python toolbox to benchmark the robustness of machine learning models", 2017.
    """

    def __init__(self, model: Model, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        check_model("Normalized", model, training=True)
        self.model = model
        self._mean, self._std = (mx.array(np.asarray(a, np.float32)) for a in (mean, std))
        if not bool((self._std > 0).all()):
            raise ValueError(f"[Normalized] std must be > 0 but is {std!r}")

    def __call__(self, x: mx.array) -> mx.array:
        """Logits of inputs as they are stored."""
        return self.model((x - self._mean.astype(x.dtype)) / self._std.astype(x.dtype))


class Remaining:
    """Rows that are still under attack, in a batch that shrinks to few sizes as rows are done.

    Row i of the batch is row ``rows[i]`` of the task. A smaller batch is filled up with copies, which are not alive.
    """

    def __init__(self, n: int) -> None:
        self._unit = -(-n // SIZES)
        self.rows = np.arange(n)
        self.alive = np.ones(n, bool)

    def __bool__(self) -> bool:
        return bool(self.alive.any())

    def retire(self, done: Array) -> mx.array | None:
        """Take rows out, by their places in the batch. Where it can shrink: the places that the new batch takes."""
        self.alive &= ~done
        places = np.flatnonzero(self.alive)
        size = -(-len(places) // self._unit) * self._unit
        if not len(places) or size >= len(self.rows):
            return None
        taken = np.concatenate([places, np.full(size - len(places), places[0])])
        self.rows, self.alive = self.rows[taken], np.arange(size) < len(places)
        return mx.array(taken)


def checked_count(where: str, name: str, value: Any, *, least: int = 1) -> int:
    """An integer >= least."""
    try:
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if isinstance(value, bool) or count < least:
        raise ValueError(f"[{where}] {name} must be an integer >= {least} but is {value!r}")
    return count


def check_model(where: str, model: Any, *, training: bool = False) -> None:
    """Refuse what cannot be called, and modules whose answers depend on the batch or on chance."""
    if not callable(model):
        raise TypeError(f"[{where}] model must be callable but has type {type(model).__name__}")
    if training or not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        if module.training and isinstance(module, STATEFUL):
            raise ValueError(
                f"[{where}] model must be in evaluation mode, model.eval(), but has {type(module).__name__} "
                f"{name or 'itself'} in training mode, whose answers depend on chance or on the other inputs"
            )


def predicted(logits: mx.array) -> mx.array:
    """int32 ``[B]``: the largest logit's class; none, and so never the right one, where a logit is NaN."""
    invalid = mx.isnan(logits).any(axis=1)
    return mx.where(invalid, NO_CLASS, mx.argmax(logits, axis=1).astype(mx.int32))


def distance(x: mx.array, other: mx.array, norm: Norm) -> mx.array:
    """float32 ``[B]``: how far inputs are from others; summed in float64, on the host."""
    if x.size == 0:
        return mx.zeros(len(x))
    moved = np.abs(np.array(x.astype(mx.float32) - other.astype(mx.float32))).reshape(len(x), -1)
    if norm == "linf":
        return mx.array(moved.max(axis=1))
    size = moved.sum(axis=1, dtype=np.float64) if norm == "l1" else np.sqrt(np.square(moved, dtype=np.float64).sum(1))
    return mx.array(size.astype(np.float32))


def within(x: mx.array, bounds: tuple[float, float]) -> mx.array:
    """bool ``[B]``: whether all values of an input are numbers within the bounds, to what rounding takes."""
    if x.size == 0:
        return mx.ones((len(x),), mx.bool_)
    low, high = bounds
    rows = x.astype(mx.float32).reshape(len(x), -1)
    return mx.logical_and(rows >= low - SLACK, rows <= high + SLACK).all(axis=1)


def column(values: mx.array, like: mx.array) -> mx.array:
    """One value a row, in a shape that meets the rows of ``like``."""
    return values.reshape(-1, *(1 for _ in like.shape[1:]))
