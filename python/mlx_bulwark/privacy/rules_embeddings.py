"""Rules of tables that are looked up by tokens."""

import mlx.core as mx

from .per_sample import PerSample, Tapped, join, scale
from .taps import Site


def embedding(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.Embedding."""
    tokens = join([c.x.reshape(c.x.shape[0], -1) for c in calls], 1)
    D = join([c.dy.reshape(c.x.shape[0], -1, c.dy.shape[-1]).astype(mx.float32) for c in calls], 1)
    return lookup("weight", site.params["weight"].shape, tokens, D)


def lookup(name: str, shape: tuple[int, ...], tokens: mx.array, D: mx.array) -> PerSample:
    """Gradient of a table [V, d] whose rows tokens [B, T] were taken, with output gradients D [B, T, d]."""

    def weighted_sums(factors: mx.array) -> dict[str, mx.array]:
        g = scale(factors, D).reshape(-1, shape[1])
        return {name: mx.zeros(shape).at[tokens.reshape(-1)].add(g)}

    return PerSample(sq_norms=lookup_sq_norms(tokens, D), weighted_sums=weighted_sums)


def lookup_sq_norms(tokens: mx.array, D: mx.array) -> mx.array:
    """Squared norms [B]: output gradients of the same token are summed, so their products count."""
    same = (tokens[:, :, None] == tokens[:, None, :]).astype(mx.float32)
    gram = (D @ D.swapaxes(1, 2)) * same
    return gram.reshape(gram.shape[0], -1).sum(axis=1)
