"""Per-sample clipping."""

import mlx.core as mx

from .. import _native
from .._native import Stream


def sample_sq_norms(grads: list[mx.array], *, stream: Stream = None) -> mx.array:
    """Squared L2 norm of every sample over all leaves."""
    if _native.runs_native(stream):
        return _native.ext.sample_sq_norms(grads, stream)
    return sample_sq_norms_reference(grads, stream=stream)


def sample_sq_norms_reference(grads: list[mx.array], *, stream: Stream = None) -> mx.array:
    """The same in plain MLX ops."""
    return sum(mx.square(g).reshape(g.shape[0], -1).sum(1) for g in grads)
