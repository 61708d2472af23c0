"""Compares private gradients with a one-by-one loop."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

from .batches import Batch
from .clipping import Group
from .gradients import ClippedSums, LossFunction, batch_size_of, clipped_sums, per_example, to_mlx
from .rules import rule_of
from .taps import PrivacyError, find_sites, named_arrays

if TYPE_CHECKING:
    from .engine import PrivacyEngine

Arrays = tuple[Any, ...]


@dataclass(frozen=True)
class CheckReport:
    """Largest relative differences between private gradients and a one-by-one loop. Not covered by epsilon."""

    loss_error: float
    norm_error: float
    sum_error: float
    coupling_error: float
    examples: int


def check(engine: "PrivacyEngine", model: nn.Module, batch: Any, loss_fn: LossFunction, rtol: float) -> CheckReport:
    """See `PrivacyEngine.check`."""
    arrays = _arrays(batch)
    B = batch_size_of(arrays)
    dropouts = [m for m in model.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)) and m.training]
    for m in dropouts:
        m.eval()
    try:
        ours = _private(engine, model, loss_fn, arrays)
        report = CheckReport(*_one_by_one(engine, model, loss_fn, arrays, ours, rtol), 0.0, B)
        return CheckReport(
            report.loss_error,
            report.norm_error,
            report.sum_error,
            _coupling(engine, model, loss_fn, arrays, ours, rtol),
            B,
        )
    finally:
        for m in dropouts:
            m.train()


def _arrays(batch: Any) -> Arrays:
    if isinstance(batch, Batch):
        return batch.data
    return to_mlx(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,))


def _private(engine: "PrivacyEngine", model: nn.Module, loss_fn: LossFunction, arrays: Arrays) -> ClippedSums:
    r = clipped_sums(model, loss_fn, arrays, None, engine.max_grad_norm, engine._clipping, {})
    mx.eval(r)
    return r


def _one_by_one(
    engine: "PrivacyEngine", model: nn.Module, loss_fn: LossFunction, arrays: Arrays, ours: ClippedSums, rtol: float
) -> tuple[float, float, float]:
    grad = nn.value_and_grad(model, lambda *x: per_example(loss_fn(model, *x), 1).sum())
    B = batch_size_of(arrays)
    losses, norms = np.zeros(B), np.zeros(B)
    groups = engine._clipping.groups(find_sites(model, rule_of))
    sums: dict[str, Any] = {path: np.zeros(s.shape) for path, s in ours.sums.items()}
    for b in tqdm(range(B), "one by one", leave=False, disable=None):
        loss, tree = grad(*_rows(arrays, b))
        grads = {path: _float64(g) for path, g in named_arrays(tree)}
        losses[b] = loss.item()
        norms[b] = np.sqrt(sum((g**2).sum() for g in grads.values()))
        factors = {path: f for group in groups for path, f in _factors(engine, group, grads)}
        for path in sums:
            sums[path] += factors[path] * grads.get(path, 0.0)
    loss_error = _require("the loss of", _relative(_float64(ours.losses), losses), rtol)
    norm_error = _require("the gradient norm of", _relative(np.sqrt(_float64(ours.sq_norms)), norms), rtol)
    scale = np.sqrt(sum((s**2).sum() for s in sums.values())) + 1e-30
    sum_error = 0.0
    for path, s in sums.items():
        error = float(np.linalg.norm(_float64(ours.sums[path]) - s) / scale)
        sum_error = max(sum_error, error)
        if not error <= rtol:
            raise PrivacyError(
                f"[check] clipped sum of {path} must equal that of a one-by-one loop but differs by {error:.2g}"
            )
    return loss_error, norm_error, sum_error


def _coupling(
    engine: "PrivacyEngine", model: nn.Module, loss_fn: LossFunction, arrays: Arrays, ours: ClippedSums, rtol: float
) -> float:
    B = batch_size_of(arrays)
    worst = 0.0
    for b in tqdm(range(B if B > 1 else 0), "among others", leave=False, disable=None):
        rows = [b if i == b else (b + 1) % B for i in range(B)]
        among = _private(engine, model, loss_fn, _take(arrays, rows))
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


def _factors(engine: "PrivacyEngine", group: Group, grads: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Factor of one example in one group of parameters, for each of their paths."""
    norm, C = np.sqrt(sum((grads[path] ** 2).sum() for path in group.paths if path in grads)), engine.max_grad_norm
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
