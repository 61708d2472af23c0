"""Rules of convolutions: matrix products of what each output position sees."""

import math
from typing import Any

import mlx.core as mx

from ..ops.ghost import conv_clipped_sum, conv_sample_grads, conv_sq_norms
from .per_sample import PerSample, Tapped, combine, join, rows
from .rules_products import bias, is_built
from .taps import Site


def convolution(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.Conv1d, nn.Conv2d, nn.Conv3d."""
    return _convolution(site, calls, transposed=False)


def transposed_convolution(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d: convolutions with input and output exchanged."""
    return _convolution(site, calls, transposed=True)


def _convolution(site: Site, calls: list[Tapped], transposed: bool) -> PerSample:
    params, results = site.params, []
    together = site.clipped_together and "weight" in params and "bias" in params
    if "bias" in params and not together:
        results.append(bias("bias", join([rows(c.dy) for c in calls], 1)))
    if "weight" in params:
        results.append(_weight(site, calls, transposed, together))
    return combine(results)


def _weight(site: Site, calls: list[Tapped], transposed: bool, with_bias: bool) -> PerSample:
    layer: Any = site.module
    x, dy = [c.x for c in calls], [c.dy for c in calls]
    kernel = site.params["weight"].shape[1:-1]
    options: dict[str, Any] = {a: _option(layer, a, len(kernel)) for a in ("stride", "padding", "dilation")}
    options |= {"groups": int(getattr(layer, "groups", 1)), "transposed": transposed, "bias": with_bias}

    def named(weight: mx.array, sums: mx.array | None) -> dict[str, mx.array]:
        return {"weight": weight} if sums is None else {"weight": weight, "bias": sums}

    groups, per_position = options["groups"], math.prod(kernel)
    inputs, outputs = (dy, x) if transposed else (x, dy)
    T, c, p = sum(math.prod(a.shape[1:-1]) for a in outputs), inputs[0].shape[-1], outputs[0].shape[-1]
    if is_built(T, per_position * c // groups, p // groups, (c + p) // groups):
        return PerSample(named(*conv_sample_grads(x, dy, kernel, **options)))

    def sq_norms(units: mx.array | None) -> mx.array:
        return conv_sq_norms(x, dy, kernel, segments=units, **options)

    def weighted_sums(factors: mx.array) -> dict[str, mx.array]:
        return named(*conv_clipped_sum(x, dy, factors, kernel, **options))

    return PerSample(sq_norms=sq_norms, weighted_sums=weighted_sums)


def _option(layer: Any, name: str, axes: int) -> tuple[int, ...]:
    value = getattr(layer, name, 0 if name == "padding" else 1)
    return (value,) * axes if isinstance(value, int) else tuple(value)
