import math
import os
import subprocess
import sys
from functools import cache

import mlx.core as mx
import mlx_bulwark as bw
import msl
import msl.bridge
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_bulwark import _native
from mlx_bulwark.ops import noise

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
SIZES = [0, 1, 31, 33, 319, 320, 321, 10241, 1000003]
COUNTERS = [0, 1, 2**32 - 5, 2**32, 2**64 - 2**20]
# Errors in units in the last place of the float64 value. The angle, the logarithm, the root, sine or cosine and the
# product each round once or twice.
ULP = 5
KEY = bw.key_from_seed(0)
NAN, INF = float("nan"), float("inf")


# ---- Oracles: ChaCha20 in numpy, word by word from the RFC, and Box-Muller in float64.


def keystream(key, counter, domain, blocks):
    """Words [blocks, 16]; the counter is 64 bits wide."""
    n = [(counter + i) % 2**64 for i in range(blocks)]
    state = np.zeros((16, blocks), np.uint32)
    state[:4] = np.frombuffer(b"expand 32-byte k", "<u4")[:, None]
    state[4:12] = np.array(key)[:, None]
    state[12], state[13] = [v & 0xFFFFFFFF for v in n], [v >> 32 for v in n]
    state[14:] = np.array(domain, np.uint32)[:, None]
    x = state.copy()

    def mix(a, b, c, d):
        for p, q, r, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[p] += x[q]
            v = x[r] ^ x[p]
            x[r] = v << np.uint32(bits) | v >> np.uint32(32 - bits)

    for _ in range(10):
        for i in range(4):
            mix(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            mix(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return (x + state).T


def box_muller(words):
    """[n, 3] words -> [n, 2] float64 normals."""
    high, low, angle = np.asarray(words, np.uint64).T
    upper = high >= 2**31
    m = np.where(upper, ~(high << np.uint64(32) | low), high << np.uint64(32) | low)  # below 2^63
    v = (m.astype(np.longdouble) + 0.5) * np.longdouble(2) ** -64
    radius = np.sqrt(-2 * np.where(upper, np.log1p(-v), np.log(v))).astype(np.float64)
    low30 = (angle & np.uint64(2**30 - 1)).astype(np.int64)
    phi = 2 * np.pi * (np.where(low30 >= 2**29, low30 - 2**30, low30) + 0.5) / 2**32
    cosine = np.where(angle >= 2**31, -np.cos(phi), np.cos(phi))
    swap = (angle >> np.uint64(30)) & np.uint64(1) == 1
    first, second = np.where(swap, np.sin(phi), cosine), np.where(swap, cosine, np.sin(phi))
    return radius[:, None] * np.stack([first, second], 1)


def normals(key, counter, domain, n):
    """The stream of normals in float64."""
    tiles = -(-n // 320)
    words = keystream(key, counter, domain, 32 * tiles)[:, :15].reshape(tiles, 32, 5, 3)
    z = box_muller(words.reshape(-1, 3)).reshape(tiles, 32, 10)
    return z.transpose(0, 2, 1).reshape(-1)[:n]


def ulps(x, exact):
    """Errors of float32 values in units in the last place."""
    return abs(np.array(x).astype(np.float64) - exact) / np.spacing(abs(exact).astype(np.float32)).astype(np.float64)


def f64(x):
    with np.errstate(invalid="ignore"):  # a signaling NaN is as good as any other
        return np.array(x.astype(mx.float32)).astype(np.float64)


def split(counter):
    return mx.array([counter & 0xFFFFFFFF, counter >> 32], mx.uint32)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all().item())


# ---- The keystream

RFC_KEY = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
RFC_VECTORS = [  # section of RFC 8439, key, nonce, counter, keystream
    (
        "2.3.2",
        RFC_KEY,
        "000000090000004a00000000",
        1,
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        "2.4.2",
        RFC_KEY,
        "000000000000004a00000000",
        1,
        "224f51f3401bd9e12fde276fb8631ded8c131f823d2c06e27e4fcaec9ef3cf78"
        "8a3b0aa372600a92b57974cded2b9334794cba40c63e34cdea212c4cf07d41b7",
    ),
    (
        "A.1 #1",
        "00" * 32,
        "00" * 12,
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        "A.1 #2",
        "00" * 32,
        "00" * 12,
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        "A.1 #3",
        "00" * 31 + "01",
        "00" * 12,
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        "A.1 #4",
        "00ff" + "00" * 30,
        "00" * 12,
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    (
        "A.1 #5",
        "00" * 32,
        "00" * 11 + "02",
        0,
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
]


def rfc_keystream(key, nonce, counter):
    """The RFC's 32-bit counter and 96-bit nonce are our counter and both domain words."""
    nonce = np.frombuffer(bytes.fromhex(nonce), "<u4").tolist()
    key = mx.array(np.frombuffer(bytes.fromhex(key), "<u4"))
    block, domain = mx.array([counter, nonce[0]], mx.uint32), (nonce[1], nonce[2])
    if bw.backend().name != "reference":
        words = _native.ext.random_bits([16], key, block, domain)
    else:
        words = noise._random_bits([16], key, block, domain)
    return np.array(words).astype("<u4").tobytes().hex()


@pytest.mark.parametrize("vector", RFC_VECTORS, ids=[v[0] for v in RFC_VECTORS])
def test_rfc_vectors(backend, vector):
    _, key, nonce, counter, expected = vector
    assert rfc_keystream(key, nonce, counter) == expected


@pytest.mark.parametrize("counter", COUNTERS)
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 511, 513, 40001])
def test_random_bits(backend, n, counter):
    words = bw.random_bits((n,), KEY, counter, domain="poisson")
    assert words.dtype == mx.uint32
    expected = keystream(KEY, counter, (2, 0), bw.bit_blocks_used(n)).reshape(-1)[:n]
    assert (np.array(words) == expected).all()


def test_domains_have_fixed_numbers():
    """They are part of the stream: a change would repeat or lose noise of runs that keep their key."""
    assert noise._DOMAINS == {"noise": 1, "poisson": 2, "smoothing": 3, "discrete": 4, "test": 5}


# ---- The normals


def chosen_words():
    high = [0, 1, 2, 255, 0x00FFFFFF, 0x01000001, 0x257D86FB, 0x5A827999, 0x5A82799A, 0x7FFFFFFF]
    high += [0xFFFFFFFF - h for h in high] + [0xB504F332, 0xB504F333, 0xB504F334]
    low = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFF7F, 0xFFFFFFFF]
    axes = [0, 1, 2, 100, 2**24 + 1, 2**29 - 1, 2**29, 2**29 + 1, 2**30 - 2, 2**30 - 1]
    angle = [quarter << 30 | a for quarter in range(4) for a in axes]
    chosen = [(h, lo, a) for h in high for lo in low for a in angle]
    random = np.random.default_rng(0).integers(0, 2**32, (100_000, 3))
    return np.concatenate([np.array(chosen), random]).astype(np.uint32)


METAL_TRANSFORM = """
[[kernel]] void transform(
    device const packed_uint3* words [[buffer(0)]], device float2* z [[buffer(1)]],
    uint i [[thread_position_in_grid]]) {
  uint3 w = uint3(words[i]);
  z[i] = box_muller(w.x, w.y, w.z);
}
"""


@cache
def metal_transform():
    """The transform inside the text that the extension ships, as a kernel of its own."""
    (text,) = (text for name, text, _ in _native.ext.sources() if name == "noise")
    path = msl.bridge.write_source("transform", text + METAL_TRANSFORM)
    msl.check(path)
    return msl.Library(path)


def transform(words):
    match bw.backend().name:
        case "metal-sim":
            arguments = {"words": words, "z": msl.Output((len(words), 2))}
            launch = {"grid": (len(words), 1, 1), "group": (256, 1, 1), "lines": 0}
            result = metal_transform().launch("transform", arguments, **launch)
            assert not result.reports
            return result.arrays["z"]
        case "native":
            return np.array(_native.ext.normals_from_words(mx.array(words)))
        case "reference":
            return np.stack([np.array(z) for z in noise._box_muller(*(mx.array(words[:, k]) for k in range(3)))], 1)


def assert_transform(words, z):
    exact = box_muller(words)
    error = ulps(z, exact)
    assert error.max() <= ULP, words[np.unravel_index(error.argmax(), error.shape)[0]]
    assert (z != 0).all()
    return exact


def test_transform_at_both_ends(backend):
    words = chosen_words()
    z = transform(words)
    exact = assert_transform(words, z)
    assert abs(exact).max() > 9.49  # the chosen words reach both ends
    assert abs(z).max() > 9.49
    assert np.hypot(*exact.T).min() < 2.4e-10
    assert abs(z).min() < 1e-18


@pytest.mark.parametrize("counter", COUNTERS)
@pytest.mark.parametrize("n", SIZES[:-1])
def test_gaussian_against_float64(backend, n, counter):
    z = bw.gaussian((n,), 1.0, KEY, counter)
    assert z.dtype == mx.float32
    assert z.shape == (n,)
    if n:
        assert ulps(z, normals(KEY, counter, (1, 0), n)).max() <= ULP


def test_gaussian_is_sigma_times_the_standard_normals(backend):
    z = np.array(bw.gaussian((5, 7, 11), 1.0, KEY, 9))
    assert z.shape == (5, 7, 11)
    for sigma in (1e-30, 0.3, 2.0, 1e30):
        assert (np.array(bw.gaussian((5, 7, 11), sigma, KEY, 9)) == np.float32(sigma) * z).all()
        assert same(bw.gaussian(385, mx.array(sigma), KEY, split(9)), bw.gaussian(385, sigma, KEY, 9))
    assert bw.gaussian((), 1.0, KEY, 9).item() == z.flat[0]


@pytest.mark.parametrize("n", SIZES)
def test_backends_agree(n):
    for counter in (3, 2**32 - 7):
        x = mx.array(np.random.default_rng(1).standard_normal(n).astype(np.float32))
        native, reference = bw.add_gaussian(x, 0.7, KEY, counter), noise.add_gaussian_reference(x, 0.7, KEY, counter)
        scale = np.maximum(abs(np.array(x)), abs(np.array(native - x)))  # the sum may cancel
        assert (abs(np.array(native - reference)) <= 2 * ULP * np.spacing(scale)).all()  # ULP each
    a, b = (f((n,), KEY, 2**32 - 7, domain="test") for f in (bw.random_bits, noise.random_bits_reference))
    assert same(a, b)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_float32_rounded_once(backend, dtype):
    for sigma in (1e-7, 1e-4, 1.0, 1e3, 3e4, 1e38):
        z = bw.gaussian((3333,), sigma, KEY, 0, dtype=dtype)
        assert z.dtype == dtype
        single = bw.gaussian((3333,), sigma, KEY, 0)
        if dtype == mx.float16:
            with np.errstate(over="ignore"):
                expected = np.array(single).astype(np.float16).astype(np.float32)
        else:  # to nearest, ties to even, on the bits
            bits = np.array(single).view(np.uint32)
            expected = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)
        assert (np.array(z.astype(mx.float32)) == expected).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_every_half_survives_noise_that_rounds_away(backend, dtype):
    patterns = np.arange(65536, dtype=np.uint16)
    x = mx.array(patterns).view(dtype)
    y = bw.add_gaussian(x, 1.5e-45, KEY, 0)
    before, after = f64(x), f64(y)
    if backend in ("metal", "metal-sim"):
        before[abs(before) < 2.0**-126] = 0  # a GPU takes subnormal float32 for 0
    finite = np.isfinite(before)
    assert (after[finite] == before[finite]).all()
    assert (np.isnan(after) == np.isnan(before)).all()
    assert (after[np.isinf(before)] == before[np.isinf(before)]).all()


# ---- sigma


def test_sigma_zero_is_exact(backend):
    x = mx.array([0.0, -1.5, 3e38, 1e-45, INF, -INF])
    for sigma in (0, 0.0, mx.array(0.0)):
        y = bw.add_gaussian({"a": x, "b": mx.array([NAN])}, sigma, KEY, 0)
        assert same(y["a"], x)
        assert math.isnan(y["b"].item())
        assert same(bw.gaussian((333,), sigma, KEY, 0), mx.zeros(333))
        for dtype in (mx.float16, mx.bfloat16):
            assert same(bw.add_gaussian(x.astype(dtype), sigma, KEY, 0), x.astype(dtype))
            assert same(bw.gaussian((333,), sigma, KEY, 0, dtype=dtype), mx.zeros(333, dtype))


@pytest.mark.parametrize("sigma", [NAN, -1.0, -1e-45, INF, -INF])
def test_wrong_sigma_in_an_array_leaves_nothing_un_noised(backend, sigma):
    for dtype in DTYPES:
        tree = [mx.ones((7, 50), dtype), mx.zeros(3, dtype), mx.ones((9, 9), dtype).T]
        for y in bw.add_gaussian(tree, mx.array(sigma), KEY, 0):
            assert mx.isnan(y).all().item()
        assert mx.isnan(bw.gaussian((40,), mx.array(sigma), KEY, 0, dtype=dtype)).all().item()


# ---- Counters


def test_blocks_used():
    assert [bw.blocks_used(n) for n in (0, 1, 320, 321, 640)] == [0, 32, 32, 64, 64]
    assert bw.blocks_used((3, 107)) == bw.blocks_used(mx.zeros((3, 107))) == 64
    assert bw.blocks_used(()) == 32
    assert bw.blocks_used({"a": mx.zeros(1), "b": [mx.zeros((2, 320)), (mx.zeros(0), mx.zeros(321))]}) == 32 + 64 + 64
    assert [bw.bit_blocks_used(n) for n in (0, 1, 16, (17,), (4, 16))] == [0, 1, 1, 2, 4]


@pytest.mark.parametrize("counter", COUNTERS)
def test_pieces_equal_the_whole(backend, counter):
    whole = bw.gaussian((3 * 320 + 77,), 1.5, KEY, counter)
    first = bw.gaussian((2 * 320,), 1.5, KEY, counter)
    second = bw.gaussian((320 + 77,), 1.5, KEY, bw.advance_counter(counter, bw.blocks_used(2 * 320)))
    assert same(mx.concatenate([first, second]), whole)
    bits = bw.random_bits((100,), KEY, counter, domain="test")
    rest = bw.random_bits((52,), KEY, bw.advance_counter(counter, bw.bit_blocks_used(48)), domain="test")
    assert same(bits[48:], rest)


@given(st.integers(0, 2**64 - 200), st.integers(0, 3), st.integers(0, 700), st.integers(0, 5))
def test_pieces_equal_the_whole_anywhere(backend, counter, tiles, n, seed):
    key = bw.key_from_seed(seed)
    whole = bw.gaussian((320 * tiles + n,), 1.0, key, counter)
    second = bw.gaussian((n,), 1.0, key, split(bw.advance_counter(counter, bw.blocks_used(320 * tiles))))
    assert same(whole[320 * tiles :], second)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_advance_counter(counter, blocks):
    low, high = bw.advance_counter(split(counter), blocks).tolist()
    assert high << 32 | low == (counter + blocks) % 2**64
    if counter + blocks < 2**64:
        assert bw.advance_counter(counter, blocks) == counter + blocks
    else:
        with pytest.raises(ValueError, match=r"\[advance_counter\] counter must stay in \[0, 2\^64\)"):
            bw.advance_counter(counter, blocks)


def test_last_counter(backend):
    last = 2**64 - 32
    assert ulps(bw.gaussian((320,), 1.0, KEY, last), normals(KEY, last, (1, 0), 320)).max() <= ULP
    for draw in (
        lambda: bw.gaussian((321,), 1.0, KEY, last),
        lambda: bw.gaussian((1,), 1.0, KEY, last + 1),
        lambda: bw.add_gaussian([mx.zeros(1), mx.zeros(1)], 1.0, KEY, last),
        lambda: bw.random_bits((33,), KEY, 2**64 - 2, domain="test"),
    ):
        with pytest.raises(ValueError, match=r"counter must stay in \[0, 2\^64\)"):
            draw()


# ---- Trees


def test_tree(backend):
    rng = np.random.default_rng(2)
    leaves = [mx.array(rng.standard_normal(s).astype(np.float32)) for s in [(3, 200), (), (0, 4), (321,), (2, 3, 5)]]
    leaves[3] = leaves[3].astype(mx.float16)
    leaves[4] = leaves[4].astype(mx.bfloat16)
    tree = {"layer": [leaves[0], {"b": leaves[1], "a": leaves[2]}], "head": (leaves[3], leaves[4]), "none": []}
    out = bw.add_gaussian(tree, 0.25, KEY, 2**32 - 40)
    assert list(out) == ["layer", "head", "none"]
    assert isinstance(out["head"], tuple)
    assert out["none"] == []
    counter = 2**32 - 40
    flat = [out["layer"][0], out["layer"][1]["b"], out["layer"][1]["a"], *out["head"]]
    for before, after in zip(leaves, flat, strict=True):
        assert same(after, bw.add_gaussian(before, 0.25, KEY, counter))
        z = f64(bw.gaussian(before.shape, 0.25, KEY, counter))
        tolerance = {mx.float32: 2e-7, mx.float16: 1e-3, mx.bfloat16: 8e-3}[before.dtype]
        np.testing.assert_allclose(f64(after), f64(before) + z, rtol=tolerance, atol=tolerance)
        counter = bw.advance_counter(counter, bw.blocks_used(before))
    assert counter == 2**32 - 40 + bw.blocks_used(tree)
    assert bw.add_gaussian([], 1.0, KEY, 0) == []


def test_many_small_leaves(backend):
    leaves = [mx.zeros(n % 7 * 90 + 1) for n in range(150)]
    out = bw.add_gaussian(leaves, 1.0, KEY, 5)
    assert len({y[0].item() for y in out}) == 150
    counter = 5
    for i, y in enumerate(out):
        if i % 10 == 0:
            assert same(y, bw.gaussian(y.shape, 1.0, KEY, counter))
        counter += bw.blocks_used(y)
    assert counter == 5 + bw.blocks_used(leaves)
    dsigma = mx.grad(lambda s: bw.add_gaussian(leaves, s, KEY, 5)[-1].sum())(mx.array(2.0))
    np.testing.assert_allclose(dsigma.item(), out[-1].sum().item(), rtol=1e-4)
    batch = mx.vmap(lambda c: bw.add_gaussian(leaves, 1.0, KEY, c)[-1])(mx.stack([split(5), split(6)]))
    np.testing.assert_allclose(np.array(batch[0]), np.array(out[-1]), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(backend, dtype):
    base = mx.array(np.random.default_rng(3).standard_normal((40, 30, 20)).astype(np.float32)).astype(dtype)
    views = [
        base.T,
        base.transpose(1, 0, 2),
        base[::3, 1::2, ::-1],
        base[5],
        base[:, 3, :],
        mx.broadcast_to(base[:, :1], (40, 30, 20)),
        mx.broadcast_to(base[0, 0, 0], (700,)),
        mx.as_strided(base, (50, 60), (3, 7), 11),
    ]
    mx.eval(views)
    for x, y in zip(views, bw.add_gaussian(views, 2.0, KEY, 8), strict=True):
        assert y.dtype == dtype
        assert y.shape == x.shape
    copies = [mx.contiguous(mx.array(np.array(v.astype(mx.float32)).copy())).astype(dtype) for v in views]
    for y, expected in zip(bw.add_gaussian(views, 2.0, KEY, 8), bw.add_gaussian(copies, 2.0, KEY, 8), strict=True):
        assert same(y, expected)
    words = mx.concatenate([KEY, KEY])
    strided_key = mx.stack([words, words], 1).reshape(-1)[:16:2]
    strided_counter = mx.array([8, 99, 0, 99], mx.uint32)[::2]
    assert same(bw.gaussian((999,), 1.0, strided_key, strided_counter), bw.gaussian((999,), 1.0, KEY, 8))


def test_inputs_that_are_held_stay(backend):
    x = mx.ones((1000,))
    view = x[100:600]
    y = bw.add_gaussian([x, x, view], 1.0, KEY, 0)
    mx.eval(y)
    assert same(x, mx.ones(1000))
    assert same(view, mx.ones(500))
    assert not same(y[0], y[1])


def test_buffers_that_nobody_holds_are_updated_in_place():
    n = 1 << 22
    x = [mx.full((n,), i + 0.5) for i in range(2)]
    mx.eval(x)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    y = bw.add_gaussian(x, 1.0, KEY, 0)
    del x
    mx.eval(y)
    assert mx.get_peak_memory() - before < n  # bytes: a second buffer would take 4 n
    for i in range(2):
        exact = normals(KEY, i * bw.blocks_used(n), (1, 0), 5000) + i + 0.5
        np.testing.assert_allclose(np.array(y[i][:5000]), exact, rtol=0, atol=1e-6)


# ---- Transformations


def test_gradients(backend):
    x = mx.array(np.random.default_rng(4).standard_normal((3, 150)).astype(np.float32))
    weight = mx.array(np.random.default_rng(5).standard_normal((3, 150)).astype(np.float32))
    z = bw.gaussian((3, 150), 1.0, KEY, 6)

    def loss(x, sigma, key, counter):
        return (weight * bw.add_gaussian(x, sigma, key, counter)).sum()

    for counter in (6, split(6)):
        for sigma in (0.5, 0.0):
            dx, dsigma = mx.grad(loss, argnums=(0, 1))(x, mx.array(sigma), KEY, counter)
            assert same(dx, weight)
            np.testing.assert_allclose(dsigma.item(), (f64(weight) * f64(z)).sum(), rtol=1e-4)
    dsigma = mx.grad(lambda s: (weight * bw.gaussian((3, 150), s, KEY, 6)).sum())(mx.array(0.5))
    np.testing.assert_allclose(dsigma.item(), (f64(weight) * f64(z)).sum(), rtol=1e-4)
    _, (tangent,) = mx.jvp(lambda x, s: bw.add_gaussian(x, s, KEY, 6), [x, mx.array(0.5)], [weight, mx.array(2.0)])
    np.testing.assert_allclose(f64(tangent), f64(weight) + 2 * f64(z), rtol=1e-5, atol=1e-5)
    tree = {"a": x, "b": [x.astype(mx.float16)]}
    grads = mx.grad(lambda t: sum(v.astype(mx.float32).sum() for v in noisy_leaves(t)))(tree)
    assert same(grads["a"], mx.ones_like(x))
    assert same(grads["b"][0], mx.ones((3, 150), mx.float16))


def noisy_leaves(tree):
    out = bw.add_gaussian(tree, 1.0, KEY, 0)
    return [out["a"], out["b"][0]]


def test_compiled_step_never_repeats_its_noise(backend):
    @mx.compile
    def step(x, sigma, key, counter):
        y = bw.add_gaussian({"x": x, "y": x}, sigma, key, counter)
        return y["x"] + y["y"], bw.gaussian((5,), sigma, key, counter, domain="test"), advance(counter)

    def advance(counter):
        return bw.advance_counter(counter, 2 * bw.blocks_used(50))

    x, counter, seen = mx.zeros(50), split(2**32 - 100), []
    for i in range(4):
        exact = 2**32 - 100 + 64 * i
        y, z, counter = step(x, mx.array(1.0 + i), KEY, counter)
        halves = normals(KEY, exact, (1, 0), 50) + normals(KEY, exact + 32, (1, 0), 50)
        np.testing.assert_allclose(np.array(y), (1 + i) * halves, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.array(z), (1 + i) * normals(KEY, exact, (5, 0), 5), rtol=1e-5)
        seen.append(y)
    assert len({v.item() for y in seen for v in y}) == 200
    other = step(x, mx.array(1.0), bw.key_from_seed(1), split(2**32 - 100))[0]
    assert not (other == seen[0]).any().item()


def test_vmap_with_batched_counters(backend):
    counters = mx.stack([split(c) for c in (0, 2**32 - 1, 2**40)])
    keys = mx.stack([bw.key_from_seed(i) for i in range(3)])
    sigmas = mx.array([0.5, 0.0, 2.0])
    xs = mx.array(np.random.default_rng(6).standard_normal((3, 4, 100)).astype(np.float32))

    def check(f, in_axes, one):
        for i, y in enumerate(mx.vmap(f, in_axes=in_axes)(xs, sigmas, keys, counters)):
            np.testing.assert_allclose(np.array(y), np.array(one(i)), rtol=1e-6, atol=1e-6)

    def add(x, s, k, c):
        return bw.add_gaussian(x, s, k, c)

    check(add, (0, 0, 0, 0), lambda i: add(xs[i], sigmas[i], keys[i], counters[i]))
    check(
        lambda x, s, k, c: bw.add_gaussian(xs[0], 1.0, KEY, c),
        (None, None, None, 0),
        lambda i: add(xs[0], 1.0, KEY, counters[i]),
    )
    check(
        lambda x, s, k, c: bw.gaussian((77,), s, KEY, c, dtype=mx.float32),
        (None, 0, None, 0),
        lambda i: bw.gaussian((77,), sigmas[i], KEY, counters[i]),
    )
    words = mx.vmap(lambda k, c: bw.random_bits((3, 7), k, c, domain="test"), in_axes=(0, 1))(keys, counters.T)
    for i in range(3):
        assert same(words[i], bw.random_bits((3, 7), keys[i], counters[i], domain="test"))
    grads = mx.vmap(mx.grad(lambda s, c: bw.gaussian((9,), s, KEY, c).sum()))(sigmas, counters)
    for i in range(3):
        np.testing.assert_allclose(grads[i].item(), bw.gaussian((9,), 1.0, KEY, counters[i]).sum().item(), rtol=1e-5)


def test_vmap_of_vmap(backend):
    counters = split(3) + mx.arange(6, dtype=mx.uint32).reshape(2, 3, 1) * mx.array([100, 0], mx.uint32)
    keys = mx.stack([bw.key_from_seed(i) for i in range(3)])
    f = mx.vmap(mx.vmap(lambda c, k: bw.gaussian((40,), 1.0, k, c)), in_axes=(0, None))
    z = f(counters, keys)
    g = mx.vmap(mx.vmap(lambda c, k: bw.gaussian((40,), 1.0, k, c), in_axes=(0, None)), in_axes=(0, 0))
    w = g(counters, keys[:2])
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(z[i, j], bw.gaussian((40,), 1.0, keys[j], counters[i, j]), rtol=1e-6)
            np.testing.assert_allclose(w[i, j], bw.gaussian((40,), 1.0, keys[i], counters[i, j]), rtol=1e-6)


def test_vmap_without_a_batched_counter_is_refused(backend):
    x, sigmas, keys = mx.zeros((3, 5)), mx.ones(3), mx.stack([KEY] * 3)
    counters = mx.stack([split(i) for i in range(3)])
    refused = [
        (lambda x: bw.add_gaussian(x, 1.0, KEY, 0), x, "add_gaussian"),
        (lambda x: bw.add_gaussian([x, mx.zeros(3)], 1.0, KEY, split(0)), x, "add_gaussian"),
        (lambda s: bw.add_gaussian(mx.zeros(5), s, KEY, 0), sigmas, "add_gaussian"),
        (lambda s: bw.gaussian((5,), s, KEY, 0), sigmas, "gaussian"),
        (lambda k: bw.gaussian((5,), 1.0, k, 0), keys, "gaussian"),
        (lambda k: bw.random_bits((5,), k, 0, domain="test"), keys, "random_bits"),
        (mx.grad(lambda s: bw.gaussian((5,), s, KEY, 0).sum()), sigmas, "gaussian"),
        (lambda s: mx.vmap(lambda c: bw.gaussian((5,), s, KEY, c))(counters), sigmas, "gaussian"),
    ]
    for f, batch, op in refused:
        with pytest.raises(ValueError, match=rf"^\[{op}\] counter must be batched under vmap, or every copy gets"):
            mx.eval(mx.vmap(f)(batch))


def test_stream(backend):
    stream = mx.new_stream(mx.cpu)
    x = mx.ones((400,))
    for where in (stream, mx.cpu, mx.Device(mx.cpu)):
        assert same(bw.gaussian((400,), 1.0, KEY, 0, stream=where), bw.gaussian((400,), 1.0, KEY, 0))
        assert same(bw.add_gaussian([x], 1.0, KEY, 0, stream=where)[0], bw.add_gaussian(x, 1.0, KEY, 0))
        words = bw.random_bits((9,), KEY, 0, domain="test", stream=where)
        assert same(words, bw.random_bits((9,), KEY, 0, domain="test"))


def test_domains_keys_and_counters_tell_streams_apart(backend):
    draws = [bw.gaussian((64,), 1.0, KEY, 0, domain=d) for d in noise._DOMAINS]
    draws += [bw.gaussian((64,), 1.0, bw.key_from_seed(1), 0), bw.gaussian((64,), 1.0, KEY, 32)]
    assert len({v.item() for d in draws for v in d}) == 64 * len(draws)


# ---- Keys


def test_random_keys_differ():
    keys = [bw.random_key() for _ in range(20)]
    assert all(k.dtype == mx.uint32 and k.shape == (8,) for k in keys)
    assert len({w for k in keys for w in k.tolist()}) == 160  # false alarms: 3e-6


def test_key_from_seed_is_the_same_everywhere():
    import hashlib

    for seed in (0, -1, 2**70):
        digest = hashlib.sha256(f"mlx-bulwark test key {seed}".encode()).digest()
        assert bw.key_from_seed(seed).tolist() == np.frombuffer(digest, "<u4").tolist()
    with pytest.raises(TypeError, match=r"\[key_from_seed\] seed must be an integer"):
        bw.key_from_seed(1.5)


# ---- Refusals

X = mx.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bw.gaussian((3,), -1.0, KEY, 0), ValueError, r"\[gaussian\] sigma must be >= 0 and finite"),
        (lambda: bw.gaussian((3,), NAN, KEY, 0), ValueError, r"\[gaussian\] sigma must be"),
        (lambda: bw.add_gaussian(X, INF, KEY, 0), ValueError, r"\[add_gaussian\] sigma must be"),
        (lambda: bw.add_gaussian(X, 1e39, KEY, 0), ValueError, r"\[add_gaussian\] sigma must be .* 1e\+39"),
        (lambda: bw.add_gaussian(X, 1e-46, KEY, 0), ValueError, r"nor vanish there, but is 1e-46"),
        (lambda: bw.add_gaussian(X, "1x", KEY, 0), ValueError, r"\[add_gaussian\] sigma must be a number"),
        (lambda: bw.add_gaussian(X, mx.ones(2), KEY, 0), ValueError, r"sigma must be a float32 scalar .* \(2,\)"),
        (lambda: bw.add_gaussian(X, mx.array(1), KEY, 0), ValueError, r"sigma must be a float32 scalar .*int32"),
        (lambda: bw.gaussian((3,), 1.0, KEY[:7], 0), ValueError, r"\[gaussian\] key must be .* \(7,\)"),
        (lambda: bw.gaussian((3,), 1.0, KEY.astype(mx.int32), 0), ValueError, r"key must be a uint32 array.*int32"),
        (lambda: bw.gaussian((3,), 1.0, 5, 0), ValueError, r"key must be a uint32 array .* type int"),
        (lambda: bw.gaussian((3,), 1.0, KEY, -1), ValueError, r"\[gaussian\] counter must stay in"),
        (lambda: bw.gaussian((3,), 1.0, KEY, 2**64), ValueError, r"\[gaussian\] counter must stay in"),
        (lambda: bw.gaussian((3,), 1.0, KEY, 1.0), ValueError, r"counter must be an integer .* type float"),
        (lambda: bw.gaussian((3,), 1.0, KEY, True), ValueError, r"counter must be an integer .* type bool"),
        (
            lambda: bw.gaussian((3,), 1.0, KEY, mx.array(1)),
            ValueError,
            r"counter must be a uint32 array of shape \(2,\)",
        ),
        (lambda: bw.gaussian((3,), 1.0, KEY, mx.array([1, 0])), ValueError, r"counter must be .* has .*int32"),
        (lambda: bw.gaussian((3, -1), 1.0, KEY, 0), ValueError, r"\[gaussian\] shape must be .* \(3, -1\)"),
        (lambda: bw.gaussian(2.5, 1.0, KEY, 0), ValueError, r"\[gaussian\] shape must be"),
        (lambda: bw.gaussian((3,), 1.0, KEY, 0, dtype=mx.int32), ValueError, r"\[gaussian\] dtype must be .*int32"),
        (lambda: bw.gaussian((3,), 1.0, KEY, 0, domain="x"), ValueError, r"\[gaussian\] domain must be one of .* 'x'"),
        (lambda: bw.add_gaussian(mx.array([1]), 1.0, KEY, 0), ValueError, r"\[add_gaussian\] x must be float32.*int32"),
        (lambda: bw.add_gaussian([X, None], 1.0, KEY, 0), TypeError, r"\[add_gaussian\] x .* leaf of type NoneType"),
        (lambda: bw.random_bits((3,), KEY[0], 0, domain="test"), ValueError, r"\[random_bits\] key must be"),
        (lambda: bw.blocks_used((2, -1)), ValueError, r"\[blocks_used\] shape must be"),
        (lambda: bw.blocks_used("ab"), TypeError, r"\[blocks_used\] x must be an array"),
        (lambda: bw.advance_counter(0, -1), ValueError, r"\[advance_counter\] blocks must be"),
        (lambda: bw.advance_counter(-1, 1), ValueError, r"\[advance_counter\] counter must stay"),
        (lambda: bw.advance_counter(mx.zeros(2), 1), ValueError, r"\[advance_counter\] counter must be"),
    ],
)
def test_refusals(backend, call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_no_counter_by_default():
    with pytest.raises(TypeError, match="counter"):
        bw.gaussian((3,), 1.0, KEY)
    with pytest.raises(TypeError, match="counter"):
        bw.add_gaussian(X, 1.0, KEY)


# ---- Native: threads and instruction sets


@pytest.fixture
def threads():
    yield _native.ext.set_num_threads
    _native.ext.set_num_threads(os.cpu_count() or 1)


def test_any_number_of_threads_draws_the_same(threads):
    x = [mx.ones(n) for n in (100_003, 5, 0, 20_000, 321)]
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        out = [*bw.add_gaussian(x, 1.0, KEY, 1), bw.random_bits((100_003,), KEY, 1, domain="test")]
        mx.eval(out)
        results.append(out)
    for out in results[1:]:
        assert all(same(a, b) for a, b in zip(out, results[0], strict=True))


CHILD = """
import os, sys
import mlx.core as mx, numpy as np, mlx_bulwark as bw
from mlx_bulwark import _native
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
import test_noise as t
assert _native.ext.isa() == sys.argv[3], _native.ext.isa()
_native.use("native")
for name, key, nonce, counter, expected in t.RFC_VECTORS:
    assert t.rfc_keystream(key, nonce, counter) == expected, name
t.test_transform_at_both_ends("native")
for dtype in (mx.float16, mx.bfloat16):
    t.test_half_precision_is_float32_rounded_once("native", dtype)
    t.test_every_half_survives_noise_that_rounds_away("native", dtype)
t.test_sigma_zero_is_exact("native")
for counter in t.COUNTERS:
    t.test_random_bits("native", 4001, counter)
    t.test_gaussian_against_float64("native", 2000, counter)
np.save(sys.argv[2], np.array(bw.gaussian((100_003,), 1.0, t.KEY, 2**32 - 9)))
"""


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa, tmp_path):
    ours = _native.ext.isa()
    if ["base", "avx2", "avx512"].index(isa) > ["base", "avx2", "avx512"].index(ours):
        pytest.skip(f"this processor, or BULWARK_ISA, goes up to {ours}")
    file = tmp_path / "z.npy"
    environment = os.environ | {"BULWARK_ISA": isa, "BULWARK_BACKEND": "native"}
    command = [sys.executable, "-c", CHILD, os.path.dirname(__file__), str(file), isa]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    here = np.array(bw.gaussian((100_003,), 1.0, KEY, 2**32 - 9))
    assert (abs(np.load(file) - here) <= 2 * ULP * np.spacing(abs(here))).all()  # ULP each
