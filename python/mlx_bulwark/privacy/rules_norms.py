"""Rules of normalisations: their gradients are small and built."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .per_sample import PerSample, Tapped, add, rows
from .taps import Site


def affine(site: Site, calls: list[Tapped]) -> PerSample:
    """y = weight * normalised(x) + bias over the last axis."""
    result = PerSample()
    for c in calls:
        dy = rows(c.dy)
        if "bias" in site.params:
            add(result.built, "bias", dy.sum(axis=1))
        if "weight" in site.params:
            normalised = rows(_without_affine(site.module, site.cls, c.x))
            add(result.built, "weight", (dy * normalised).sum(axis=1))
    return result


def _without_affine(module: Any, cls: type[nn.Module], x: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    if issubclass(cls, nn.LayerNorm):
        return mx.fast.layer_norm(x, None, None, module.eps)
    if issubclass(cls, nn.RMSNorm):
        return mx.fast.rms_norm(x, None, module.eps)
    if issubclass(cls, nn.InstanceNorm):
        by_instance: mx.array = nn.InstanceNorm(module.dims, module.eps)(x)
        return by_instance
    plain: Any = nn.GroupNorm(module.num_groups, module.dims, module.eps, False, module.pytorch_compatible)
    normalised: mx.array = plain(x)
    return normalised
