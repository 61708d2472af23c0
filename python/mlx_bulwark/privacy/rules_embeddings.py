"""Rules of tables that are looked up by tokens and multiplied by their transpose."""

import mlx.core as mx

from ..ops.ghost import (
    embedding_clipped_sum,
    embedding_linear_products,
    embedding_sq_norms,
    linear_clipped_sum,
    linear_sq_norms,
)
from .per_sample import PerSample, Tapped, join, rows
from .rules_products import product
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


def _from_the_start(tokens: mx.array, num_embeddings: int) -> mx.array:
    """Tokens without the negative ones, which MLX counts from the end of the table: one row has one number."""
    if mx.issubdtype(tokens.dtype, mx.unsignedinteger):
        return tokens
    tokens = tokens.astype(mx.int32)
    return mx.where(tokens < 0, tokens + num_embeddings, tokens)


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
        return product(name, shape, *multiplied)
    assert looked_up
    looked_up = _from_the_start(looked_up[0], shape[0]), looked_up[1]

    def sq_norms(units: mx.array | None) -> mx.array:
        total = embedding_sq_norms(*looked_up, segments=units)
        if multiplied:
            total = total + linear_sq_norms(*multiplied, segments=units)
            total = total + 2 * embedding_linear_products(*looked_up, *multiplied, segments=units)
        return mx.where(total < 0, 0.0, total)  # NaN stays NaN

    def weighted_sums(factors: mx.array) -> dict[str, mx.array]:
        total = embedding_clipped_sum(*looked_up, factors, shape[0])
        if multiplied:
            total = total + linear_clipped_sum(*multiplied, factors).weight
        return {name: total}

    return PerSample(sq_norms=sq_norms, weighted_sums=weighted_sums)
