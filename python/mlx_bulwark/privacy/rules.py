"""Which rule gives the per-sample gradients of which layer."""

import mlx.nn as nn

from .per_sample import PerSample, PerSampleRule, Tapped
from .rules_convolutions import convolution
from .rules_embeddings import embedding
from .rules_generic import generic
from .rules_norms import affine
from .rules_products import linear
from .taps import Site


def has_rule(module: nn.Module) -> bool:
    """Tell whether a rule computes this layer: its type, or a subclass that calls it unchanged."""
    return _rule_of(type(module)) is not None


def per_sample(site: Site, calls: list[Tapped]) -> PerSample:
    """Per-sample gradients of one layer over all its calls."""
    rule = _rule_of(site.cls) if site.has_rule else None
    return rule(site, calls) if rule else generic(site, calls)


def _rule_of(cls: type[nn.Module]) -> PerSampleRule | None:
    for base, rule in RULES.items():
        if issubclass(cls, base) and cls.__call__ is base.__call__:
            return rule
    return None


RULES: dict[type[nn.Module], PerSampleRule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Embedding: embedding,
    nn.LayerNorm: affine,
    nn.RMSNorm: affine,
    nn.GroupNorm: affine,
}
