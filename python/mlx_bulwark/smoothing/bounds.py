"""Confidence bounds and radii of smoothed classifiers, in float64 by SciPy."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import special, stats

ABSTAIN = -1
Norm = Literal["l2", "l1"]
Array = np.ndarray[Any, Any]


def lower_confidence_bound(votes: Any, draws: Any, alpha: float) -> Any:
    """Bound a probability from below by Clopper and Pearson's exact one-sided interval.

    Args:
        votes: How often the event happened, an integer or an array of them, in [0, draws].
        draws: Number of independent draws, as ``votes``.
        alpha: Probability that the bound is wrong, in (0, 1).

    Returns:
        float64: The bound; an array where ``votes`` or ``draws`` is one. It is ``alpha ** (1 / n)`` if all n voted.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> from mlx_bulwark.smoothing import lower_confidence_bound
        >>> round(float(lower_confidence_bound(99_000, 100_000, 0.001)), 6)
        0.988989

    Source:
        C. J. Clopper and E. S. Pearson, "The Use of Confidence or Fiducial Limits", 1934.
    """
    return 1.0 - upper_failure_bound("lower_confidence_bound", votes, draws, alpha)


def upper_failure_bound(where: str, votes: Any, draws: Any, alpha: float) -> Any:
    """One less the lower bound: near 1 that is where a float64 has its digits."""
    check_fraction(where, "alpha", alpha)
    k, n = np.asarray(votes, np.float64), np.asarray(draws, np.float64)
    if ((k < 0) | (k > n) | (k != np.floor(k)) | (n != np.floor(n))).any():
        raise ValueError(f"[{where}] votes must be integers in [0, draws] but are {votes!r} of {draws!r}")
    with np.errstate(invalid="ignore"):
        bound = special.betainccinv(np.maximum(n - k + 1, 1), np.maximum(k, 1), alpha)
    return np.where(k == 0, 1.0, bound)[()]


def certified_radius(votes: Any, draws: Any, alpha: float, sigma: float, *, norm: Norm = "l2") -> Any:
    """Turn the votes for a class into the radius within which the smoothed classifier cannot leave it.

    With p the ``lower_confidence_bound``: ``sigma * Phi^-1(p)`` for Gaussian noise and the L2 norm,
    ``2 * sqrt(3) * sigma * (p - 1/2)`` for uniform noise and the L1 norm, both of standard deviation sigma.

    Args:
        votes: Votes for the class among draws that did not choose it, an integer or an array.
        draws: Number of draws, as ``votes``.
        alpha: Probability that the radius is wrong, in (0, 1).
        sigma: Standard deviation of the noise, in the unit of the input.
        norm: ``"l2"`` for Gaussian noise, ``"l1"`` for uniform noise.

    Returns:
        float64: The radius, in the unit of the input; 0 where p is at most 1/2 and nothing is certified.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> from mlx_bulwark.smoothing import certified_radius
        >>> round(float(certified_radius(100_000, 100_000, 0.001, sigma=1.0)), 2)
        3.81

    Source:
        J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019;
        G. Yang et al., "Randomized Smoothing of All Shapes and Sizes", 2020.
    """
    check_norm("certified_radius", norm)
    check_positive("certified_radius", "sigma", sigma)
    return radius_of(upper_failure_bound("certified_radius", votes, draws, alpha), sigma, norm)


def radius_of(failure: Any, sigma: float, norm: Norm) -> Any:
    """Radius from an upper bound on the probability of all other classes together."""
    q = np.minimum(failure, 0.5)
    radius = sigma * -special.ndtri(q) if norm == "l2" else 2 * math.sqrt(3) * sigma * (0.5 - q)
    return np.maximum(radius, 0.0)[()]


def draws_for_radius(radius: float, sigma: float, alpha: float, *, norm: Norm = "l2") -> int:
    """Tell how many draws could certify a radius at all: as many as it takes when every one votes for the class.

    Args:
        radius: The radius, > 0, in the unit of the input.
        sigma: Standard deviation of the noise, in the same unit.
        alpha: Probability that the radius is wrong, in (0, 1).
        norm: ``"l2"`` for Gaussian noise, ``"l1"`` for uniform noise.

    Returns:
        int: The least n whose ``certified_radius(n, n, alpha, sigma)`` reaches ``radius``.

    Raises:
        ValueError: An argument is out of its range, or no number of draws reaches the radius.

    Example:
        >>> from mlx_bulwark.smoothing import draws_for_radius
        >>> draws_for_radius(1.0, sigma=0.5, alpha=0.001)
        301

    Source:
        J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019.
    """
    where = "draws_for_radius"
    check_norm(where, norm)
    check_positive(where, "sigma", sigma)
    check_fraction(where, "alpha", alpha)
    check_positive(where, "radius", radius)
    least = failure_of(radius, sigma, norm)
    if least <= 0:
        raise ValueError(f"[{where}] radius must be within reach of noise of sigma {sigma:g} but is {radius:g}")
    n = max(1, math.ceil(math.log(alpha) / math.log1p(-least)) - 1)
    while radius_of(upper_failure_bound(where, n, n, alpha), sigma, norm) < radius:
        n += 1
    return n


def failure_of(radius: float, sigma: float, norm: Norm) -> float:
    """Probability of all other classes together that a radius allows."""
    if norm == "l2":
        return float(special.ndtr(-radius / sigma))
    return 0.5 - radius / (2 * math.sqrt(3) * sigma)


def prediction_p_value(top: Any, second: Any) -> Any:
    """Exact two-sided binomial p-value of top and runner-up being equally likely; 1 where nobody voted."""
    first, n = np.maximum(top, second), np.add(top, second)
    return np.minimum(1.0, 2 * stats.binom.sf(first - 1, n, 0.5))[()]


def look_schedule(where: str, n: int, looks: int | Sequence[int]) -> list[int]:
    """Numbers of draws after which the votes are looked at, increasing, the last one n."""
    if isinstance(looks, Sequence) and not isinstance(looks, str):
        plan = list(looks)
        if not plan or not all(map(is_integer, plan)) or plan[0] < 1 or plan[-1] != n or sorted(set(plan)) != plan:
            raise ValueError(
                f"[{where}] looks must be increasing numbers of draws that end with n = {n} but are {plan}"
            )
        return [int(look) for look in plan]
    if not is_integer(looks) or not 1 <= looks <= 64:
        raise ValueError(f"[{where}] looks must be an integer in [1, 64] or numbers of draws but is {looks!r}")
    return sorted({-(-n // 2**i) for i in range(int(looks))})


def is_integer(x: Any) -> bool:
    """Whether x is an integer and no boolean."""
    return hasattr(x, "__index__") and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Whether x is a real number and no boolean."""
    return isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)


def check_positive(where: str, name: str, x: Any) -> None:
    """Refuse what is not a positive, finite number."""
    if not is_number(x) or not 0 < x < math.inf:
        raise ValueError(f"[{where}] {name} must be a positive, finite number but is {x!r}")


def check_fraction(where: str, name: str, x: Any) -> None:
    """Refuse what is not a number between 0 and 1, both left out."""
    if not is_number(x) or not 0 < x < 1:
        raise ValueError(f"[{where}] {name} must be a number in (0, 1) but is {x!r}")


def check_count(where: str, name: str, x: Any) -> None:
    """Refuse what is not an integer of 1 or more."""
    if not is_integer(x) or x < 1:
        raise ValueError(f"[{where}] {name} must be an integer >= 1 but is {x!r}")


def check_norm(where: str, norm: Any) -> None:
    """Refuse what is no norm that has a certificate here."""
    if norm not in ("l2", "l1"):
        raise ValueError(f"[{where}] norm must be 'l2' or 'l1' but is {norm!r}")
