"""Privacy accounting of subsampled Gaussian steps, by Google's dp-accounting."""

import functools
import math
import warnings
from collections.abc import Callable

from .events import ADJACENCY, COARSE, Accountant, Release, composed_epsilon, integer_rdp_epsilon

__all__ = ["ADJACENCY", "compute_epsilon", "find_noise_multiplier", "find_steps"]

Releases = tuple[Release, ...]
TOLERANCE = 1e-5  # of a noise multiplier, relative where it is above 1
MOST_STEPS = 10**9


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
        delta: probability of the (epsilon, delta) guarantee, in (0, 1); at least 1e-12 with ``"pld"``.
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
        delta: probability of the (epsilon, delta) guarantee, in (0, 1); at least 1e-12 with ``"pld"``.
        sample_rate: probability with which an example enters a batch, in (0, 1].
        steps: number of optimizer steps.
        accountant: ``"pld"`` or ``"rdp"``.

    Returns:
        The noise multiplier, found to 1e-5 (relative, above 1) and rounded to the safe side.

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
    check_delta("find_noise_multiplier", delta)
    if steps == 0 or sample_rate == 0:
        raise ValueError(
            f"[find_noise_multiplier] steps and sample_rate must be positive but are {steps}, {sample_rate}"
        )
    return calibrate(epsilon, delta, accountant, lambda sigma: (Release(float(sample_rate), float(sigma), int(steps)),))


def find_steps(
    epsilon: float,
    delta: float,
    sample_rate: float,
    noise_multiplier: float,
    accountant: Accountant = "pld",
) -> int:
    """Largest number of steps that stays within a target epsilon.

    Args:
        epsilon: target, above 0.
        delta: probability of the (epsilon, delta) guarantee, in (0, 1); at least 1e-12 with ``"pld"``.
        sample_rate: probability with which an example enters a batch, in (0, 1]. Epochs are steps times this.
        noise_multiplier: noise standard deviation over clipping norm, above 0.
        accountant: ``"pld"`` or ``"rdp"``.

    Returns:
        Number of optimizer steps; 0 where the first would already pass the target.

    Raises:
        ValueError: an argument is out of range, or more than 10^9 steps stay within the target.

    Example:
        >>> from mlx_bulwark.privacy import find_steps
        >>> find_steps(2.0, 1e-5, sample_rate=0.01, noise_multiplier=1.0)
        1202

    Source:
        bisection over dp-accounting's epsilon.
    """
    _check(noise_multiplier, sample_rate, 1, accountant)
    check_delta("find_steps", delta)
    check_epsilon("find_steps", epsilon)
    if noise_multiplier == 0 or sample_rate == 0:
        raise ValueError(
            f"[find_steps] noise_multiplier and sample_rate must be positive but are {noise_multiplier}, {sample_rate}"
        )

    def epsilon_of(steps: int) -> float:
        return compute_epsilon(noise_multiplier, sample_rate, steps, delta, accountant)

    guess = 1
    if accountant == "pld":  # RDP's answer is close, and a number of steps costs it nothing
        rdp = functools.partial(integer_rdp_epsilon, delta=delta)
        guess = most_steps(epsilon, lambda k: rdp((Release(sample_rate, noise_multiplier, k),)), 1, MOST_STEPS)
    steps = most_steps(epsilon, epsilon_of, guess, MOST_STEPS)
    if steps >= MOST_STEPS:
        raise ValueError(f"[find_steps] epsilon must limit the steps but {epsilon} allows more than {MOST_STEPS:g}")
    return steps


def most_steps(target: float, epsilon_of: Callable[[int], float], guess: int, most: int) -> int:
    """Largest k in [0, most] whose epsilon, which grows with k, stays within the target; looked for around a guess."""
    low = high = min(max(guess, 1), most)
    while epsilon_of(high) <= target:
        if high == most:
            return most
        low, high = high, min(high + max(1, high // 4), most)
    while epsilon_of(low) > target:
        if low == 1:
            return 0
        low, high = low - max(1, low // 4), low
    bisect = False
    while high - low > 1:  # epsilon grows like a power of k: false position in logarithms, and bisection in turn
        middle = (low + high) // 2
        if not bisect and (at_low := epsilon_of(low)) > 0:
            share = math.log(target / at_low) / math.log(epsilon_of(high) / at_low)
            middle = min(max(round(low * (high / low) ** share), low + 1), high - 1)
        bisect = not bisect and high - low > 8
        low, high = (middle, high) if epsilon_of(middle) <= target else (low, middle)
    return low


def calibrate(epsilon: float, delta: float, accountant: Accountant, releases_of: Callable[[float], Releases]) -> float:
    """Smallest scale at which ``releases_of(scale)``, the less the larger the scale, stays within epsilon at delta."""
    check_epsilon("find_noise_multiplier", epsilon)
    if accountant == "rdp":
        return _solve(epsilon, 1.0, lambda s: composed_epsilon(releases_of(s), delta, "rdp"), TOLERANCE)
    # PLD is slow, and slowest where the noise is far too small: from RDP's answer, which is close and on the safe side,
    # over a coarse grid to two or three evaluations on the fine one.
    loose = _solve(epsilon, 1.0, lambda s: integer_rdp_epsilon(releases_of(s), delta), 1e-2)
    grid = COARSE * max(0.1, min(1.0, epsilon), epsilon / 8)

    def coarse(s: float) -> float:
        return composed_epsilon(releases_of(s), delta, "pld", grid)

    near = _solve(epsilon, loose, coarse, 1e-4)
    slope = (coarse(near * 1.001) - coarse(near / 1.001)) / (near * 0.002)
    return _polish(epsilon, near, slope, lambda s: composed_epsilon(releases_of(s), delta, "pld"))


def _polish(target: float, guess: float, slope: float, epsilon_of: Callable[[float], float]) -> float:
    """Newton's steps with a slope that is known, to a value that is on the safe side by at most TOLERANCE."""
    tolerance = TOLERANCE * max(1.0, guess)
    for _ in range(6):
        excess = epsilon_of(guess) - target
        if slope * tolerance <= excess <= 0:
            return guess
        guess = min(max(guess - excess / slope + tolerance / 4, guess / 1.05), guess * 1.05)
    return _solve(target, guess, epsilon_of, TOLERANCE, 1.001)


def _solve(
    target: float, guess: float, epsilon_of: Callable[[float], float], tolerance: float, by: float = 1.5
) -> float:
    from scipy.optimize import brentq

    known: dict[float, float] = {}

    def excess(s: float) -> float:
        if s not in known:
            known[s] = epsilon_of(s) - target
        return known[s]

    low = high = guess
    while excess(high) > 0:
        low, high = high, high * by
    while excess(low) <= 0:
        low, high = low / by, low
    found = float(brentq(excess, low, high, xtol=tolerance * max(1.0, low) / 2))
    step = tolerance * max(1.0, found) / 2
    while excess(found) > 0:
        found += step
    return found


def warn_of_delta(delta: float, dataset_size: int) -> None:
    """Warn where delta lets a mechanism publish some person's record outright."""
    if delta >= 1 / dataset_size:
        warnings.warn(
            f"delta {delta:g} is not below 1 / {dataset_size} examples: publishing one example at random would satisfy "
            "it; choose it well below",
            stacklevel=3,
        )


def check_epsilon(op: str, epsilon: float) -> None:
    """Refuse a target that is not positive and finite."""
    if not 0 < epsilon < math.inf:
        raise ValueError(f"[{op}] epsilon must be positive and finite but is {epsilon}")


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
