"""Discrete noise: the sampler against the exact distribution, integers against Python's, the accounting, the engine."""

import math
from fractions import Fraction

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark.privacy import schedules
from mlx_bulwark.privacy.discrete import (
    LEAST_SHARE,
    add_discrete,
    discrete_gaussian,
    discrete_laplace,
    make_grid,
    off_grid,
    on_grid,
)
from mlx_bulwark.privacy.events import INTEGER_ORDERS, Release, _integer_rdp, composed_epsilon
from mlx_bulwark.privacy.gradients import clipped_sums
from scipy import stats
from scipy.special import logsumexp
from training import Net, data, engine, flat, loss_fn, no_loss, train


def words_from(seed):
    key, used = bw.key_from_seed(seed), 0

    def words(n):
        nonlocal used
        out = np.array(bw.random_bits((2 * n,), key, used, domain="discrete")).view(np.uint64)
        used += bw.bit_blocks_used((2 * n,))
        return out

    return words


def chi_square(drawn, weight):
    """Probability of so large a statistic under the exact distribution with these weights at integers."""
    reach = 400
    x = np.arange(-reach, reach + 1)
    p = weight(x.astype(np.longdouble))
    p = np.array(p / p.sum(), np.float64)
    counts = np.bincount(drawn + reach, minlength=len(x))
    assert counts.sum() == len(drawn)
    common = p * len(drawn) > 10
    seen = np.append(counts[common], counts[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * len(drawn)
    keep = expected > 0
    return stats.chi2.sf(((seen - expected)[keep] ** 2 / expected[keep]).sum(), keep.sum() - 1)


# Each rejects sound noise once in 10^5 runs; keys are fixed.
@pytest.mark.parametrize(("t", "m"), [(1, 1), (2, 3), (1, 4), (5, 4), (3, 1), (11, 10)])
def test_sampler_has_the_exact_distribution(t, m):
    drawn = discrete_gaussian(400_000, t, m, words_from(100 * t + m))
    assert 1e-5 < chi_square(drawn, lambda x: np.exp(-(x**2) / (2 * t * m))) < 1 - 1e-9


@pytest.mark.parametrize("t", [1, 2, 7])
def test_discrete_laplace_has_the_exact_distribution(t):
    drawn = discrete_laplace(400_000, t, words_from(t))
    assert 1e-5 < chi_square(drawn, lambda x: np.exp(-abs(x) / t)) < 1 - 1e-9


def test_the_test_of_the_distribution_can_fail():
    # rounded continuous noise of the same variance parameter, which a careless implementation would take
    rounded = np.rint(np.random.default_rng(0).normal(0, math.sqrt(0.5), 400_000)).astype(int)
    assert chi_square(rounded, lambda x: np.exp(-(x**2))) < 1e-9
    drawn = discrete_gaussian(400_000, 2, 3, words_from(203))
    assert chi_square(drawn, lambda x: np.exp(-(x**2) / 12.2)) < 1e-5


def test_large_noise_is_normal_to_what_a_test_can_see():
    # two-sided at 1e-5 each; at this scale the discrete and the continuous distribution function differ by 1e-7
    grid = make_grid(1.3, 0.7)
    z = discrete_gaussian(200_000, grid.t, grid.m, words_from(5)) / math.sqrt(grid.t * grid.m)
    assert stats.kstest(z, "norm").pvalue > 1e-5
    assert 5e-6 < stats.chi2.cdf((z**2).sum(), z.size) < 1 - 5e-6
    lowest = np.bincount((z * math.sqrt(grid.t * grid.m)).astype(np.int64) & 7, minlength=8)
    assert stats.chisquare(lowest).pvalue > 1e-5


def test_distances_past_64_bits_are_exact():
    from mlx_bulwark.privacy.discrete import _bernoulli_exp

    far = np.array([0, 2**31, 2**40, 0], np.int64)
    assert _bernoulli_exp(far, 2**40, words_from(1)).tolist() == [True, False, False, True]


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1e4), st.floats(1e-6, 1e6))
def test_grid_never_has_less_noise_than_is_accounted(sigma, norm):
    grid = make_grid(sigma, norm)
    step = Fraction(2) ** grid.exponent
    assert grid.m * grid.t >= (Fraction(sigma) * Fraction(norm) / step) ** 2
    assert grid.m * grid.t <= (Fraction(sigma) * Fraction(norm) / step) ** 2 + grid.t
    assert Fraction(grid.max_squared_norm) <= (Fraction(norm) / step) ** 2
    assert grid.t <= 2**26
    assert 2 * grid.m * grid.t * 64 < 2**63  # what the sampler multiplies
    assert norm / float(step) >= (2**10 if sigma <= 1000 else 2**8)


@pytest.mark.parametrize(("sigma", "norm"), [(1.0, 1.0), (0.7, 0.3), (1.3, 0.9), (33.3, 3.1), (1e-4, 7.0)])
def test_chosen_grids_have_enough_noise(sigma, norm):
    grid = make_grid(sigma, norm)
    wanted = (Fraction(sigma) * Fraction(norm) / Fraction(2) ** grid.exponent) ** 2
    assert wanted <= grid.m * grid.t <= wanted + grid.t


def exact_on_grid(values, grid):
    return [int(Fraction(float(np.float32(v))) / Fraction(2) ** grid.exponent) for v in values]  # int() truncates


def test_truncation_of_chosen_values():
    step = 2.0**-20
    values = [1.7, -1.7, 0.999, -0.999, 2.5, -3.5, 7.0, -7.0, 0.0, 1e5 + 0.75]
    ints, within = on_grid({"w": mx.array([v * step for v in values])}, make_grid(1.0, 1.0))
    assert within.item()
    assert ints["w"].tolist() == [1, -1, 0, 0, 2, -3, 7, -7, 0, 100_000]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-0.25, 0.25, width=32), min_size=1, max_size=40))
def test_truncation_is_exact_and_toward_zero(values):
    grid = make_grid(1.0, 1.0)
    ints, within = on_grid({"w": mx.array(values, mx.float32)}, grid)
    exact = exact_on_grid(values, grid)
    assert within.item() == (sum(z * z for z in exact) <= grid.max_squared_norm)
    assert ints["w"].tolist() == (exact if within.item() else [0] * len(values))


@pytest.mark.parametrize(
    "values",
    [[1.0, 2.0**-10], [math.nan, 0.0], [math.inf], [1e30], [-1e38, 1e38], [0.8, 0.8], [1.0] * 100_000, [3e4] * 3],
)
def test_a_norm_past_the_bound_is_left_out(values):
    grid = make_grid(1.0, 1.0)
    ints, within = on_grid({"a": mx.array(values), "b": mx.zeros((2,))}, grid)
    assert not within.item()
    assert not ints["a"].any().item()


def test_a_norm_at_the_bound_is_kept():
    grid = make_grid(1.0, 1.0)
    assert on_grid({"a": mx.array([1.0])}, grid)[1].item()
    assert not on_grid({"a": mx.array([1.0, 2.0**-20])}, grid)[1].item()


def test_sums_are_exact_and_noise_is_added_in_integers():
    z = mx.array([2**40 + 1, -(2**40), 3], mx.int64)
    without = off_grid({"w": z}, make_grid(0.0, 1.0))["w"]
    np.testing.assert_array_equal(np.array(without), np.float32(np.array(z) * 2.0**-20))
    grid = make_grid(2.0, 1.0)
    noisy = add_discrete({"w": mx.full((5, 100), 7, mx.int64)}, grid, words_from(3))
    drawn = 7 + discrete_gaussian(500, grid.t, grid.m, words_from(3)).reshape(5, 100)
    np.testing.assert_array_equal(np.array(noisy["w"]), drawn)
    np.testing.assert_array_equal(np.array(off_grid(noisy, grid)["w"]), np.float32(drawn * 2.0**grid.exponent))


@pytest.mark.parametrize("ranks", [2, 3, 64])
def test_shares_of_ranks_add_up_to_the_noise(ranks):
    for sigma, norm in ((0.5, 1.0), (1.3, 0.7), (100.0, 3.0)):
        whole, share = make_grid(sigma, norm), make_grid(sigma, norm, ranks)
        assert (share.exponent, share.max_squared_norm) == (whole.exponent, whole.max_squared_norm)
        wanted = (Fraction(sigma) * Fraction(norm) / Fraction(2) ** whole.exponent) ** 2
        assert 0 <= ranks * share.t * share.m - wanted <= wanted * Fraction(1, 2**8)
        assert share.t * share.m >= LEAST_SHARE
    with pytest.raises(ValueError, match="noise_multiplier must be at least"):
        make_grid(0.0001, 1.0, ranks)
    assert make_grid(0.0, 1.0, ranks).m == 0


def test_accounting_is_that_of_integer_orders():
    e = engine(noise="discrete", batch_size=8)
    assert e.accountant == "rdp"
    train(e, 3)
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    theirs = RdpAccountant(INTEGER_ORDERS).compose(PoissonSampledDpEvent(0.125, GaussianDpEvent(1.0)), 3)
    assert e.epsilon(1e-3) == pytest.approx(theirs.get_epsilon(1e-3), rel=1e-9)
    assert e.epsilon(1e-3) >= bw.compute_epsilon(1.0, 0.125, 3, 1e-3)
    with pytest.raises(ValueError, match="accountant must be 'rdp'"):
        composed_epsilon((Release(0.1, 1.0, 1, True),), 1e-5, "pld")


def test_integer_divergences_are_those_of_the_exact_distribution():
    # E[((1 - q) + q Q/P)^k] over the exact discrete Gaussian with shift mu, both ways round
    V, mu, q = 5.0, 2, 0.3
    x = np.arange(-300, 301)
    total = logsumexp(-(x**2) / (2 * V))
    P, Q = -(x**2) / (2 * V) - total, -((x - mu) ** 2) / (2 * V) - total  # logarithms
    mix = np.logaddexp(math.log(1 - q) + P, math.log(q) + Q)
    ours = dict(zip(INTEGER_ORDERS, _integer_rdp(q, math.sqrt(V) / mu), strict=True))
    for k in (2, 3, 5, 8):
        forward = logsumexp(k * mix + (1 - k) * P) / (k - 1)
        backward = logsumexp(k * P + (1 - k) * mix) / (k - 1)
        assert forward == pytest.approx(ours[k], rel=1e-9)
        assert backward <= forward


def test_unsampled_is_zero_concentrated():
    # Bun and Steinke 2016: rho-zCDP gives epsilon = rho + 2 sqrt(rho log(1 / delta)); the conversion here is tighter
    releases = (Release(1.0, 2.0, 10, True),)
    rho = 10 / 8
    epsilon = composed_epsilon(releases, 1e-5, "rdp")
    assert bw.compute_epsilon(2.0, 1.0, 10, 1e-5) < epsilon < rho + 2 * math.sqrt(rho * math.log(1e5))


def test_calibration():
    e = bw.PrivacyEngine.for_epsilon(3.0, 1e-4, 1000, steps=50, batch_size=50, max_grad_norm=1.0, noise="discrete")
    e._books.steps = 50
    assert 2.99 < e.epsilon() <= 3.0


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_without_noise_it_is_the_clipped_sum(backend, clipping):
    x, y = data()
    norm = 0.3
    e = engine(batch_size=64, noise_multiplier=0.0, max_grad_norm=norm, noise="discrete", clipping=clipping)
    mx.random.seed(0)
    model, optimizer = Net(), e.wrap(optim.SGD(1.0))
    expected = clipped_sums(model, loss_fn, (mx.array(x), mx.array(y)), None, norm * (1 - 2.0**-12), e._clipping, {})
    want = np.concatenate([np.array(expected.sums[p]).ravel() for p in expected.sums])
    names = list(expected.sums)
    (batch,) = e.batches((x, y), steps=1)
    losses, grads = e.value_and_grad(model, loss_fn)(model, batch)
    np.testing.assert_allclose(np.array(losses), np.array(expected.losses), atol=1e-6)
    np.testing.assert_allclose(np.array(grads.norms), np.sqrt(np.array(expected.sq_norms)), rtol=1e-4)
    got = e._release(grads)
    got = np.concatenate([np.array(got[p]).ravel() for p in names]) * 64
    # each of 64 gradients loses less than one step of the grid a coordinate
    np.testing.assert_allclose(got, want, atol=64 * 2.0 ** make_grid(0.0, norm).exponent + 1e-5)
    assert np.isfinite(flat(model)).all()
    optimizer.init(model.parameters())


def test_noise_has_the_accounted_deviation(backend):
    # two-sided at 1e-5
    e = engine(noise="discrete", noise_multiplier=schedules.step(1.7, 2.0, 10), max_grad_norm=0.3)
    noise = train(e, 20, loss=no_loss, microbatch_size=5) * 16 / 0.3
    noise[:10] /= 1.7
    noise[10:] /= 3.4
    assert stats.chi2.cdf((noise**2).sum(), noise.size) == pytest.approx(0.5, abs=0.5 - 5e-6)
    r = np.corrcoef(noise)
    np.fill_diagonal(r, 0)
    assert abs(r).max() * np.sqrt(noise.shape[1]) < 5.2


def test_released_values_are_on_the_grid():
    e = engine(noise="discrete", noise_multiplier=0.5, max_grad_norm=1.0, batch_size=16)
    x, y = data()
    (batch,) = e.batches((x, y), steps=1, microbatch_size=64)
    model = Net()
    released = e._release(e.value_and_grad(model, loss_fn)(model, batch)[1])
    for g in released.values():
        steps = np.array(g).astype(np.float64) * 16 * 2.0**20
        np.testing.assert_array_equal(steps, np.rint(steps))


def test_rows_of_a_unit_are_clipped_together(backend):
    x, y = data()
    units = mx.array([0, 1, 0, 2, 2, 2, 5, 5], mx.int32)
    mask = mx.array([True] * 7 + [False])
    rows = (mx.array(x[:8]), mx.array(y[:8]))
    mx.random.seed(1)
    model = Net()
    e = engine(batch_size=64, noise_multiplier=0.0, max_grad_norm=0.3, noise="discrete")
    _, grads = e.value_and_grad(model, loss_fn)(model, *rows, mask=mask, units=units)
    ours = off_grid(grads._sums, make_grid(0.0, 0.3))
    theirs = clipped_sums(model, loss_fn, rows, mask, 0.3 * (1 - 2.0**-12), e._clipping, {}, units).sums
    for path, s in theirs.items():
        np.testing.assert_allclose(np.array(ours[path]), np.array(s), atol=1e-5)


def test_a_nan_example_is_counted_and_harmless():
    x, y = data()
    x[5] = np.nan
    model = Net()
    e = engine(batch_size=64, noise="discrete")
    _, grads = e.value_and_grad(model, loss_fn)(model, mx.array(x[:8]), mx.array(y[:8]))
    assert grads.num_refused.item() == 1
    assert all(np.isfinite(np.array(g)).all() for g in e._release(grads).values())


def test_an_empty_batch_is_pure_noise():
    e = engine(noise="discrete", batch_size=0.001)
    moves = train(e, 2)
    assert e.steps == 2
    assert (moves != 0).mean() > 0.99


def test_check_knows_it(backend):
    x, y = data()
    report = engine(noise="discrete").check(Net(), (mx.array(x[:3]), mx.array(y[:3])), loss_fn)
    assert 0 < report.noise_error < 0.5


@pytest.mark.parametrize(
    ("more", "says"),
    [({"clipping": "adaptive"}, "clipping must not be adaptive"), ({"accountant": "pld"}, "accountant must be 'rdp'"),
     ({"max_grad_norm": math.inf, "noise_multiplier": 0.0}, "max_grad_norm must be")],
)  # fmt: skip
def test_refused(more, says):
    with pytest.raises(ValueError, match=says):
        engine(noise="discrete", **more)


def test_graphs_are_refused():
    e, model = engine(noise="discrete"), nn.Linear(6, 3)
    with pytest.raises(bw.PrivacyError, match="noise must not be 'discrete'"):
        e.compiled_step(model, e.wrap(optim.SGD(1.0)), loss_fn)
    f = e.value_and_grad(model, loss_fn)
    with pytest.raises(bw.PrivacyError, match=r"outside mx\.compile"):
        mx.compile(lambda x, y: f(model, x, y)[0])(mx.zeros((2, 6)), mx.zeros((2,), mx.int32))
