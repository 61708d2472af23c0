"""Rules of quantized layers: their integers stay as they are, what is floating may be trained."""

from typing import Any

import mlx.core as mx

from .per_sample import PerSample, Tapped, combine, join, rows
from .rules_products import bias, product
from .taps import Site


def quantized_linear(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.QuantizedLinear: W = scales * integers + biases, group by group along its rows."""
    layer: Any = site.module
    size, params = layer.group_size, site.params
    U, D = join([rows(c.x) for c in calls], 1), join([rows(c.dy) for c in calls], 1)
    results = []
    if "bias" in params:
        results.append(bias("bias", D))
    if "biases" in params:
        of_groups = U.reshape(*U.shape[:2], -1, size).sum(axis=-1)
        results.append(product("biases", params["biases"].shape, of_groups, D))
    if "scales" in params:
        scales = params["scales"]
        integers = mx.dequantize(
            layer.weight, mx.ones_like(scales), mx.zeros_like(scales), group_size=size, bits=layer.bits, mode=layer.mode
        )
        weighted = (D.swapaxes(1, 2) @ U) * integers.astype(mx.float32)
        results.append(PerSample({"scales": weighted.reshape(U.shape[0], *scales.shape, size).sum(axis=-1)}))
    return combine(results)
