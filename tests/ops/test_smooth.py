import math
import os
import subprocess
import sys

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_bulwark import _native
from mlx_bulwark.ops import smooth
from scipy import stats
from test_noise import keystream, normals

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
SHAPES = [(0,), (1,), (31,), (33,), (320,), (28, 28), (3, 1001)]
KEY = bw.key_from_seed(6)
DOMAIN = (3, 0)
NAN, INF = float("nan"), float("inf")
NORMAL_ULP = 5  # of a normal, as in test_noise
RATE = 1e-6  # of false alarms of a statistical test, had its seed not been fixed


# ---- Oracles: the noise word by word from the RFC, the rest in numpy float64.


def uniforms(key, counter, n):
    """The stream of uniforms of variance 1 in float64: the first ten words of a block, in the order of the normals."""
    tiles = -(-n // 320)
    words = keystream(key, counter, DOMAIN, 32 * tiles)[:, :10].reshape(tiles, 32, 10)
    high = words.transpose(0, 2, 1).reshape(-1)[:n].view(np.int32) >> 8
    return math.sqrt(3) * (2.0 * high + 1) / 2**24


def noise(distribution, counter, n, key=KEY):
    return uniforms(key, counter, n) if distribution == "uniform" else normals(key, counter, DOMAIN, n)


def assert_copies(got, x, n, sigma, counter, distribution):
    """Float32 copies against float64: errors of the noise, and the rounding of the sum."""
    exact_noise = sigma * noise(distribution, counter, n * x.size).reshape((n, *x.shape))
    exact = f64(x) + exact_noise
    assert got.dtype == mx.float32
    assert got.shape == (n, *x.shape)
    unit = np.spacing(abs(exact).astype(np.float32)) + NORMAL_ULP * np.spacing(abs(exact_noise).astype(np.float32))
    assert (abs(f64(got) - exact) <= unit).all()


def vote64(logits, classes):
    """Votes row by row."""
    counts = np.zeros(classes + 1, np.int64)
    for row in f64(logits):
        counts[classes if np.isnan(row).any() else int(np.argmax(row))] += 1
    return counts


def f64(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def rand(shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def split(counter):
    return mx.array([counter & 0xFFFFFFFF, counter >> 32], mx.uint32)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(a, b, equal_nan=True).item())


def zeros(classes):
    return mx.zeros(classes + 1, mx.int32)


# ---- noisy_copies


@pytest.mark.parametrize("distribution", smooth.DISTRIBUTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_copies_against_float64(backend, shape, distribution):
    x = rand(shape)
    for n, counter in ((0, 0), (1, 7), (7, 2**32 - 40)):
        copies = bw.noisy_copies(x, n, 0.25, KEY, counter, distribution=distribution)
        assert_copies(copies, x, n, 0.25, counter, distribution)


@pytest.mark.parametrize("distribution", smooth.DISTRIBUTIONS)
def test_a_large_input(backend, distribution):
    x = rand((20_003 if backend == "metal-sim" else 1_000_003,))
    copies = bw.noisy_copies(x, 2, 0.5, KEY, 3, distribution=distribution)
    assert_copies(copies, x, 2, 0.5, 3, distribution)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (10,), (31,), (33,)])
def test_many_copies_of_a_small_input(backend, shape):
    x = rand(shape)
    for n in (100, 2003):
        assert_copies(bw.noisy_copies(x, n, 2.0, KEY, 5), x, n, 2.0, 5, "gaussian")
    uniform = bw.noisy_copies(x, 500, 2.0, KEY, 5, distribution="uniform")
    assert_copies(uniform, x, 500, 2.0, 5, "uniform")


def test_noise_is_that_of_gaussian_to_the_bit(backend):
    x = mx.zeros((9, 41))
    copies = bw.noisy_copies(x, 30, 0.3, KEY, 11)
    assert same(copies, bw.gaussian((30, 9, 41), 0.3, KEY, 11, domain="smoothing"))
    assert not (copies == bw.gaussian((30, 9, 41), 0.3, KEY, 11)).any().item()


def test_noise_is_not_truncated(backend):
    """A block of the test's key that holds a normal beyond the 5.42 at which mx.random.normal ends."""
    far = 101_900_928
    copies = np.array(bw.noisy_copies(mx.zeros(320), 1, 1.0, KEY, far))[0]
    assert np.argmax(abs(copies)) == 265
    assert copies[265] == pytest.approx(-6.157995, abs=1e-5)
    assert normals(KEY, far, DOMAIN, 320)[265] == pytest.approx(-6.157995, abs=1e-5)


@pytest.mark.parametrize("distribution", smooth.DISTRIBUTIONS)
def test_backends_agree(distribution):
    x = rand((57, 301))
    native = bw.noisy_copies(x, 20, 0.7, KEY, 2**32 - 7, distribution=distribution)
    reference = smooth.noisy_copies_reference(x, 20, 0.7, KEY, 2**32 - 7, distribution=distribution)
    scale = np.maximum(abs(np.array(native)), abs(np.array(native - x)))
    assert (abs(np.array(native - reference)) <= 2 * NORMAL_ULP * np.spacing(scale)).all()


@pytest.mark.parametrize("distribution", smooth.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_float32_rounded_once(backend, dtype, distribution):
    x = rand((7, 150), dtype)
    for sigma in (1e-4, 0.25, 1e4):
        for limits in ({}, {"bounds": (-1, 1)}, {"bounds": (0, 1), "levels": 256}):
            options = {"distribution": distribution} | limits
            copies = bw.noisy_copies(x, 3, sigma, KEY, 0, **options)
            single = bw.noisy_copies(x.astype(mx.float32), 3, sigma, KEY, 0, **options)
            assert copies.dtype == dtype
            if dtype == mx.float16:
                with np.errstate(over="ignore"):
                    expected = np.array(single).astype(np.float16).astype(np.float32)
            else:  # to nearest, ties to even, on the bits
                bits = np.array(single).view(np.uint32)
                expected = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)
            assert (np.array(copies.astype(mx.float32)) == expected).all()


# ---- The distributions


@pytest.fixture(scope="module")
def sample():
    _native.use("native")
    drawn = {
        d: np.array(bw.noisy_copies(mx.zeros(1000), 2000, 0.5, KEY, 2**40, distribution=d)).astype(np.float64)
        for d in smooth.DISTRIBUTIONS
    }
    _native.use_from_environment()
    return drawn


LAWS = {"gaussian": stats.norm(0, 0.5), "uniform": stats.uniform(-math.sqrt(3) / 2, math.sqrt(3))}


@pytest.mark.parametrize("distribution", smooth.DISTRIBUTIONS)
def test_law_of_the_noise(sample, distribution):
    z = sample[distribution]
    assert stats.kstest(z.reshape(-1), LAWS[distribution].cdf).pvalue > RATE
    limit = stats.norm.isf(RATE / 2)
    fourth = 3.0 if distribution == "gaussian" else 1.8  # kurtosis
    assert abs(z.mean()) < limit * 0.5 / math.sqrt(z.size)
    assert abs(z.var() / 0.25 - 1) < limit * math.sqrt((fourth - 1) / z.size)


@pytest.mark.parametrize("distribution", smooth.DISTRIBUTIONS)
def test_copies_are_independent(sample, distribution):
    """Every pair of 300 copies, and every pair of 300 elements."""
    for z in (sample[distribution][:300], sample[distribution][:, :300].T):
        for x in (z, z**2):
            r = np.corrcoef(x)[np.triu_indices(len(x), 1)] * math.sqrt(x.shape[1])
            assert abs((r**2).mean() - 1) < stats.norm.isf(RATE / 2) * math.sqrt(2 / len(r))
            assert abs(r).max() < stats.norm.isf(RATE / 2 / len(r)) * 1.1  # normal only for endless rows


def test_uniform_noise_stays_inside_lambda(sample):
    z = sample["uniform"]
    limit = math.sqrt(3) * 0.5
    assert -limit <= z.min() < -limit * (1 - 1e-4)  # of 2e6 draws, none that close to the end: e^-100
    assert limit * (1 - 1e-4) < z.max() <= limit


# ---- Bounds, grid


@pytest.mark.parametrize("distribution", smooth.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip(backend, dtype, distribution):
    x = rand((13, 50), dtype)
    for low, high in ((0, 1), (-0.3, 0.7), (-3, -1)):
        free = f64(bw.noisy_copies(x, 5, 0.5, KEY, 0, distribution=distribution))
        copies = bw.noisy_copies(x, 5, 0.5, KEY, 0, distribution=distribution, bounds=(low, high))
        limits = [mx.array(b, dtype).item() for b in (low, high)]
        assert copies.dtype == dtype
        assert (f64(copies) == np.clip(free, *limits)).all()


@pytest.mark.parametrize("levels", [2, 3, 16, 256, 65536])
@pytest.mark.parametrize("bounds", [(0, 1), (-1, 1), (-2.5, 0.25)])
def test_grid(backend, bounds, levels):
    x = rand((5, 130))
    free = f64(bw.noisy_copies(x, 4, 0.5, KEY, 9))
    copies = bw.noisy_copies(x, 4, 0.5, KEY, 9, bounds=bounds, levels=levels)
    low, high = bounds
    grid = np.float32(low) + np.arange(levels, dtype=np.float32) * np.float32(high - low) / np.float32(levels - 1)
    place = np.searchsorted(grid, np.array(copies))
    assert (grid[np.minimum(place, levels - 1)] == np.array(copies)).all()  # its values to the bit
    step = (high - low) / (levels - 1)
    assert (abs(grid[place] - np.clip(free, low, high)) <= step / 2 + 4e-7).all()
    assert len(set(place.reshape(-1))) > min(levels, 100) / 3


def test_grid_of_8_bits_is_that_of_images(backend):
    image = np.random.default_rng(1).integers(0, 256, (20, 20), np.uint8)
    x = mx.array(image.astype(np.float32) / np.float32(255))
    assert same(bw.noisy_copies(x, 2, 0, KEY, 0, bounds=(0, 1), levels=256), mx.stack([x, x]))
    copies = np.array(bw.noisy_copies(x, 50, 0.1, KEY, 0, bounds=(0, 1), levels=256))
    assert set(copies.reshape(-1)) <= set(np.arange(256, dtype=np.float32) / np.float32(255))


def test_ties_of_the_grid_go_to_even(backend):
    x = mx.array([0.5, 1.5, 2.5, 3.5, 0.49, 0.51])
    assert bw.noisy_copies(x, 1, 0, KEY, 0, bounds=(0, 4), levels=5).tolist() == [[0, 2, 2, 4, 0, 1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", smooth.DISTRIBUTIONS)
def test_nan_and_infinity(backend, dtype, distribution):
    x = mx.array([NAN, INF, -INF, 0.5] * 100).astype(dtype)
    for sigma in (0.0, 0.25):
        free = f64(bw.noisy_copies(x, 3, sigma, KEY, 0, distribution=distribution)).reshape(-1, 4)
        assert np.isnan(free[:, 0]).all()
        assert (free[:, 1] == INF).all()
        assert (free[:, 2] == -INF).all()
        assert np.isfinite(free[:, 3]).all()
        for levels in (None, 5):
            options = {"distribution": distribution, "bounds": (0, 1), "levels": levels}
            held = f64(bw.noisy_copies(x, 3, sigma, KEY, 0, **options)).reshape(-1, 4)
            assert np.isnan(held[:, 0]).all()
            assert (held[:, 1] == 1).all()
            assert (held[:, 2] == 0).all()


def test_huge_and_tiny_values(backend):
    x = mx.array([3e38, -3e38, 1e-30, 0.0] * 10)
    for sigma in (1e-30, 1.0, 1e30):
        assert_copies(bw.noisy_copies(x, 3, sigma, KEY, 0), x, 3, np.float64(np.float32(sigma)), 0, "gaussian")


@pytest.mark.parametrize("distribution", smooth.DISTRIBUTIONS)
def test_sigma(backend, distribution):
    x = rand((30, 30))

    def copies(sigma, **options):
        return bw.noisy_copies(x, 2, sigma, KEY, 0, distribution=distribution, **options)

    for zero in (0, 0.0, mx.array(0.0)):
        assert same(copies(zero), mx.stack([x, x]))
        assert same(copies(zero, bounds=(-1, 1)), mx.stack([mx.clip(x, -1, 1)] * 2))
    assert same(copies(mx.array(0.3)), copies(0.3))
    for wrong in (NAN, -1.0, -1e-45, INF, -INF):
        for options in ({}, {"bounds": (0, 1)}, {"bounds": (0, 1), "levels": 256}):
            assert mx.isnan(copies(mx.array(wrong), **options)).all().item()


# ---- Inputs


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(backend, dtype):
    base = rand((12, 10, 20), dtype, 3)
    views = [
        base.T,
        base.transpose(1, 0, 2),
        base[::3, 1::2, ::-1],
        base[5],
        base[:, 3, :],
        mx.broadcast_to(base[:, :1], (12, 10, 20)),
        mx.broadcast_to(base[0, 0, 0], (700,)),
    ]
    mx.eval(views)
    for view in views:
        copy = mx.array(np.array(view.astype(mx.float32)).copy()).astype(dtype)
        options = {"bounds": (-1, 1), "levels": 9}
        assert same(bw.noisy_copies(view, 3, 0.5, KEY, 8), bw.noisy_copies(copy, 3, 0.5, KEY, 8))
        assert same(bw.noisy_copies(view, 3, 0.5, KEY, 8, **options), bw.noisy_copies(copy, 3, 0.5, KEY, 8, **options))
    words = mx.concatenate([KEY, KEY])
    strided_key = mx.stack([words, words], 1).reshape(-1)[:16:2]
    strided_counter = mx.array([8, 99, 0, 99], mx.uint32)[::2]
    x = rand((50,))
    assert same(bw.noisy_copies(x, 9, 1.0, strided_key, strided_counter), bw.noisy_copies(x, 9, 1.0, KEY, 8))


def test_the_input_stays(backend):
    x = mx.ones(1000)
    copies = bw.noisy_copies(x, 1, 1.0, KEY, 0)
    mx.eval(copies)
    assert same(x, mx.ones(1000))


@pytest.mark.parametrize("distribution", smooth.DISTRIBUTIONS)
def test_two_calls_equal_one(backend, distribution):
    for shape, first in (((32, 10), 3), ((5, 16), 8), ((3,), 320)):
        x, counter = rand(shape), 2**32 - 50
        whole = bw.noisy_copies(x, first + 5, 0.5, KEY, counter, distribution=distribution)
        a = bw.noisy_copies(x, first, 0.5, KEY, counter, distribution=distribution)
        counter = bw.advance_counter(counter, bw.blocks_used((first, *shape)))
        b = bw.noisy_copies(x, 5, 0.5, KEY, counter, distribution=distribution)
        assert same(mx.concatenate([a, b]), whole)


@given(
    st.integers(0, 2**64 - 40_000),
    st.integers(0, 40),
    st.integers(0, 90),
    st.sampled_from(smooth.DISTRIBUTIONS),
    st.integers(0, 5),
)
def test_a_value_depends_on_its_place_alone(backend, counter, n, size, distribution, seed):
    """Copies of any input are the copies of one flat input of the same length, row after row."""
    key, x = bw.key_from_seed(seed), rand((size,), seed=seed)
    copies = bw.noisy_copies(x, n, 0.5, key, counter, distribution=distribution)
    rows = mx.concatenate([x] * n) if n else x[:0]
    flat = bw.noisy_copies(rows, 1, 0.5, key, split(counter), distribution=distribution)
    assert same(copies.reshape(-1), flat.reshape(-1))


# ---- Transformations


@pytest.mark.parametrize("distribution", smooth.DISTRIBUTIONS)
def test_gradient_is_the_sum_over_copies(backend, distribution):
    x, weight = rand((3, 50)), rand((4, 3, 50), seed=1)

    def loss(x, sigma, **options):
        copies = bw.noisy_copies(x, 4, sigma, KEY, 6, distribution=distribution, **options)
        return (weight.astype(copies.dtype) * copies).astype(mx.float32).sum()

    z = noise(distribution, 6, 600).reshape(4, 3, 50)
    dx, dsigma = mx.grad(loss, argnums=(0, 1))(x, mx.array(0.5))
    np.testing.assert_allclose(f64(dx), f64(weight).sum(0), atol=1e-6)
    np.testing.assert_allclose(dsigma.item(), (f64(weight) * z).sum(), rtol=1e-4)
    inside = (f64(x) + 0.5 * z >= -0.4) & (f64(x) + 0.5 * z <= 0.6)
    assert 0.2 < inside.mean() < 0.8
    for levels in (None, 4):
        dx, dsigma = mx.grad(loss, argnums=(0, 1))(x, mx.array(0.5), bounds=(-0.4, 0.6), levels=levels)
        np.testing.assert_allclose(f64(dx), (f64(weight) * inside).sum(0), atol=1e-6)
        np.testing.assert_allclose(dsigma.item(), (f64(weight) * z * inside).sum(), rtol=1e-4)
    for dtype in (mx.float16, mx.bfloat16):
        dx = mx.grad(loss)(x.astype(dtype), 0.5, bounds=(-0.4, 0.6))
        assert dx.dtype == dtype
        # cotangents of half precision, and entries that round onto a bound
        assert np.median(abs(f64(dx) - (f64(weight) * inside).sum(0))) < 0.01
    _, (tangent,) = mx.jvp(
        lambda x, s: bw.noisy_copies(x, 4, s, KEY, 6, distribution=distribution, bounds=(-0.4, 0.6)),
        [x, mx.array(0.5)],
        [weight[0], mx.array(2.0)],
    )
    np.testing.assert_allclose(f64(tangent), inside * (f64(weight[0]) + 2 * z), rtol=1e-5, atol=1e-5)


def test_gradient_on_a_bound(backend):
    """A value on a bound was not clipped: black pixels have gradients."""
    x = mx.array([0.0, 1.0, -0.1, 1.1, 0.5])
    dx = mx.grad(lambda x: bw.noisy_copies(x, 3, 0.0, KEY, 0, bounds=(0, 1)).sum())(x)
    assert dx.tolist() == [3, 3, 0, 0, 3]


def test_gradient_of_a_model_through_copies(backend):
    """What an attack by expectation over transformation wants: the mean gradient over noisy copies, one by one."""
    w, x = rand((50, 3)), rand((50,), seed=1)

    def loss(rows):
        return (mx.softmax(rows @ w, axis=-1)[..., 0]).mean()

    got = mx.grad(lambda x: loss(bw.noisy_copies(x, 6, 0.5, KEY, 0)))(x)
    z = mx.array(noise("gaussian", 0, 300).reshape(6, 50).astype(np.float32))
    expected = sum(np.array(mx.grad(loss)(x + 0.5 * row)) for row in z) / 6
    np.testing.assert_allclose(np.array(got), expected, atol=1e-6)


def test_compiled_copies_never_repeat_their_noise(backend):
    @mx.compile
    def step(x, sigma, key, counter):
        copies = bw.noisy_copies(x, 3, sigma, key, counter)
        clipped = bw.noisy_copies(x, 3, sigma, key, counter, bounds=(0, 1))
        coarse = bw.noisy_copies(x, 3, sigma, key, counter, bounds=(0, 1), levels=2)
        wide = bw.noisy_copies(x, 3, sigma, key, counter, bounds=(0, 2))
        more = bw.noisy_copies(x, 4, sigma, key, counter)
        uniform = bw.noisy_copies(x, 3, sigma, key, counter, distribution="uniform")
        return [copies, clipped, coarse, wide, more, uniform], bw.advance_counter(counter, bw.blocks_used(more))

    x, counter, seen = rand((50,)), split(2**32 - 100), []
    for i in range(3):
        exact = 2**32 - 100 + 32 * i
        (copies, clipped, coarse, wide, more, uniform), counter = step(x, mx.array(1.0 + i), KEY, counter)
        assert_copies(copies, x, 3, 1.0 + i, exact, "gaussian")
        assert_copies(uniform, x, 3, 1.0 + i, exact, "uniform")
        assert same(clipped, mx.clip(copies, 0, 1))
        assert same(wide, mx.clip(copies, 0, 2))
        assert set(np.array(coarse).reshape(-1)) == {0.0, 1.0}
        assert same(more[:3], copies)
        seen.append(copies)
    assert len({v.item() for y in seen for v in y.reshape(-1)}) == 450


def test_vmap_with_batched_counters(backend):
    counters = mx.stack([split(c) for c in (0, 2**32 - 1, 2**40)])
    xs, sigmas = rand((3, 4, 25)), mx.array([0.5, 0.0, 2.0])
    for options in ({}, {"distribution": "uniform", "bounds": (-1, 1)}):
        batch = mx.vmap(lambda x, s, c, o=options: bw.noisy_copies(x, 5, s, KEY, c, **o))(xs, sigmas, counters)
        for i in range(3):
            one = bw.noisy_copies(xs[i], 5, sigmas[i], KEY, counters[i], **options)
            np.testing.assert_allclose(np.array(batch[i]), np.array(one), rtol=1e-6, atol=1e-6)


def test_vmap_without_a_batched_counter_is_refused(backend):
    for f, batch in (
        (lambda x: bw.noisy_copies(x, 2, 1.0, KEY, 0), mx.zeros((3, 5))),
        (lambda x: bw.noisy_copies(x, 2, 1.0, KEY, 0, distribution="uniform"), mx.zeros((3, 5))),
        (lambda s: bw.noisy_copies(mx.zeros(5), 2, s, KEY, split(0)), mx.ones(3)),
        (lambda k: bw.noisy_copies(mx.zeros(5), 2, 1.0, k, split(0)), mx.stack([KEY] * 3)),
    ):
        with pytest.raises(ValueError, match=r"^\[noisy_copies\] counter must be batched under vmap"):
            mx.eval(mx.vmap(f)(batch))


def test_stream(backend):
    x, logits = rand((40,)), rand((40, 5))
    for where in (mx.new_stream(mx.cpu), mx.cpu, mx.Device(mx.cpu)):
        assert same(bw.noisy_copies(x, 3, 1.0, KEY, 0, stream=where), bw.noisy_copies(x, 3, 1.0, KEY, 0))
        assert same(bw.count_votes(logits, zeros(5), stream=where), bw.count_votes(logits, zeros(5)))


# ---- count_votes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(0, 10), (1, 1), (31, 1), (33, 2), (1000, 10), (257, 31), (64, 33), (100, 1000), (3, 10_007), (20_011, 3)],
)
def test_votes_row_by_row(backend, shape, dtype):
    m, classes = (min(shape[0], 2003), shape[1]) if backend == "metal-sim" else shape
    logits = rand((m, classes), dtype)
    before = mx.arange(classes + 1, dtype=mx.int32)
    counts = bw.count_votes(logits, before)
    assert counts.dtype == mx.int32
    assert (np.array(counts) == np.arange(classes + 1) + vote64(logits, classes)).all()
    assert same(before, mx.arange(classes + 1, dtype=mx.int32))


@pytest.mark.parametrize("m", [1_000_003, 999_937])
def test_many_votes(m):
    logits = rand((m, 7))
    expected = np.bincount(np.argmax(np.array(logits), axis=1), minlength=8)
    assert (np.array(bw.count_votes(logits, zeros(7))) == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 10, 37, 300])
def test_special_logits(backend, classes, dtype):
    """Ties, NaN in any place, infinities, signed zeros, subnormals."""
    rng = np.random.default_rng(classes)
    x = rng.choice([0.0, -0.0, 1.0, -1.0, INF, -INF], (600, classes)).astype(np.float32)
    for row in range(0, 300, 3):
        x[row, rng.integers(classes)] = NAN
    x[300:310] = -INF
    x[310:320] = INF
    x[320:330] = 0.0
    x[330:340] = -NAN
    logits = mx.array(x).astype(dtype)
    assert (np.array(bw.count_votes(logits, zeros(classes))) == vote64(logits, classes)).all()


def test_every_nan_counts(backend):
    """Quiet and signaling ones, of both signs and any payload."""
    bits = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFF800001, 0x7FFFFFFF], np.uint32)
    logits = mx.array(np.stack([bits, np.full_like(bits, 0x3F800000)], 1)).view(mx.float32)
    assert bw.count_votes(logits, zeros(2)).tolist() == [0, 0, 5]
    halves = mx.array(np.array([[0x7C01, 0], [0xFFFF, 0], [0x7C00, 0]], np.uint16)).view(mx.float16)
    assert bw.count_votes(halves, zeros(2)).tolist() == [1, 0, 2]
    halves = mx.array(np.array([[0x7F81, 0], [0xFFFF, 0], [0x7F80, 0]], np.uint16)).view(mx.bfloat16)
    assert bw.count_votes(halves, zeros(2)).tolist() == [1, 0, 2]


def test_neighbouring_logits_are_told_apart(backend):
    below = np.nextafter(np.float32(1), np.float32(0))
    rows = [[below, 1.0], [1.0, below], [-below, -1.0], [1e-30, 2e-30], [3.4e38, 3.3e38], [-3.4e38, -INF]]
    logits = mx.array(np.array(rows, np.float32))
    assert (np.array(bw.count_votes(logits, zeros(2))) == vote64(logits, 2)).all()


def test_running_counts(backend):
    logits = rand((900, 10))
    counts = zeros(10)
    for part in mx.split(logits, 9):
        counts = bw.count_votes(part, counts)
    assert same(counts, bw.count_votes(logits, zeros(10)))
    assert counts.sum().item() == 900


@given(st.integers(0, 70), st.integers(1, 70), st.integers(0, 3), st.integers(0, 10_000))
def test_any_shape_of_logits(backend, m, classes, kinds, seed):
    values = np.random.default_rng(seed).integers(-kinds, kinds + 1, (m, classes)).astype(np.float32)
    logits = mx.array(np.where(values == 3, NAN, values).astype(np.float32)).reshape(m, classes)
    assert (np.array(bw.count_votes(logits, zeros(classes))) == vote64(logits, classes)).all()


def test_non_contiguous_logits_and_counts(backend):
    base = rand((60, 40))
    for logits in (base.T, base[::2, 3:30:3], base[:, ::-1], mx.broadcast_to(base[:1], (50, 40))):
        classes = logits.shape[1]
        counts = mx.arange(2 * classes + 2, dtype=mx.int32)[::2]
        expected = 2 * np.arange(classes + 1) + vote64(logits, classes)
        assert (np.array(bw.count_votes(logits, counts)) == expected).all()


def test_votes_under_transformations(backend):
    logits = rand((4, 30, 6))
    compiled = mx.compile(bw.count_votes)
    assert same(compiled(logits[0], zeros(6)), bw.count_votes(logits[0], zeros(6)))
    batch = mx.vmap(lambda x: bw.count_votes(x, zeros(6)))(logits)
    assert same(batch, mx.stack([bw.count_votes(x, zeros(6)) for x in logits]))


# ---- Refusals

X, LOGITS = mx.zeros((2, 3)), mx.zeros((4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bw.noisy_copies(X.astype(mx.int32), 2, 1.0, KEY, 0), r"x must be a float32, .* has dtype .*int32"),
        (lambda: bw.noisy_copies([1.0], 2, 1.0, KEY, 0), r"x must be a float32, .* has type list"),
        (lambda: bw.noisy_copies(X, -1, 1.0, KEY, 0), r"n must be an integer in \[0, 2\^31\) but is -1"),
        (lambda: bw.noisy_copies(X, 2.0, 1.0, KEY, 0), r"n must be an integer"),
        (lambda: bw.noisy_copies(X, True, 1.0, KEY, 0), r"n must be an integer"),
        (lambda: bw.noisy_copies(X, 2, -1.0, KEY, 0), r"sigma must be >= 0 and finite"),
        (lambda: bw.noisy_copies(X, 2, mx.ones(2), KEY, 0), r"sigma must be a float32 scalar"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY[:3], 0), r"key must be a uint32 array of shape \(8,\)"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, -1), r"counter must stay in \[0, 2\^64\)"),
        (lambda: bw.noisy_copies(X, 54, 1.0, KEY, 2**64 - 32), r"counter must stay in \[0, 2\^64\)"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, distribution="laplace"), r"distribution must be .* 'laplace'"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, bounds=(1, 0)), r"bounds must be finite and increase .* \(1, 0\)"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, bounds=(0, INF)), r"bounds must be finite and increase"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, bounds=(NAN, 1)), r"bounds must be finite and increase"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, bounds=(-3e38, 3e38)), r"bounds must be finite and increase"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, bounds=(1, 1 + 1e-9)), r"bounds must be finite and increase"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, bounds=1.0), r"bounds must be two numbers"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, bounds=(0, 1, 2)), r"bounds must be two numbers"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, levels=256), r"levels must be .*, with bounds, but there are no"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, bounds=(0, 1), levels=1), r"levels must be .* but is 1"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, bounds=(0, 1), levels=2.5), r"levels must be an integer"),
        (lambda: bw.noisy_copies(X, 2, 1.0, KEY, 0, bounds=(0, 1), levels=65537), r"levels must be .* 65536\]"),
        (lambda: bw.count_votes(LOGITS[0], zeros(3)), r"logits must be .* of shape \[m, c\] .* of shape \(3,\)"),
        (lambda: bw.count_votes(mx.zeros((4, 0)), zeros(0)), r"logits must be .* with c >= 1"),
        (lambda: bw.count_votes(LOGITS.astype(mx.int32), zeros(3)), r"logits must be .*int32"),
        (lambda: bw.count_votes([[1.0]], zeros(1)), r"logits must be an array but has type list"),
        (lambda: bw.count_votes(LOGITS, mx.zeros(3, mx.int32)), r"counts must be .* shape \(4,\), .* \(3,\)"),
        (lambda: bw.count_votes(LOGITS, mx.zeros(4)), r"counts must be an int32 array .*float32"),
        (lambda: bw.count_votes(LOGITS, None), r"counts must be an array but has type NoneType"),
    ],
)
def test_refusals(backend, call, message):
    with pytest.raises(ValueError, match=rf"^\[(noisy_copies|count_votes)\] {message}"):
        call()


def test_no_counter_by_default():
    with pytest.raises(TypeError, match="counter"):
        bw.noisy_copies(X, 2, 1.0, KEY)


# ---- Native: threads and instruction sets


def test_any_number_of_threads_gives_the_same():
    _native.use("native")
    x, logits = rand((1001,)), rand((20_011, 10))
    results = []
    for n in (1, 2, 3, 7):
        _native.ext.set_num_threads(n)
        results.append([bw.noisy_copies(x, 101, 0.5, KEY, 1), bw.count_votes(logits, zeros(10))])
        mx.eval(results[-1])
    _native.ext.set_num_threads(os.cpu_count() or 1)
    _native.use_from_environment()
    for copies, counts in results[1:]:
        assert same(copies, results[0][0])
        assert same(counts, results[0][1])


CHILD = """
import os, sys
import mlx.core as mx, mlx_bulwark as bw
from mlx_bulwark import _native
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
import test_smooth as t
assert _native.ext.isa() == sys.argv[2], _native.ext.isa()
_native.use("native")
for distribution in ("gaussian", "uniform"):
    for shape in t.SHAPES:
        t.test_copies_against_float64("native", shape, distribution)
    for dtype in t.DTYPES:
        t.test_clip("native", dtype, distribution)
        t.test_nan_and_infinity("native", dtype, distribution)
    t.test_half_precision_is_float32_rounded_once("native", mx.float16, distribution)
    t.test_half_precision_is_float32_rounded_once("native", mx.bfloat16, distribution)
    t.test_sigma("native", distribution)
for levels in (2, 256, 65536):
    t.test_grid("native", (-2.5, 0.25), levels)
t.test_ties_of_the_grid_go_to_even("native")
t.test_every_nan_counts("native")
for dtype in t.DTYPES:
    for classes in (1, 2, 10, 37, 300):
        t.test_special_logits("native", classes, dtype)
    for shape in ((257, 31), (100, 1000), (3, 10_007)):
        t.test_votes_row_by_row("native", shape, dtype)
"""


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa):
    ours = _native.ext.isa()
    if ["base", "avx2", "avx512"].index(isa) > ["base", "avx2", "avx512"].index(ours):
        pytest.skip(f"this processor, or BULWARK_ISA, goes up to {ours}")
    environment = os.environ | {"BULWARK_ISA": isa, "BULWARK_BACKEND": "native"}
    command = [sys.executable, "-c", CHILD, os.path.dirname(__file__), isa]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
