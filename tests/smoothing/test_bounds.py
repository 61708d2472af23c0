"""Bounds and radii against SciPy, statsmodels where it is installed, and published values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_bulwark.smoothing import ABSTAIN, Smooth, certified_radius, draws_for_radius, lower_confidence_bound
from mlx_bulwark.smoothing.bounds import look_schedule, prediction_p_value
from scipy import stats

GRID = [(k, n, a) for n in (1, 7, 100, 1000, 100_000) for k in {0, 1, n // 2, n - 1, n} for a in (1e-3, 0.05, 0.5)]


def test_the_lower_bound_is_clopper_and_pearson_s():
    for k, n, alpha in GRID:
        interval = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact")
        np.testing.assert_allclose(lower_confidence_bound(k, n, alpha), interval.low, rtol=1e-9, atol=1e-12)


def test_statsmodels_with_twice_the_alpha_agrees():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for k, n, alpha in GRID:
        if alpha < 0.5:
            low, _ = proportion.proportion_confint(k, n, alpha=2 * alpha, method="beta")
            np.testing.assert_allclose(lower_confidence_bound(k, n, alpha), low, rtol=1e-9, atol=1e-12)


def test_the_bound_covers_as_it_says():
    """Exact coverage, over all outcomes: never less than 1 - alpha, and not much more where votes are many."""
    n, alpha = 200, 0.05
    bounds = lower_confidence_bound(np.arange(n + 1), n, alpha)
    for p in (0.01, 0.3, 0.5, 0.77, 0.999):
        covered = stats.binom.pmf(np.arange(n + 1), n, p)[bounds <= p].sum()
        assert 1 - alpha <= covered
        if 0.1 < p < 0.9:
            assert covered <= 1 - alpha / 2


def test_the_largest_radius_is_the_published_one():
    assert round(float(certified_radius(100_000, 100_000, 0.001, 1.0)), 2) == 3.81
    expected = stats.norm.ppf(0.001 ** (1 / 100_000))
    assert certified_radius(100_000, 100_000, 0.001, 0.25) == pytest.approx(0.25 * expected, rel=1e-9)


def test_radii_and_abstentions_over_a_grid_of_counts():
    n, alpha, sigma = 1000, 0.001, 0.5
    k = np.arange(n + 1)
    p = np.concatenate([[0.0], stats.beta.ppf(alpha, k[1:], n - k[1:] + 1)])
    l2 = np.where(p > 0.5, sigma * stats.norm.ppf(np.maximum(p, 0.5)), 0.0)
    l1 = np.where(p > 0.5, 2 * math.sqrt(3) * sigma * (p - 0.5), 0.0)
    np.testing.assert_allclose(certified_radius(k, n, alpha, sigma), l2, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(certified_radius(k, n, alpha, sigma, norm="l1"), l1, rtol=1e-7, atol=1e-12)
    assert (np.diff(certified_radius(k, n, alpha, sigma)) >= 0).all()
    first = int(np.argmax(certified_radius(k, n, alpha, sigma) > 0))
    assert stats.binom.sf(first - 1, n, 0.5) <= alpha < stats.binom.sf(first - 2, n, 0.5)  # the least majority


def test_very_small_failures_keep_their_digits():
    """Next to p = 1 the complement counts: 1 - p rounded first would cost digits."""
    radius = certified_radius(10**9, 10**9, 1e-8, 1.0)
    assert radius == pytest.approx(-stats.norm.ppf(-math.expm1(math.log(1e-8) / 1e9)), rel=1e-12)


@given(st.floats(0.01, 3.0), st.floats(1e-6, 0.2), st.sampled_from(["l2", "l1"]))
def test_draws_for_a_radius_are_the_least(radius, alpha, norm):
    if norm == "l1" and radius >= math.sqrt(3) * 0.95:
        radius = 1.0
    n = draws_for_radius(radius, 1.0, alpha, norm=norm)
    assert certified_radius(n, n, alpha, 1.0, norm=norm) >= radius
    assert n == 1 or certified_radius(n - 1, n - 1, alpha, 1.0, norm=norm) < radius


def test_the_test_of_predictions_is_the_exact_binomial_one():
    for top, second in ((1, 0), (60, 40), (500, 500), (561, 439), (1000, 3)):
        assert prediction_p_value(top, second) == pytest.approx(stats.binomtest(top, top + second).pvalue, rel=1e-9)
    assert prediction_p_value(0, 0) == 1


def test_looks_are_fixed_by_n_alone():
    assert look_schedule("certify", 100_000, 1) == [100_000]
    assert look_schedule("certify", 100_000, 4) == [12_500, 25_000, 50_000, 100_000]
    assert look_schedule("certify", 5, 8) == [1, 2, 3, 5]
    assert look_schedule("certify", 100, [1, 10, 100]) == [1, 10, 100]
    for wrong in (0, 65, 1.5, True, [], [0, 100], [100, 10], [10, 99], [10, 10, 100], [1.5, 100]):
        with pytest.raises(ValueError, match=r"\[certify\] looks must"):
            look_schedule("certify", 100, wrong)


@pytest.mark.parametrize("alpha", [0, 1, -1, 2, math.nan, "x", None, True])
def test_alpha_outside_of_its_range_is_refused(alpha):
    smooth = Smooth(lambda x: x, 2, 1.0)
    for f in (
        lambda: lower_confidence_bound(5, 10, alpha),
        lambda: certified_radius(5, 10, alpha, 1.0),
        lambda: draws_for_radius(1.0, 1.0, alpha),
        lambda: smooth.certify([[1.0, 0.0]], alpha=alpha),
        lambda: smooth.predict([[1.0, 0.0]], alpha=alpha),
    ):
        with pytest.raises(ValueError, match="alpha must be"):
            f()


def test_counts_that_are_none_are_refused():
    for votes, draws in ((-1, 10), (11, 10), (1.5, 10), (math.nan, 10), ([1, 20], [5, 10])):
        with pytest.raises(ValueError, match="votes must be"):
            lower_confidence_bound(votes, draws, 0.1)
    for sigma in (0, -1, math.inf, math.nan, "x"):
        with pytest.raises(ValueError, match="sigma must be"):
            certified_radius(5, 10, 0.1, sigma)
    with pytest.raises(ValueError, match="norm must be"):
        certified_radius(5, 10, 0.1, 1.0, norm="linf")
    with pytest.raises(ValueError, match="within reach"):
        draws_for_radius(2.0, 1.0, 0.1, norm="l1")
    assert ABSTAIN == -1
