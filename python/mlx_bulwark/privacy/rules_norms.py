"""Rules of normalisations: their gradients are small and built."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .per_sample import PerSample, Tapped, add, rows
from .taps import Site


def layer_norm(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.LayerNorm."""
    return _affine(site, calls, lambda layer, x: mx.fast.layer_norm(x, None, None, layer.eps))


def rms_norm(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.RMSNorm, and those whose weight is one more than their parameter."""
    return _affine(site, calls, lambda layer, x: mx.fast.rms_norm(x, None, layer.eps))


def group_norm(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.GroupNorm."""

    def normalised(layer: Any, x: mx.array) -> Any:
        plain: Any = nn.GroupNorm(layer.num_groups, layer.dims, layer.eps, False, layer.pytorch_compatible)
        return plain(x)

    return _affine(site, calls, normalised)


def instance_norm(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.InstanceNorm."""
    return _affine(site, calls, lambda layer, x: nn.InstanceNorm(layer.dims, layer.eps)(x))


def _affine(site: Site, calls: list[Tapped], normalised: Callable[[Any, mx.array], Any]) -> PerSample:
    """y = weight * normalised(x) + bias over the last axis."""
    result = PerSample()
    for c in calls:
        dy = rows(c.dy)
        if "bias" in site.params:
            add(result.built, "bias", dy.sum(axis=1))
        if "weight" in site.params:
            add(result.built, "weight", (dy * rows(normalised(site.module, c.x.astype(mx.float32)))).sum(axis=1))
    return result
