"""Secure noise: ChaCha20 in counter mode, and normals by Box-Muller."""

import hashlib
import math
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from .. import _native
from .._native import Stream

Domain = Literal["noise", "poisson", "smoothing", "discrete", "test"]
Counter = int | mx.array

NORMALS_PER_TILE = 320
BLOCKS_PER_TILE = 32
WORDS_PER_BLOCK = 16
FLOATS = (mx.float32, mx.float16, mx.bfloat16)  # in the order of the native enum
_DOMAINS: dict[str, int] = {"noise": 1, "poisson": 2, "smoothing": 3, "discrete": 4, "test": 5}
_END = 1 << 64
_FLOAT32_MAX = 3.4028234663852886e38
_FLOAT32_TINY = 2.0**-149


def random_key() -> mx.array:
    """Draw a secret key from the operating system.

    Who has the key can subtract the noise: never log it, nor save it beside a model or in a checkpoint. A run that is
    resumed draws a fresh one.

    Returns:
        array: uint32 ``[8]``, 256 bits.

    Example:
        >>> import mlx_bulwark as bw
        >>> bw.random_key().shape
        (8,)
    """
    return mx.array(struct.unpack("<8I", os.urandom(32)), mx.uint32)


def key_from_seed(seed: int) -> mx.array:
    """Make a key that anybody can make again: for tests only, never for privacy.

    Args:
        seed: Any integer.

    Returns:
        array: uint32 ``[8]``, the SHA-256 of the seed.

    Raises:
        TypeError: ``seed`` is not an integer.

    Example:
        >>> import mlx_bulwark as bw
        >>> bw.key_from_seed(0).tolist() == bw.key_from_seed(1).tolist()
        False
    """
    if not _is_int(seed):
        raise TypeError(f"[key_from_seed] seed must be an integer but has type {type(seed).__name__}")
    return mx.array(struct.unpack("<8I", hashlib.sha256(f"mlx-bulwark test key {seed}".encode()).digest()), mx.uint32)


def blocks_used(shape_or_tree: Any) -> int:
    """Tell how many counter values ``gaussian`` or ``add_gaussian`` uses.

    The normals come in tiles of 320 from 32 blocks, and every array starts a tile: ``32 * ceil(n / 320)`` an array.

    Args:
        shape_or_tree: A shape (an integer or a sequence of integers), an array, or a tree of arrays.

    Returns:
        int: Number of 64-byte ChaCha20 blocks, by which the counter must advance before the next draw.

    Raises:
        ValueError: A dimension is negative.
        TypeError: It is neither a shape nor a tree of arrays.

    Example:
        >>> import mlx_bulwark as bw
        >>> bw.blocks_used((10, 64)), bw.blocks_used(641)
        (64, 96)
    """
    if _is_shape(shape_or_tree):
        return _blocks(math.prod(_shape("blocks_used", shape_or_tree)))
    return sum(_blocks(x.size) for x in _leaves("blocks_used", shape_or_tree))


def bit_blocks_used(shape: int | Sequence[int]) -> int:
    """Tell how many counter values ``random_bits`` uses: one for 16 words.

    Args:
        shape: An integer or a sequence of integers.

    Returns:
        int: Number of 64-byte ChaCha20 blocks, by which the counter must advance before the next draw.

    Raises:
        ValueError: A dimension is negative.

    Example:
        >>> import mlx_bulwark as bw
        >>> bw.bit_blocks_used((3, 11))
        3
    """
    return -(-math.prod(_shape("bit_blocks_used", shape)) // WORDS_PER_BLOCK)


def advance_counter(counter: Counter, blocks: int) -> Any:
    """Move a counter past the blocks that a draw used.

    Args:
        counter: An integer in [0, 2^64), or a uint32 array ``[2]``, low word first.
        blocks: How many blocks, in [0, 2^64): see ``blocks_used`` and ``bit_blocks_used``.

    Returns:
        int or array: The same type as ``counter``. An array may be traced, so a compiled step can carry its counter;
        it wraps at 2^64.

    Raises:
        ValueError: An argument is outside its range, or an integer counter would pass 2^64.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> bw.advance_counter(7, bw.blocks_used(1000))
        135
        >>> bw.advance_counter(mx.array([2**32 - 1, 0], mx.uint32), 2).tolist()
        [1, 1]
    """
    if not _is_int(blocks) or not 0 <= blocks < _END:
        raise ValueError(f"[advance_counter] blocks must be an integer in [0, 2^64) but is {blocks!r}")
    if not isinstance(counter, mx.array):
        _counter("advance_counter", counter, blocks + 1)
        return int(counter) + int(blocks)
    words = _counter("advance_counter", counter, 0)
    low = words[0] + mx.array(blocks & 0xFFFFFFFF, mx.uint32)
    high = words[1] + mx.array(blocks >> 32, mx.uint32) + (low < words[0]).astype(mx.uint32)
    return mx.stack([low, high])


def gaussian(
    shape: int | Sequence[int],
    sigma: float | mx.array,
    key: mx.array,
    counter: Counter,
    *,
    dtype: mx.Dtype = mx.float32,
    domain: Domain = "noise",
    stream: Stream = None,
) -> mx.array:
    """Draw secure Gaussian noise: ``sigma * z`` with z standard normal.

    The draw is a function of key, counter and domain alone: under one key and domain no counter may serve twice, so
    advance it by ``blocks_used(shape)``. Two pieces drawn one after the other equal the whole where the first holds a
    multiple of 320 values. The radius has 64 random bits (abs(z) reaches 9.49), and no float32 draw of sigma = 1 is 0.

    Args:
        shape: Shape of the result.
        sigma: Standard deviation, a number >= 0 or a float32 scalar array. 0 gives exact zeros. An array that holds a
            negative number, an infinity or NaN gives NaN everywhere.
        key: uint32 ``[8]``, from ``random_key``.
        counter: First block: an integer in [0, 2^64) or a uint32 array ``[2]``, low word first.
        dtype: float32, float16 or bfloat16; computed in float32 and rounded once.
        domain: What the noise is for; the domains of one key never overlap.
        stream: Stream or device.

    Returns:
        array: ``shape``, of ``dtype``. Differentiable in ``sigma``.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype, an integer counter would pass 2^64, or ``vmap``
            maps something but the counter.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> z = bw.gaussian((1000,), 2.0, bw.random_key(), 0)
        >>> bool(mx.abs(z).max() < 2 * 9.5)
        True

    Source:
        RFC 8439 (ChaCha20); G. E. P. Box and M. E. Muller, "A Note on the Generation of Random Normal Deviates", 1958.
    """
    dims = _shape("gaussian", shape)
    if dtype not in FLOATS:
        raise ValueError(f"[gaussian] dtype must be float32, float16 or bfloat16 but is {dtype}")
    inputs = _noise("gaussian", sigma, key, counter, _blocks(math.prod(dims)))
    words = _domain("gaussian", domain)
    if _native.runs_native(stream):
        return _native.ext.gaussian(dims, *inputs, dtype, words, stream)
    with _on(stream):
        return _gaussian(dims, *inputs, dtype, words)


def gaussian_reference(
    shape: int | Sequence[int],
    sigma: float | mx.array,
    key: mx.array,
    counter: Counter,
    *,
    dtype: mx.Dtype = mx.float32,
    domain: Domain = "noise",
    stream: Stream = None,
) -> mx.array:
    """Compute ``gaussian`` by plain MLX ops."""
    with _on(stream):
        inputs = _noise("gaussian", sigma, key, counter, 0)
        return _gaussian(_shape("gaussian", shape), *inputs, dtype, _domain("gaussian", domain))


def add_gaussian(
    x: Any,
    sigma: float | mx.array,
    key: mx.array,
    counter: Counter,
    *,
    domain: Domain = "noise",
    stream: Stream = None,
) -> Any:
    """Add secure Gaussian noise to an array or to a tree of arrays: ``x + sigma * z``.

    The leaves take their counters one after the other, in the order of ``mlx.utils.tree_flatten``: leaf i starts at
    ``counter + blocks_used(leaves before i)``. The noise is that of ``gaussian``, and so is the rule that a counter
    serves once: advance it by ``blocks_used(x)``. Buffers that nobody else holds are updated in place.

    Args:
        x: An array, or dicts, lists and tuples of arrays, float32, float16 or bfloat16; float16 and bfloat16 are
            added in float32 and rounded once.
        sigma: Standard deviation, a number >= 0 or a float32 scalar array. 0 gives exactly ``x``. An array that holds
            a negative number, an infinity or NaN gives NaN everywhere, never un-noised values.
        key: uint32 ``[8]``, from ``random_key``.
        counter: First block: an integer in [0, 2^64) or a uint32 array ``[2]``, low word first.
        domain: What the noise is for; the domains of one key never overlap.
        stream: Stream or device.

    Returns:
        array or tree: Like ``x``, dtypes too. Differentiable in ``x`` and ``sigma``.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype, an integer counter would pass 2^64, or ``vmap``
            maps something but the counter.
        TypeError: A leaf of ``x`` is not an array.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> gradients = {"weight": mx.zeros((3, 4)), "bias": mx.zeros(3)}
        >>> noisy = bw.add_gaussian(gradients, 0.5, bw.random_key(), 0)
        >>> noisy["weight"].shape, bool((noisy["bias"] == 0).any())
        ((3, 4), False)

    Source:
        M. Abadi et al., "Deep Learning with Differential Privacy", 2016; RFC 8439.
    """
    leaves, inputs, words = _add_gaussian_inputs(x, sigma, key, counter, domain)
    if _native.runs_native(stream):
        outputs = _native.ext.add_gaussian(leaves, *inputs, words, stream) if leaves else []
    else:
        with _on(stream):
            outputs = _add_gaussian(leaves, *inputs, words)
    return _like(x, outputs)


def add_gaussian_reference(
    x: Any,
    sigma: float | mx.array,
    key: mx.array,
    counter: Counter,
    *,
    domain: Domain = "noise",
    stream: Stream = None,
) -> Any:
    """Compute ``add_gaussian`` by plain MLX ops."""
    with _on(stream):
        leaves, inputs, words = _add_gaussian_inputs(x, sigma, key, counter, domain)
        return _like(x, _add_gaussian(leaves, *inputs, words))


def random_bits(
    shape: int | Sequence[int], key: mx.array, counter: Counter, *, domain: Domain, stream: Stream = None
) -> mx.array:
    """Draw secure random words: the ChaCha20 keystream, 16 words a block.

    The draw is a function of key, counter and domain alone: advance the counter by ``bit_blocks_used(shape)``. Two
    pieces drawn one after the other equal the whole where the first holds a multiple of 16 words.

    Args:
        shape: Shape of the result.
        key: uint32 ``[8]``, from ``random_key``.
        counter: First block: an integer in [0, 2^64) or a uint32 array ``[2]``, low word first.
        domain: What the words are for; the domains of one key never overlap.
        stream: Stream or device.

    Returns:
        array: ``shape``, uint32.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype, an integer counter would pass 2^64, or ``vmap``
            maps something but the counter.

    Example:
        >>> import mlx_bulwark as bw
        >>> words = bw.random_bits((4, 16), bw.random_key(), 0, domain="poisson")
        >>> words.dtype
        mlx.core.uint32

    Source:
        RFC 8439, with a 64-bit counter in words 12-13 and the domain in words 14-15.
    """
    dims = _shape("random_bits", shape)
    inputs = _key("random_bits", key), _counter("random_bits", counter, bit_blocks_used(dims))
    words = _domain("random_bits", domain)
    if _native.runs_native(stream):
        return _native.ext.random_bits(dims, *inputs, words, stream)
    with _on(stream):
        return _random_bits(dims, *inputs, words)


def random_bits_reference(
    shape: int | Sequence[int], key: mx.array, counter: Counter, *, domain: Domain, stream: Stream = None
) -> mx.array:
    """Compute ``random_bits`` by plain MLX ops."""
    with _on(stream):
        inputs = _key("random_bits", key), _counter("random_bits", counter, 0)
        return _random_bits(_shape("random_bits", shape), *inputs, _domain("random_bits", domain))


# Checks: what they return is what the primitives take.


def _is_int(x: Any) -> bool:
    return hasattr(x, "__index__") and not isinstance(x, bool | mx.array)


def _is_shape(x: Any) -> bool:
    return _is_int(x) or (isinstance(x, list | tuple) and all(map(_is_int, x)))


def _shape(op: str, shape: Any) -> list[int]:
    if not _is_shape(shape) or any(d < 0 for d in ([shape] if _is_int(shape) else shape)):
        raise ValueError(f"[{op}] shape must be an integer or a sequence of integers >= 0 but is {shape!r}")
    return [int(shape)] if _is_int(shape) else [int(d) for d in shape]


def _blocks(n: int) -> int:
    return BLOCKS_PER_TILE * -(-n // NORMALS_PER_TILE)


def _leaves(op: str, tree: Any) -> list[mx.array]:
    leaves: list[Any] = [x for _, x in cast(list[tuple[str, Any]], tree_flatten(tree))]
    for x in leaves:
        if not isinstance(x, mx.array):
            raise TypeError(f"[{op}] x must be an array or a tree of arrays but has a leaf of type {type(x).__name__}")
    return leaves


def _like(tree: Any, leaves: list[mx.array]) -> Any:
    rest = iter(leaves)
    return tree_map(lambda _: next(rest), tree)


def _key(op: str, key: Any) -> mx.array:
    if not isinstance(key, mx.array) or key.dtype != mx.uint32 or key.shape != (8,):
        has = f"{key.dtype} of shape {key.shape}" if isinstance(key, mx.array) else f"type {type(key).__name__}"
        raise ValueError(f"[{op}] key must be a uint32 array of shape (8,) but has {has}")
    return key


def _counter(op: str, counter: Any, blocks: int) -> mx.array:
    if isinstance(counter, mx.array):
        if counter.dtype != mx.uint32 or counter.shape != (2,):
            raise ValueError(
                f"[{op}] counter must be a uint32 array of shape (2,) but has {counter.dtype} of shape {counter.shape}"
            )
        return counter
    if not _is_int(counter):
        raise ValueError(f"[{op}] counter must be an integer or a uint32 array but has type {type(counter).__name__}")
    if not 0 <= counter < _END or counter + blocks > _END:
        raise ValueError(f"[{op}] counter must stay in [0, 2^64) but is {counter} and advances by {blocks}")
    return mx.array([counter & 0xFFFFFFFF, counter >> 32], mx.uint32)


def _sigma(op: str, sigma: Any) -> mx.array:
    if isinstance(sigma, mx.array):
        if sigma.dtype != mx.float32 or sigma.ndim != 0:
            raise ValueError(f"[{op}] sigma must be a float32 scalar but has {sigma.dtype} of shape {sigma.shape}")
        return sigma
    try:
        value = float(sigma)
    except (TypeError, ValueError):
        raise ValueError(f"[{op}] sigma must be a number or an array but has type {type(sigma).__name__}") from None
    if value != 0 and not _FLOAT32_TINY <= value <= _FLOAT32_MAX:
        raise ValueError(f"[{op}] sigma must be >= 0 and finite in float32, nor vanish there, but is {value}")
    return mx.array(value, mx.float32)


def _noise(op: str, sigma: Any, key: Any, counter: Any, blocks: int) -> tuple[mx.array, mx.array, mx.array]:
    return _sigma(op, sigma), _key(op, key), _counter(op, counter, blocks)


def _domain(op: str, domain: str) -> tuple[int, int]:
    if domain not in _DOMAINS:
        raise ValueError(f"[{op}] domain must be one of {', '.join(_DOMAINS)} but is {domain!r}")
    return _DOMAINS[domain], 0


def _add_gaussian_inputs(
    x: Any, sigma: Any, key: Any, counter: Any, domain: str
) -> tuple[list[mx.array], tuple[mx.array, mx.array, mx.array], tuple[int, int]]:
    leaves = _leaves("add_gaussian", x)
    for leaf in leaves:
        if leaf.dtype not in FLOATS:
            raise ValueError(f"[add_gaussian] x must be float32, float16 or bfloat16 but has dtype {leaf.dtype}")
    inputs = _noise("add_gaussian", sigma, key, counter, sum(_blocks(leaf.size) for leaf in leaves))
    return leaves, inputs, _domain("add_gaussian", domain)


def _on(stream: Stream) -> Any:
    return mx.stream(mx.default_stream(mx.default_device()) if stream is None else stream)


# The reference. Leading axes of key and counter are batches; blocks and words come last.


@_native.reference("gaussian")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    sigma, key, counter, parameters = arrays
    word14, word15, dtype, *shape = _integers(parameters)
    with _on(stream):
        return [_gaussian(shape, sigma, key, counter, FLOATS[dtype], (word14, word15))]


@_native.reference("add_gaussian")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    *leaves, sigma, key, counter, parameters = arrays
    word14, word15, first_tile = _integers(parameters)
    with _on(stream):
        counter = advance_counter(counter, first_tile * BLOCKS_PER_TILE)
        return _add_gaussian(leaves, sigma, key, counter, (word14, word15))


@_native.reference("random_bits")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    key, counter, parameters = arrays
    word14, word15, *shape = _integers(parameters)
    with _on(stream):
        return [_random_bits(shape, key, counter, (word14, word15))]


def _integers(parameters: mx.array) -> list[int]:
    return cast(list[int], parameters.tolist())


def _gaussian(
    shape: Sequence[int],
    sigma: mx.array,
    key: mx.array,
    counter: mx.array,
    dtype: mx.Dtype,
    domain: Sequence[int],
) -> mx.array:
    (z,) = _standard_normals("gaussian", [shape], [sigma], key, counter, domain)
    return (_valid(sigma) * z).astype(dtype)


def _add_gaussian(
    leaves: list[mx.array], sigma: mx.array, key: mx.array, counter: mx.array, domain: Sequence[int]
) -> list[mx.array]:
    if not leaves:
        return []
    z = _standard_normals("add_gaussian", [x.shape for x in leaves], [*leaves, sigma], key, counter, domain)
    sigma = _valid(sigma)
    return [(x.astype(mx.float32) + sigma * n).astype(x.dtype) for x, n in zip(leaves, z, strict=True)]


def _random_bits(shape: Sequence[int], key: mx.array, counter: mx.array, domain: Sequence[int]) -> mx.array:
    n = math.prod(shape)

    def draw(key: mx.array, counter: mx.array) -> list[mx.array]:
        words = _keystream(key, counter, domain, -(-n // WORDS_PER_BLOCK)).swapaxes(-1, -2)
        batch = words.shape[:-2]
        return [words.reshape(*batch, -1)[..., :n].reshape((*batch, *shape))]

    return _drawn("random_bits", draw, [], key, counter)[0]


def _valid(sigma: mx.array) -> mx.array:
    return mx.where((sigma >= 0) & (sigma <= _FLOAT32_MAX), sigma, mx.array(math.nan))


def _drawn(
    op: str,
    draw: Callable[[mx.array, mx.array], list[mx.array]],
    others: list[mx.array],
    key: mx.array,
    counter: mx.array,
) -> list[mx.array]:
    """Call ``draw(key, counter)``; refuse a vmap that maps ``others`` or the key but not the counter."""

    @mx.custom_function
    def drawn(key: mx.array, counter: mx.array, *others: mx.array) -> list[mx.array]:
        return draw(key, counter)

    @drawn.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return tuple(mx.zeros_like(p) for p in primals)

    @drawn.vmap
    def _(inputs: Any, axes: Any) -> Any:
        key, counter, *others = inputs
        if axes[1] is None or axes[1] < 0:
            raise ValueError(f"[{op}] counter must be batched under vmap, or every copy gets the same noise")
        counter = mx.moveaxis(counter, axes[1], 0)
        if axes[0] is not None and axes[0] >= 0:
            key = mx.moveaxis(key, axes[0], 0)
            key = key.reshape(key.shape[0], *[1] * (counter.ndim - key.ndim), *key.shape[1:])
        outputs = cast(list[mx.array], drawn(key, counter, *others))
        return outputs, [0] * len(outputs)

    return cast(list[mx.array], drawn(key, counter, *others))


def _standard_normals(
    op: str,
    shapes: Sequence[Sequence[int]],
    others: list[mx.array],
    key: mx.array,
    counter: mx.array,
    domain: Sequence[int],
) -> list[mx.array]:
    tiles = [-(-math.prod(s) // NORMALS_PER_TILE) for s in shapes]

    def draw(key: mx.array, counter: mx.array) -> list[mx.array]:
        words = _keystream(key, counter, domain, BLOCKS_PER_TILE * sum(tiles))
        batch = words.shape[:-2]
        words = words.reshape(*batch, WORDS_PER_BLOCK, -1, BLOCKS_PER_TILE)
        pairs = _box_muller(*(words[..., k:15:3, :, :] for k in range(3)))
        z = mx.stack(pairs, axis=-3).reshape(*batch, 10, -1, BLOCKS_PER_TILE).swapaxes(-2, -3).reshape(*batch, -1)
        pieces, first = [], 0
        for shape, count in zip(shapes, tiles, strict=True):
            start = first * NORMALS_PER_TILE
            pieces.append(z[..., start : start + math.prod(shape)].reshape((*batch, *shape)))
            first += count
        return pieces

    return _drawn(op, draw, others, key, counter)


def _keystream(key: mx.array, counter: mx.array, domain: Sequence[int], blocks: int) -> mx.array:
    """Words of consecutive blocks, ``[..., 16, blocks]``."""
    low = counter[..., :1] + mx.arange(blocks, dtype=mx.uint32)
    high = counter[..., 1:] + (low < counter[..., :1]).astype(mx.uint32)
    zero = (low ^ low) + (key[..., :1] & 0)  # ties all rows to both inputs: MLX cannot vmap a concatenation of some
    rows = [
        mx.array([[0x61707865], [0x3320646E], [0x79622D32], [0x6B206574]], mx.uint32),
        key[..., :4, None],
        key[..., 4:, None],
        mx.stack([low + zero, high + zero, *(zero + mx.array(w, mx.uint32) for w in domain)], axis=-2),
    ]
    state = [r + zero[..., None, :] for r in rows]
    x = state
    for _ in range(10):
        x = _quarter_rounds(*x)
        x = [_rotate_rows(r, k) for k, r in enumerate(x)]
        x = _quarter_rounds(*x)
        x = [_rotate_rows(r, -k) for k, r in enumerate(x)]
    return mx.concatenate([r + s for r, s in zip(x, state, strict=True)], axis=-2)


def _quarter_rounds(a: mx.array, b: mx.array, c: mx.array, d: mx.array) -> list[mx.array]:
    a = a + b
    d = _rotate(d ^ a, 16)
    c = c + d
    b = _rotate(b ^ c, 12)
    a = a + b
    d = _rotate(d ^ a, 8)
    c = c + d
    b = _rotate(b ^ c, 7)
    return [a, b, c, d]


def _rotate(x: mx.array, n: int) -> mx.array:
    return (x << n) | (x >> (32 - n))


def _rotate_rows(x: mx.array, k: int) -> mx.array:
    return mx.concatenate([x[..., k:, :], x[..., :k, :]], axis=-2) if k else x


def _box_muller(high: mx.array, low: mx.array, angle: mx.array) -> list[mx.array]:
    upper = high >= 0x80000000
    flip = mx.where(upper, mx.array(0xFFFFFFFF, mx.uint32), mx.array(0, mx.uint32))
    v = (high ^ flip).astype(mx.float32) * 2.0**-32 + ((low ^ flip).astype(mx.float32) * 2.0**-64 + 2.0**-65)
    radius = mx.sqrt(-2 * mx.where(upper, mx.log1p(-v), mx.log(v)))
    # The lower 30 bits, signed, are the angle; bit 31 negates the cosine, bit 30 swaps the two.
    phi = ((angle << 2) | 2).astype(mx.int32).astype(mx.float32) * (math.pi * 2.0**-33)
    sine, cosine = mx.sin(phi), mx.cos(phi)
    cosine = mx.where(angle >= 0x80000000, -cosine, cosine)
    swap = ((angle >> 30) & 1) == 1
    return [radius * mx.where(swap, sine, cosine), radius * mx.where(swap, cosine, sine)]
