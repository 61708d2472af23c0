import math

import pytest
from mlx_bulwark import compute_epsilon, find_noise_multiplier

# Published and recomputed values of dp-accounting 0.6: sigma = 1, q = 0.01, 1000 steps, delta = 1e-5.
GOLDEN = {"rdp": 2.1014, "pld": 1.8282}


@pytest.mark.parametrize("accountant", GOLDEN)
def test_golden_epsilon(accountant):
    assert compute_epsilon(1.0, 0.01, 1000, 1e-5, accountant) == pytest.approx(GOLDEN[accountant], abs=5e-5)


def test_golden_noise_multiplier():
    assert find_noise_multiplier(3.0, 1e-5, 0.01, 1000) == pytest.approx(0.81358, abs=2e-5)


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
