"""Layers that have no guarantee as they are, and why."""

from collections.abc import Iterator
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from .taps import PrivacyError, named_arrays

GradSampleMode = Literal["ghost", "loop"]

_SHARDED = "its parameters are spread over several machines, and so would be each example's norm; use data parallelism"

# Types whose trainable parameters are refused.
REFUSED = {
    "mlx.nn.layers.quantized.QQLinear": (
        "its backward pass quantizes gradients in groups that run across the batch, which couples the examples; "
        "freeze it, or use nn.Linear"
    ),
    "mlx.nn.layers.quantized.QuantizedEmbedding": (
        "a table of quantized rows has no rule; freeze it, dequantize it, or put a LoRA layer around it"
    ),
    "mlx.nn.layers.distributed.AllToShardedLinear": _SHARDED,
    "mlx.nn.layers.distributed.ShardedToAllLinear": _SHARDED,
    "mlx.nn.layers.distributed.QuantizedAllToShardedLinear": _SHARDED,
    "mlx.nn.layers.distributed.QuantizedShardedToAllLinear": _SHARDED,
    "mlx.nn.layers.distributed.FullyShardedModule": _SHARDED,
    "mlx_lm.models.switch_layers.QuantizedSwitchLinear": (
        "quantized experts have no rule; freeze it, dequantize it, or put a LoRA layer around it"
    ),
}


def refuse(model: nn.Module, grad_sample_mode: GradSampleMode) -> None:
    """Raise the first reason for which the model cannot be made private."""
    for path, module in walk(model):
        if reason := refusal(module, grad_sample_mode):
            raise PrivacyError(
                f"[value_and_grad] layer {path or 'model'} ({type(module).__name__}) must have a guarantee but has "
                f"none: {reason}"
            )


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer and its path, also those in tuples, which MLX's own walk leaves out."""
    stack: list[tuple[str, Any]] = [("", model)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, nn.Module):
            yield path, value
        if isinstance(value, dict):
            stack += [(f"{path}.{k}" if path else str(k), v) for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            stack += [(f"{path}.{i}", v) for i, v in enumerate(value)]


def refusal(module: nn.Module, grad_sample_mode: GradSampleMode) -> str | None:
    """Why this layer cannot be private, or None."""
    if isinstance(module, nn.BatchNorm):
        statistics: Any = module
        return (
            "a BatchNorm couples the examples of a batch; use nn.GroupNorm(groups, dims, pytorch_compatible=True), as "
            "engine.fix(model) does, or running statistics in eval mode"
            if module.training or not statistics.track_running_stats
            else None
        )
    own = own_arrays(module, trainable=True)
    integers = [name for name, a in own.items() if not mx.issubdtype(a.dtype, mx.floating)]
    if integers:
        return f"its trainable {', '.join(integers)} must be floating but is not; freeze it"
    for base in type(module).__mro__ if own or _shards(module) else ():
        reason = REFUSED.get(f"{base.__module__}.{base.__qualname__}")
        if reason and (grad_sample_mode == "ghost" or reason is _SHARDED):
            return reason
    return None


def own_arrays(module: nn.Module, trainable: bool = False) -> dict[str, mx.array]:
    """Arrays of the layer itself, not of the layers in it; all, or those that are trained."""
    wanted: Any = nn.Module.trainable_parameter_filter if trainable else nn.Module.valid_parameter_filter
    own: dict[str, mx.array] = {}
    for name, value in module.items():
        if wanted(module, name, value):
            own.update(_arrays(name, value))
    return own


def _arrays(name: str, value: Any) -> dict[str, mx.array]:
    if isinstance(value, nn.Module):
        return {}
    if isinstance(value, mx.array):
        return {name: value}
    entries = enumerate(value) if isinstance(value, (list, tuple)) else value.items() if isinstance(value, dict) else ()
    return {path: a for key, v in entries for path, a in _arrays(f"{name}.{key}", v).items()}


def _shards(module: nn.Module) -> bool:
    return type(module).__name__ == "FullyShardedModule" and bool(named_arrays(module.trainable_parameters()))
