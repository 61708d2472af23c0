"""From a model and a per-example loss to clipped, not yet noised gradient sums."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..ops.clip import clipped_sum, sample_sq_norms
from ..ops.ghost import linear_sq_norms
from .batches import UnitReduction
from .clipping import Clipping, FactorMode, Group
from .per_sample import PerSample, Tapped
from .refusals import GradSampleMode, refuse
from .rules import per_sample, rule_of
from .taps import Call, Planned, PrivacyError, ShapeAndDtype, Site, Trace, find_sites, named_arrays, tapped

LossFunction = Callable[..., mx.array]


class ClippedSums(NamedTuple):
    """Losses [B], and per parameter path the float32 sum of the clipped gradients of the units.

    ``sq_norms`` [B] are those of the units; ``mask`` [B], where not None, is False for rows or units that are padding.
    """

    losses: mx.array
    sums: dict[str, mx.array]
    sq_norms: mx.array
    num_refused: mx.array
    mask: mx.array | None


class Units(NamedTuple):
    """What is clipped as one: which rows, and what each of them weighs."""

    ids: mx.array  # [B] int32; -1 for rows that take no part
    weights: mx.array  # [B] float32, of a unit's rows: 1, or 1 over their number
    mask: mx.array  # [B] bool: which units have rows

    def of_rows(self, factors: mx.array) -> mx.array:
        """Factors of units, [B], as those of rows, [B]."""
        return mx.where(self.ids < 0, 0.0, (factors * self.weights)[mx.maximum(self.ids, 0)])


def _make_units(units: mx.array, mask: mx.array | None, reduction: UnitReduction) -> Units:
    B = units.shape[0]
    ids = units.astype(mx.int32)
    taken = (ids >= 0) & (ids < B)
    ids = mx.where(taken if mask is None else taken & mask, ids, -1)
    counts = mx.zeros((B,)).at[mx.maximum(ids, 0)].add((ids >= 0).astype(mx.float32))
    weights = mx.ones((B,)) if reduction == "sum" else 1 / mx.maximum(counts, 1)
    return Units(ids, weights, counts > 0)


def clipped_sums(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: tuple[Any, ...],
    mask: mx.array | None,
    max_grad_norm: float | mx.array,
    clipping: Clipping | FactorMode,
    plans: dict[Any, list[Planned]],
    units: mx.array | None = None,
    unit_reduction: UnitReduction = "mean",
    grad_sample_mode: GradSampleMode = "ghost",
) -> ClippedSums:
    """Book-keeping (Bu et al. 2022): one backward pass to the layers' outputs, norms, factors, weighted sums.

    With ``"loop"``: a backward pass for each row.

    ``units`` [B], below B: the gradients of a unit's rows are averaged or added up before the one clip. Without it
    every row is a unit.
    """
    refuse(model, grad_sample_mode)
    sites = find_sites(model, rule_of)
    if not sites:
        raise PrivacyError("[value_and_grad] model must have trainable parameters but has none")
    batch = to_mlx(batch)
    B = batch_size_of(batch)
    if B == 0:
        zeros = {s.path: mx.zeros(s.array.shape) for site in sites for s in site.slots}
        return ClippedSums(mx.zeros((0,)), zeros, mx.zeros((0,)), mx.array(0), None)
    clipping = clipping if isinstance(clipping, Clipping) else Clipping(clipping)
    groups = clipping.groups(sites)
    for site in sites:
        site.clipped_together = any(g.paths.issuperset(s.path for s in site.slots) for g in groups)
    if grad_sample_mode == "loop":
        losses, layers = _row_by_row(sites, loss_fn, model, batch, B)
    else:
        plan = _plan(model, sites, loss_fn, batch, B, plans)
        losses, layers = _backward(sites, plan, loss_fn, model, batch, B)
    parts = [part for g in groups if (part := _part(g, layers)).built or part.unbuilt]
    joined = None if units is None else _make_units(units, mask, unit_reduction)
    counted = joined.mask if joined else mask
    norms = [part.sq_norms(joined) for part in parts]
    factors, total, num_refused = clipping.factors([p.group for p in parts], norms, max_grad_norm, counted)
    sums = {
        path: s
        for part, f in zip(parts, factors, strict=True)
        for path, s in part.weighted_sums(joined.of_rows(f) if joined else f).items()
    }
    for site in sites:  # a layer that the loss does not reach: its noise must be there all the same
        sums.update({s.path: mx.zeros(s.array.shape) for s in site.slots if s.path not in sums})
    return ClippedSums(losses, sums, total, num_refused, counted)


class _Part(NamedTuple):
    """What is clipped together: gradients that are built, by path, and layers whose gradients are not."""

    group: Group
    built: dict[str, mx.array]
    unbuilt: list[tuple[Site, PerSample]]

    def sq_norms(self, units: Units | None) -> mx.array:
        ids = units.ids if units else None
        norms = [r.sq_norms(ids) for _, r in self.unbuilt if r.sq_norms is not None]
        if ids is None and self.built:
            norms.append(sample_sq_norms(self.built))
        if ids is not None:  # the sum of a unit's rows is the product of these rows with ones
            norms += [linear_sq_norms(mx.ones((g.shape[0], 1)), _rows(g), segments=ids) for g in self.built.values()]
        total = sum(norms[1:], norms[0])
        return total * units.weights.square() if units else total

    def weighted_sums(self, factors: mx.array) -> dict[str, mx.array]:
        sums: dict[str, mx.array] = clipped_sum(self.built, factors) if self.built else {}
        for site, result in self.unbuilt:
            weighted = result.weighted_sums(factors) if result.weighted_sums else {}
            sums.update({s.path: weighted[s.name] for s in site.slots if s.name in weighted})
        return sums


def _rows(g: mx.array) -> mx.array:
    return mx.flatten(g, 1) if g.ndim > 1 else g[:, None]


def _part(group: Group, layers: list[tuple[Site, PerSample]]) -> _Part:
    part = _Part(group, {}, [])
    for site, r in layers:
        part.built.update({s.path: r.built[s.name] for s in site.slots if s.name in r.built and s.path in group.paths})
        unbuilt = {s.path for s in site.slots if s.name not in r.built}
        if unbuilt & group.paths:
            if not unbuilt <= group.paths:
                raise PrivacyError(
                    f"[value_and_grad] max_grad_norm must have {', '.join(sorted(unbuilt))} of {site.label} in one "
                    "group but divides them: their norm is computed as one"
                )
            part.unbuilt.append((site, r))
    return part


def to_mlx(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the batch with numpy arrays as MLX arrays."""
    converted: tuple[Any, ...] = tree_map(lambda a: mx.array(a) if isinstance(a, np.ndarray) else a, batch)
    return converted


def batch_size_of(batch: tuple[Any, ...]) -> int:
    """Rows of the first array of a batch."""
    arrays = [a for _, a in named_arrays(batch)]
    if not arrays or arrays[0].ndim == 0:
        raise PrivacyError("[value_and_grad] batch must hold arrays with a row for each example but holds none")
    return int(arrays[0].shape[0])


def per_example(losses: Any, B: int) -> mx.array:
    """Return the losses, if there is one for each example."""
    if not isinstance(losses, mx.array) or losses.shape != (B,):
        shape = losses.shape if isinstance(losses, mx.array) else type(losses).__name__
        raise PrivacyError(
            f"[value_and_grad] loss_fn must return one loss an example, shape ({B},), but returned {shape}; "
            "use reduction='none' and average only within an example"
        )
    return losses


def _row_by_row(
    sites: list[Site], loss_fn: LossFunction, model: nn.Module, batch: tuple[Any, ...], B: int
) -> tuple[mx.array, list[tuple[Site, PerSample]]]:
    parameters = model.trainable_parameters()

    def loss(parameters: Any, *row: Any) -> mx.array:
        model.update(parameters)
        return per_example(loss_fn(model, *row), 1).sum()

    try:
        rows = [mx.value_and_grad(loss)(parameters, *_row(batch, i, B)) for i in range(B)]
    finally:
        model.update(parameters)  # under mx.compile the model would keep what was traced
    gradients = [dict(named_arrays(tree)) for _, tree in rows]
    layers = [
        (s, PerSample({slot.name: mx.stack([g[slot.path] for g in gradients]) for slot in s.slots})) for s in sites
    ]
    return mx.stack([loss for loss, _ in rows]), layers


def _row(batch: Any, i: int, B: int) -> Any:
    return tree_map(lambda a: a[i : i + 1] if isinstance(a, mx.array) and a.ndim and a.shape[0] == B else a, batch)


def _backward(
    sites: list[Site], plan: list[Planned], loss_fn: LossFunction, model: nn.Module, batch: tuple[Any, ...], B: int
) -> tuple[mx.array, list[tuple[Site, PerSample]]]:
    # broadcast from one zero: the probes take no memory
    probes = [[mx.broadcast_to(mx.zeros((), t), shape) for shape, t in c.outputs] for c in plan]
    inner = [{k: mx.broadcast_to(mx.zeros((), t), shape) for k, (shape, t) in c.inner.items()} for c in plan]
    traces: list[Trace] = []

    def total(probes: Any, inner: Any) -> tuple[mx.array, mx.array, list[tuple[list[mx.array], dict[str, mx.array]]]]:
        trace = Trace(B, plan, probes, inner)
        traces.append(trace)
        with tapped(sites, trace):
            losses = per_example(loss_fn(model, *batch), B)
        if len(trace.calls) != len(plan):
            raise PrivacyError("[value_and_grad] loss_fn must call the same layers in every forward pass but did not")
        return losses.sum(), losses, [(c.inputs, c.recorded) for c in trace.calls]

    (_, losses, tapes), (dys, dinner) = mx.value_and_grad(total, argnums=(0, 1))(probes, inner)
    by_site: dict[int, list[Tapped]] = {id(s): [] for s in sites}
    for call, planned, (x, recorded), dy, di in zip(traces[-1].calls, plan, tapes, dys, dinner, strict=True):
        if planned.broadcast:
            x = [mx.broadcast_to(a, (B, *a.shape)) for a in x]
            if not planned.inner:  # a probe inside has given them the batch axis
                recorded = {k: mx.broadcast_to(a, (B, *a.shape)) for k, a in recorded.items()}
        by_site[id(call.site)].append(Tapped(call, planned, x, dy, recorded, di))
    return losses, [(s, per_sample(s, by_site[id(s)])) for s in sites if by_site[id(s)]]


def _plan(
    model: nn.Module,
    sites: list[Site],
    loss_fn: LossFunction,
    batch: tuple[Any, ...],
    B: int,
    plans: dict[Any, list[Planned]],
) -> list[Planned]:
    """Learn the calls and their shapes from forward passes that are built and never run.

    One is of B rows and one of B + 1: what grows with the batch has the batch axis, and a coincidence of sizes
    cannot be taken for one.
    """
    key = (
        tuple((k, a.shape, a.dtype) if isinstance(a, mx.array) else (k, a) for k, a in list(tree_flatten(batch))),
        tuple((s.path, s.cls, s.module.training, *(slot.path for slot in s.slots)) for s in sites),
    )
    if key not in plans:
        plan = _dry_run(model, sites, loss_fn, batch, B)
        try:
            larger = _dry_run(model, sites, loss_fn, _one_more(batch, B), B + 1)
        except PrivacyError:
            raise
        except Exception as e:
            raise PrivacyError(
                f"[value_and_grad] model and loss_fn must work at any batch size but failed with one more example: {e}"
            ) from e
        if [(c.site.path, c.method) for c in plan] != [(c.site.path, c.method) for c in larger]:
            raise PrivacyError("[value_and_grad] loss_fn must call the same layers at every batch size but does not")
        plans[key] = [_compare(a, b, B) for a, b in zip(plan, larger, strict=True)]
    return plans[key]


def _dry_run(model: nn.Module, sites: list[Site], loss_fn: LossFunction, batch: Any, B: int) -> list[Call]:
    trace = Trace(B, None, [], [])
    with tapped(sites, trace):
        per_example(loss_fn(model, *batch), B)
    return trace.calls


def _one_more(batch: Any, B: int) -> Any:
    def grow(a: Any) -> Any:
        if isinstance(a, mx.array) and a.ndim and a.shape[0] == B:
            return mx.concatenate([a, a[:1]], axis=0)
        return a

    return tree_map(grow, batch)


def _compare(a: Call, b: Call, B: int) -> Planned:
    outputs = [(y.shape, y.dtype) for y in a.outputs]
    batched = [_grows(x, y, B) for x, y in zip(a.inputs, b.inputs, strict=True)]
    if all(x.shape == y.shape for x, y in zip(a.inputs + a.outputs, b.inputs + b.outputs, strict=True)):
        outputs, inner = _with_batch(outputs, B), dict(zip(a.inner, _with_batch(a.inner.values(), B), strict=True))
        return Planned(a.site.path, a.method, outputs, inner, batched, True)
    if not batched or not batched[0] or not all(_grows(x, y, B) for x, y in zip(a.outputs, b.outputs, strict=True)):
        raise PrivacyError(
            f"[value_and_grad] {a.site.label} must see the batch as its first axis, {B} rows, but has input shape "
            f"{a.inputs[0].shape if a.inputs else ()} and output shape {a.outputs[0].shape}; "
            "keep [batch, ...] and do not fold other axes into it"
        )
    return Planned(a.site.path, a.method, outputs, a.inner, batched, False)


def _with_batch(shapes: Iterable[ShapeAndDtype], B: int) -> list[ShapeAndDtype]:
    return [((B, *shape), dtype) for shape, dtype in shapes]


def _grows(x: mx.array, y: mx.array, B: int) -> bool:
    return x.ndim > 0 and x.shape == (B, *x.shape[1:]) and y.shape == (B + 1, *x.shape[1:])
