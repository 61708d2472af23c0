"""Rules of activations with parameters."""

import mlx.core as mx

from .per_sample import PerSample, Tapped, add, rows
from .taps import Site


def prelu(site: Site, calls: list[Tapped]) -> PerSample:
    """y = max(0, x) + weight * min(0, x), with one weight or one for each channel."""
    result = PerSample()
    size = site.params["weight"].size
    for c in calls:
        channels = (rows(c.dy) * mx.minimum(rows(c.x), 0)).sum(axis=1)
        add(result.built, "weight", channels if size > 1 else channels.sum(axis=1, keepdims=True))
    return result
