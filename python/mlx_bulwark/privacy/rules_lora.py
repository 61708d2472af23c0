"""Rules of mlx-lm's low-rank adapters, over plain and quantized weights.

The low-rank product sees its input after dropout, so that is what is recorded; where dropout comes after the product, a
probe before the dropout has its mask in its gradient.
"""

from typing import Any

import mlx.core as mx

from .per_sample import PerSample, Tapped, combine, join, rows
from .rules_embeddings import by_method, joined, lookup_rows, table, token_rows
from .rules_products import product
from .taps import Site

Rows = list[tuple[mx.array, mx.array]]  # inputs and output gradients of one call each


def lora_linear(site: Site, calls: list[Tapped]) -> PerSample:
    """y = linear(x) + scale * dropout(x) A B."""
    return _low_rank(site, [(rows(c.recorded["dropout"]), site.module.scale * rows(c.dy)) for c in calls])


def dora_linear(site: Site, calls: list[Tapped]) -> PerSample:
    """y = m / norm * (x W^T + scale * dropout(x) A B) + bias."""
    layer: Any = site.module
    A, B, m = (a.astype(mx.float32) for a in (layer.lora_a, layer.lora_b, layer.m))
    W = layer._dequantized_weight().astype(mx.float32)
    norm = mx.linalg.norm(W + (layer.scale * B.T) @ A.T, axis=1)
    inputs = [(rows(c.x), rows(c.recorded["dropout"]), rows(c.dy)) for c in calls]
    results = [_low_rank(site, [(h, layer.scale * dy * (m / norm)) for _, h, dy in inputs])]
    if "m" in site.params:
        of_calls = [(dy * ((x @ W.T + layer.scale * (h @ A) @ B) / norm)).sum(axis=1) for x, h, dy in inputs]
        results.append(PerSample({"m": sum(of_calls[1:], of_calls[0])}))
    return combine(results)


def _low_rank(site: Site, inputs: Rows) -> PerSample:
    """Gradients of A [d, r] and B [r, p], with h [B, T, d] and output gradients [B, T, p] of h A B."""
    layer, params = site.module, site.params
    h, D = join([h for h, _ in inputs], 1), join([D for _, D in inputs], 1)
    results = []
    if "lora_a" in params:
        inner = D @ layer.lora_b.astype(mx.float32).T
        results.append(product("lora_a", params["lora_a"].shape, inner, h))
    if "lora_b" in params:
        inner = h @ layer.lora_a.astype(mx.float32)
        results.append(product("lora_b", params["lora_b"].shape, D, inner))
    return combine(results)


def lora_embedding(site: Site, calls: list[Tapped]) -> PerSample:
    """y = embedding(x) + scale * dropout(A[x] B), and as_linear."""
    looked_up, multiplied = by_method(calls)
    return _low_rank_table(
        site,
        [(token_rows(c.x), lookup_rows(c, c.inner["dropout"])) for c in looked_up],
        [(rows(c.recorded["dropout"]), site.module.scale * rows(c.dy)) for c in multiplied],
    )


def dora_embedding(site: Site, calls: list[Tapped]) -> PerSample:
    """y = m[x] / norm * (embedding(x) + dropout(scale * A[x] B)), and as_linear."""
    layer: Any = site.module
    A, B, m = (a.astype(mx.float32) for a in (layer.lora_a, layer.lora_b, layer.m))
    looked_up, multiplied = by_method(calls)
    W = layer.embedding.weight.astype(mx.float32)
    norm = mx.linalg.norm(W + (layer.scale * A) @ B, axis=1)
    results = [
        _low_rank_table(
            site,
            [(token_rows(c.x), layer.scale * lookup_rows(c, c.inner["dropout"])) for c in looked_up],
            [(rows(c.recorded["dropout"]), layer.scale * rows(c.dy) * (m / norm)) for c in multiplied],
        )
    ]
    if "m" in site.params:
        of_tokens, of_rows = [], []
        for c in looked_up:
            plain = lookup_rows(c, layer.embedding(c.x))
            norms = mx.linalg.norm(plain + layer.scale * A[token_rows(c.x)] @ B, axis=-1)
            products = (lookup_rows(c, c.dy) * (plain + lookup_rows(c, c.recorded["dropout"]))).sum(axis=-1)
            of_tokens.append((token_rows(c.x), (products / norms)[..., None]))
        for c in multiplied:
            y = rows(c.x) @ W.T + layer.scale * (rows(c.recorded["dropout"]) @ B.T) @ A.T
            of_rows.append((rows(c.dy) * y / norm).sum(axis=1, keepdims=True))
        ones = [mx.ones((*r.shape[:2], 1)) for r in of_rows]
        column = table("m", (*m.shape, 1), joined(of_tokens), joined(list(zip(ones, of_rows, strict=True))))
        results.append(_squeezed(column))
    return combine(results)


def _low_rank_table(site: Site, looked_up: Rows, multiplied: Rows) -> PerSample:
    """Gradients of A [V, r] and B [r, d]: tokens and gradients of A[x] B; inputs h and gradients of h B^T A^T."""
    A, B = site.module.lora_a.astype(mx.float32), site.module.lora_b.astype(mx.float32)
    results = []
    if "lora_a" in site.params:
        of_tokens = [(tokens, D @ B.T) for tokens, D in looked_up]
        of_rows = [(h @ B.T, D) for h, D in multiplied]
        results.append(table("lora_a", A.shape, joined(of_tokens), joined(of_rows)))
    if "lora_b" in site.params:
        pairs = [(D, A[tokens]) for tokens, D in looked_up] + [(h, D @ A) for h, D in multiplied]
        right, left = (list(parts) for parts in zip(*pairs, strict=True))
        results.append(product("lora_b", B.shape, right, left))
    return combine(results)


def _squeezed(r: PerSample) -> PerSample:
    """A table of one column as a vector."""
    weighted_sums = r.weighted_sums
    return PerSample(
        {name: g[..., 0] for name, g in r.built.items()},
        r.sq_norms,
        (lambda factors: {name: s[:, 0] for name, s in weighted_sums(factors).items()}) if weighted_sums else None,
    )
