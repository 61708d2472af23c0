"""Privacy accounting of subsampled Gaussian steps, by Google's dp-accounting."""

import math
from collections.abc import Callable

from .events import ADJACENCY, Accountant, Release, composed_epsilon

__all__ = ["ADJACENCY", "compute_epsilon", "find_noise_multiplier"]


def compute_epsilon(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
) -> float:
    """Epsilon that Poisson-sampled DP-SGD has spent after a number of steps.

    Args:
        noise_multiplier: noise standard deviation over clipping norm.
        sample_rate: probability with which an example enters a batch, in [0, 1].
        steps: number of optimizer steps, empty batches included.
        delta: probability of the (epsilon, delta) guarantee, in (0, 1).
        accountant: ``"pld"`` (privacy loss distributions, tight) or ``"rdp"`` (Renyi, looser and quicker).

    Returns:
        Epsilon under add-or-remove-one-example adjacency; ``inf`` where there is no noise.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from mlx_bulwark.privacy import compute_epsilon
        >>> round(compute_epsilon(1.0, sample_rate=0.01, steps=1000, delta=1e-5), 2)
        1.83

    Source:
        Abadi et al. 2016 (arXiv:1607.00133); Koskela et al. 2020 (arXiv:1906.03049); Mironov et al. 2019
        (arXiv:1908.10530); computed by dp-accounting.
    """
    _check(noise_multiplier, sample_rate, steps, accountant)
    check_delta("compute_epsilon", delta)
    if steps == 0 or sample_rate == 0:
        return 0.0
    release = Release(float(sample_rate), float(noise_multiplier), int(steps))
    return composed_epsilon((release,), float(delta), accountant)


def find_noise_multiplier(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant = "pld",
) -> float:
    """Smallest noise multiplier whose steps stay within a target epsilon.

    Args:
        epsilon: target, above 0.
        delta: probability of the (epsilon, delta) guarantee, in (0, 1).
        sample_rate: probability with which an example enters a batch, in (0, 1].
        steps: number of optimizer steps.
        accountant: ``"pld"`` or ``"rdp"``.

    Returns:
        The noise multiplier, found to 1e-5 and rounded to the safe side.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from mlx_bulwark.privacy import find_noise_multiplier
        >>> round(find_noise_multiplier(3.0, 1e-5, sample_rate=0.01, steps=1000), 2)
        0.81

    Source:
        root search (Brent) over dp-accounting's epsilon.
    """
    _check(1.0, sample_rate, steps, accountant)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"[find_noise_multiplier] epsilon must be positive and finite but is {epsilon}")
    check_delta("find_noise_multiplier", delta)
    if steps == 0 or sample_rate == 0:
        raise ValueError(
            f"[find_noise_multiplier] steps and sample_rate must be positive but are {steps}, {sample_rate}"
        )
    loose = _solve(epsilon, 1.0, lambda sigma: compute_epsilon(sigma, sample_rate, steps, delta, "rdp"))
    if accountant == "rdp":
        return loose
    # PLD is slow where the noise is far too small: start from RDP's answer, which is close and on the safe side.
    return _solve(epsilon, loose, lambda sigma: compute_epsilon(sigma, sample_rate, steps, delta, "pld"))


def _solve(target: float, guess: float, epsilon_of: Callable[[float], float]) -> float:
    from scipy.optimize import brentq

    low = high = guess
    while epsilon_of(high) > target:
        low, high = high, high * 1.5
    while epsilon_of(low) <= target:
        low, high = low / 1.2, low
    sigma = float(brentq(lambda s: epsilon_of(s) - target, low, high, xtol=1e-5))
    while epsilon_of(sigma) > target:
        sigma += 1e-5
    return sigma


def check_delta(op: str, delta: float) -> None:
    """Refuse a delta that is no probability strictly between 0 and 1."""
    if not 0 < delta < 1:
        raise ValueError(f"[{op}] delta must be in (0, 1) but is {delta}")


def _check(noise_multiplier: float, sample_rate: float, steps: int, accountant: str) -> None:
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"[privacy] noise_multiplier must be at least 0 and finite but is {noise_multiplier}")
    if not 0 <= sample_rate <= 1:
        raise ValueError(f"[privacy] sample_rate must be in [0, 1] but is {sample_rate}")
    if steps < 0 or int(steps) != steps:
        raise ValueError(f"[privacy] steps must be a whole number of at least 0 but is {steps}")
    if accountant not in ("pld", "rdp"):
        raise ValueError(f"[privacy] accountant must be 'pld' or 'rdp' but is {accountant!r}")
