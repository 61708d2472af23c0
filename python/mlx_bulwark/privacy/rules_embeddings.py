"""Rules of tables that are looked up by tokens and multiplied by their transpose."""

import mlx.core as mx

from .per_sample import PerSample, Tapped, join, rows, scale
from .rules_products import product, product_sq_norms, product_sum
from .taps import Site


def embedding(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.Embedding, called and `as_linear`: one table for both."""
    looked_up, multiplied = by_method(calls)
    return table(
        "weight",
        site.params["weight"].shape,
        joined([(token_rows(c.x), lookup_rows(c, c.dy)) for c in looked_up]),
        joined([(rows(c.x), rows(c.dy)) for c in multiplied]),
    )


def by_method(calls: list[Tapped]) -> tuple[list[Tapped], list[Tapped]]:
    """Calls of the layer, and of its `as_linear`."""
    looked_up = [c for c in calls if c.call.method == "__call__"]
    return looked_up, [c for c in calls if c.call.method == "as_linear"]


def joined(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array] | None:
    """Inputs and output gradients of several calls, joined along T."""
    return (join([a for a, _ in parts], 1), join([b for _, b in parts], 1)) if parts else None


def token_rows(tokens: mx.array) -> mx.array:
    """[B, ...] -> [B, T]."""
    return tokens.reshape(tokens.shape[0], -1)


def lookup_rows(c: Tapped, y: mx.array) -> mx.array:
    """What has the shape of a lookup's output as [B, T, d] float32."""
    return y.reshape(c.x.shape[0], -1, y.shape[-1]).astype(mx.float32)


def table(
    name: str,
    shape: tuple[int, ...],
    looked_up: tuple[mx.array, mx.array] | None,
    multiplied: tuple[mx.array, mx.array] | None,
) -> PerSample:
    """Gradient of a table [V, d].

    looked_up: tokens [B, T], the rows that were taken, and output gradients [B, T, d].
    multiplied: inputs [B, T, d] that were multiplied by its transpose, and output gradients [B, T, V].
    """
    if multiplied and not looked_up:
        return product(name, shape, multiplied[0][:, None], multiplied[1][:, None])
    assert looked_up

    def weighted_sums(factors: mx.array) -> dict[str, mx.array]:
        total = _lookup_sum(shape, *looked_up, factors)
        if multiplied:
            total = total + product_sum(shape, multiplied[0][:, None], multiplied[1][:, None], factors)
        return {name: total}

    sq_norms = lookup_sq_norms(*looked_up)
    if multiplied:
        sq_norms = sq_norms + product_sq_norms(multiplied[0][:, None], multiplied[1][:, None])
        sq_norms = mx.maximum(sq_norms + 2 * cross_terms(*looked_up, *multiplied), 0)
    return PerSample(sq_norms=sq_norms, weighted_sums=weighted_sums)


def _lookup_sum(shape: tuple[int, ...], tokens: mx.array, D: mx.array, factors: mx.array) -> mx.array:
    return mx.zeros(shape).at[tokens.reshape(-1)].add(scale(factors, D).reshape(-1, shape[1]))


def lookup_sq_norms(tokens: mx.array, D: mx.array) -> mx.array:
    """Squared norms [B]: output gradients of the same token are summed, so their products count."""
    same = (tokens[:, :, None] == tokens[:, None, :]).astype(mx.float32)
    gram = (D @ D.swapaxes(1, 2)) * same
    return gram.reshape(gram.shape[0], -1).sum(axis=1)


def cross_terms(tokens: mx.array, D: mx.array, U: mx.array, E: mx.array) -> mx.array:
    """Inner products [B] of the gradients of a table by lookup, tokens and D, and by product, U and E."""
    at = mx.broadcast_to(tokens[:, None, :], (*U.shape[:2], tokens.shape[1]))
    gram = (U @ D.swapaxes(1, 2)) * mx.take_along_axis(E, at, axis=2)
    return gram.reshape(gram.shape[0], -1).sum(axis=1)
