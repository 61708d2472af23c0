"""Per-sample clipping: norms, factors and clipped sums over whole gradient trees."""

import itertools
import math
from functools import partial
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from .. import _native
from .._native import Stream
from .noise import FLOATS, Counter, _blocks, _like, _noise, _on, add_gaussian_reference

MODES = ("flat", "automatic")
# MLX adds float32 in sequence on the CPU: the reference splits longer sums, so that they stay good to 1e-6.
COLUMNS = 32
ROWS = 1024


class ClipFactors(NamedTuple):
    """What every sample is multiplied with before the sum.

    Attributes:
        factors: ``[B]``, float32; 0 for a sample that is refused or masked.
        num_refused: Scalar int32: how many samples hold NaN or infinity, or overflow; masked ones do not count.
    """

    factors: mx.array
    num_refused: mx.array


class ClippedNorms(NamedTuple):
    """What ``clip_and_sum`` found on its way to the sums.

    Attributes:
        sq_norms: ``[B]``, float32, squared L2 norm of every sample, before the clip.
        factors: ``[B]``, float32, as of ``clip_factors``.
        num_refused: Scalar int32, as of ``clip_factors``.
    """

    sq_norms: mx.array
    factors: mx.array
    num_refused: mx.array


def sample_sq_norms(grads: Any, *, stream: Stream = None) -> mx.array:
    """Squared L2 norm of every sample over all leaves of a gradient tree.

    Squares are added in float32 over short runs of values and the runs in float64. A sample whose squared norm
    overflows float32 (norms above 1.8e19) has the norm infinity.

    Args:
        grads: Per-sample gradients: an array ``[B, ...]`` or a tree (dict, list, tuple) of them; float32, float16 or
            bfloat16, also mixed.
        stream: Stream or device.

    Returns:
        array: ``[B]``, float32.

    Raises:
        ValueError: There is no leaf, or leaves differ in ``B``, or a leaf has another dtype.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> bw.sample_sq_norms({"weight": mx.array([[1.0, 2.0], [0.0, 3.0]]), "bias": mx.array([2.0, 4.0])})
        array([9, 25], dtype=float32)

    Source:
        Abadi et al., "Deep Learning with Differential Privacy" (2016), algorithm 1.
    """
    leaves = _leaves("sample_sq_norms", grads)
    if _native.runs_native(stream):
        return _native.ext.sample_sq_norms(leaves, stream)
    return sample_sq_norms_reference(leaves, stream=stream)


def sample_sq_norms_reference(grads: Any, *, stream: Stream = None) -> mx.array:
    """The same as ``sample_sq_norms`` in plain MLX ops."""
    with _on(stream):
        return _sum_over_leaves([_row_sums(mx.square(_rows(g).astype(mx.float32))) for _, g in _named(grads)])


def clip_factors(
    sq_norms: mx.array,
    max_grad_norm: float | mx.array,
    mode: str = "flat",
    mask: mx.array | None = None,
    *,
    stream: Stream = None,
) -> ClipFactors:
    """Factors that bound every sample's L2 norm by ``max_grad_norm``.

    With n the norm and C the bound, mode ``"flat"`` is min(1, C / (n + 1e-6)) and mode ``"automatic"`` (AUTO-S) is
    C / (n + 0.01). A sample whose squared norm is NaN or infinite is refused: its factor is 0, and it is counted.

    Args:
        sq_norms: ``[B]``, float32, squared L2 norms as of ``sample_sq_norms``; negative ones count as 0.
        max_grad_norm: The bound C, positive and finite; in mode ``"flat"`` infinity too, which clips nothing. An array
            must be a scalar, and its value is not checked.
        mode: ``"flat"`` or ``"automatic"``.
        mask: ``[B]``, bool; where it is False (padding) the factor is 0, and the sample is not counted as refused.
        stream: Stream or device.

    Returns:
        ClipFactors: ``factors`` ``[B]`` float32, and ``num_refused``, a scalar int32.

    Raises:
        ValueError: A shape, ``max_grad_norm`` or ``mode`` is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> factors, num_refused = bw.clip_factors(mx.array([0.25, 16.0, float("inf")]), 2.0)
        >>> [round(f, 4) for f in factors.tolist()], num_refused.item()
        ([1.0, 0.5, 0.0], 1)

    Source:
        Abadi et al., "Deep Learning with Differential Privacy" (2016); Bu et al., "Automatic Clipping: Differentially
        Private Deep Learning Made Easier and Stronger" (2022).
    """
    if sq_norms.ndim != 1:
        raise ValueError(f"[clip_factors] sq_norms must have shape [B] but has shape {list(sq_norms.shape)}")
    bound = _bound("clip_factors", max_grad_norm, mode)
    _check_mask("clip_factors", mask, sq_norms.shape[0])
    with _on(stream):
        return _factors(sq_norms.astype(mx.float32), bound, mode, mask)


def _factors(sq_norms: mx.array, bound: mx.array, mode: str, mask: mx.array | None) -> ClipFactors:
    counts = mx.ones_like(sq_norms, dtype=mx.bool_) if mask is None else mask
    finite = mx.isfinite(sq_norms)
    # Not by `&`: where one side is batched alone, vmap gets it wrong.
    kept = mx.logical_and(counts, finite)
    positive = mx.logical_and(kept, sq_norms > 0)
    # Branches that are not taken hold harmless values too: 0 times their derivative must not be NaN.
    norms = mx.where(positive, mx.sqrt(mx.where(positive, sq_norms, 1.0)), 0.0)
    if mode == "automatic":
        factors = bound / (norms + 0.01)
    else:
        norms = norms + 1e-6
        factors = mx.where(bound >= norms, 1.0, mx.where(bound == math.inf, 1.0, bound) / norms)
    return ClipFactors(
        mx.where(kept, factors, 0.0), mx.sum(mx.logical_and(counts, mx.logical_not(finite))).astype(mx.int32)
    )


def clipped_sum(
    grads: Any,
    factors: mx.array,
    sigma: float | mx.array | None = None,
    key: mx.array | None = None,
    counter: Counter | None = None,
    *,
    stream: Stream = None,
) -> Any:
    """Sum of all samples, each times its factor, over a gradient tree, and Gaussian noise on top.

    A sample with factor 0 is skipped, whatever it holds: NaN in it reaches neither the sum nor a derivative. The noise
    is that of ``add_gaussian``, to the bit, and so are its rules: a counter serves once.

    Args:
        grads: Per-sample gradients: an array ``[B, ...]`` or a tree (dict, list, tuple) of them; float32, float16 or
            bfloat16, also mixed.
        factors: ``[B]``, float32, as of ``clip_factors``.
        sigma: Standard deviation of Gaussian noise that is added to the sums, as of ``add_gaussian``; with ``key`` and
            ``counter``, or none of the three.
        key: uint32 ``[8]``, from ``random_key``.
        counter: First block: an integer in [0, 2^64) or a uint32 array ``[2]``, low word first. Leaf i starts at
            ``counter + blocks_used(sums before i)``; advance it by ``blocks_used(sums)`` before the next draw.
        stream: Stream or device.

    Returns:
        The tree with ``[...]`` float32 in place of every leaf: ``sum_b factors[b] * grads[b] + sigma * z``.

    Raises:
        ValueError: There is no leaf, a leaf or another argument has a wrong shape, dtype or value, or ``vmap`` maps
            something but the counter of the noise.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> grads = {"weight": mx.array([[1.0, 2.0], [0.0, 3.0]])}
        >>> bw.clipped_sum(grads, mx.array([1.0, 0.5]))
        {'weight': array([1, 3.5], dtype=float32)}
        >>> noisy = bw.clipped_sum(grads, mx.array([1.0, 0.5]), sigma=0.1, key=bw.random_key(), counter=0)

    Source:
        Abadi et al., "Deep Learning with Differential Privacy" (2016), algorithm 1.
    """
    leaves = _leaves("clipped_sum", grads)
    batch = leaves[0].shape[0]
    if factors.shape != (batch,) or factors.dtype not in FLOATS:
        raise ValueError(
            f"[clipped_sum] factors must have shape [{batch}] and dtype float32 "
            f"but has shape {list(factors.shape)} and dtype {factors.dtype}"
        )
    drawn = _noise_inputs("clipped_sum", leaves, sigma, key, counter)
    with _on(stream):
        factors = factors.astype(mx.float32)
    if _native.runs_native(stream):
        return _like(grads, _native.ext.clipped_sum(leaves, factors, drawn, stream))
    return clipped_sum_reference(grads, factors, *drawn, stream=stream)


def clipped_sum_reference(
    grads: Any,
    factors: mx.array,
    sigma: mx.array | None = None,
    key: mx.array | None = None,
    counter: mx.array | None = None,
    *,
    stream: Stream = None,
) -> Any:
    """The same as ``clipped_sum`` in plain MLX ops."""

    def one(g: mx.array) -> mx.array:
        f = mx.expand_dims(factors, list(range(1, g.ndim)))
        kept = mx.where(f == 0, mx.zeros_like(g), g).astype(mx.float32)
        return _sum_of_rows(f * kept)

    with _on(stream):
        sums = tree_map(one, grads)
        if sigma is None or key is None or counter is None:
            return sums
        return add_gaussian_reference(sums, sigma, key, counter)


def clip_and_sum(
    grads: Any,
    max_grad_norm: float | mx.array,
    mode: str = "flat",
    mask: mx.array | None = None,
    sigma: float | mx.array | None = None,
    key: mx.array | None = None,
    counter: Counter | None = None,
    *,
    stream: Stream = None,
) -> tuple[Any, ClippedNorms]:
    """Clip every sample and sum: ``sample_sq_norms``, ``clip_factors`` and ``clipped_sum`` in one pass over memory.

    The same bits as the three ops one after another.

    Args:
        grads: Per-sample gradients: an array ``[B, ...]`` or a tree (dict, list, tuple) of them; float32, float16 or
            bfloat16, also mixed.
        max_grad_norm: As of ``clip_factors``.
        mode: As of ``clip_factors``.
        mask: As of ``clip_factors``.
        sigma: Standard deviation of Gaussian noise that is added to the sums, as of ``add_gaussian``; with ``key`` and
            ``counter``, or none of the three.
        key: uint32 ``[8]``, from ``random_key``.
        counter: First block: an integer in [0, 2^64) or a uint32 array ``[2]``, low word first. Leaf i starts at
            ``counter + blocks_used(sums before i)``; advance it by ``blocks_used(sums)`` before the next draw.
        stream: Stream or device.

    Returns:
        tuple: The tree of sums as of ``clipped_sum``, and ``ClippedNorms``: ``sq_norms`` and ``factors`` ``[B]``
        float32, ``num_refused`` int32. Norms, factors and the count depend on data and carry no noise.

    Raises:
        ValueError: An argument is not as above.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> sums, norms = bw.clip_and_sum([mx.array([[3.0, 4.0], [0.0, 0.5]])], float("inf"))
        >>> sums, norms.sq_norms
        ([array([3, 4.5], dtype=float32)], array([25, 0.25], dtype=float32))

    Source:
        Abadi et al., "Deep Learning with Differential Privacy" (2016), algorithm 1.
    """
    leaves = _leaves("clip_and_sum", grads)
    bound = _bound("clip_and_sum", max_grad_norm, mode)
    _check_mask("clip_and_sum", mask, leaves[0].shape[0])
    drawn = _noise_inputs("clip_and_sum", leaves, sigma, key, counter)
    if _native.runs_native(stream):
        out = _native.ext.clip_and_sum(leaves, bound, mode, [] if mask is None else [mask], drawn, stream)
        return _like(grads, out[: len(leaves)]), ClippedNorms(*out[len(leaves) :])
    return clip_and_sum_reference(grads, bound, mode, mask, *drawn, stream=stream)


def clip_and_sum_reference(
    grads: Any,
    max_grad_norm: mx.array,
    mode: str = "flat",
    mask: mx.array | None = None,
    sigma: mx.array | None = None,
    key: mx.array | None = None,
    counter: mx.array | None = None,
    *,
    stream: Stream = None,
) -> tuple[Any, ClippedNorms]:
    """The same as ``clip_and_sum`` in plain MLX ops."""
    with _on(stream):
        sq_norms = sample_sq_norms_reference(grads)
        factors, num_refused = _factors(sq_norms, max_grad_norm, mode, mask)
        sums = clipped_sum_reference(grads, factors, sigma, key, counter)
        return sums, ClippedNorms(sq_norms, factors, num_refused)


@_native.reference("sample_sq_norms")
def _sample_sq_norms(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    return [sample_sq_norms_reference(arrays, stream=stream)]


def _clipped_sum(arrays: list[mx.array], stream: Any, noisy: bool) -> list[mx.array]:
    arrays, drawn = _split(arrays, 3 * noisy)
    sums: list[mx.array] = clipped_sum_reference(arrays[:-1], arrays[-1], *drawn, stream=stream)
    return sums


def _clip_and_sum(arrays: list[mx.array], stream: Any, mode: str, masked: bool, noisy: bool) -> list[mx.array]:
    arrays, drawn = _split(arrays, 3 * noisy)
    arrays, masks = _split(arrays, masked)
    mask = masks[0] if masked else None
    sums, norms = clip_and_sum_reference(arrays[:-1], arrays[-1], mode, mask, *drawn, stream=stream)
    return [*sums, *norms]


def _split(arrays: list[mx.array], last: int) -> tuple[list[mx.array], list[mx.array]]:
    return arrays[: len(arrays) - last], arrays[len(arrays) - last :]


for _noisy in (False, True):
    _suffix = "_noisy" * _noisy
    _native.reference(f"clipped_sum{_suffix}")(partial(_clipped_sum, noisy=_noisy))
    for _mode, _masked in itertools.product(MODES, (False, True)):
        _native.reference(f"clip_and_sum_{_mode}{'_masked' * _masked}{_suffix}")(
            partial(_clip_and_sum, mode=_mode, masked=_masked, noisy=_noisy)
        )


def _noise_inputs(op: str, leaves: list[mx.array], sigma: Any, key: Any, counter: Any) -> list[mx.array]:
    given = {"sigma": sigma, "key": key, "counter": counter}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return []
    if missing:
        raise ValueError(f"[{op}] sigma, key and counter must be given together but {' and '.join(missing)} is None")
    return list(_noise(op, sigma, key, counter, sum(_blocks(math.prod(g.shape[1:])) for g in leaves)))


def _named(grads: Any) -> list[tuple[str, Any]]:
    return cast("list[tuple[str, Any]]", tree_flatten(grads))


def _leaves(op: str, grads: Any) -> list[mx.array]:
    named = _named(grads)
    if not named:
        raise ValueError(f"[{op}] grads must hold at least one array but has none")
    for name, g in named:
        name = f"grads.{name}" if name else "grads"
        if not isinstance(g, mx.array):
            raise ValueError(f"[{op}] {name} must be an array but is {type(g).__name__}")
        if g.ndim < 1 or g.shape[0] != named[0][1].shape[0]:
            first = named[0][1].shape[0] if named[0][1].ndim else "B"
            raise ValueError(f"[{op}] {name} must have shape [{first}, ...] but has shape {list(g.shape)}")
        if g.dtype not in FLOATS:
            raise ValueError(f"[{op}] {name} must be float32, float16 or bfloat16 but has dtype {g.dtype}")
    return [g for _, g in named]


def _bound(op: str, max_grad_norm: float | mx.array, mode: str) -> mx.array:
    if mode not in MODES:
        raise ValueError(f"[{op}] mode must be one of {', '.join(MODES)} but is {mode!r}")
    if isinstance(max_grad_norm, mx.array):
        if max_grad_norm.ndim:
            raise ValueError(f"[{op}] max_grad_norm must be a scalar but has shape {list(max_grad_norm.shape)}")
        return max_grad_norm.astype(mx.float32)
    if not max_grad_norm > 0 or (math.isinf(max_grad_norm) and mode != "flat"):
        raise ValueError(
            f"[{op}] max_grad_norm must be positive{' and finite' if mode != 'flat' else ''} but is {max_grad_norm}"
        )
    return mx.array(max_grad_norm, mx.float32)


def _check_mask(op: str, mask: mx.array | None, batch: int) -> None:
    if mask is not None and (mask.shape != (batch,) or mask.dtype != mx.bool_):
        raise ValueError(
            f"[{op}] mask must have shape [{batch}] and dtype bool "
            f"but has shape {list(mask.shape)} and dtype {mask.dtype}"
        )


def _rows(g: mx.array) -> mx.array:
    return mx.expand_dims(g, 1) if g.ndim == 1 else mx.flatten(g, 1)


def _row_sums(x: mx.array) -> mx.array:
    while x.shape[1] > COLUMNS:
        x = _pad(x, 1, COLUMNS)
        x = mx.unflatten(x, 1, (x.shape[1] // COLUMNS, COLUMNS)).sum(2)
    return x.sum(1)


def _sum_of_rows(x: mx.array) -> mx.array:
    while x.shape[0] > ROWS and x.size:
        x = mx.reshape(_pad(x, 0, ROWS), (-1, ROWS, *x.shape[1:])).sum(1)
    return x.sum(0)


def _pad(x: mx.array, axis: int, multiple: int) -> mx.array:
    """Zeros at the end of an axis, from ops that also hold for another batch size under a shapeless compile."""
    if not (missing := -x.shape[axis] % multiple):
        return x
    shape = [1] * x.ndim
    shape[axis] = missing
    zero = (mx.max(x, axis=axis, keepdims=True) < -math.inf).astype(x.dtype)
    return mx.concatenate([x, zero * mx.zeros(shape, x.dtype)], axis=axis)


def _sum_over_leaves(sums: list[mx.array]) -> mx.array:
    return sums[0] if len(sums) == 1 else mx.stack(sums, 1).sum(1)
