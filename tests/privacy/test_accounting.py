import math
import time

import pytest
from mlx_bulwark import compute_epsilon, find_noise_multiplier, find_steps

# Published and recomputed values of dp-accounting 0.6: sigma = 1, q = 0.01, 1000 steps, delta = 1e-5.
GOLDEN = {"rdp": 2.1014, "pld": 1.8282}


@pytest.mark.parametrize("accountant", GOLDEN)
def test_golden_epsilon(accountant):
    assert compute_epsilon(1.0, 0.01, 1000, 1e-5, accountant) == pytest.approx(GOLDEN[accountant], abs=5e-5)


def test_golden_noise_multiplier():
    assert find_noise_multiplier(3.0, 1e-5, 0.01, 1000) == pytest.approx(0.81358, abs=2e-5)


def test_golden_unsampled_epochs():
    assert compute_epsilon(1.0, 1.0, 10, 1e-5) == pytest.approx(17.8566, abs=5e-5)


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (0.5, 0.3), (4.0, 1e-4), (2.0, 1.0)])
def test_integer_orders_are_those_of_dp_accounting(sigma, rate):
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant
    from mlx_bulwark.privacy.events import INTEGER_ORDERS, Release, integer_rdp_epsilon

    theirs = RdpAccountant(INTEGER_ORDERS)
    theirs.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)), 30)
    ours = integer_rdp_epsilon((Release(rate, sigma, 10), Release(rate, sigma, 20)), 1e-6)
    assert ours == pytest.approx(theirs.get_epsilon(1e-6), rel=1e-9)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_equal_to_the_accountants_of_dp_accounting(accountant):
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(1.3)), 700)
    theirs = {"pld": PLDAccountant, "rdp": RdpAccountant}[accountant]().compose(event).get_epsilon(1e-6)
    assert compute_epsilon(1.3, 0.02, 700, 1e-6, accountant) == pytest.approx(theirs, rel=1e-9)


def test_unsampled_gaussian_has_its_closed_form():
    # Balle and Wang 2018: delta(eps) of k Gaussian releases with multiplier s is that of one with s / sqrt(k)
    from scipy.stats import norm

    sigma, k, delta = 2.0, 4, 1e-5
    mu = math.sqrt(k) / sigma
    epsilon = compute_epsilon(sigma, 1.0, k, delta)
    exact = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert exact == pytest.approx(delta, rel=5e-3)
    assert exact <= delta


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(0.5, 0.18, 100), (3.0, 0.01, 1000), (8.0, 1.0, 10)])
@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_calibration_stays_within_the_target_and_close(epsilon, rate, steps, accountant):
    sigma = find_noise_multiplier(epsilon, 1e-5, rate, steps, accountant)
    assert compute_epsilon(sigma, rate, steps, 1e-5, accountant) <= epsilon
    assert compute_epsilon(sigma - 1e-3, rate, steps, 1e-5, accountant) > epsilon


# each took from 12 seconds to minutes when the search walked through noise that is far too small
@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [(0.01, 1e-5, 0.01, 1000), (100.0, 1e-5, 0.2, 10_000), (1.0, 1e-5, 1.0, 10**6), (700.0, 1e-5, 0.01, 100)],
)
def test_calibration_at_extremes(epsilon, delta, rate, steps):
    start = time.process_time()
    sigma = find_noise_multiplier(epsilon, delta, rate, steps)
    assert time.process_time() - start < 10
    assert compute_epsilon(sigma, rate, steps, delta) <= epsilon
    assert compute_epsilon(sigma * 0.999, rate, steps, delta) > epsilon


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_steps_for_a_target(accountant):
    steps = find_steps(2.0, 1e-5, 0.01, 1.0, accountant)
    assert compute_epsilon(1.0, 0.01, steps, 1e-5, accountant) <= 2.0
    assert compute_epsilon(1.0, 0.01, steps + 1, 1e-5, accountant) > 2.0
    assert find_steps(1e-3, 1e-5, 0.01, 1.0, accountant) == 0


def test_tiny_deltas():
    with pytest.raises(ValueError, match="at least 1e-12 with accountant 'pld'"):
        compute_epsilon(1.0, 0.01, 1000, 1e-13)
    with pytest.raises(ValueError, match="at least 1e-12 with accountant 'pld'"):
        find_noise_multiplier(1.0, 1e-30, 0.01, 1000)
    assert 1.0 < compute_epsilon(1.0, 0.01, 1000, 1e-12) < compute_epsilon(1.0, 0.01, 1000, 1e-12, "rdp") < 20
    assert compute_epsilon(1.0, 0.01, 1000, 1e-200, "rdp") < math.inf
    sigma = find_noise_multiplier(1.0, 1e-30, 0.01, 1000, "rdp")
    assert compute_epsilon(sigma, 0.01, 1000, 1e-30, "rdp") <= 1.0


def test_ends():
    assert compute_epsilon(1.0, 0.01, 0, 1e-5) == 0.0
    assert compute_epsilon(1.0, 0.0, 100, 1e-5) == 0.0
    assert compute_epsilon(0.0, 0.01, 1, 1e-5) == math.inf


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((-1.0, 0.1, 1, 1e-5), "noise_multiplier must"),
        ((math.nan, 0.1, 1, 1e-5), "noise_multiplier must"),
        ((1.0, 1.1, 1, 1e-5), "sample_rate must"),
        ((1.0, 0.1, -1, 1e-5), "steps must"),
        ((1.0, 0.1, 1, 0.0), "delta must"),
        ((1.0, 0.1, 1, 1.0), "delta must"),
        ((1.0, 0.1, 1, 1e-5, "prv"), "accountant must"),
    ],
)
def test_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        compute_epsilon(*arguments)


@pytest.mark.parametrize(
    ("epsilon", "delta", "steps"), [(0.0, 1e-5, 10), (math.inf, 1e-5, 10), (1.0, 0.0, 10), (1.0, 1e-5, 0)]
)
def test_calibration_refused(epsilon, delta, steps):
    with pytest.raises(ValueError, match="must be"):
        find_noise_multiplier(epsilon, delta, 0.1, steps)
