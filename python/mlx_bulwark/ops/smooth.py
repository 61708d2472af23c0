"""Randomized smoothing: noisy copies of an input, and the votes of a classifier on them."""

import math
import struct
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx

from .. import _native
from .._native import Stream
from .noise import (
    _DOMAINS,
    BLOCKS_PER_TILE,
    FLOATS,
    NORMALS_PER_TILE,
    Counter,
    _blocks,
    _drawn,
    _integers,
    _is_int,
    _keystream,
    _noise,
    _on,
    _standard_normals,
    _valid,
)

Distribution = Literal["gaussian", "uniform"]

DISTRIBUTIONS = ("gaussian", "uniform")
MOST_LEVELS = 65536
_DOMAIN = _DOMAINS["smoothing"], 0


class _Copies(NamedTuple):
    """What noisy_copies does besides its arrays; the primitive keeps the same."""

    n: int
    uniform: bool
    bounds: tuple[float, float] | None
    levels: int


def noisy_copies(
    x: mx.array,
    n: int,
    sigma: float | mx.array,
    key: mx.array,
    counter: Counter,
    *,
    distribution: Distribution = "gaussian",
    bounds: tuple[float, float] | None = None,
    levels: int | None = None,
    stream: Stream = None,
) -> mx.array:
    """Draw noisy copies of an input: ``copies[i] = x + noise[i]``, from secure noise that is not truncated.

    The noise is that of ``gaussian((n, *x.shape), sigma, key, counter, domain="smoothing")``, so no counter may serve
    twice: advance it by ``blocks_used((n, *x.shape))``, for both distributions. Two calls one after the other give the
    copies of one call where ``x.size`` times the first call's ``n`` is a multiple of 320.

    Computed in float32 and rounded once. The order is noise, clip, grid; NaN in ``x`` stays NaN in every copy.

    Args:
        x: One input of a model, any shape, float32, float16 or bfloat16.
        n: Number of copies, >= 0.
        sigma: Standard deviation of the noise, a number >= 0 or a float32 scalar array, in the unit of ``x``. 0 copies
            ``x``. An array that holds a negative number, an infinity or NaN gives NaN everywhere.
        key: uint32 ``[8]``, from ``random_key``: who knows it can fit an input to its noise.
        counter: First block: an integer in [0, 2^64) or a uint32 array ``[2]``, low word first.
        distribution: ``"gaussian"``, or ``"uniform"`` over [-lambda, lambda) with lambda = sqrt(3) sigma.
        bounds: Lowest and highest value, to which copies are clipped; rounded to the dtype of ``x``.
        levels: Number of evenly spaced values in ``bounds``, ends included, to which copies are rounded: 256 for
            images of 8 bits. At most 65536.
        stream: Stream or device.

    Returns:
        array: ``[n, *x.shape]``, of the dtype of ``x``. Differentiable in ``x``: the sum of the cotangents over the
        copies, without the entries that were clipped; the grid counts as the identity. Differentiable in ``sigma``
        too.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype, an integer counter would pass 2^64, or ``vmap``
            maps something but the counter.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> image = mx.full((28, 28), 0.5)
        >>> copies = bw.noisy_copies(image, 100, 0.25, bw.random_key(), 0, bounds=(0, 1))
        >>> copies.shape, copies.min().item() >= 0
        ((100, 28, 28), True)

    Source:
        J. Cohen, E. Rosenfeld and J. Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019;
        G. Yang et al., "Randomized Smoothing of All Shapes and Sizes", 2020 (uniform noise).
    """
    inputs, what = _copies_inputs(x, n, sigma, key, counter, distribution, bounds, levels)
    if _native.runs_native(stream):
        x, sigma, key, counter = inputs
        limits = list(what.bounds or ())
        return _native.ext.noisy_copies(x, what.n, sigma, key, counter, what.uniform, limits, what.levels, stream)
    with _on(stream):
        return _noisy_copies(*inputs, what)


def noisy_copies_reference(
    x: mx.array,
    n: int,
    sigma: float | mx.array,
    key: mx.array,
    counter: Counter,
    *,
    distribution: Distribution = "gaussian",
    bounds: tuple[float, float] | None = None,
    levels: int | None = None,
    stream: Stream = None,
) -> mx.array:
    """Compute ``noisy_copies`` by plain MLX ops."""
    with _on(stream):
        inputs, what = _copies_inputs(x, n, sigma, key, counter, distribution, bounds, levels)
        return _noisy_copies(*inputs, what)


def count_votes(logits: mx.array, counts: mx.array, *, stream: Stream = None) -> mx.array:
    """Add the votes of a classifier to running counts: one vote a row, for its largest logit.

    A row that holds NaN votes for no class; it is counted in the last slot. Of equal logits the lower class gets the
    vote. Counts stay on the device, so that many batches need one synchronisation.

    Args:
        logits: ``[m, c]``, float32, float16 or bfloat16, c >= 1; scores or probabilities serve as well.
        counts: int32 ``[c + 1]``: the votes so far of each class, and the rows with NaN. Zeros in the beginning.
        stream: Stream or device.

    Returns:
        array: int32 ``[c + 1]``, the new counts; they add up to m more than before.

    Raises:
        ValueError: An argument has a wrong shape or dtype.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> logits = mx.array([[0.1, 0.9], [0.8, 0.2], [float("nan"), 1.0], [0.3, 0.7]])
        >>> bw.count_votes(logits, mx.zeros(3, mx.int32)).tolist()
        [1, 2, 1]

    Source:
        J. Cohen, E. Rosenfeld and J. Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019.
    """
    _check_votes(logits, counts)
    if _native.runs_native(stream):
        return _native.ext.count_votes(logits, counts, stream)
    with _on(stream):
        return _count_votes(logits, counts)


def count_votes_reference(logits: mx.array, counts: mx.array, *, stream: Stream = None) -> mx.array:
    """Compute ``count_votes`` by plain MLX ops."""
    _check_votes(logits, counts)
    with _on(stream):
        return _count_votes(logits, counts)


# Checks


def _copies_inputs(
    x: Any, n: Any, sigma: Any, key: Any, counter: Any, distribution: Any, bounds: Any, levels: Any
) -> tuple[tuple[mx.array, mx.array, mx.array, mx.array], _Copies]:
    op = "noisy_copies"
    if not isinstance(x, mx.array) or x.dtype not in FLOATS:
        has = f"dtype {x.dtype}" if isinstance(x, mx.array) else f"type {type(x).__name__}"
        raise ValueError(f"[{op}] x must be a float32, float16 or bfloat16 array but has {has}")
    if not _is_int(n) or not 0 <= n < 1 << 31:
        raise ValueError(f"[{op}] n must be an integer in [0, 2^31) but is {n!r}")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"[{op}] distribution must be 'gaussian' or 'uniform' but is {distribution!r}")
    limits = None if bounds is None else _bounds(bounds, x.dtype)
    if levels is not None and (not _is_int(levels) or not 2 <= levels <= MOST_LEVELS or limits is None):
        has = f"is {levels!r}" if limits else "there are no bounds"
        raise ValueError(f"[{op}] levels must be an integer in [2, {MOST_LEVELS}], with bounds, but {has}")
    inputs = x, *_noise(op, sigma, key, counter, _blocks(int(n) * x.size))
    return inputs, _Copies(int(n), distribution == "uniform", limits, int(levels or 0))


def _bounds(bounds: Any, dtype: mx.Dtype) -> tuple[float, float]:
    """The bounds as the dtype holds them, so that rounding to it leaves no copy outside."""
    try:
        low, high = (_rounded(float(b), dtype) for b in bounds)
    except (TypeError, ValueError):
        raise ValueError(f"[noisy_copies] bounds must be two numbers but is {bounds!r}") from None
    if not (low < high and math.isfinite(_rounded(high - low, mx.float32))):
        raise ValueError(f"[noisy_copies] bounds must be finite and increase in {dtype} but is {bounds!r}")
    return low, high


def _rounded(value: float, dtype: mx.Dtype) -> float:
    return cast(float, mx.array(value, dtype).item())


def _check_votes(logits: Any, counts: Any) -> None:
    for name, x in (("logits", logits), ("counts", counts)):
        if not isinstance(x, mx.array):
            raise ValueError(f"[count_votes] {name} must be an array but has type {type(x).__name__}")
    if logits.ndim != 2 or logits.shape[1] < 1 or logits.dtype not in FLOATS:
        raise ValueError(
            "[count_votes] logits must be a float32, float16 or bfloat16 array of shape [m, c] with c >= 1 but has "
            f"{logits.dtype} of shape {logits.shape}"
        )
    if counts.shape != (logits.shape[1] + 1,) or counts.dtype != mx.int32:
        raise ValueError(
            f"[count_votes] counts must be an int32 array of shape ({logits.shape[1] + 1},), one slot a class and one "
            f"for NaN, but has {counts.dtype} of shape {counts.shape}"
        )


# The reference


@_native.reference("noisy_copies")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    *inputs, parameters = arrays
    _, _, n, uniform, bounded, low, high, levels = _integers(parameters)
    bounds = (_float_of(low), _float_of(high)) if bounded else None
    x, sigma, key, counter = inputs
    with _on(stream):
        return [_noisy_copies(x, sigma, key, counter, _Copies(n, bool(uniform), bounds, levels))]


@_native.reference("count_votes")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    with _on(stream):
        return [_count_votes(*arrays)]


def _float_of(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def _noisy_copies(x: mx.array, sigma: mx.array, key: mx.array, counter: mx.array, what: _Copies) -> mx.array:
    shape = [what.n, *x.shape]
    draw = _uniforms if what.uniform else _normals
    value = x.astype(mx.float32) + _valid(sigma) * draw(shape, [x, sigma], key, counter)
    if what.bounds:
        low, high = what.bounds
        value = mx.where(value < low, low, mx.where(value > high, high, value))
        if what.levels:
            value = _to_grid(value, low, _rounded(high - low, mx.float32), what.levels - 1)
    return value.astype(x.dtype)


def _to_grid(value: mx.array, low: float, width: float, steps: int) -> mx.array:
    place = mx.round((value - low) * (steps / width))
    return mx.stop_gradient(place * width / steps + low) + (value - mx.stop_gradient(value))


def _normals(shape: Sequence[int], others: list[mx.array], key: mx.array, counter: mx.array) -> mx.array:
    return _standard_normals("noisy_copies", [shape], others, key, counter, _DOMAIN)[0]


def _uniforms(shape: Sequence[int], others: list[mx.array], key: mx.array, counter: mx.array) -> mx.array:
    """Values in (-sqrt(3), sqrt(3)) from the first ten words of each block, in the order of the normals."""
    size = math.prod(shape)

    def draw(key: mx.array, counter: mx.array) -> list[mx.array]:
        words = _keystream(key, counter, _DOMAIN, BLOCKS_PER_TILE * -(-size // NORMALS_PER_TILE))[..., :10, :]
        batch = words.shape[:-2]
        words = words.reshape(*batch, 10, -1, BLOCKS_PER_TILE).swapaxes(-2, -3).reshape(*batch, -1)[..., :size]
        odd = (words.astype(mx.int32) >> 8) * 2 + 1  # symmetric, and exact in float32
        return [(odd.astype(mx.float32) * (math.sqrt(3) * 2.0**-24)).reshape((*batch, *shape))]

    return _drawn("noisy_copies", draw, others, key, counter)[0]


def _count_votes(logits: mx.array, counts: mx.array) -> mx.array:
    rows, classes = logits.shape
    if rows == 0:  # which mx.argmax refuses
        return counts
    votes = mx.where(mx.isnan(logits).any(axis=1), classes, mx.argmax(logits, axis=1))
    return counts.at[votes].add(mx.ones_like(votes).astype(mx.int32))
