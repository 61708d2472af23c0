"""Lower confidence bounds on epsilon from guesses of which canaries took part in one training run."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Guesses = int | tuple[int, int] | None


@dataclass(frozen=True)
class GuessBound:
    """The bound that one number of guesses gives.

    Attributes:
        included_guesses: canaries with the highest scores, guessed to have taken part (k+).
        excluded_guesses: canaries with the lowest scores, guessed not to have (k-).
        correct: guesses that were right.
        epsilon: the lower confidence bound on epsilon; the confidence holds for all numbers of guesses together.
        ceiling: what it would be with every guess right.
    """

    included_guesses: int
    excluded_guesses: int
    correct: int
    epsilon: float
    ceiling: float

    @property
    def guesses(self) -> int:
        """Number of guesses; the canaries between are abstained from."""
        return self.included_guesses + self.excluded_guesses


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """Lower confidence bound on epsilon from one run with independently included canaries.

    Args:
        canaries: number m of canaries, each included by a fair coin of its own.
        guesses: number r of canaries guessed about, the rest abstained from; fixed before the coins are looked at.
        correct: number of right guesses.
        delta: delta of the (epsilon, delta) guarantee under test, for adding or removing one canary.
        confidence: probability with which the bound holds.

    Returns:
        The smallest epsilon whose (epsilon, delta) guarantee the guesses do not refute; 0 where they refute none.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from mlx_bulwark.privacy import one_run_epsilon
        >>> round(one_run_epsilon(1000, guesses=100, correct=95, delta=1e-5), 2)
        2.17

    Source:
        Steinke, Nasr, Jagielski 2023, Privacy Auditing with One (1) Training Run, theorem 5.2 (arXiv:2305.08846).
    """
    from scipy.optimize import brentq

    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            "[one_run_epsilon] correct, guesses and canaries must be in ascending order but are "
            f"{correct}, {guesses}, {canaries}"
        )
    check_probability("one_run_epsilon", "delta", delta, zero=True)
    check_probability("one_run_epsilon", "confidence", confidence)
    significance = 1 - confidence

    def excess(epsilon: float) -> float:
        return p_value(canaries, guesses, correct, epsilon, delta) - significance

    if excess(0.0) >= 0:
        return 0.0
    low, high = 0.0, 1.0
    while excess(high) < 0:
        low, high = high, 2 * high
    root = float(brentq(excess, low, high, xtol=1e-9))
    return max(low, root - 1e-8)


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest probability of that many right guesses, or more, under any (epsilon, delta) guarantee."""
    from scipy.stats import binom

    q = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, q))
    # Counts further below the mean have a probability of less than exp(-72): Hoeffding.
    lowest = max(0, math.floor(guesses * q - 6 * math.sqrt(guesses)))
    below = np.arange(correct - 1, lowest - 1, -1)
    sums = np.cumsum(binom.pmf(below, guesses, q))
    alpha = float((sums / np.arange(1, len(below) + 1)).max(initial=0.0))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def one_run_bounds(scores: Any, included: Any, delta: float, confidence: float, guesses: Guesses) -> list[GuessBound]:
    """Bounds for the planned numbers of guesses; the confidence is shared out among them (Bonferroni)."""
    m = len(scores)
    plan = plan_guesses(m, guesses)
    each = 1 - (1 - confidence) / len(plan)
    order = np.argsort(scores, kind="stable")  # ties fall by index, which knows nothing of the coins
    bounds = []
    for up, down in plan:
        correct = int(included[order[m - up :]].sum() + (~included[order[:down]]).sum())
        bounds.append(
            GuessBound(
                up,
                down,
                correct,
                one_run_epsilon(m, up + down, correct, delta, each),
                one_run_epsilon(m, up + down, up + down, delta, each),
            )
        )
    return bounds


def plan_guesses(canaries: int, guesses: Guesses) -> list[tuple[int, int]]:
    """Numbers of guesses (k+, k-), known before any score is: one as asked for, or 0.9 m, m/2, m/4, ... m/64."""
    if guesses is None:
        # Not all: of m fair coins some more, or fewer, than half fall on one side, and those guesses would be wrong.
        plan = [canaries >> k for k in range(6, 0, -1) if canaries >> k] + [9 * canaries // 10]
        return [(n - n // 2, n // 2) for n in plan]
    up, down = guesses if isinstance(guesses, tuple) else (guesses - guesses // 2, guesses // 2)
    if up < 0 or down < 0 or not 1 <= up + down <= canaries:
        raise ValueError(f"[audit] guesses must be from 1 to the number of canaries, {canaries}, but is {guesses}")
    return [(up, down)]


def check_probability(op: str, name: str, value: float, zero: bool = False) -> None:
    """Refuse what is not a probability inside (0, 1)."""
    if not (0 < value < 1 or (zero and value == 0)):
        raise ValueError(f"[{op}] {name} must be in {'[' if zero else '('}0, 1) but is {value}")
