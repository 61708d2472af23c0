"""Neural Cleanse: a class that a small change of any input leads to is the target of a backdoor."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..convolutions import faster_convolutions
from .classifier import (
    LEAST_CLASSES,
    Array,
    Bounds,
    bounds_of,
    inputs_of,
    integer,
    logits_of,
    outlier_p_value,
    positive,
    share,
)

CONSISTENCY = 1.4826  # from the median absolute deviation of a normal distribution to its standard deviation
INDEX = 2.0  # the paper's
LARGEST = 0.4  # of the median norm: what a trigger's mask may have
LEAST_SUCCESS = 0.9  # of a trigger that is worth the name
GROWTH, DECAY = 1.1, 1.15  # of the penalty in a step
MEMORY = 0.9  # of the moving average of the success
BETAS = (0.5, 0.9)  # Adam's, as the authors have them
EPSILON = 1e-8

State = list[Any]


@dataclass(frozen=True, eq=False)
class ReversedTrigger:
    """The smallest change found that leads all inputs to a class.

    Attributes:
        target: The class.
        mask: float32 of an input's shape, for images ``[H, W, 1]``: share of the pattern, 0 to 1.
        pattern: float32 of an input's shape, within the bounds.
        norm: L1 of the mask; where no trigger was found, the most it can be.
        success: Share of the trusted inputs of other classes that it leads to the target.
        anomaly_index: Deviations of the norm's logarithm below the median of all classes', by the median absolute
            deviation; negative above it.
    """

    target: int
    mask: Array
    pattern: Array
    norm: float
    success: float
    anomaly_index: float

    def stamp(self, x: Array) -> Array:
        """Return inputs ``[n, ...]`` with the trigger."""
        stamped: Array = ((1 - self.mask) * x + self.mask * self.pattern).astype(np.float32)
        return stamped


@dataclass(frozen=True, eq=False)
class NeuralCleanse:
    """What the search for triggers has found.

    Attributes:
        triggers: One a class.
        accused_classes: int64, ascending: targets of a backdoor.
        p_value: Of the smallest norm against the other classes', over all classes; None where there are too few.
        reason: Why, in words.
    """

    triggers: tuple[ReversedTrigger, ...]
    accused_classes: Array
    p_value: float | None
    reason: str

    @property
    def accused(self) -> bool:
        """Whether the model has a backdoor."""
        return bool(len(self.accused_classes))

    @property
    def norms(self) -> Array:
        """float64 ``[C]``: L1 norms of the masks."""
        return np.array([t.norm for t in self.triggers])

    @property
    def anomaly_index(self) -> Array:
        """float64 ``[C]``: see ``ReversedTrigger``."""
        return np.array([t.anomaly_index for t in self.triggers])


def neural_cleanse(
    model: Any,
    trusted: Any,
    *,
    bounds: Bounds = (0.0, 1.0),
    steps: int = 250,
    batch_size: int = 16,
    learning_rate: float = 0.1,
    success: float = 0.99,
    alpha: float = 0.05,
    seed: int = 0,
    progress: bool = False,
) -> NeuralCleanse:
    """Search for each class the smallest mask and pattern that lead all inputs to it, and accuse a class far below.

    All classes are searched at once: a step is one compiled graph. The penalty on the mask's norm grows while the
    trigger works and falls while it does not.

    The paper accuses a class whose norm is below the median by an anomaly index above 2. Of ten classes without any
    backdoor, the lowest of ten normal draws, that is a third of all clean models. So a class is accused if

    - its norm, in logarithms since norms differ by factors, is below the median by an index above 2, as in the paper;
    - it is an outlier among the other classes' norms: Student's t of a new value against theirs, times the classes, is
      at most ``alpha`` (Grubbs's test; as Rosner has it for several targets, a third of the classes at most);
    - its norm is at most 0.4 of the median class's: in clean models of digits the smallest was half of it or more;
    - and the trigger works, on 90 % of the trusted inputs of other classes.

    A backdoor that opens for inputs of one class alone, and a trigger that is spread all over the input, need as large
    a mask as a clean class: they are not found.

    Args:
        model: Takes ``[m, ...]`` and any m, returns logits ``[m, C]``, differentiable; in evaluation mode.
        trusted: Inputs ``[n, ...]`` without trigger, of all classes, within the bounds, NumPy or MLX; some hundred.
        bounds: Lowest and highest value of an input.
        steps: Of Adam.
        batch_size: Inputs a class and step.
        learning_rate: Of Adam, on the logits of mask and pattern.
        success: Share of inputs that a trigger must lead to the class before its mask counts.
        alpha: Rate of clean models that are accused, were the norms' logarithms normal.
        seed: Of the batches.
        progress: Show a bar on standard error.

    Returns:
        NeuralCleanse: The reversed triggers, and the classes that are accused. Fewer than 5 classes cannot be compared:
            then none is, and the reason says so.

    Raises:
        TypeError: The model cannot be called.
        ValueError: An argument has a wrong value, shape or dtype; the model is in training mode or returns NaN.

    Example:
        >>> import mlx.core as mx, numpy as np
        >>> from mlx_bulwark.poison import neural_cleanse
        >>> w = np.zeros((25, 6), np.float32)  # six classes, each of four bright values
        >>> w[np.arange(24), np.arange(24) // 4] = 8
        >>> w[24, 2] = 60  # the backdoor: a bright last value means class 2
        >>> x = np.random.default_rng(0).uniform(0, 1, (100, 25)).astype(np.float32)
        >>> x[:, 24] = 0
        >>> neural_cleanse(lambda x: x @ mx.array(w), x).accused_classes.tolist()
        [2]

    Source:
        B. Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", 2019;
        B. Rosner, "Percentage Points for a Generalized ESD Many-Outlier Procedure", 1983.
    """
    op = "neural_cleanse"
    rows = inputs_of(op, "trusted", trusted, least=1)
    limits = bounds_of(op, "trusted", rows, bounds)
    level, wanted = share(op, "alpha", alpha), share(op, "success", success)
    count, each = integer(op, "steps", steps, 1), integer(op, "batch_size", batch_size, 1)
    integer(op, "seed", seed, 0)
    pace = positive(op, "learning_rate", learning_rate)
    predicted = logits_of(op, model, rows)
    classes = predicted.shape[1]
    search = _Search(model, rows.shape[1:], classes, min(each, len(rows)), pace, wanted, limits)
    masks, patterns, norms = search.run(rows, count, seed, progress)
    index = anomaly_index(norms)
    kinds = predicted.argmax(axis=1)
    triggers = []
    for c in range(classes):
        found = ReversedTrigger(c, masks[c], patterns[c], float(norms[c]), 0.0, float(index[c]))
        others = rows[kinds != c]
        hits = logits_of(op, model, found.stamp(others)).argmax(axis=1) == c if len(others) else np.zeros(1)
        triggers.append(ReversedTrigger(c, *(masks[c], patterns[c]), found.norm, float(hits.mean()), float(index[c])))
    return _judged(tuple(triggers), level)


def anomaly_index(norms: Array) -> Array:
    """Deviations of each logarithm below the median, by the median absolute deviation."""
    logs = np.log(np.maximum(norms, EPSILON))
    below = np.median(logs) - logs
    deviation = CONSISTENCY * float(np.median(np.abs(below)))
    with np.errstate(divide="ignore", invalid="ignore"):
        index: Array = np.where(below == 0, 0.0, below / deviation)
    return index


def outlier_p_values(norms: Array) -> Array:
    """Of the first, second, ... smallest norm against all larger ones, over all classes."""
    falling = -np.sort(np.log(np.maximum(norms, EPSILON)))
    return np.array([outlier_p_value(float(falling[k]), falling[k + 1 :]) for k in range(max(1, len(norms) // 3))])


def _judged(triggers: tuple[ReversedTrigger, ...], alpha: float) -> NeuralCleanse:
    norms = np.array([t.norm for t in triggers])
    order = np.argsort(norms, kind="stable")
    if len(norms) < LEAST_CLASSES:
        words = f"{len(norms)} classes cannot be compared: the spread of the others is unknown below {LEAST_CLASSES}"
        return NeuralCleanse(triggers, np.zeros(0, np.int64), None, words)
    p_values, median = outlier_p_values(norms), float(np.median(norms))
    accused = 0
    for k, p in enumerate(p_values):
        t = triggers[order[k]]
        small = t.anomaly_index > INDEX and t.norm <= LARGEST * median
        if p <= alpha and small and t.success >= LEAST_SUCCESS:
            accused = k + 1
    least = triggers[order[0]]
    size = f"a mask of L1 {least.norm:.1f}, where the median class needs {median:.1f}"
    figures = f"anomaly index {least.anomaly_index:.1f}, p {p_values[0]:.2g}"
    if accused:
        names = ", ".join(str(c) for c in sorted(order[:accused].tolist()))
        words = f"class {names}: {size}, leads {least.success:.0%} of other inputs to class {least.target} ({figures})"
    else:
        words = f"no class is reached far more easily than others: class {least.target} with {size} ({figures})"
    return NeuralCleanse(triggers, np.sort(order[:accused]).astype(np.int64), float(p_values[0]), words)


class _Search:
    """Adam on the masks and patterns of all classes at once."""

    def __init__(
        self, model: Any, shape: tuple[int, ...], classes: int, each: int, rate: float, success: float, bounds: Bounds
    ) -> None:
        self.model, self.shape, self.classes, self.each = model, shape, classes, each
        self.rate, self.success, self.bounds = rate, success, bounds
        self.mask_shape = (*shape[:-1], 1) if len(shape) > 2 else shape
        self.size = math.prod(self.mask_shape)

    def run(self, rows: Array, steps: int, seed: int, progress: bool) -> tuple[Array, Array, Array]:
        """Masks, patterns and norms."""
        from tqdm import tqdm

        state, step = self._start(), mx.compile(self._step)
        rng = np.random.default_rng(seed)
        with faster_convolutions(self.model):
            for _ in tqdm(range(steps), desc="Neural Cleanse", unit="step", disable=not progress, file=sys.stderr):
                chosen = rng.choice(len(rows), self.each, replace=False)
                state = step(state, mx.array(rows[chosen]))
                mx.eval(state)
        best, norms = state[4], np.array(state[3], np.float64)
        masks, patterns = np.array(mx.sigmoid(best[0])), np.array(self._pattern(best[1]))
        if not (np.isfinite(masks).all() and np.isfinite(patterns).all()):
            raise ValueError("[neural_cleanse] model must have finite gradients but they led to NaN")
        return masks, patterns, np.where(np.isfinite(norms), norms, self.size)

    def _start(self) -> State:
        """Parameters, both moments, least norms and what has them, penalties, success, number of the step."""
        parameters = [mx.full((self.classes, *self.mask_shape), -1.0), mx.zeros((self.classes, *self.shape))]
        moments = [[mx.zeros_like(p) for p in parameters] for _ in range(2)]
        norms, penalty = mx.full(self.classes, math.inf), mx.full(self.classes, 0.8 / self.size)
        return [parameters, *moments, norms, parameters, penalty, mx.zeros(self.classes), mx.array(1.0)]

    def _pattern(self, logits: mx.array) -> mx.array:
        return self.bounds[0] + (self.bounds[1] - self.bounds[0]) * mx.sigmoid(logits)

    def _loss(self, parameters: list[mx.array], penalty: mx.array, x: mx.array) -> tuple[mx.array, list[mx.array]]:
        mask, pattern = mx.sigmoid(parameters[0])[:, None], self._pattern(parameters[1])[:, None]
        stamped = ((1 - mask) * x[None] + mask * pattern).reshape(self.classes * self.each, *self.shape)
        targets = mx.repeat(mx.arange(self.classes), self.each)
        logits = self.model(stamped).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, targets, reduction="none").reshape(self.classes, self.each)
        norms = mask.reshape(self.classes, -1).sum(axis=1)
        hits = (mx.argmax(logits, axis=1) == targets).reshape(self.classes, self.each)
        return (losses.mean(axis=1) + penalty * norms).sum(), [norms, hits.astype(mx.float32).mean(axis=1)]

    def _step(self, state: State, x: mx.array) -> State:
        parameters, first, second, least, best, penalty, success, number = state
        gradient: Callable[..., Any] = mx.value_and_grad(self._loss)
        (_, (norms, hits)), gradients = gradient(parameters, penalty, x)
        success = mx.where(number == 1, hits, MEMORY * success + (1 - MEMORY) * hits)
        works = success >= self.success
        better = mx.logical_and(works, norms < least)
        least = mx.where(better, norms, least)
        # Where none has worked yet, what there is stands for the best.
        kept = mx.logical_and(mx.isfinite(least), mx.logical_not(better))
        best = [mx.where(kept.reshape(-1, *[1] * (p.ndim - 1)), b, p) for b, p in zip(best, parameters, strict=True)]
        penalty = mx.clip(mx.where(works, penalty * GROWTH, penalty / DECAY), 0.008 / self.size, 800 / self.size)
        moved: list[list[mx.array]] = [[], [], []]
        for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            size = mx.sqrt(v / (1 - BETAS[1] ** number)) + EPSILON
            for values, new in zip(moved, (p - self.rate * m / (1 - BETAS[0] ** number) / size, m, v), strict=True):
                values.append(new)
        return [*moved, least, best, penalty, success, number + 1]
