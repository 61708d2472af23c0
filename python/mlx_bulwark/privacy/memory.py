"""The largest physical batch whose training step stays within a number of bytes."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from .batches import Batch, Source
from .events import Discrete
from .gradients import LossFunction
from .optimizer import PrivateOptimizer

if TYPE_CHECKING:
    from .engine import PrivacyEngine

_FIRST, _SECOND = 4, 12  # rows, or that many times the rows of a unit
_SPARED = 1 / 32  # of the bytes: what a step frees and what it takes race, and peaks of equal steps differ by a percent


def find_microbatch_size(
    engine: "PrivacyEngine",
    model: nn.Module,
    optimizer: PrivateOptimizer,
    loss_fn: LossFunction,
    source: Source,
    most: int,
    max_memory: int,
) -> int:
    """Largest number of rows, at most ``most``, whose step's peak of MLX memory stays within ``max_memory``.

    The peaks of two small sizes give a line, and the size that it promises is tried. Where its peak is too high after
    all, halving finds a size that stays within, to an eighth.
    """

    def peak(size: int) -> int:
        return peak_of_step(engine, model, optimizer, loss_fn, source.trial_batch(size))

    unit_rows = source.rows_per_unit
    (small, low), (large, high) = ((size, peak(size)) for size in (min(most, unit_rows * k) for k in (_FIRST, _SECOND)))
    row = max(1.0, (high - low) / max(1, large - small))
    allowed = int(max_memory * (1 - _SPARED))
    size = min(most, int(small + (allowed - low) / row))
    fits, fails, reached = 0, size + 1, 0
    while fails - fits > max(1, fits // 8) and size >= unit_rows:
        if (found := peak(size)) <= allowed:
            fits, reached = size, found
        else:
            fails = size
        size = (fits + fails) // 2
    if fits < unit_rows:
        raise ValueError(
            f"[batches] max_memory must hold a step of {unit_rows} rows, about {int(low + (unit_rows - small) * row)} "
            f"bytes, but is {max_memory}"
        )
    print(
        f"microbatch_size {fits}: peak of {reached / 2**20:.1f} MiB within {max_memory / 2**20:.1f} MiB "
        f"({row / 2**10:.1f} KiB a row, from {small} and {large} rows)"
    )
    return fits


def peak_of_step(
    engine: "PrivacyEngine", model: nn.Module, optimizer: PrivateOptimizer, loss_fn: LossFunction, batch: Batch
) -> int:
    """Peak of MLX memory in a step on this batch, eager or compiled, in bytes. Nothing is charged or changed by it.

    What the model and the optimizer hold is kept beside what the step makes of it: the peak may be higher than that of
    a step in training, and is not lower.
    """
    parameters, generator = tree_map(lambda a: a, model.parameters()), cast("list[mx.array]", mx.random.state)
    high, low = (int(word) for word in np.array(generator[0]))
    peaks = []
    try:
        for compiled in (False,) if isinstance(engine.event.mechanism, Discrete) else (False, True):
            trial = engine._without_books()
            trial._ranks = engine._ranks.rehearsal() if engine._ranks else None
            wrapped = PrivateOptimizer(trial, copy.deepcopy(optimizer.optimizer))
            wrapped.init(model.trainable_parameters())
            step = trial.compiled_step(model, wrapped, loss_fn) if compiled else _eager(trial, model, wrapped, loss_fn)
            mx.eval(model.state, wrapped.state, trial.state, batch.data, batch.mask)
            mx.clear_cache()
            mx.reset_peak_memory()
            for last in (False, True):  # with what is added up between the pieces of a logical batch
                mx.eval(step(replace(batch, last=last)), model.state, wrapped.state, trial.state)
            peaks.append(mx.get_peak_memory())
            model.update(parameters)
    finally:
        model.update(parameters)
        mx.random.seed((high << 32) | low)  # the key itself: the state cannot be written
        mx.clear_cache()
    return max(peaks)


def _eager(
    engine: "PrivacyEngine", model: nn.Module, optimizer: PrivateOptimizer, loss_fn: LossFunction
) -> Callable[[Batch], mx.array]:
    loss_and_grad = engine.value_and_grad(model, loss_fn)

    def step(batch: Batch) -> mx.array:
        losses, gradients = loss_and_grad(model, batch)
        optimizer.update(model, gradients)
        return losses

    return step
