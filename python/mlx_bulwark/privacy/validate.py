"""What of a model is private, frozen or refused, and why; and repairs."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from .refusals import GradSampleMode, own_arrays, refusal, walk
from .rules import rule_of
from .taps import PrivacyError, Site, find_sites

Status = Literal["private", "frozen", "refused"]


@dataclass(frozen=True)
class LayerReport:
    """One layer that has parameters, or is refused."""

    path: str
    type: str
    status: Status
    reason: str  # how its per-sample gradients are computed, or why they are not
    trainable_parameters: int
    frozen_parameters: int


@dataclass(frozen=True)
class ValidationReport:
    """What of a model is private, frozen or refused, and why."""

    layers: tuple[LayerReport, ...]

    @property
    def refused(self) -> tuple[LayerReport, ...]:
        """The layers that cannot be private as they are."""
        return tuple(r for r in self.layers if r.status == "refused")

    @property
    def is_valid(self) -> bool:
        """Whether nothing is refused."""
        return not self.refused

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(r.trainable_parameters for r in self.layers)

    @property
    def frozen_parameters(self) -> int:
        """How many numbers are frozen."""
        return sum(r.frozen_parameters for r in self.layers)

    def to_json(self) -> str:
        """Return the report as JSON.

        Returns:
            An object with ``is_valid`` and one entry a layer.

        Example:
            >>> import mlx.nn as nn, mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> '"is_valid": true' in engine.validate(nn.Linear(2, 2)).to_json()
            True
        """
        return json.dumps(
            {"kind": "privacy_layers", "is_valid": self.is_valid, "layers": [asdict(r) for r in self.layers]}, indent=2
        )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            (r.status, r.path or "model", r.type, f"{r.trainable_parameters:,}", r.reason) for r in self.layers
        ]
        rows.insert(0, ("status", "layer", "type", "trained", "how or why"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4])).rstrip() for row in rows]
        valid = "valid" if self.is_valid else f"not valid: {len(self.refused)} refused"
        lines.append(f"{valid}; {self.trainable_parameters:,} trained and {self.frozen_parameters:,} frozen parameters")
        return "\n".join(lines)


@dataclass(frozen=True)
class Fix:
    """One repair of a model."""

    path: str
    before: str
    after: str


def validate(model: nn.Module, grad_sample_mode: GradSampleMode) -> ValidationReport:
    """See `PrivacyEngine.validate`."""
    sites = {id(s.module): s for s in find_sites(model, rule_of)}
    seen: set[int] = set()
    layers = []
    for path, module in sorted(walk(model), key=lambda item: item[0]):
        if id(module) not in seen:
            seen.add(id(module))
            layers.extend(_layer(path, module, sites.get(id(module)), grad_sample_mode))
    if not sites:
        layers.insert(0, LayerReport("", type(model).__name__, "refused", "it has no trainable parameters", 0, 0))
    return ValidationReport(tuple(layers))


def _layer(path: str, module: nn.Module, site: Site | None, mode: GradSampleMode) -> list[LayerReport]:
    own, trained = own_arrays(module), own_arrays(module, trainable=True)
    mapped = site is not None and not site.rule and mode == "ghost"
    reason = refusal(module, mode) or (_unmappable(module) if mapped else None)
    if not own and not reason:
        return []
    status: Status = "refused" if reason else "private" if trained else "frozen"
    how = "by a backward pass for each row" if mode == "loop" else _BY_VMAP if mapped else "by the rule of its type"
    trainable, frozen = (sum(a.size for k, a in own.items() if (k in trained) == t) for t in (True, False))
    reason = reason or (how if trained else "")
    return [LayerReport(path, type(module).__name__, status, reason, trainable, frozen)]


_BY_VMAP = "by mx.vmap, if it can map the layer: no rule of its own"


def _unmappable(module: nn.Module) -> str | None:
    """Why a layer without a rule cannot be mapped, as far as its parts tell."""
    own = ", ".join(own_arrays(module, trainable=True))
    for path, part in module.named_modules():
        way_out = f"in {path} ({type(part).__name__}); put {own} into a layer of its own"
        if isinstance(part, nn.QuantizedLinear):
            return f"it owns {own}, has no rule, and mx.vmap cannot map what is {way_out}"
        if isinstance(part, _DROPOUT) and part.training and part._p_1 < 1:
            return f"it owns {own}, has no rule, and something random is drawn {way_out}"
    return None


_DROPOUT: Any = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


def fix(model: nn.Module) -> tuple[Fix, ...]:
    """See `PrivacyEngine.fix`."""
    if isinstance(model, nn.BatchNorm):
        raise PrivacyError("[fix] model must hold its layers but is itself a BatchNorm; use nn.GroupNorm in its place")
    fixes: list[Fix] = []
    replaced: dict[int, nn.Module] = {}
    for path, module in list(walk(model)):
        for name, child in list(module.items()):
            if not name.startswith("_"):
                module[name] = _fixed(child, f"{path}.{name}" if path else name, replaced, fixes)
        integers = [name for name, a in own_arrays(module, trainable=True).items() if not _floating(a)]
        if integers:
            module.freeze(keys=integers, recurse=False)
            fixes.append(Fix(path, f"trainable {', '.join(integers)}", "frozen: integers"))
    return tuple(fixes)


def _fixed(value: Any, path: str, replaced: dict[int, nn.Module], fixes: list[Fix]) -> Any:
    if isinstance(value, nn.BatchNorm):
        norm = replaced.setdefault(id(value), _group_norm(value))
        fixes.append(Fix(path, repr(value), repr(norm)))
        return norm
    if isinstance(value, (nn.Module, mx.array)):
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_fixed(v, f"{path}.{i}", replaced, fixes) for i, v in enumerate(value))
    if isinstance(value, dict):
        return {k: _fixed(v, f"{path}.{k}", replaced, fixes) for k, v in value.items()}
    return value


def _group_norm(norm: Any) -> nn.GroupNorm:
    groups = math.gcd(32, norm.num_features)
    affine = "weight" in norm
    fixed: Any = nn.GroupNorm(groups, norm.num_features, norm.eps, affine, pytorch_compatible=True)
    if affine:
        fixed.weight, fixed.bias = norm.weight, norm.bias
        fixed.freeze(keys=[k for k in ("weight", "bias") if k in norm._no_grad], recurse=False)
    fixed.train(norm.training)
    group_norm: nn.GroupNorm = fixed
    return group_norm


def _floating(a: mx.array) -> bool:
    return mx.issubdtype(a.dtype, mx.floating)
