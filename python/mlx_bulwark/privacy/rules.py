"""Per-sample gradients by layer: their norms and their weighted sums from a layer's inputs and output gradients.

With inputs U [B, T, d] and output gradients D [B, T, p] of a matrix product, the gradient of sample b is D_b^T U_b.
Its squared norm is built from that product or, where 2 T^2 <= d p, from the T x T Gram matrices of U_b and D_b
(Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679; Bu et al. 2022, arXiv:2210.00038). Calls of one
layer are joined along T: the product of the joined matrices is the sum of the calls' gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..ops.clip import sample_sq_norms
from .taps import Call, Planned, PrivacyError, Site, named_arrays

WeightedSums = Callable[[mx.array], dict[str, mx.array]]


@dataclass
class PerSample:
    """Per-sample gradients of one layer: built, or as norms and a way to their weighted sum."""

    built: dict[str, mx.array] = field(default_factory=dict)  # name -> [B, ...]
    sq_norms: mx.array | None = None  # [B], of the gradients that are not built
    weighted_sums: WeightedSums | None = None  # factors [B] -> their weighted sums


@dataclass
class Tapped:
    """One call as the rules see it: every input and output gradient with the batch axis first."""

    call: Call
    planned: Planned
    inputs: list[mx.array]
    gradients: list[mx.array]

    @property
    def x(self) -> mx.array:
        """The layer's first input."""
        return self.inputs[0]

    @property
    def dy(self) -> mx.array:
        """The gradient of the layer's one output."""
        return self.gradients[0]


Rule = Callable[[Site, list[Tapped]], PerSample]


def has_rule(module: nn.Module) -> bool:
    """Tell whether a rule computes this layer: its type, or a subclass that calls it unchanged."""
    return _rule_of(type(module)) is not None


def per_sample(site: Site, calls: list[Tapped]) -> PerSample:
    """Per-sample gradients of one layer over all its calls."""
    rule = _rule_of(site.cls) if site.has_rule else None
    return rule(site, calls) if rule else _generic(site, calls)


def _rule_of(cls: type[nn.Module]) -> Rule | None:
    for base, rule in _RULES.items():
        if issubclass(cls, base) and cls.__call__ is base.__call__:
            return rule
    return None


def keep(factors: mx.array, x: mx.array) -> mx.array:
    """x with zeros in the samples of factor 0, whatever they hold: 0 * NaN would be NaN."""
    f = factors.reshape(-1, *[1] * (x.ndim - 1))
    return mx.where(f == 0, mx.zeros((), x.dtype), x)


def _scale(factors: mx.array, x: mx.array) -> mx.array:
    f = factors.reshape(-1, *[1] * (x.ndim - 1))
    return mx.where(f == 0, mx.zeros((), mx.float32), f * x)


def _middle(x: mx.array) -> mx.array:
    """[B, ..., d] -> [B, T, d] in float32."""
    return x.reshape(x.shape[0], -1, x.shape[-1]).astype(mx.float32)


def _join(parts: list[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def _product(site: Site, U: mx.array, D: mx.array) -> PerSample:
    """Rule of y = U W^T + bias with U [B, G, T, d] and D [B, G, T, p]; W [G * p, ...] holds G groups."""
    result = PerSample()
    params = site.params
    if "bias" in params:
        result.built["bias"] = (D.sum(axis=2) if D.shape[2] > 1 else D).reshape(D.shape[0], -1)
    if "weight" not in params:
        return result
    shape = params["weight"].shape
    T, d, p = U.shape[2], U.shape[3], D.shape[3]
    if T > 1 and d * p < 2 * T * T:
        result.built["weight"] = (D.swapaxes(2, 3) @ U).reshape(D.shape[0], *shape)
        return result
    if T == 1:
        result.sq_norms = _outer_sq_norms(U, D)
    else:
        gram = (U @ U.swapaxes(2, 3)) * (D @ D.swapaxes(2, 3))
        result.sq_norms = gram.reshape(gram.shape[0], -1).sum(axis=1)

    def weighted_sums(factors: mx.array) -> dict[str, mx.array]:
        u, g = keep(factors, U), _scale(factors, D)
        u = u.swapaxes(0, 1).reshape(U.shape[1], -1, d)
        g = g.swapaxes(0, 1).reshape(U.shape[1], -1, p)
        return {"weight": (g.swapaxes(1, 2) @ u).reshape(shape)}

    result.weighted_sums = weighted_sums
    return result


def _outer_sq_norms(U: mx.array, D: mx.array) -> mx.array:
    """Squared norms of the outer products of one row each: |u|^2 |d|^2, summed over the groups."""
    if U.shape[1] == 1:
        return sample_sq_norms([U]) * sample_sq_norms([D])
    return (U.square().sum(axis=(2, 3)) * D.square().sum(axis=(2, 3))).sum(axis=1)


def _linear(site: Site, calls: list[Tapped]) -> PerSample:
    U = _join([_middle(c.x) for c in calls], 1)
    D = _join([_middle(c.dy) for c in calls], 1)
    return _product(site, U[:, None], D[:, None])


def _conv(site: Site, calls: list[Tapped]) -> PerSample:
    groups = int(getattr(site.module, "groups", 1))

    def split(x: mx.array) -> mx.array:  # [B, T, k, c] -> [B, G, T, k * c / G]
        B, T, k, c = x.shape
        return x.reshape(B, T, k, groups, c // groups).transpose(0, 3, 1, 2, 4).reshape(B, groups, T, -1)

    U = _join([split(_patches(site.module, c.x)) for c in calls], 2)
    D = _join([split(_middle(c.dy)[:, :, None]) for c in calls], 2)
    return _product(site, U, D)


def _patches(conv: Any, x: mx.array) -> mx.array:
    """[B, *space, c] -> [B, T, k, c] float32: what each output position sees."""
    n = x.ndim - 2
    kernel = conv.weight.shape[1:-1]
    stride, padding, dilation = (_tuple(getattr(conv, a, 1), n) for a in ("stride", "padding", "dilation"))
    x = x.astype(mx.float32)
    if any(padding):
        x = mx.pad(x, [(0, 0), *((p, p) for p in padding), (0, 0)])
    x = mx.contiguous(x)
    space = x.shape[1:-1]
    out = [(s - d * (k - 1) - 1) // t + 1 for s, k, t, d in zip(space, kernel, stride, dilation, strict=True)]
    step = [x.shape[-1]] * n
    for i in reversed(range(n - 1)):
        step[i] = step[i + 1] * space[i + 1]
    moves = [a * t for a, t in zip(step, stride, strict=True)]
    offsets = [a * d for a, d in zip(step, dilation, strict=True)]
    strides = [step[0] * space[0], *moves, *offsets, 1]
    view = mx.as_strided(x, (x.shape[0], *out, *kernel, x.shape[-1]), strides)
    T, k = 1, 1
    for o, q in zip(out, kernel, strict=True):
        T, k = T * o, k * q
    return view.reshape(x.shape[0], T, k, x.shape[-1])


def _tuple(value: int | tuple[int, ...], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


def _embedding(site: Site, calls: list[Tapped]) -> PerSample:
    tokens = _join([c.x.reshape(c.x.shape[0], -1) for c in calls], 1)
    D = _join([c.dy.reshape(c.x.shape[0], -1, c.dy.shape[-1]).astype(mx.float32) for c in calls], 1)
    shape = site.params["weight"].shape
    same = (tokens[:, :, None] == tokens[:, None, :]).astype(mx.float32)
    gram = (D @ D.swapaxes(1, 2)) * same
    sq_norms = gram.reshape(gram.shape[0], -1).sum(axis=1)

    def weighted_sums(factors: mx.array) -> dict[str, mx.array]:
        g = _scale(factors, D).reshape(-1, shape[1])
        return {"weight": mx.zeros(shape).at[tokens.reshape(-1)].add(g)}

    return PerSample(sq_norms=sq_norms, weighted_sums=weighted_sums)


def _affine(site: Site, calls: list[Tapped]) -> PerSample:
    """Rule of y = weight * normalised(x) + bias over the last axis."""
    result = PerSample()
    for c in calls:
        dy = _middle(c.dy)
        if "bias" in site.params:
            _add(result.built, "bias", dy.sum(axis=1))
        if "weight" in site.params:
            normalised = _middle(_without_affine(site.module, site.cls, c.x))
            _add(result.built, "weight", (dy * normalised).sum(axis=1))
    return result


def _without_affine(module: Any, cls: type[nn.Module], x: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    if issubclass(cls, nn.LayerNorm):
        return mx.fast.layer_norm(x, None, None, module.eps)
    if issubclass(cls, nn.RMSNorm):
        return mx.fast.rms_norm(x, None, module.eps)
    plain: Any = nn.GroupNorm(module.num_groups, module.dims, module.eps, False, module.pytorch_compatible)
    normalised: mx.array = plain(x)
    return normalised


def _add(total: dict[str, mx.array], name: str, value: mx.array) -> None:
    total[name] = total[name] + value if name in total else value


def _generic(site: Site, calls: list[Tapped]) -> PerSample:
    """Any layer that mx.vmap can map: one vector-Jacobian product a sample."""
    params = site.params
    result = PerSample()
    for c in calls:
        per_call = _vmap_vjp(site, c, params)
        for name, g in zip(params, per_call, strict=True):
            _add(result.built, name, g.astype(mx.float32))
    return result


def _vmap_vjp(site: Site, c: Tapped, params: dict[str, mx.array]) -> list[mx.array]:
    batched = [i for i, b in enumerate(c.planned.batched) if b or c.planned.broadcast]

    def one(rows: list[mx.array], dys: list[mx.array]) -> list[mx.array]:
        inputs = list(c.inputs)
        for i, row in zip(batched, rows, strict=True):
            inputs[i] = row if c.planned.broadcast else row[None]
        args, kwargs = c.call.arguments(inputs)

        def forward(*values: mx.array) -> list[mx.array]:
            y = site.run(dict(zip(params, values, strict=True)), args, kwargs)
            return [y] if isinstance(y, mx.array) else [v for _, v in named_arrays(y)]

        cotangents = dys if c.planned.broadcast else [d[None] for d in dys]
        return mx.vjp(forward, list(params.values()), cotangents)[1]

    try:
        return mx.vmap(one)([c.inputs[i] for i in batched], c.gradients)
    except (ValueError, RuntimeError) as e:
        raise PrivacyError(
            f"[value_and_grad] {site.label} must be of a type with a rule ({', '.join(b.__name__ for b in _RULES)}) or "
            f"of operations that mx.vmap can map but is not ({e}); freeze it, or build it from such layers"
        ) from e
    finally:
        site.install(site.params)


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Embedding: _embedding,
    nn.LayerNorm: _affine,
    nn.RMSNorm: _affine,
    nn.GroupNorm: _affine,
}
