"""One step of an engine: clipped gradients, the charge, the noise, the update; eager and compiled."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..ops.noise import add_gaussian, advance_counter, blocks_used
from .banded import add_banded, taps
from .batches import Batch, UnitReduction
from .books import Books
from .clipping import QUANTILE
from .discrete import Grid, add_discrete, make_grid, off_grid
from .discrete_gradients import integer_loss_and_grad
from .distributed import Ranks
from .events import Banded, CyclicPoisson, Discrete, Shuffle
from .gradients import LossFunction, batch_size_of, clipped_sums, to_mlx
from .key_file import keep_shapes
from .optimizer import ClippedGradients, PrivateOptimizer
from .state import is_traced
from .taps import Planned, PrivacyError

if TYPE_CHECKING:
    from .engine import PrivacyEngine

LossAndGrad = Callable[..., tuple[mx.array, ClippedGradients]]
Rows = tuple[list[mx.array], mx.array, mx.array | None]  # data, mask, units


def private_value_and_grad(engine: "PrivacyEngine", model: nn.Module, loss_fn: LossFunction) -> LossAndGrad:
    """See `PrivacyEngine.value_and_grad`."""
    if engine._ranks:
        engine._ranks.align(model)
    plans: dict[Any, list[Planned]] = {}

    def loss_and_grad(
        called_model: nn.Module,
        *batch: Any,
        mask: mx.array | None = None,
        units: mx.array | None = None,
        unit_reduction: UnitReduction = "mean",
        last: bool = True,
    ) -> tuple[mx.array, ClippedGradients]:
        if called_model is not model:
            raise PrivacyError("[value_and_grad] model must be the one that value_and_grad was given but is another")
        first: Any = batch[0] if len(batch) == 1 else None
        if isinstance(first, Batch):
            _refuse_out_of_order(engine, first.step)
            batch, mask, last = first.data, first.mask, first.last
            units, unit_reduction = first.units, first.unit_reduction
        else:
            _refuse_out_of_order(engine, None)
            if units is None and engine._joins_rows:
                raise PrivacyError(
                    "[value_and_grad] units must be given, as batch.units, but is None: several rows of a batch are "
                    "one unit of privacy, and clipped one by one they would move the sums by more than is accounted"
                )
        units = _checked(units, batch)
        return _loss_and_grad(engine, model, loss_fn, batch, mask, units, unit_reduction, last, plans)

    return loss_and_grad


def _checked(units: Any, batch: tuple[Any, ...]) -> mx.array | None:
    """Units as an array; a row with an id that stands for no unit would be left out in silence."""
    if units is None:
        return None
    ids, B = mx.array(units), batch_size_of(to_mlx(batch))
    if ids.shape != (B,) or not mx.issubdtype(ids.dtype, mx.integer):
        raise PrivacyError(
            f"[value_and_grad] units must have shape ({B},) and an integer dtype but has shape {ids.shape} and dtype "
            f"{ids.dtype}"
        )
    if B and not is_traced(ids):
        low, high = np.array(ids).min(), np.array(ids).max()
        if low < 0 or high >= B:
            raise PrivacyError(
                f"[value_and_grad] units must be numbers from 0 to {B - 1}, one for each row, but lie between {low} "
                f"and {high}"
            )
    return ids


def _loss_and_grad(
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
    if isinstance(engine.event.mechanism, Discrete):
        return integer_loss_and_grad(engine, model, loss_fn, to_mlx(data), mask, units, unit_reduction, last, plans)
    norm = engine.state["max_grad_norm"]
    r = clipped_sums(
        model, loss_fn, data, mask, norm, engine._clipping, plans, units, unit_reduction, engine.grad_sample_mode
    )
    losses = r.losses if mask is None else mx.where(mask, r.losses, 0)
    if quantile := engine._clipping.quantile:
        r.sums[QUANTILE] = quantile.counted(r.sq_norms, norm, engine.state["noise_std"], r.mask)
    return losses, ClippedGradients(engine, r.sums, r.sq_norms, r.num_refused, last)


def _refuse_out_of_order(engine: "PrivacyEngine", step: int | None) -> None:
    """Refuse a batch whose place in the sampling scheme is not that of the next step."""
    scheme = engine.event.sampling
    if isinstance(scheme, CyclicPoisson | Shuffle) and step != engine.steps:
        raise PrivacyError(
            f"[value_and_grad] batch must be that of step {engine.steps}, from engine.batches, but is "
            f"{'an array of your own' if step is None else f'that of step {step}'}: {type(scheme).__name__} accounts "
            "for every batch once and in its order"
        )


def release(engine: "PrivacyEngine", gradients: ClippedGradients) -> dict[str, mx.array] | None:
    """Take clipped sums; at the end of a logical batch charge the step and return the noised mean."""
    sums = spend(engine, gradients)
    traced = is_traced(*sums.values())
    if not gradients._last:
        if traced:
            raise PrivacyError(
                "[update] last=False must be outside mx.compile but is inside; engine.compiled_step does both"
            )
        _accumulate(engine, sums)
        return None
    if not traced:  # a compiled end of a batch gets them as an argument
        sums, engine._accumulated = add(sums, engine._accumulated), {}
    counter = _charge(engine, blocks_used(sums), traced)
    noisy = _noised(engine, sums, counter, traced)
    if engine._ranks:
        noisy = engine._ranks.add_up(noisy)
        if not traced:
            engine._ranks.wait(noisy)
    if isinstance(engine.event.mechanism, Discrete):
        noisy = off_grid(noisy, _grid(engine))
    mean = _mean(engine, noisy)
    if not traced:
        engine._advance()
    return mean


def _mean(engine: "PrivacyEngine", noisy: dict[str, mx.array]) -> dict[str, mx.array]:
    if engine._clipping.quantile:
        engine._clipping.quantile.move(engine.state, noisy.pop(QUANTILE))
    return {path: g / engine.expected_batch_size for path, g in noisy.items()}


def spend(engine: "PrivacyEngine", gradients: ClippedGradients) -> dict[str, mx.array]:
    """Take the sums out of gradients, which can be done once."""
    if gradients._engine is not engine:
        raise PrivacyError("[update] gradients must come from the engine that wraps the optimizer but do not")
    sums, gradients._sums = gradients._sums, {}
    if not sums:
        raise PrivacyError("[update] gradients must be used once but were used before")
    return sums


def _admit(engine: "PrivacyEngine") -> Books:
    if engine._ranks:
        engine._ranks.refuse_lost()
    books = engine._up_to_date_books()
    books.admit()
    return books


def _charge(engine: "PrivacyEngine", blocks: int, traced: bool) -> mx.array:
    """Count one step and reserve its noise blocks; return the counter of the first."""
    noise = engine.state["noise"]
    counter: mx.array = noise["counter"]
    if traced and not is_traced(counter):
        raise PrivacyError(
            "[update] engine.state must be among the inputs and outputs of mx.compile but is not: every step would "
            "get the same noise; see engine.compiled_step"
        )
    if not traced:
        books = _admit(engine)
        books.charge()
    elif not engine._tracing:
        books = engine._books
        books.refuse_fork()
        if books.needs_python:
            raise PrivacyError(
                "[update] update must be outside mx.compile where there is a schedule, a ledger or a target epsilon "
                "but is inside; engine.compiled_step does both"
            )
        engine._counts_in_graph = True
    noise["counter"] = advance_counter(counter, blocks)
    engine.state["steps"] = engine.state["steps"] + 1
    if not traced:  # the books are closed before the update exists
        mx.eval(engine.state["steps"], noise["counter"])
    return counter


def _noised(engine: "PrivacyEngine", sums: dict[str, mx.array], counter: mx.array, traced: bool) -> dict[str, mx.array]:
    if engine.event.mechanism.noise_multiplier == 0:
        return sums
    if isinstance(engine.event.mechanism, Discrete):
        return add_discrete(sums, _grid(engine), engine._discrete_words)
    std, key = engine.state["noise_std"], engine.state["noise"]["key"]
    if engine._ranks:
        std = engine._ranks.share(std)
    mechanism = engine.event.mechanism
    if isinstance(mechanism, Banded):
        books, steps = engine._books, engine.state["steps"]
        own = (steps if traced else books.steps) - 1 - books.session_start
        sums = dict(sorted(sums.items()))  # a step finds the normals of earlier ones only in the same order
        _refuse_other_shapes(engine, sums)
        return add_banded(sums, taps(mechanism.coefficients, books.plan.horizon), std, key, own)
    noisy: dict[str, mx.array] = add_gaussian(sums, std, key, counter)
    return noisy


def _grid(engine: "PrivacyEngine") -> Grid:
    return make_grid(engine.noise_multiplier, engine.max_grad_norm, engine._ranks.size if engine._ranks else 1)


def _refuse_other_shapes(engine: "PrivacyEngine", sums: dict[str, mx.array]) -> None:
    shapes = {path: s.shape for path, s in sums.items()}
    if not engine._noised and engine._noise_key_file is not None:
        keep_shapes(engine._noise_key_file, shapes)
    engine._noised = engine._noised or shapes
    if shapes != engine._noised:
        raise PrivacyError("[update] trainable parameters must stay the same in a run with banded noise but changed")


def _accumulate(engine: "PrivacyEngine", sums: dict[str, mx.array]) -> None:
    """Add a piece to its logical batch, at once: unevaluated it would keep the memory of all pieces."""
    engine._accumulated = add(sums, engine._accumulated)
    mx.eval(engine._accumulated)


def _rows(batch: Batch) -> Rows:
    return list(batch.data), batch.mask, batch.units


def add(sums: dict[str, mx.array], accumulated: dict[str, mx.array]) -> dict[str, mx.array]:
    """Sums of two pieces of a logical batch."""
    return {path: s + accumulated[path] for path, s in sums.items()} if accumulated else sums


def compiled_step(
    engine: "PrivacyEngine", model: nn.Module, optimizer: PrivateOptimizer, loss_fn: LossFunction
) -> Callable[[Batch], mx.array]:
    """See `PrivacyEngine.compiled_step`."""
    if isinstance(engine.event.mechanism, Discrete):
        raise PrivacyError(
            "[compiled_step] noise must not be 'discrete', whose integers are drawn outside of a graph, but is; take "
            "value_and_grad and update"
        )
    if engine._ranks:
        engine._ranks.align(model)
    plans: dict[Any, list[Planned]] = {}
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, engine.state, mx.random.state]

    def gradients_of(rows: Rows, reduction: UnitReduction) -> tuple[mx.array, ClippedGradients]:
        return _loss_and_grad(engine, model, loss_fn, tuple(rows[0]), *rows[1:], reduction, True, plans)

    def piece(rows: Rows, reduction: UnitReduction) -> tuple[mx.array, dict[str, mx.array]]:
        losses, gradients = gradients_of(rows, reduction)
        return losses, spend(engine, gradients)

    def end(rows: Rows, reduction: UnitReduction, accumulated: dict[str, mx.array]) -> mx.array:
        losses, gradients = gradients_of(rows, reduction)
        gradients._sums = add(gradients._sums, accumulated)
        engine._tracing = True
        try:
            optimizer.update(model, gradients)
        finally:
            engine._tracing = False
        return losses

    # With other ranks a step is two functions, and Python waits between them: what fails there fails before the model
    # is touched.
    def share(
        rows: Rows, reduction: UnitReduction, accumulated: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        losses, gradients = gradients_of(rows, reduction)
        sums = add(spend(engine, gradients), accumulated)
        engine._tracing = True
        try:
            counter = _charge(engine, blocks_used(sums), traced=True)
        finally:
            engine._tracing = False
        return losses, _noised(engine, sums, counter, True)

    def apply(noisy: dict[str, mx.array]) -> None:
        optimizer._apply(model, _mean(engine, noisy))

    # Of the engine's state a piece needs the clipping norm: with the key and the counter it has nothing to do.
    compiled_piece = mx.compile(piece, inputs=[model.state, engine.state, mx.random.state], outputs=[mx.random.state])
    compiled_end = mx.compile(end, inputs=state, outputs=state)
    engine_state = [engine.state, mx.random.state]
    compiled_share = mx.compile(share, inputs=[model.state, *engine_state], outputs=engine_state)
    compiled_apply = mx.compile(apply, inputs=state, outputs=state)

    def end_with_others(rows: Rows, reduction: UnitReduction, accumulated: dict[str, mx.array]) -> mx.array:
        losses: mx.array
        losses, noisy = compiled_share(rows, reduction, accumulated)
        ranks = cast(Ranks, engine._ranks)
        total = ranks.add_up(noisy)
        ranks.wait(total, engine_state)
        compiled_apply(total)
        return losses

    def run(batch: Batch) -> mx.array:
        books = _admit(engine)
        _refuse_out_of_order(engine, batch.step)
        losses: mx.array
        if batch.last:
            books.charge()
            end_of_batch = end_with_others if engine._ranks else compiled_end
            losses = end_of_batch(_rows(batch), batch.unit_reduction, engine._accumulated)
            engine._accumulated = {}
            engine._advance()
        else:
            losses, sums = compiled_piece(_rows(batch), batch.unit_reduction)
            _accumulate(engine, sums)
        return losses

    return run
