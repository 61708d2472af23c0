"""What a rule gives for one layer, and what rules are made of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .taps import Call, Planned

SqNorms = Callable[[mx.array | None], mx.array]
WeightedSums = Callable[[mx.array], dict[str, mx.array]]


@dataclass
class PerSample:
    """Per-sample gradients of one layer: built, or as norms and a way to their weighted sum."""

    built: dict[str, mx.array] = field(default_factory=dict)  # name -> [B, ...]
    # Of the gradients that are not built: units [B], None where every row is one -> squared norms [B] of the units
    sq_norms: SqNorms | None = None
    weighted_sums: WeightedSums | None = None  # factors [B] -> their weighted sums


@dataclass
class Tapped:
    """One call as the rules see it: every input and output gradient with the batch axis first."""

    call: Call
    planned: Planned
    inputs: list[mx.array]
    gradients: list[mx.array]
    recorded: dict[str, mx.array]
    inner: dict[str, mx.array]  # gradients of the probes inside the layer

    @property
    def x(self) -> mx.array:
        """The layer's first input."""
        return self.inputs[0]

    @property
    def dy(self) -> mx.array:
        """The gradient of the layer's one output."""
        return self.gradients[0]

    def named(self, *names: str) -> list[Any]:
        """Arguments of the call, whose signature has these names; None where the call has none."""
        args, kwargs = self.call.arguments(self.inputs)
        return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def combine(results: Iterable[PerSample]) -> PerSample:
    """Per-sample gradients of several parameters of one layer as one."""
    parts = list(results)
    norms = [r.sq_norms for r in parts if r.sq_norms is not None]
    weighted = [r.weighted_sums for r in parts if r.weighted_sums is not None]

    def sq_norms(units: mx.array | None) -> mx.array:
        each = [f(units) for f in norms]
        return sum(each[1:], each[0])

    def weighted_sums(factors: mx.array) -> dict[str, mx.array]:
        return {name: s for f in weighted for name, s in f(factors).items()}

    return PerSample(
        {name: g for r in parts for name, g in r.built.items()},
        sq_norms if norms else None,
        weighted_sums if weighted else None,
    )


def rows(x: mx.array) -> mx.array:
    """[B, ..., d] -> [B, T, d] in float32."""
    return x.reshape(x.shape[0], -1, x.shape[-1]).astype(mx.float32)


def join(parts: list[mx.array], axis: int) -> mx.array:
    """The calls of one layer along an axis."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def add(total: dict[str, mx.array], name: str, value: mx.array) -> None:
    """total[name] += value."""
    total[name] = total[name] + value if name in total else value
