"""Rules of layers that are a matrix product.

With inputs U [B, T, d] and output gradients D [B, T, p] of a matrix product, the gradient of sample b is D_b^T U_b
(Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679; Bu et al. 2022, arXiv:2210.00038). Where it costs
less than the Gram matrices of U_b and D_b it is built: it is then not much larger than they are. Calls of one layer are
joined along T: the product of the joined matrices is the sum of the calls' gradients.
"""

import math

import mlx.core as mx

from ..ops.ghost import linear_clipped_sum, linear_sample_grads, linear_sq_norms
from .per_sample import PerSample, Tapped, combine, join, rows
from .taps import Site

Arrays = mx.array | list[mx.array]  # of each call, or of the only one
# A gradient that is built is at most so many times as large as what it is made from.
_MOST_GROWTH = 4


def linear(site: Site, calls: list[Tapped]) -> PerSample:
    """y = x W^T + bias."""
    x, dy = [c.x for c in calls], [c.dy for c in calls]
    return weight_and_bias(site, x, dy)


def bilinear(site: Site, calls: list[Tapped]) -> PerSample:
    """y_p = x2^T W_p x1 + bias_p: a matrix product of x2 x1^T."""
    return weight_and_bias(site, [_outer(*c.named("x1", "x2")) for c in calls], [rows(c.dy) for c in calls])


def _outer(x1: mx.array, x2: mx.array) -> mx.array:
    x2 = mx.broadcast_to(x2, (*x1.shape[:-1], x2.shape[-1]))
    outer = rows(x2)[..., :, None] * rows(x1)[..., None, :]
    return outer.reshape(*outer.shape[:2], -1)


def weight_and_bias(site: Site, x: list[mx.array], dy: list[mx.array]) -> PerSample:
    """Gradients of a layer's weight and bias, as far as it trains them."""
    params, results = site.params, []
    together = site.clipped_together and "weight" in params and "bias" in params
    if "bias" in params and not together:
        results.append(bias("bias", join([rows(d) for d in dy], 1)))
    if "weight" in params:
        results.append(product("weight", params["weight"].shape, x, dy, bias_name="bias" if together else None))
    return combine(results)


def bias(name: str, D: mx.array) -> PerSample:
    """Gradient of what is added at every row: D [B, T, p] summed over the rows."""
    return PerSample({name: D.sum(axis=1) if D.shape[1] > 1 else D[:, 0]})


def product(name: str, shape: tuple[int, ...], x: Arrays, dy: Arrays, bias_name: str | None = None) -> PerSample:
    """Gradient D^T U of a weight of this shape, and of a bias, from U [B, ..., d] and D [B, ..., p] of each call."""
    with_bias = bias_name is not None

    def named(weight: mx.array, sums: mx.array | None) -> dict[str, mx.array]:
        found = {name: weight}
        if bias_name is not None and sums is not None:
            found[bias_name] = sums
        return found

    T, d, p = sizes(x, dy)
    if is_built(T, d, p, d + p):
        grads = linear_sample_grads(x, dy, bias=with_bias)
        return PerSample(named(grads.weight.reshape(-1, *shape), grads.bias))

    def sq_norms(units: mx.array | None) -> mx.array:
        return linear_sq_norms(x, dy, bias=with_bias, segments=units)

    def weighted_sums(factors: mx.array) -> dict[str, mx.array]:
        sums = linear_clipped_sum(x, dy, factors, bias=with_bias)
        return named(sums.weight.reshape(shape), sums.bias)

    return PerSample(sq_norms=sq_norms, weighted_sums=weighted_sums)


def sizes(x: Arrays, dy: Arrays) -> tuple[int, int, int]:
    """T over all calls, d and p."""
    xs, dys = ([a] if isinstance(a, mx.array) else a for a in (x, dy))
    return sum(math.prod(a.shape[1:-1]) for a in dys), xs[0].shape[-1], dys[0].shape[-1]


def is_built(T: int, d: int, p: int, width: int) -> bool:
    """Whether a gradient [p, d] is cheaper than the Gram matrices of its T rows, and small beside T * width values."""
    return T > 1 and d * p <= T * (d + p) and d * p <= _MOST_GROWTH * T * width
