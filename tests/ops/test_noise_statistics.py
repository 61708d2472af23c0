"""Statistics of the native normals.

The key is fixed, so a test passes or fails always: a false-alarm rate says how often another key would fail a perfect
generator. All statistics here together: below 1e-5.
"""

import math

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_bulwark import _native
from scipy import special, stats

pytestmark = pytest.mark.slow

DRAWS, CHUNK = 100_000_000, 5_000_000
KEY = bw.key_from_seed(2)
RATE = 1e-7  # of false alarms, of one statistic
SIGMAS = stats.norm.isf(RATE / 2)
BINS_PER_UNIT, REACH = 1024, 8
EDGES = np.arange(-REACH * BINS_PER_UNIT + 1, REACH * BINS_PER_UNIT) / BINS_PER_UNIT


def draw(n, counter=0, key=KEY, domain="noise"):
    return np.array(bw.gaussian((n,), 1.0, key, counter, domain=domain))


@pytest.fixture(scope="module")
def sample():
    """Power sums, a histogram and tail counts of 1e8 draws; the whole would take 400 MB."""
    _native.use("native")
    powers = np.zeros(9)
    bins = np.zeros(2 * REACH * BINS_PER_UNIT, np.int64)
    low_bits = np.zeros(256, np.int64)
    tails = {(side, t): 0 for side in (-1, 1) for t in (4, 5)}
    zeros, counter = 0, 0
    for _ in range(DRAWS // CHUNK):
        z = draw(CHUNK, counter)
        counter = bw.advance_counter(counter, bw.blocks_used(CHUNK))
        zeros += int((z == 0).sum())
        power = z64 = z.astype(np.float64)
        for k in range(1, 9):
            powers[k] += power.sum()
            power = power * z64
        place = np.floor(z * np.float32(BINS_PER_UNIT)).astype(np.int32) + REACH * BINS_PER_UNIT
        bins += np.bincount(np.clip(place, 0, len(bins) - 1), minlength=len(bins))
        magnitude = abs(z)
        for side in (-1, 1):
            for t in (4, 5):
                tails[side, t] += int((side * z[magnitude > 4] > t).sum())
        middle = z[(magnitude >= 0.5) & (magnitude < 1)]
        low_bits += np.bincount(middle.view(np.uint32) & 255, minlength=256)
    _native.use_from_environment()
    return {"powers": powers / DRAWS, "bins": bins, "tails": tails, "zeros": zeros, "low_bits": low_bits}


def test_moments(sample):
    for k in range(1, 9):
        expected, square = (float(special.factorial2(m - 1)) if m % 2 == 0 else 0.0 for m in (k, 2 * k))
        deviation = math.sqrt((square - expected**2) / DRAWS)
        assert abs(sample["powers"][k] - expected) < SIGMAS * deviation, f"moment {k}"


def bridge(bins):
    """sqrt(n) (F_n - F) and F at the edges of the bins."""
    n = bins.sum()
    f = special.ndtr(EDGES)
    return math.sqrt(n) * (np.cumsum(bins)[:-1] / n - f), f


def kolmogorov(bins):
    """Kolmogorov-Smirnov statistic: the supremum over the edges, which is at most that over all values."""
    return abs(bridge(bins)[0]).max()


def anderson_darling(bins):
    """A^2 as its integral over F. Mass beyond the edges, 1e-15 of it, counts for nothing."""
    b, f = bridge(bins)
    integrand = b**2 / (f * special.ndtr(-EDGES))
    return (np.diff(f) * (integrand[1:] + integrand[:-1]) / 2).sum()


# A^2 is a sum of chi-squares with weights 1 / (k (k + 1)): for large x P(A^2 > x) is sqrt(3) P(chi-square_1 > 2 x).
ANDERSON_DARLING_LIMIT = stats.chi2(1).isf(RATE / math.sqrt(3)) / 2


def test_kolmogorov_smirnov(sample):
    assert special.kolmogorov(kolmogorov(sample["bins"])) > RATE


def test_anderson_darling(sample):
    assert anderson_darling(sample["bins"]) < ANDERSON_DARLING_LIMIT


def test_the_goodness_of_fit_tests_see_small_errors():
    """What 1e8 draws of a normal with a scale or a mean that is off by 1 / 500 would show, without their chance."""
    beyond = np.concatenate([[-np.inf], EDGES, [np.inf]])
    for scale, shift in ((1.002, 0.0), (1.0, 0.002)):
        bins = np.diff(special.ndtr((beyond - shift) / scale)) * DRAWS
        assert special.kolmogorov(kolmogorov(bins)) < RATE
        assert anderson_darling(bins) > ANDERSON_DARLING_LIMIT


def test_tails(sample):
    for (_, t), count in sample["tails"].items():
        expected = DRAWS * stats.norm.sf(t)
        assert stats.poisson.cdf(count, expected) > RATE / 2
        assert stats.poisson.sf(count - 1, expected) > RATE / 2


def test_no_exact_zeros(sample):
    assert sample["zeros"] == 0


def test_low_bits_are_uniform(sample):
    """The last 8 of 24 bits between 1/2 and 1, where the density is smooth: no lattice shows."""
    assert stats.chisquare(sample["low_bits"]).pvalue > RATE


def test_radius_and_angle_of_pairs():
    """Normals 2p and 2p + 1 of a block stand 32 apart."""
    z = draw(320 * 10_000).reshape(-1, 5, 2, 32)
    first, second = z[:, :, 0].reshape(-1), z[:, :, 1].reshape(-1)
    square = first.astype(np.float64) ** 2 + second.astype(np.float64) ** 2
    angle = np.arctan2(second, first).astype(np.float64)
    assert stats.kstest(square, stats.chi2(2).cdf).pvalue > RATE
    assert stats.kstest(angle, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > RATE
    for f in (np.sin, np.cos):
        for harmonic in (1, 2, 4, 8):
            r = np.corrcoef(square, f(harmonic * angle))[0, 1]
            assert abs(r) * math.sqrt(len(square)) < SIGMAS


@pytest.mark.parametrize("power", [1, 2, 3])
def test_no_correlation_at_any_lag(power):
    """Lags within a vector (1 to 16), a tile (32 to 320), a thread's piece (10240) and up to 2^15, all at once."""
    n, lags = 1 << 22, 1 << 15
    x = draw(n).astype(np.float64) ** power
    x = (x - x.mean()) / x.std()
    spectrum = np.fft.rfft(x, 2 * n)
    r = np.fft.irfft(abs(spectrum) ** 2, 2 * n)[1 : lags + 1] / np.sqrt(n - np.arange(1, lags + 1))
    assert abs(r).max() < stats.norm.isf(RATE / 2 / lags)
    assert abs((r**2).mean() - 1) < SIGMAS * math.sqrt(2 / lags)


def test_no_correlation_between_lanes():
    """Every pair of the 320 places of a tile."""
    z = draw(320 * 20_000).reshape(-1, 320).astype(np.float64)
    for x in (z, z**2):
        r = np.corrcoef(x.T)[np.triu_indices(320, 1)] * math.sqrt(len(x))
        assert abs(r).max() < stats.norm.isf(RATE / 2 / len(r))
        assert abs((r**2).mean() - 1) < SIGMAS * math.sqrt(2 / len(r))


def test_no_correlation_between_keys_counters_and_domains():
    n = 320 * 300
    streams = [draw(n)]
    for bit in range(0, 256, 4):  # keys that differ in one bit
        flip = mx.array([1 << bit % 32 if word == bit // 32 else 0 for word in range(8)], mx.uint32)
        streams.append(draw(n, key=KEY ^ flip))
    for counter in [bw.blocks_used(n), *(1 << b for b in range(20, 64, 4)), 2**64 - bw.blocks_used(n)]:
        streams.append(draw(n, counter))
    streams += [draw(n, domain=d) for d in ("poisson", "smoothing", "discrete", "test")]
    z = np.stack(streams).astype(np.float64)
    for x in (z, z**2):
        r = np.corrcoef(x)[np.triu_indices(len(x), 1)] * math.sqrt(n)
        assert abs(r).max() < stats.norm.isf(RATE / 2 / len(r))
        assert abs((r**2).mean() - 1) < SIGMAS * math.sqrt(2 / len(r))
