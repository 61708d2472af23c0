"""Per-sample gradients of one layer, from its inputs and output gradients: their norms, their clipped sum, themselves.

A layer whose gradient for sample b is ``D_b^T U_b``, with U_b [R, d] its inputs and D_b [R, p] the gradients of its
outputs, row by row (tokens, positions, calls), needs no gradient built to know its norm.

Everywhere: a *unit* is a sample, or all samples that have the same id in ``segments`` (rows of one user, augmentations
of one example), whose gradients are added up before the norm is taken. A layer that was called several times gives a
list of inputs and one of output gradients. Sums are in float32 or better, whatever the inputs are, and NaN or infinity
in a sample reach only its own unit.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx

from .. import _native
from .._native import Stream
from .clip import _row_sums, _rows, _sum_of_rows
from .noise import FLOATS, _on

METHODS = ("auto", "gram", "direct")

Arrays = mx.array | Sequence[mx.array]
Size = int | tuple[int, ...]


class LayerGradients(NamedTuple):
    """Gradients of one layer.

    Attributes:
        weight: float32.
        bias: float32; None where it was not asked for.
    """

    weight: mx.array
    bias: mx.array | None


def linear_sq_norms(
    x: Arrays,
    dy: Arrays,
    *,
    bias: bool = False,
    mask: Arrays | None = None,
    segments: mx.array | None = None,
    num_segments: int | None = None,
    method: str = "auto",
    stream: Stream = None,
) -> mx.array:
    """Squared L2 norm of every sample's gradient of a linear layer, without the gradient.

    Method ``"gram"`` takes the products of the rows' Gram matrices, tile by tile: R^2 (d + p) multiplications, none
    of the tiles below the diagonal twice. Method ``"direct"`` squares the gradient tile by tile: R d p. ``"auto"``
    takes what costs less. A Gram sum is as exact as the products of float32 that it adds up: where they cancel by a
    factor c, its relative error grows by c.

    Args:
        x: Inputs ``[B, ..., d]``, float32, float16 or bfloat16; or one such array a call.
        dy: Gradients of the outputs ``[B, ..., p]``, with the same ``...``; as many as ``x``.
        bias: Whether the layer's bias counts too.
        mask: ``[B, ...]``, bool, as many as ``x``; rows where it is False take no part, whatever they hold.
        segments: ``[B]``, int32: which unit a sample belongs to. Samples with an id outside ``[0, num_segments)`` take
            no part.
        num_segments: Number of units; by default ``B``.
        method: ``"auto"``, ``"gram"`` or ``"direct"``.
        stream: Stream or device.

    Returns:
        array: ``[B]`` or ``[num_segments]``, float32.

    Raises:
        ValueError: A shape, dtype or ``method`` is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> x, dy = mx.array([[[1.0, 2.0]], [[3.0, 0.0]]]), mx.array([[[2.0]], [[1.0]]])
        >>> bw.linear_sq_norms(x, dy)
        array([20, 9], dtype=float32)
        >>> bw.linear_sq_norms(x, dy, segments=mx.array([0, 0]), num_segments=1)
        array([41], dtype=float32)

    Source:
        Goodfellow, "Efficient Per-Example Gradient Computations" (2015); Li et al., "Large Language Models Can Be
        Strong Differentially Private Learners" (2021); Bu et al., "Differentially Private Optimization on Large Model
        at Small Cost" (2022).
    """
    call = _linear("linear_sq_norms", x, dy, mask, segments, num_segments)
    return _sq_norms("linear_sq_norms", call._replace(bias=bias), method, stream)


def linear_sample_grads(
    x: Arrays,
    dy: Arrays,
    *,
    bias: bool = False,
    mask: Arrays | None = None,
    segments: mx.array | None = None,
    num_segments: int | None = None,
    stream: Stream = None,
) -> LayerGradients:
    """Every sample's gradient of a linear layer.

    Args:
        x: As of ``linear_sq_norms``.
        dy: As of ``linear_sq_norms``.
        bias: Whether the gradient of the bias is returned too.
        mask: As of ``linear_sq_norms``.
        segments: As of ``linear_sq_norms``.
        num_segments: As of ``linear_sq_norms``.
        stream: Stream or device.

    Returns:
        LayerGradients: ``weight`` ``[B, p, d]`` or ``[num_segments, p, d]``, and ``bias`` ``[B, p]`` or
        ``[num_segments, p]``.

    Raises:
        ValueError: A shape or dtype is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> x, dy = mx.array([[[1.0, 2.0]], [[3.0, 0.0]]]), mx.array([[[2.0]], [[1.0]]])
        >>> bw.linear_sample_grads(x, dy).weight.tolist()
        [[[2.0, 4.0]], [[3.0, 0.0]]]

    Source:
        Bu et al., "Differentially Private Optimization on Large Model at Small Cost" (2022), hybrid book-keeping.
    """
    call = _linear("linear_sample_grads", x, dy, mask, segments, num_segments)
    return _grads(call._replace(bias=bias), stream)


def linear_clipped_sum(
    x: Arrays,
    dy: Arrays,
    factors: mx.array,
    *,
    bias: bool = False,
    mask: Arrays | None = None,
    stream: Stream = None,
) -> LayerGradients:
    """Sum of every sample's gradient of a linear layer times its factor: one product, and no gradient of a sample.

    Args:
        x: As of ``linear_sq_norms``.
        dy: As of ``linear_sq_norms``.
        factors: ``[B]``, float32, as of ``clip_factors``; a sample of factor 0 is skipped, whatever it holds.
        bias: Whether the sum for the bias is returned too.
        mask: As of ``linear_sq_norms``.
        stream: Stream or device.

    Returns:
        LayerGradients: ``weight`` ``[p, d]`` and ``bias`` ``[p]``.

    Raises:
        ValueError: A shape or dtype is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> x, dy = mx.array([[[1.0, 2.0]], [[3.0, 0.0]]]), mx.array([[[2.0]], [[1.0]]])
        >>> bw.linear_clipped_sum(x, dy, mx.array([0.5, 1.0])).weight
        array([[4, 2]], dtype=float32)

    Source:
        Bu et al., "Differentially Private Optimization on Large Model at Small Cost" (2022), book-keeping.
    """
    call = _linear("linear_clipped_sum", x, dy, mask, None, None)
    return _clipped_sum("linear_clipped_sum", call._replace(bias=bias), factors, stream)


def conv_sq_norms(
    x: Arrays,
    dy: Arrays,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    transposed: bool = False,
    bias: bool = False,
    segments: mx.array | None = None,
    num_segments: int | None = None,
    method: str = "auto",
    stream: Stream = None,
) -> mx.array:
    """Squared L2 norm of every sample's gradient of a convolution, without the gradient.

    What each position sees is gathered a few rows at a time and never stands in memory as a whole.

    Args:
        x: Inputs ``[B, *space, c]`` with 1, 2 or 3 axes of space; float32, float16 or bfloat16; or one such array a
            call.
        dy: Gradients of the outputs ``[B, *positions, p]``; as many as ``x``.
        kernel_size: Of each axis of space, or of all.
        stride: As of the layer.
        padding: As of the layer.
        dilation: As of the layer.
        groups: As of the layer.
        transposed: Whether the layer is a transposed convolution.
        bias: Whether the layer's bias counts too.
        segments: As of ``linear_sq_norms``.
        num_segments: As of ``linear_sq_norms``.
        method: As of ``linear_sq_norms``.
        stream: Stream or device.

    Returns:
        array: ``[B]`` or ``[num_segments]``, float32.

    Raises:
        ValueError: A shape, dtype or ``method`` is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> bw.conv_sq_norms(mx.ones((2, 5, 5, 3)), mx.ones((2, 4, 4, 1)), 2)
        array([3072, 3072], dtype=float32)

    Source:
        Bu et al., "Scalable and Efficient Training of Large Convolutional Neural Networks with Differential Privacy"
        (2022).
    """
    call, dys = _conv(
        "conv_sq_norms", x, dy, kernel_size, stride, padding, dilation, groups, transposed, bias, segments, num_segments
    )
    norms = _sq_norms("conv_sq_norms", call, method, stream)
    return norms + _ones_product(call, dys, method, stream) if bias and transposed else norms


def conv_sample_grads(
    x: Arrays,
    dy: Arrays,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    transposed: bool = False,
    bias: bool = False,
    segments: mx.array | None = None,
    num_segments: int | None = None,
    stream: Stream = None,
) -> LayerGradients:
    """Every sample's gradient of a convolution.

    Args:
        x: As of ``conv_sq_norms``.
        dy: As of ``conv_sq_norms``.
        kernel_size: As of ``conv_sq_norms``.
        stride: As of the layer.
        padding: As of the layer.
        dilation: As of the layer.
        groups: As of the layer.
        transposed: As of ``conv_sq_norms``.
        bias: Whether the gradient of the bias is returned too.
        segments: As of ``linear_sq_norms``.
        num_segments: As of ``linear_sq_norms``.
        stream: Stream or device.

    Returns:
        LayerGradients: ``weight`` ``[B, p, *kernel_size, c / groups]`` and ``bias`` ``[B, p]``; with segments
        ``num_segments`` stands in place of ``B``.

    Raises:
        ValueError: A shape or dtype is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> bw.conv_sample_grads(mx.ones((2, 5, 5, 3)), mx.ones((2, 4, 4, 1)), 2).weight.shape
        (2, 1, 2, 2, 3)

    Source:
        As of ``conv_sq_norms``.
    """
    call, dys = _conv(
        "conv_sample_grads", x, dy, kernel_size, stride, padding, dilation, groups, transposed, bias, segments,
        num_segments,
    )  # fmt: skip
    found = _grads(call, stream)
    with _on(stream):
        sums = _grads(_ones(call, dys), stream).weight[:, :, 0] if bias and transposed else found.bias
        return LayerGradients(_kernels(found.weight, kernel_size, groups, transposed, x), sums)


def conv_clipped_sum(
    x: Arrays,
    dy: Arrays,
    factors: mx.array,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    transposed: bool = False,
    bias: bool = False,
    stream: Stream = None,
) -> LayerGradients:
    """Sum of every sample's gradient of a convolution times its factor, and no gradient of a sample.

    Args:
        x: As of ``conv_sq_norms``.
        dy: As of ``conv_sq_norms``.
        factors: As of ``linear_clipped_sum``.
        kernel_size: As of ``conv_sq_norms``.
        stride: As of the layer.
        padding: As of the layer.
        dilation: As of the layer.
        groups: As of the layer.
        transposed: As of ``conv_sq_norms``.
        bias: Whether the sum for the bias is returned too.
        stream: Stream or device.

    Returns:
        LayerGradients: ``weight`` ``[p, *kernel_size, c / groups]`` and ``bias`` ``[p]``.

    Raises:
        ValueError: A shape or dtype is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> x, dy = mx.ones((2, 5, 1)), mx.ones((2, 4, 1))
        >>> bw.conv_clipped_sum(x, dy, mx.array([0.5, 1.0]), 2).weight.tolist()
        [[[6.0], [6.0]]]

    Source:
        As of ``linear_clipped_sum``.
    """
    call, dys = _conv(
        "conv_clipped_sum", x, dy, kernel_size, stride, padding, dilation, groups, transposed, bias, None, None
    )
    found = _clipped_sum("conv_clipped_sum", call, factors, stream)
    with _on(stream):
        weight = _kernels(found.weight[None], kernel_size, groups, transposed, x)[0]
        if not (bias and transposed):
            return LayerGradients(weight, found.bias)
        return LayerGradients(weight, _clipped_sum("conv_clipped_sum", _ones(call, dys), factors, stream).weight[:, 0])


def convolve(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    stream: Stream = None,
) -> mx.array:
    """Convolution as ``mx.conv_general`` has it (no kernel is flipped), faster on the CPU.

    On the CPU what each position sees is gathered a few rows at a time, on all cores, where MLX writes the unfolded
    input to memory on one; where there are few channels or outputs nothing is gathered, and 3 x 3 kernels of stride 1
    take 16 products where 36 stood. Half precision, and everything on Metal, is left to MLX.

    Args:
        x: Inputs ``[B, *space, c]`` with 1, 2 or 3 axes of space; float32, float16 or bfloat16.
        weight: ``[p, *kernel_size, c / groups]``, of the dtype of ``x``.
        bias: ``[p]``, of the dtype of ``x``.
        stride: Of each axis of space, or of all.
        padding: Zeros at both ends of each axis, or of all.
        dilation: Distance of the kernel's elements along each axis, or along all.
        groups: Of channels.
        stream: Stream or device.

    Returns:
        array: ``[B, *positions, p]``, of the dtype of ``x``.

    Raises:
        ValueError: A shape or dtype is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> bw.convolve(mx.ones((2, 5, 5, 3)), mx.ones((4, 3, 3, 3)), padding=1).shape
        (2, 5, 5, 4)

    Source:
        K. Chellapilla et al., "High Performance Convolutional Neural Networks for Document Processing", 2006.
        A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.
    """
    sizes = _convolution(x, weight, bias, {"stride": stride, "padding": padding, "dilation": dilation}, groups)
    if x.dtype == mx.float32 and _runs_kernel(stream):
        axes = x.ndim - 2
        window = []
        for name, value in {"kernel": weight.shape[1:-1], **sizes}.items():
            window += [0 if name == "padding" else 1] * (3 - axes) + list(value)
        return _native.ext.convolved(x, weight, [] if bias is None else [bias], groups, window, stream)
    with _on(stream):
        return _convolved(x, weight, bias, **sizes, groups=groups)


def convolve_reference(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    stream: Stream = None,
) -> mx.array:
    """Compute ``convolve`` by plain MLX ops."""
    sizes = _convolution(x, weight, bias, {"stride": stride, "padding": padding, "dilation": dilation}, groups)
    with _on(stream):
        return _convolved(x, weight, bias, **sizes, groups=groups)


def embedding_sq_norms(
    tokens: Arrays,
    dy: Arrays,
    *,
    padding_index: int | None = None,
    mask: Arrays | None = None,
    segments: mx.array | None = None,
    num_segments: int | None = None,
    stream: Stream = None,
) -> mx.array:
    """Squared L2 norm of every sample's gradient of an embedding, without the gradient.

    Rows of equal tokens are found by sorting and added up.

    Args:
        tokens: ``[B, ...]``, integer; or one such array a call. Rows of negative tokens take no part.
        dy: Gradients of the looked-up rows, ``[B, ..., p]``, float32, float16 or bfloat16; as many as ``tokens``.
        padding_index: A token whose row is not trained and takes no part.
        mask: ``[B, ...]``, bool, as many as ``tokens``; rows where it is False take no part, whatever they hold.
        segments: As of ``linear_sq_norms``.
        num_segments: As of ``linear_sq_norms``.
        stream: Stream or device.

    Returns:
        array: ``[B]`` or ``[num_segments]``, float32.

    Raises:
        ValueError: A shape or dtype is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> bw.embedding_sq_norms(mx.array([[1, 1], [1, 2]]), mx.ones((2, 2, 3)))
        array([12, 6], dtype=float32)

    Source:
        Li et al., "Large Language Models Can Be Strong Differentially Private Learners" (2021).
    """
    op = "embedding_sq_norms"
    tokens, dy = _lookups(op, tokens, dy, padding_index, mask, stream)
    ids, units = _segments(op, segments, num_segments, dy[0].shape[0], stream)
    if _runs_kernel(stream):
        return _native.ext.embedding_sq_norms(tokens, dy, ids, units, stream)
    if _runs_metal(stream):
        with _on(stream):
            if len(tokens) > 1:
                tokens, dy = ([a] for a in _joined_lookups(tokens, dy))
            return _native.ext.embedding_sq_norms(tokens, dy, ids, units, stream)
    with _on(stream):
        return _embedding_sq_norms_reference(tokens, dy, ids, units)


def embedding_clipped_sum(
    tokens: Arrays,
    dy: Arrays,
    factors: mx.array,
    num_embeddings: int,
    *,
    padding_index: int | None = None,
    mask: Arrays | None = None,
    stream: Stream = None,
) -> mx.array:
    """Sum of every sample's gradient of an embedding times its factor.

    Args:
        tokens: As of ``embedding_sq_norms``; below ``num_embeddings``.
        dy: As of ``embedding_sq_norms``.
        factors: As of ``linear_clipped_sum``.
        num_embeddings: Rows of the embedding's weight.
        padding_index: As of ``embedding_sq_norms``.
        mask: As of ``embedding_sq_norms``.
        stream: Stream or device.

    Returns:
        array: ``[num_embeddings, p]``, float32.

    Raises:
        ValueError: A shape or dtype is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> bw.embedding_clipped_sum(mx.array([[1, 1], [1, 2]]), mx.ones((2, 2, 1)), mx.array([0.5, 1.0]), 3).tolist()
        [[0.0], [2.0], [1.0]]

    Source:
        As of ``linear_clipped_sum``.
    """
    op = "embedding_clipped_sum"
    tokens, dy = _lookups(op, tokens, dy, padding_index, mask, stream)
    factors = _factors(op, factors, dy[0].shape[0], stream)
    if _runs_kernel(stream):
        return _native.ext.embedding_clipped_sum(tokens, dy, factors, num_embeddings, stream)
    with _on(stream):
        return _embedding_clipped_sum_reference(tokens, dy, factors, num_embeddings)


def embedding_linear_products(
    tokens: Arrays,
    dy: Arrays,
    x: Arrays,
    dy_linear: Arrays,
    *,
    padding_index: int | None = None,
    segments: mx.array | None = None,
    num_segments: int | None = None,
    stream: Stream = None,
) -> mx.array:
    """Inner product of every sample's gradients of an embedding and of a linear layer with the same weight.

    Tied weights: the squared norm of their gradient is ``embedding_sq_norms + linear_sq_norms`` and twice this.

    Args:
        tokens: As of ``embedding_sq_norms``; below V.
        dy: As of ``embedding_sq_norms``.
        x: Inputs of the linear layer ``[B, ..., p]``; or one such array a call.
        dy_linear: Gradients of its outputs ``[B, ..., V]``; as many as ``x``.
        padding_index: As of ``embedding_sq_norms``.
        segments: As of ``linear_sq_norms``.
        num_segments: As of ``linear_sq_norms``.
        stream: Stream or device.

    Returns:
        array: ``[B]`` or ``[num_segments]``, float32.

    Raises:
        ValueError: A shape or dtype is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> tokens, dy = mx.array([[0, 2]]), mx.array([[[1.0], [3.0]]])
        >>> x, dy_linear = mx.array([[[2.0]]]), mx.array([[[1.0, 5.0, 10.0]]])
        >>> bw.embedding_linear_products(tokens, dy, x, dy_linear)
        array([62], dtype=float32)

    Source:
        Li et al., "Large Language Models Can Be Strong Differentially Private Learners" (2021).
    """
    op = "embedding_linear_products"
    tokens, dy = _lookups(op, tokens, dy, padding_index, None, stream)
    call = _linear(op, x, dy_linear, None, segments, num_segments)
    if call.x[0].shape[-1] != dy[0].shape[-1] or call.x[0].shape[0] != dy[0].shape[0]:
        raise ValueError(
            f"[{op}] x must have shape [{dy[0].shape[0]}, ..., {dy[0].shape[-1]}] but has shape {list(call.x[0].shape)}"
        )
    if _runs_kernel(stream):
        return _native.ext.embedding_linear_products(tokens, dy, call.x, call.dy, call.segments, call.units, stream)
    with _on(stream):
        return _embedding_linear_products_reference(tokens, dy, call)


class _Call(NamedTuple):
    """What the extension is given: rows of x beside rows of dy, and what belongs together."""

    x: list[mx.array]
    dy: list[mx.array]
    mask: list[mx.array]
    segments: list[mx.array]
    units: int
    bias: bool = False
    groups: int = 1
    window: tuple[int, ...] = ()


def _runs_kernel(stream: Stream) -> bool:
    # Metal has kernels for the norms; what is more is products, and MLX's own are as good there.
    return _native.runs_native(stream) and not _native.ext.on_metal(stream)


def _runs_metal(stream: Stream) -> bool:
    return _native.runs_native(stream) and bool(_native.ext.on_metal(stream))


def _metal_sq_norms(call: _Call, method: str, stream: Stream) -> mx.array:
    """The kernels take rows as they stand, of one call, one group and one type: all else is gathered before."""
    batch, groups = call.x[0].shape[0], call.groups
    with _on(stream):
        if len(call.x) > 1 or groups > 1 or call.window or call.x[0].dtype != call.dy[0].dtype:
            u, d = (a.flatten(0, 1) for a in _joined(call))
            ids = call.segments
            if ids:
                valid = (ids[0] >= 0) & (ids[0] < call.units)
                ids = [mx.where(valid, ids[0] * groups, -groups)[:, None] + mx.arange(groups)]
                ids = [ids[0].astype(mx.int32).flatten()]
            units = (call.units if ids else batch) * groups
            call = call._replace(x=[u], dy=[d], mask=[], segments=ids, units=units, groups=1, window=())
        norms = _native.ext.ghost_sq_norms(*call[:5], call.bias, 1, [], method, stream)
        return norms if groups == 1 else norms.reshape(-1, groups).sum(axis=1)


def _sq_norms(op: str, call: _Call, method: str, stream: Stream) -> mx.array:
    if method not in METHODS:
        raise ValueError(f"[{op}] method must be one of {', '.join(METHODS)} but is {method!r}")
    if _runs_kernel(stream):
        return _native.ext.ghost_sq_norms(*call[:5], call.bias, call.groups, list(call.window), method, stream)
    if _runs_metal(stream):
        return _metal_sq_norms(call, method, stream)
    with _on(stream):
        return _sq_norms_reference(call, method)


def _grads(call: _Call, stream: Stream) -> LayerGradients:
    if _runs_kernel(stream):
        out = _native.ext.ghost_grads(*call[:5], call.bias, call.groups, list(call.window), stream)
        return LayerGradients(out[0], out[1] if call.bias else None)
    with _on(stream):
        return _grads_reference(call)


def _clipped_sum(op: str, call: _Call, factors: mx.array, stream: Stream) -> LayerGradients:
    factors = _factors(op, factors, call.x[0].shape[0], stream)
    if _runs_kernel(stream):
        out = _native.ext.ghost_clipped_sum(
            call.x, call.dy, call.mask, factors, call.bias, call.groups, list(call.window), stream
        )
        return LayerGradients(out[0], out[1] if call.bias else None)
    with _on(stream):
        return _clipped_sum_reference(call, factors)


def _joined(call: _Call) -> tuple[mx.array, mx.array]:
    """U [B, G, R, d] and D [B, G, R, p], float32, with zeros in the rows that take no part."""
    sides: tuple[list[mx.array], list[mx.array]] = ([], [])
    for i, (x, dy) in enumerate(zip(call.x, call.dy, strict=True)):
        for side, a in zip(sides, (_unfolded(call, x, dy), _split(dy, call.groups)), strict=True):
            if call.mask:
                mask = call.mask[i].reshape(a.shape[0], 1, a.shape[2], 1)
                a = mx.where(mask, a, mx.zeros((), a.dtype))
            side.append(a)
    u, d = (s[0] if len(s) == 1 else mx.concatenate(s, axis=2) for s in sides)
    return u, d


def _split(a: mx.array, groups: int) -> mx.array:
    """[B, ..., c] -> [B, G, T, c / G]."""
    a = a.astype(mx.float32).reshape(a.shape[0], math.prod(a.shape[1:-1]), groups, a.shape[-1] // groups)
    return a.swapaxes(1, 2)


def _unfolded(call: _Call, x: mx.array, dy: mx.array) -> mx.array:
    """[B, G, T, d]: what each row of dy sees of x."""
    if not call.window:
        return _split(x, call.groups)
    kernel, stride, padding, dilation = (call.window[i : i + 3] for i in range(0, 12, 3))
    x = x.reshape(x.shape[0], *[1] * (5 - x.ndim), *x.shape[1:])
    out = [1] * (5 - dy.ndim) + list(dy.shape[1:-1])
    x = mx.pad(x, [(0, 0), *((p, p) for p in padding), (0, 0)])
    seen = []
    for at in range(math.prod(kernel)):
        offset = (at // (kernel[1] * kernel[2]), at // kernel[2] % kernel[1], at % kernel[2])
        window = [
            slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, n, s in zip(offset, dilation, out, stride, strict=True)
        ]
        seen.append(_split(x[:, window[0], window[1], window[2]], call.groups))
    together = mx.stack(seen, axis=3)  # [B, G, T, k, c / G]
    return together.flatten(3)


def _by_unit(segments: list[mx.array], units: int, a: mx.array) -> mx.array:
    """Sums of samples [B, ...] by unit [units, ...]."""
    if not segments:
        return a
    ids = mx.where((segments[0] >= 0) & (segments[0] < units), segments[0], units)
    return mx.zeros((units + 1, *a.shape[1:]), a.dtype).at[ids].add(a)[:units]


def _grads_reference(call: _Call) -> LayerGradients:
    u, d = _joined(call)
    weight = d.swapaxes(2, 3) @ u
    weight = _by_unit(call.segments, call.units, weight.flatten(1, 2))
    if not call.bias:
        return LayerGradients(weight, None)
    # contiguous: MLX 0.32.3 may never come back from the sum of a transposed array without rows
    sums = mx.contiguous(d).sum(axis=2).flatten(1)
    return LayerGradients(weight, _by_unit(call.segments, call.units, sums))


def _clipped_sum_reference(call: _Call, factors: mx.array) -> LayerGradients:
    u, d = _joined(call)
    f = factors.reshape(-1, 1, 1, 1)
    u, d = mx.where(f == 0, 0.0, u), mx.where(f == 0, 0.0, f * d)
    u, d = (a.swapaxes(0, 1).flatten(1, 2) for a in (u, d))
    weight = (d.swapaxes(1, 2) @ u).flatten(0, 1)
    return LayerGradients(weight, _sum_of_rows(mx.contiguous(d.swapaxes(0, 1))).flatten() if call.bias else None)


def _sq_norms_reference(call: _Call, method: str) -> mx.array:
    rows = sum(math.prod(dy.shape[1:-1]) for dy in call.dy)
    d, p = math.prod(call.window[:3]) * call.x[0].shape[-1] // call.groups, call.dy[0].shape[-1] // call.groups
    if call.segments:  # one Gram matrix of all samples
        rows *= call.x[0].shape[0]
    if method == "direct" or (method == "auto" and rows * (d + p) > d * p):
        return sum((_row_sums(_rows(g).square()) for g in _grads_reference(call) if g is not None), mx.array(0.0))
    u, d_ = _joined(call)
    if call.segments:
        return _sq_norms_of_units(call, u, d_)
    gram = (u @ u.swapaxes(2, 3) + float(call.bias)) * (d_ @ d_.swapaxes(2, 3))
    norms = _row_sums(_rows(gram))
    return mx.where(norms < 0, 0.0, norms)


def _sq_norms_of_units(call: _Call, u: mx.array, d: mx.array) -> mx.array:
    batch, rows = u.shape[0], u.shape[2]
    ids = mx.repeat(call.segments[0], rows)
    u, d = (a.swapaxes(0, 1).flatten(1, 2) for a in (u, d))
    gram = (u @ u.swapaxes(1, 2) + float(call.bias)) * (d @ d.swapaxes(1, 2))
    of_rows = mx.where(ids[:, None] == ids, gram, 0.0).sum(axis=0)  # a row counts with those of its own unit
    each = _row_sums(_row_sums(of_rows).reshape(batch, rows)) if rows else mx.zeros((batch,))
    norms = _by_unit(call.segments, call.units, each)
    return mx.where(norms < 0, 0.0, norms)


def _embedding_sq_norms_reference(
    tokens: list[mx.array], dy: list[mx.array], segments: list[mx.array], units: int
) -> mx.array:
    t, d = _joined_lookups(tokens, dy)
    if t.size == 0:
        return mx.zeros((units,))
    # Rows of one token of one unit are added up at the first of them: nothing of the vocabulary's size, nor T x T.
    ids = segments[0] if segments else mx.arange(t.shape[0])
    # Not by `&`: where one side is batched alone, vmap gets it wrong.
    kept = mx.logical_and(t >= 0, mx.logical_and(ids >= 0, ids < units)[:, None])
    unit = mx.broadcast_to(ids[:, None], t.shape).flatten().astype(mx.int64)
    key = mx.where(kept.flatten(), unit * 2**31 + t.flatten(), mx.array(2**62, mx.int64))
    order = mx.argsort(key)
    key = key[order]
    run = mx.concatenate([mx.zeros((1,), mx.int32), mx.cumsum((key[1:] != key[:-1]).astype(mx.int32))])
    flat = mx.where(kept[..., None], d, 0.0).flatten(0, 1)[order]
    sums = mx.zeros_like(flat).at[run].add(flat)
    squares = _row_sums(sums.square())
    owner = mx.zeros((key.size,), mx.int32).at[run].maximum(mx.where(key < 2**62, key // 2**31, units).astype(mx.int32))
    return mx.zeros((units + 1,)).at[owner].add(squares)[:units]


def _embedding_clipped_sum_reference(
    tokens: list[mx.array], dy: list[mx.array], factors: mx.array, num_embeddings: int
) -> mx.array:
    t, d = _joined_lookups(tokens, dy)
    if t.size == 0:
        return mx.zeros((num_embeddings, d.shape[-1]))
    f = factors.reshape(-1, 1, 1)
    d = mx.where(mx.logical_or(f == 0, (t < 0)[..., None]), 0.0, f * d).flatten(0, 1)
    return mx.zeros((num_embeddings, d.shape[-1])).at[mx.maximum(t, 0).flatten()].add(d)


def _embedding_linear_products_reference(tokens: list[mx.array], dy: list[mx.array], call: _Call) -> mx.array:
    weight = _grads_reference(call).weight  # [units, V, p]
    t, d = _joined_lookups(tokens, dy)
    ids = call.segments[0] if call.segments else mx.arange(t.shape[0])
    valid = (ids >= 0) & (ids < call.units)
    looked_up = weight[mx.where(valid, ids, 0)[:, None], mx.maximum(t, 0)]
    kept = mx.logical_and(valid[:, None, None], (t >= 0)[..., None])
    each = _row_sums(_rows(mx.where(kept, d * looked_up, 0.0)))
    return _by_unit(call.segments, call.units, each)


def _joined_lookups(tokens: list[mx.array], dy: list[mx.array]) -> tuple[mx.array, mx.array]:
    """Tokens [B, T] and output gradients [B, T, p] of all calls, float32."""
    t = mx.concatenate([a.reshape(a.shape[0], math.prod(a.shape[1:])) for a in tokens], axis=1)
    d = [a.reshape(a.shape[0], math.prod(a.shape[1:-1]), a.shape[-1]).astype(mx.float32) for a in dy]
    return t, mx.concatenate(d, axis=1)


def _call_of(arrays: list[mx.array], parameters: str) -> tuple[_Call, dict[str, Any]]:
    given = json.loads(parameters)
    n = given["calls"]
    mask = arrays[2 * n : 3 * n] if given["masked"] else []
    segments = arrays[-1:] if given["segmented"] else []
    units = given["units"] if segments else arrays[0].shape[0]
    window = tuple(given["window"])
    call = _Call(arrays[:n], arrays[n : 2 * n], mask, segments, units, given["bias"], given["groups"], window)
    return call, given


@_native.reference("ghost_sq_norms")
def _ghost_sq_norms(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    call, given = _call_of(arrays, parameters)
    with _on(stream):
        return [_sq_norms_reference(call, given["method"])]


@_native.reference("ghost_grads")
def _ghost_grads(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    with _on(stream):
        return [g for g in _grads_reference(_call_of(arrays, parameters)[0]) if g is not None]


@_native.reference("ghost_clipped_sum")
def _ghost_clipped_sum(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    with _on(stream):
        sums = _clipped_sum_reference(_call_of(arrays[:-1], parameters)[0], arrays[-1])
        return [g for g in sums if g is not None]


@_native.reference("convolved")
def _convolved_again(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    given = json.loads(parameters)
    axes, window = arrays[0].ndim - 2, given["window"]
    stride, padding, dilation = (tuple(window[i + 3 - axes : i + 3]) for i in (3, 6, 9))
    how = _Convolution(stride, padding, dilation, given["groups"], stream)
    with _on(stream):
        return [_differentiable(how)(*arrays)]


@_native.reference("embedding_sq_norms")
def _embedding_sq_norms(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    call, _ = _call_of(arrays, parameters)
    with _on(stream):
        return [_embedding_sq_norms_reference(call.x, call.dy, call.segments, call.units)]


@_native.reference("embedding_clipped_sum")
def _embedding_clipped_sum(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    call, given = _call_of(arrays[:-1], parameters)
    with _on(stream):
        return [_embedding_clipped_sum_reference(call.x, call.dy, arrays[-1], given["units"])]


@_native.reference("embedding_linear_products")
def _embedding_linear_products(arrays: list[mx.array], stream: Any, parameters: str) -> list[mx.array]:
    call, given = _call_of(arrays, parameters)
    at, n = 2 * given["calls"], given["linear_calls"]
    linear = call._replace(x=arrays[at : at + n], dy=arrays[at + n : at + 2 * n])
    with _on(stream):
        return [_embedding_linear_products_reference(call.x, call.dy, linear)]


def _linear(
    op: str, x: Arrays, dy: Arrays, mask: Arrays | None, segments: mx.array | None, num_segments: int | None
) -> _Call:
    xs, dys = _pairs(op, "x", x, "dy", dy)
    for i, (a, d) in enumerate(zip(xs, dys, strict=True)):
        if a.ndim < 2 or a.shape[0] != xs[0].shape[0] or a.shape[-1] != xs[0].shape[-1]:
            raise ValueError(f"[{op}] {_nth('x', i, xs)} must have shape [B, ..., d] but has shape {list(a.shape)}")
        if d.shape[:-1] != a.shape[:-1] or d.shape[-1] != dys[0].shape[-1]:
            want = [*a.shape[:-1], "p"]
            raise ValueError(
                f"[{op}] {_nth('dy', i, dys)} must have shape {_shape(want)} but has shape {list(d.shape)}"
            )
    masks = _masks(op, mask, [a.shape[:-1] for a in xs])
    return _Call(xs, dys, masks, *_segments(op, segments, num_segments, xs[0].shape[0], None))


def _conv(
    op: str,
    x: Arrays,
    dy: Arrays,
    kernel_size: Size,
    stride: Size,
    padding: Size,
    dilation: Size,
    groups: int,
    transposed: bool,
    bias: bool,
    segments: mx.array | None,
    num_segments: int | None,
) -> tuple[_Call, list[mx.array]]:
    """The call, and dy as it was given: in a transposed convolution x and dy change places."""
    xs, dys = _pairs(op, "x", x, "dy", dy)
    axes = xs[0].ndim - 2
    if axes not in (1, 2, 3):
        raise ValueError(f"[{op}] x must have 1, 2 or 3 axes of space but has shape {list(xs[0].shape)}")
    given = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    sizes = {name: _sizes(op, name, value, axes) for name, value in given.items()}
    inputs, outputs = (dys, xs) if transposed else (xs, dys)
    for i, (a, d) in enumerate(zip(inputs, outputs, strict=True)):
        space = [
            (s + 2 * p - e * (k - 1) - 1) // t + 1 for s, k, t, p, e in zip(a.shape[1:-1], *sizes.values(), strict=True)
        ]
        want = [xs[0].shape[0], *space, outputs[0].shape[-1]]
        name, seen = ("x", a) if not transposed else ("dy", a)
        fits = list(d.shape) == want
        if transposed and d.ndim == axes + 2:  # the output may have been padded further than positions reach
            fits = all(n <= m for n, m in zip(d.shape, want, strict=True)) and d.shape[:: axes + 1] == (
                want[0],
                want[-1],
            )
        if seen.ndim != axes + 2 or seen.shape[-1] != inputs[0].shape[-1] or not fits:
            raise ValueError(
                f"[{op}] {_nth('dy' if name == 'x' else 'x', i, xs)} must have shape {want} for {name} of shape "
                f"{list(seen.shape)} but has shape {list(d.shape)}"
            )
    if groups < 1 or xs[0].shape[-1] % groups or dys[0].shape[-1] % groups:
        raise ValueError(
            f"[{op}] groups must divide the channels {xs[0].shape[-1]} and {dys[0].shape[-1]} but is {groups}"
        )
    window = []
    for name, value in sizes.items():
        window += [0 if name == "padding" else 1] * (3 - axes) + list(value)
    units = _segments(op, segments, num_segments, xs[0].shape[0], None)
    return _Call(inputs, outputs, [], *units, bias and not transposed, groups, tuple(window)), dys


def _convolution(
    x: mx.array, weight: mx.array, bias: mx.array | None, given: dict[str, Size], groups: int
) -> dict[str, tuple[int, ...]]:
    """Stride, padding and dilation of each axis."""
    axes = x.ndim - 2
    if axes not in (1, 2, 3) or x.dtype not in FLOATS:
        raise ValueError(
            "[convolve] x must be float32, float16 or bfloat16 with 1, 2 or 3 axes of space, [B, *space, c], but has "
            f"dtype {x.dtype} and shape {list(x.shape)}"
        )
    if groups < 1 or x.shape[-1] == 0 or x.shape[-1] % groups:
        raise ValueError(f"[convolve] groups must divide the channels {x.shape[-1]} of x but is {groups}")
    channels = x.shape[-1] // groups
    fits = weight.ndim == x.ndim and weight.shape[-1] == channels and weight.shape[0] % groups == 0
    if not fits or min(weight.shape) == 0 or weight.dtype != x.dtype:
        raise ValueError(
            f"[convolve] weight must have dtype {x.dtype} and shape [p, *kernel_size, {channels}] with {axes} axes of "
            f"space and p a multiple of groups, {groups}, but has dtype {weight.dtype} and shape {list(weight.shape)}"
        )
    if bias is not None and (list(bias.shape) != [weight.shape[0]] or bias.dtype != x.dtype):
        raise ValueError(
            f"[convolve] bias must have dtype {x.dtype} and shape [{weight.shape[0]}] but has dtype {bias.dtype} and "
            f"shape {list(bias.shape)}"
        )
    sizes = {name: _sizes("convolve", name, value, axes) for name, value in given.items()}
    for n, k, p, d in zip(x.shape[1:-1], weight.shape[1:-1], sizes["padding"], sizes["dilation"], strict=True):
        if n + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f"[convolve] x must reach over the kernel in each axis but has shape {list(x.shape)} for weight of "
                f"shape {list(weight.shape)}, padding {sizes['padding']} and dilation {sizes['dilation']}"
            )
    return sizes


def _convolved(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> mx.array:
    y = mx.conv_general(x, weight, stride, padding, dilation, groups=groups)
    return y if bias is None else y + bias


class _Convolution(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    stream: Stream


def _differentiable(how: _Convolution) -> Callable[..., mx.array]:
    """The convolution of (x, weight[, bias]), whose gradients are convolutions by the kernels too, not MLX's."""

    def convolution(x: mx.array, weight: mx.array, *bias: mx.array) -> mx.array:
        return _convolved(x, weight, bias[0] if bias else None, how.stride, how.padding, how.dilation, how.groups)

    differentiable = mx.custom_function(convolution)

    @differentiable.vjp
    def gradients(primals: tuple[mx.array, ...], dy: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, weight, *bias = primals
        with _on(how.stream):
            found = (_input_gradient(x, weight, dy, how), _kernel_gradient(x, weight, dy, how))
            return (*found, *(dy.sum(axis=tuple(range(dy.ndim - 1))) for _ in bias))

    return cast(Callable[..., mx.array], differentiable)


def _input_gradient(x: mx.array, weight: mx.array, dy: mx.array, how: _Convolution) -> mx.array:
    """dy, with zeros where the stride jumps, convolved with the kernels turned round, inputs and outputs swapped."""
    for axis, step in enumerate(how.stride, start=1):
        dy = _spread(dy, axis, step)
    margins = []
    for n, k, m, p, d in zip(*(a.shape[1:-1] for a in (x, weight, dy)), how.padding, how.dilation, strict=True):
        before = d * (k - 1) - p
        margins.append((before, n + d * (k - 1) - m - before))
    turn = (slice(None), *(slice(None, None, -1) for _ in how.stride))
    turned = weight[turn]
    turned = turned.reshape(how.groups, -1, *turned.shape[1:]).swapaxes(1, -1).flatten(0, 1)
    padding = (
        tuple(a if a == b else 0 for a, b in margins) if min(min(m) for m in margins) >= 0 else (0,) * len(margins)
    )
    rest = [(a - p, b - p) for (a, b), p in zip(margins, padding, strict=True)]
    dy = _padded(dy, [(0, 0), *rest, (0, 0)])
    return convolve(dy, turned, padding=padding, dilation=how.dilation, groups=how.groups, stream=how.stream)


def _spread(dy: mx.array, axis: int, step: int) -> mx.array:
    """Zeros between the positions of an axis."""
    if step == 1:
        return dy
    shape = [*dy.shape[: axis + 1], step, *dy.shape[axis + 1 :]]
    wide = mx.pad(mx.expand_dims(dy, axis + 1), [(0, n - 1 if i == axis + 1 else 0) for i, n in enumerate(shape)])
    return wide.flatten(axis, axis + 1)


def _padded(dy: mx.array, margins: list[tuple[int, int]]) -> mx.array:
    """Zeros around, or less of it where a margin is negative."""
    if not any(map(any, margins)):
        return dy
    inside = tuple(slice(max(0, -a), n - max(0, -b)) for n, (a, b) in zip(dy.shape, margins, strict=True))
    return mx.pad(dy[inside], [(max(0, a), max(0, b)) for a, b in margins])


def _kernel_gradient(x: mx.array, weight: mx.array, dy: mx.array, how: _Convolution) -> mx.array:
    sizes: dict[str, Any] = how._asdict()
    return conv_clipped_sum(x, dy, mx.ones(len(x)), weight.shape[1:-1], **sizes).weight


def _ones(call: _Call, dys: list[mx.array]) -> _Call:
    """The call whose gradient is the sum of dy's rows."""
    return call._replace(x=[mx.ones((*dy.shape[:-1], 1)) for dy in dys], dy=dys, bias=False, groups=1, window=())


def _ones_product(call: _Call, dys: list[mx.array], method: str, stream: Stream) -> mx.array:
    return _sq_norms("conv_sq_norms", _ones(call, dys), method, stream)


def _kernels(weight: mx.array, kernel_size: Size, groups: int, transposed: bool, x: Arrays) -> mx.array:
    """[N, p, k * c / G] as the layer keeps its weight: [N, p, *kernel_size, c / G]."""
    axes = (x if isinstance(x, mx.array) else x[0]).ndim - 2
    kernel = _sizes("conv", "kernel_size", kernel_size, axes)
    n, rows = weight.shape[:2]
    if not transposed:
        return weight.reshape(n, rows, *kernel, -1)
    k = math.prod(kernel)
    out = weight.shape[2] // k
    weight = weight.reshape(n, groups, rows // groups, k, out).transpose(0, 1, 4, 3, 2)
    return weight.reshape(n, groups * out, *kernel, rows // groups)


def _sizes(op: str, name: str, value: Size, axes: int) -> tuple[int, ...]:
    sizes = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(sizes) != axes or any(v < (0 if name == "padding" else 1) for v in sizes):
        raise ValueError(f"[{op}] {name} must be {axes} positive whole numbers but is {value}")
    return sizes


def _pairs(op: str, first: str, x: Arrays, second: str, dy: Arrays) -> tuple[list[mx.array], list[mx.array]]:
    xs, dys = ([a] if isinstance(a, mx.array) else list(a) for a in (x, dy))
    if not xs or len(xs) != len(dys):
        raise ValueError(f"[{op}] {first} and {second} must be as many but are {len(xs)} and {len(dys)}")
    for name, arrays in ((first, xs), (second, dys)):
        for i, a in enumerate(arrays):
            if a.dtype not in FLOATS:
                name = _nth(name, i, arrays)
                raise ValueError(f"[{op}] {name} must be float32, float16 or bfloat16 but has dtype {a.dtype}")
            if a.ndim == 0:
                raise ValueError(f"[{op}] {_nth(name, i, arrays)} must have shape [B, ...] but has shape []")
    return xs, dys


def _lookups(
    op: str, tokens: Arrays, dy: Arrays, padding_index: int | None, mask: Arrays | None, stream: Stream
) -> tuple[list[mx.array], list[mx.array]]:
    """Tokens as int32, -1 where they take no part, and output gradients."""
    ts, dys = ([a] if isinstance(a, mx.array) else list(a) for a in (tokens, dy))
    if not ts or len(ts) != len(dys):
        raise ValueError(f"[{op}] tokens and dy must be as many but are {len(ts)} and {len(dys)}")
    for i, (t, d) in enumerate(zip(ts, dys, strict=True)):
        if not mx.issubdtype(t.dtype, mx.integer) or t.ndim < 1:
            raise ValueError(
                f"[{op}] {_nth('tokens', i, ts)} must have shape [B, ...] and an integer dtype "
                f"but has shape {list(t.shape)} and dtype {t.dtype}"
            )
        want = [ts[0].shape[0], *t.shape[1:], dys[0].shape[-1] if dys[0].ndim else "p"]
        if list(d.shape) != want or d.dtype not in FLOATS:
            raise ValueError(
                f"[{op}] {_nth('dy', i, dys)} must have shape {_shape(want)} and dtype float32, float16 or bfloat16 "
                f"but has shape {list(d.shape)} and dtype {d.dtype}"
            )
    masks = _masks(op, mask, [t.shape for t in ts])
    with _on(stream):
        out = []
        for i, t in enumerate(ts):
            kept = masks[i] if masks else None
            if padding_index is not None:
                kept = t != padding_index if kept is None else mx.logical_and(kept, t != padding_index)
            t = t.astype(mx.int32)
            out.append(t if kept is None else mx.where(kept, t, -1))
        return out, dys


def _masks(op: str, mask: Arrays | None, shapes: list[tuple[int, ...]]) -> list[mx.array]:
    if mask is None:
        return []
    masks = [mask] if isinstance(mask, mx.array) else list(mask)
    if [(m.shape, m.dtype) for m in masks] != [(s, mx.bool_) for s in shapes]:
        raise ValueError(
            f"[{op}] mask must have shape {[list(s) for s in shapes]} and dtype bool "
            f"but has shape {[list(m.shape) for m in masks]} and dtype {[m.dtype for m in masks]}"
        )
    return masks


def _segments(
    op: str, segments: mx.array | None, num_segments: int | None, batch: int, stream: Stream
) -> tuple[list[mx.array], int]:
    if segments is None:
        if num_segments is not None:
            raise ValueError(f"[{op}] segments must be given with num_segments but is None")
        return [], batch
    if segments.shape != (batch,) or not mx.issubdtype(segments.dtype, mx.integer):
        raise ValueError(
            f"[{op}] segments must have shape [{batch}] and an integer dtype "
            f"but has shape {list(segments.shape)} and dtype {segments.dtype}"
        )
    units = batch if num_segments is None else num_segments
    if units < 0:
        raise ValueError(f"[{op}] num_segments must not be negative but is {units}")
    with _on(stream):
        return [segments.astype(mx.int32)], units


def _factors(op: str, factors: mx.array, batch: int, stream: Stream) -> mx.array:
    if factors.shape != (batch,) or factors.dtype not in FLOATS:
        raise ValueError(
            f"[{op}] factors must have shape [{batch}] and dtype float32 "
            f"but has shape {list(factors.shape)} and dtype {factors.dtype}"
        )
    with _on(stream):
        return factors.astype(mx.float32)


def _nth(name: str, i: int, arrays: list[mx.array]) -> str:
    return f"{name}[{i}]" if len(arrays) > 1 else name


def _shape(shape: list[Any]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
