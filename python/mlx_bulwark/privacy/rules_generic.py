"""The rule of layers that have none of their own."""

import mlx.core as mx

from .per_sample import PerSample, Tapped, add
from .taps import PrivacyError, Site, named_arrays


def generic(site: Site, calls: list[Tapped]) -> PerSample:
    """Any layer that mx.vmap can map, for what it owns itself: one vector-Jacobian product a sample."""
    params = site.params
    result = PerSample()
    for c in calls:
        per_call = _vmap_vjp(site, c, params)
        for name, g in zip(params, per_call, strict=True):
            add(result.built, name, g.astype(mx.float32))
    return result


def _vmap_vjp(site: Site, c: Tapped, params: dict[str, mx.array]) -> list[mx.array]:
    floating = [i for i, d in enumerate(c.gradients) if mx.issubdtype(d.dtype, mx.floating)]
    batched = [i for i, b in enumerate(c.planned.batched) if b or c.planned.broadcast]

    def one(rows: list[mx.array], dys: list[mx.array]) -> list[mx.array]:
        inputs = list(c.inputs)
        for i, row in zip(batched, rows, strict=True):
            inputs[i] = row if c.planned.broadcast else row[None]
        args, kwargs = c.call.arguments(inputs)

        def forward(*values: mx.array) -> list[mx.array]:
            y = site.run(dict(zip(params, values, strict=True)), args, kwargs)
            outputs = [y] if isinstance(y, mx.array) else [v for _, v in named_arrays(y)]
            # mx.vjp gives the cotangent of an output of mx.stop_gradient to the next one: a sum is none
            return [outputs[i] + 0 for i in floating]

        cotangents = dys if c.planned.broadcast else [d[None] for d in dys]
        return mx.vjp(forward, list(params.values()), cotangents)[1]

    try:
        return mx.vmap(one)([c.inputs[i] for i in batched], [c.gradients[i] for i in floating])
    except (ValueError, RuntimeError) as e:
        raise PrivacyError(
            f"[value_and_grad] {site.label} must be of a type with a rule or of operations that mx.vmap can map but is "
            f"not ({e}); freeze it, or build it from layers of mlx.nn"
        ) from e
    finally:
        site.install(site.params)
