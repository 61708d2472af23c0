"""Rules of layers that hold many experts, of which each row has its own, and of adapters to them.

What one example adds to one expert is one gradient: rows are put together by example and expert, and the squared norms
of all its experts are those of the example. A router couples no examples: no expert has a limit of rows.
"""

import mlx.core as mx

from ..ops.ghost import linear_sample_grads, linear_sq_norms
from .per_sample import PerSample, Tapped, combine, join
from .taps import PrivacyError, Site


def switch_linear(site: Site, calls: list[Tapped]) -> PerSample:
    """mlx-lm's SwitchLinear: y = x W_e^T + bias_e with the expert e of the row."""
    results = []
    x, dy, experts = _joined(site, calls, [c.x for c in calls], [c.dy for c in calls])
    if "bias" in site.params:
        results.append(_of_experts("bias", site.params["bias"].shape, mx.ones((*x.shape[:2], 1)), dy, experts))
    if "weight" in site.params:
        results.append(_of_experts("weight", site.params["weight"].shape, x, dy, experts))
    return combine(results)


def lora_switch_linear(site: Site, calls: list[Tapped]) -> PerSample:
    """y = linear(x) + scale * dropout(x) A_e^T B_e^T."""
    layer, params = site.module, site.params
    h, dy, experts = _joined(site, calls, [c.recorded["dropout"] for c in calls], [c.dy for c in calls])
    D, results = layer.scale * dy, []
    A, B = layer.lora_a.astype(mx.float32), layer.lora_b.astype(mx.float32)
    if "lora_a" in params:
        results.append(_of_experts("lora_a", A.shape, h, _each(D, B, experts), experts))
    if "lora_b" in params:
        results.append(_of_experts("lora_b", B.shape, _each(h, A.swapaxes(1, 2), experts), D, experts))
    return combine(results)


def _joined(
    site: Site, calls: list[Tapped], x: list[mx.array], dy: list[mx.array]
) -> tuple[mx.array, mx.array, mx.array]:
    """Inputs [B, R, d], output gradients [B, R, p] and experts [B, R] of the rows of all calls."""
    if any(c.planned.broadcast for c in calls):
        raise PrivacyError(f"[value_and_grad] {site.label} must see the batch as its first axis but does not")
    experts = [c.inputs[1].flatten(1) for c in calls]
    sides = ([a.astype(mx.float32).reshape(*e.shape, -1) for a, e in zip(s, experts, strict=True)] for s in (x, dy))
    xs, dys = sides
    return join(xs, 1), join(dys, 1), join(experts, 1).astype(mx.int32)


def sums_by_expert(u: mx.array, d: mx.array, ids: mx.array, E: int) -> mx.array:
    """Sums [E, p, d] of the products of rows d [N, 1, p] and u [N, 1, d]; rows of id -1 take no part."""
    if mx.default_device() != mx.gpu:
        return linear_sample_grads(u, d, segments=ids, num_segments=E).weight
    return sums_by_sorting(u, d, ids, E)


def sums_by_sorting(u: mx.array, d: mx.array, ids: mx.array, E: int) -> mx.array:
    """The same by MLX's product of sorted rows: its kernel of segments is on the GPU, where ours is not."""
    order = mx.argsort(ids)
    experts, there = mx.maximum(ids[order], 0), (ids[order] >= 0)[:, None, None]
    u, d = (mx.where(there, a[order], 0.0) for a in (u, d))

    def products(weight: mx.array) -> mx.array:
        return mx.gather_mm(u, weight.swapaxes(1, 2), rhs_indices=experts, sorted_indices=True)

    return mx.vjp(products, [mx.zeros((E, d.shape[-1], u.shape[-1]))], [d])[1][0]


def _each(rows: mx.array, matrices: mx.array, experts: mx.array) -> mx.array:
    """Each row [B, R, a] times the matrix [a, b] of its expert."""
    return mx.gather_mm(rows[..., None, :], matrices, rhs_indices=experts)[..., 0, :]


def _of_experts(name: str, shape: tuple[int, ...], x: mx.array, dy: mx.array, experts: mx.array) -> PerSample:
    """Gradients [E, p, d], for each expert the product of its rows' output gradients and inputs."""
    (B, R), E = experts.shape, shape[0]
    u = x.reshape(B * R, 1, -1)

    def sq_norms(units: mx.array | None) -> mx.array:
        unit = (mx.arange(B) if units is None else units)[:, None]
        ids = mx.where(unit < 0, -1, unit * E + experts).astype(mx.int32)
        d = dy.reshape(B * R, 1, -1)
        return linear_sq_norms(u, d, segments=ids.flatten(), num_segments=B * E).reshape(B, E).sum(axis=1)

    def weighted_sums(factors: mx.array) -> dict[str, mx.array]:
        f = factors[:, None]
        ids = mx.where(f == 0, -1, experts).astype(mx.int32).flatten()
        d = (f[..., None] * dy).reshape(B * R, 1, -1)
        return {name: sums_by_expert(u, d, ids, E).reshape(shape)}

    return PerSample(sq_norms=sq_norms, weighted_sums=weighted_sums)
