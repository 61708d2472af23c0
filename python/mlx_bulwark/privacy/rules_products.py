"""Rules of layers that are a matrix product.

With inputs U [B, T, d] and output gradients D [B, T, p] of a matrix product, the gradient of sample b is D_b^T U_b.
Its squared norm is built from that product or, where 2 T^2 <= d p, from the T x T Gram matrices of U_b and D_b
(Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679; Bu et al. 2022, arXiv:2210.00038). Calls of one
layer are joined along T: the product of the joined matrices is the sum of the calls' gradients.
"""

import mlx.core as mx

from ..ops.clip import sample_sq_norms
from .per_sample import PerSample, Tapped, combine, join, keep, rows, scale
from .taps import Site


def linear(site: Site, calls: list[Tapped]) -> PerSample:
    """y = x W^T + bias."""
    U, D = join([rows(c.x) for c in calls], 1), join([rows(c.dy) for c in calls], 1)
    results = []
    if "bias" in site.params:
        results.append(bias("bias", D))
    if "weight" in site.params:
        results.append(product("weight", site.params["weight"].shape, U[:, None], D[:, None]))
    return combine(results)


def bilinear(site: Site, calls: list[Tapped]) -> PerSample:
    """y_p = x2^T W_p x1 + bias_p: a matrix product of x2 x1^T."""
    D = join([rows(c.dy) for c in calls], 1)
    results = []
    if "bias" in site.params:
        results.append(bias("bias", D))
    if "weight" in site.params:
        U = join([_outer(*c.named("x1", "x2")) for c in calls], 1)
        results.append(product("weight", site.params["weight"].shape, U[:, None], D[:, None]))
    return combine(results)


def _outer(x1: mx.array, x2: mx.array) -> mx.array:
    x2 = mx.broadcast_to(x2, (*x1.shape[:-1], x2.shape[-1]))
    outer = rows(x2)[..., :, None] * rows(x1)[..., None, :]
    return outer.reshape(*outer.shape[:2], -1)


def bias(name: str, D: mx.array) -> PerSample:
    """Gradient of what is added at every row: D [B, T, p] summed over the rows."""
    return PerSample({name: D.sum(axis=1) if D.shape[1] > 1 else D[:, 0]})


def product(name: str, shape: tuple[int, ...], U: mx.array, D: mx.array) -> PerSample:
    """Gradient D^T U of a weight, with U [B, G, T, d] and D [B, G, T, p]; its shape is that of [G * p, d]."""
    T, d, p = U.shape[2], U.shape[3], D.shape[3]
    if T > 1 and d * p < 2 * T * T:
        return PerSample({name: (D.swapaxes(2, 3) @ U).reshape(D.shape[0], *shape)})

    def weighted_sums(factors: mx.array) -> dict[str, mx.array]:
        return {name: product_sum(shape, U, D, factors)}

    return PerSample(sq_norms=product_sq_norms(U, D), weighted_sums=weighted_sums)


def product_sum(shape: tuple[int, ...], U: mx.array, D: mx.array, factors: mx.array) -> mx.array:
    """Sum of D^T U over the batch, each times its factor."""
    G, d, p = U.shape[1], U.shape[3], D.shape[3]
    u = keep(factors, U).swapaxes(0, 1).reshape(G, -1, d)
    g = scale(factors, D).swapaxes(0, 1).reshape(G, -1, p)
    return (g.swapaxes(1, 2) @ u).reshape(shape)


def product_sq_norms(U: mx.array, D: mx.array) -> mx.array:
    """Squared norms [B] of D^T U, U [B, G, T, d] and D [B, G, T, p], summed over the groups G."""
    if U.shape[2] > 1:
        gram = (U @ U.swapaxes(2, 3)) * (D @ D.swapaxes(2, 3))
        return gram.reshape(gram.shape[0], -1).sum(axis=1)
    if U.shape[1] == 1:  # one row: |u|^2 |d|^2
        return sample_sq_norms([U]) * sample_sq_norms([D])
    return (U.square().sum(axis=(2, 3)) * D.square().sum(axis=(2, 3))).sum(axis=1)
