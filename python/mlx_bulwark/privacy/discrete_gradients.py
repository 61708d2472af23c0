"""Clipped gradients one unit at a time, truncated to the grid and summed in integers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from .batches import UnitReduction
from .discrete import MARGIN, integer_sums, make_grid
from .gradients import ClippedSums, LossFunction, batch_size_of, clipped_sums
from .optimizer import ClippedGradients
from .state import is_traced
from .taps import Planned, PrivacyError, named_arrays

if TYPE_CHECKING:
    from .engine import PrivacyEngine


def integer_loss_and_grad(
    engine: "PrivacyEngine",
    model: nn.Module,
    loss_fn: LossFunction,
    data: tuple[Any, ...],
    mask: mx.array | None,
    units: mx.array | None,
    unit_reduction: UnitReduction,
    last: bool,
    plans: dict[Any, list[Planned]],
) -> tuple[mx.array, ClippedGradients]:
    """Each unit by itself, so that its clipped gradient is there to be truncated to integers before any sum."""
    if is_traced(*(a for _, a in named_arrays(data)), engine.state["max_grad_norm"]):
        raise PrivacyError(
            "[value_and_grad] noise='discrete' must be outside mx.compile but is inside: its integers are drawn by the "
            "processor, step by step"
        )
    B, norm = batch_size_of(data), engine.state["max_grad_norm"] * MARGIN
    losses, sq_norms, refused = np.zeros(B, np.float32), np.zeros(B, np.float32), 0

    def clipped(rows: Any) -> ClippedSums:
        part = tree_map(lambda a: a[mx.array(rows)] if isinstance(a, mx.array) and a.ndim else a, data)
        one = None if units is None else mx.zeros(len(rows), mx.int32)
        return clipped_sums(
            model, loss_fn, part, None, norm, engine._clipping, plans, one, unit_reduction, engine.grad_sample_mode
        )

    def gradients() -> Iterator[dict[str, mx.array]]:
        nonlocal refused
        for unit, rows in _rows_of_units(B, mask, units):
            r = clipped(rows)
            losses[rows], sq_norms[unit] = np.array(r.losses), r.sq_norms[0].item()
            refused += int(np.array(r.num_refused))
            yield r.sums

    grid = make_grid(engine.noise_multiplier, engine.max_grad_norm)
    sums, left_out = integer_sums(gradients(), clipped(np.zeros(0, np.int64)).sums, grid)
    return mx.array(losses), ClippedGradients(engine, sums, mx.array(sq_norms), mx.array(refused + left_out), last)


def _rows_of_units(B: int, mask: mx.array | None, units: mx.array | None) -> Iterator[tuple[int, Any]]:
    there = np.arange(B) if mask is None else np.flatnonzero(np.array(mask))
    if units is None:
        for row in there:
            yield int(row), np.array([row])
        return
    ids = np.array(units)
    for unit in np.unique(ids[there]):
        yield int(unit), there[ids[there] == unit]
