"""Compares private gradients with a one-by-one loop, and noise with what is accounted."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

from .batches import Batch
from .check_noise import check_noise
from .clipping import Group
from .gradients import ClippedSums, LossFunction, batch_size_of, clipped_sums, per_example, to_mlx
from .rules import rule_of
from .taps import PrivacyError, find_sites, named_arrays

if TYPE_CHECKING:
    from .engine import PrivacyEngine

Arrays = tuple[Any, ...]


@dataclass(frozen=True)
class CheckReport:
    """Largest relative differences between private gradients and a one-by-one loop, and of the noise.

    Not covered by epsilon.
    """

    loss_error: float
    norm_error: float
    sum_error: float
    coupling_error: float
    noise_error: float  # of the standard deviation of a leaf
    examples: int
    noise_steps: int


def check(
    engine: "PrivacyEngine", model: nn.Module, batch: Any, loss_fn: LossFunction, rtol: float, noise_steps: int
) -> CheckReport:
    """See `PrivacyEngine.check`."""
    arrays = _arrays(batch)
    dropouts = [m for m in model.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)) and m.training]
    for m in dropouts:
        m.eval()
    try:
        ours = _private(engine, model, loss_fn, arrays, engine.max_grad_norm)
        one_by_one = _one_by_one(engine, model, loss_fn, arrays, ours, rtol)
        coupling = _coupling(engine, model, loss_fn, arrays, ours, rtol)
    finally:
        for m in dropouts:
            m.train()
    steps = noise_steps if engine.noise_multiplier else 0
    noise = check_noise(engine, {path: s.shape for path, s in ours.sums.items()}, steps) if steps else 0.0
    return CheckReport(*one_by_one, coupling, noise, batch_size_of(arrays), steps)


def _arrays(batch: Any) -> Arrays:
    if isinstance(batch, Batch):
        return batch.data
    return to_mlx(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,))


def _private(
    engine: "PrivacyEngine", model: nn.Module, loss_fn: LossFunction, arrays: Arrays, max_grad_norm: float
) -> ClippedSums:
    r = clipped_sums(
        model, loss_fn, arrays, None, max_grad_norm, engine._clipping, {}, grad_sample_mode=engine.grad_sample_mode
    )
    mx.eval(r)
    return r


def _one_by_one(
    engine: "PrivacyEngine", model: nn.Module, loss_fn: LossFunction, arrays: Arrays, ours: ClippedSums, rtol: float
) -> tuple[float, float, float]:
    """Errors of losses, norms and sums; of sums also where every example is clipped, whatever the engine's norm."""
    tight = 0.01 * _least(np.sqrt(_float64(ours.sq_norms))) or engine.max_grad_norm
    limits = {engine.max_grad_norm: ours, tight: _private(engine, model, loss_fn, arrays, tight)}
    grad = nn.value_and_grad(model, lambda *x: per_example(loss_fn(model, *x), 1).sum())
    B = batch_size_of(arrays)
    losses, norms = np.zeros(B), np.zeros(B)
    groups = engine._clipping.groups(find_sites(model, rule_of))
    sums: dict[float, dict[str, Any]] = {C: {path: np.zeros(s.shape) for path, s in ours.sums.items()} for C in limits}
    for b in tqdm(range(B), "one by one", leave=False, disable=None):
        loss, tree = grad(*_rows(arrays, b))
        grads = {path: _float64(g) for path, g in named_arrays(tree)}
        losses[b] = loss.item()
        norms[b] = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for C in limits:
            factors = {path: f for group in groups for path, f in _factors(engine, group, grads, C)}
            for path in sums[C]:
                sums[C][path] += factors[path] * grads.get(path, 0.0)
    loss_error = _require("the loss of", _relative(_float64(ours.losses), losses), rtol)
    norm_error = _require("the gradient norm of", _relative(np.sqrt(_float64(ours.sq_norms)), norms), rtol)
    return loss_error, norm_error, max(_sum_error(limits[C].sums, sums[C], C, rtol) for C in limits)


def _least(norms: Any) -> float:
    positive = norms[np.isfinite(norms) & (norms > 0)]
    return float(positive.min()) if positive.size else 0.0


def _sum_error(ours: dict[str, mx.array], sums: dict[str, Any], C: float, rtol: float) -> float:
    scale = np.sqrt(sum((s**2).sum() for s in sums.values())) + 1e-30
    worst = 0.0
    for path, s in sums.items():
        error = float(np.linalg.norm(_float64(ours[path]) - s) / scale)
        worst = max(worst, error)
        if not error <= rtol:
            raise PrivacyError(
                f"[check] clipped sum of {path} must equal that of a one-by-one loop but differs by {error:.2g} "
                f"at max_grad_norm {C:.3g}"
            )
    return worst


def _coupling(
    engine: "PrivacyEngine", model: nn.Module, loss_fn: LossFunction, arrays: Arrays, ours: ClippedSums, rtol: float
) -> float:
    B = batch_size_of(arrays)
    worst = 0.0
    for b in tqdm(range(B if B > 1 else 0), "among others", leave=False, disable=None):
        rows = [b if i == b else (b + 1) % B for i in range(B)]
        among = _private(engine, model, loss_fn, _take(arrays, rows), engine.max_grad_norm)
        for what, x, y in (("loss", among.losses, ours.losses), ("norm", among.sq_norms, ours.sq_norms)):
            error = float(_relative(_float64(x)[b : b + 1], _float64(y)[b : b + 1])[0])
            worst = max(worst, error)
            if not error <= rtol:
                raise PrivacyError(
                    f"[check] example {b} must have the same {what} whatever else is in its batch but it changes by "
                    f"{error:.2g}: the loss or a layer couples the examples"
                )
    return worst


def _take(arrays: Arrays, rows: list[int]) -> Arrays:
    taken: Arrays = tree_map(lambda a: a[mx.array(rows)] if isinstance(a, mx.array) and a.ndim else a, arrays)
    return taken


def _rows(arrays: Arrays, b: int) -> Arrays:
    return _take(arrays, [b])


def _factors(engine: "PrivacyEngine", group: Group, grads: dict[str, Any], C: float) -> Iterator[tuple[str, float]]:
    """Factor of one example in one group of parameters, for each of their paths."""
    norm = np.sqrt(sum((grads[path] ** 2).sum() for path in group.paths if path in grads))
    if np.inf == C:
        factor = 1.0
    elif engine._clipping.factor_mode == "automatic":
        factor = C * group.share / (norm + 0.01)
    else:
        factor = min(1.0, C * group.share / (norm + 1e-6))
    return ((path, factor) for path in group.paths)


def _relative(x: Any, y: Any) -> Any:
    return np.abs(x - y) / np.maximum(np.maximum(np.abs(x), np.abs(y)), 1e-6)


def _require(what: str, errors: Any, rtol: float) -> float:
    worst = int(np.argmax(np.where(np.isnan(errors), np.inf, errors))) if len(errors) else 0
    if len(errors) and not errors[worst] <= rtol:
        raise PrivacyError(
            f"[check] {what} example {worst} must equal that of a one-by-one loop but differs by {errors[worst]:.2g}"
        )
    return float(errors.max()) if len(errors) else 0.0


def _float64(a: mx.array) -> Any:
    return np.array(a.astype(mx.float32)).astype(np.float64)
