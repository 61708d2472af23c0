"""Exact discrete Gaussian noise on an integer grid: integer arithmetic from random bits to the noised sum.

A float is not a real number: the lowest bits of a Gaussian sample in floating point tell sums apart that its density
does not (Mironov 2012, On Significance of the Least Significant Bits for Differential Privacy), and this was turned
into attacks on Gaussian noise and DP-SGD (Jin et al. 2022, Are We There Yet?, arXiv:2112.05307). Here the gradients
become integers before they are summed, and no float has a part in the noise. What is left is time: how many words are
drawn depends on the noise, and who can measure a step very finely learns something of it.
"""

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Words = Callable[[int], NDArray[np.uint64]]  # n -> n secret 64-bit words that nobody else gets
Integers = NDArray[np.int64]

FINEST = 20  # the clipping norm is at least 2^20 steps of the grid, unless the noise is very large
LARGEST = 25  # and the noise at most 2^25 steps, so that 64 bits hold what the sampler computes
HALF = 21  # bits of a square that are added apart
# Variance of each rank's noise. The sum of so wide discrete Gaussians is a discrete Gaussian but for a factor of
# e^tau, tau < 10 * ranks * e^(-pi^2 2^20) in every point, which no figure of ours can show (Kairouz, Liu and Steinke
# 2021, The Distributed Discrete Gaussian Mechanism, arXiv:2102.06387).
LEAST_SHARE = 1 << 20
MARGIN = 1 - 2.0**-12  # of the norm that is clipped to, so that rounding of the norm cannot pass the bound


class Grid(NamedTuple):
    """Steps of ``2**exponent``; a unit's integer gradient has at most this squared norm; the noise has variance m t."""

    exponent: int
    max_squared_norm: int
    t: int
    m: int


def make_grid(noise_multiplier: float, max_grad_norm: float, ranks: int = 1) -> Grid:
    """Grid of a step; its noise, or that of all ranks together, is at least what the noise multiplier says."""
    bits = min(FINEST, LARGEST - max(0, math.ceil(math.log2(noise_multiplier))) - 1) if noise_multiplier else FINEST
    exponent = math.floor(math.log2(max_grad_norm)) - bits
    norm = Fraction(max_grad_norm) / Fraction(2) ** exponent
    share = (Fraction(noise_multiplier) * norm) ** 2 / ranks
    if ranks > 1 and 0 < share < LEAST_SHARE:
        raise ValueError(
            f"[PrivacyEngine] noise_multiplier must be at least {math.sqrt(ranks * LEAST_SHARE / norm**2):.3g} with "
            f"noise='discrete' and {ranks} ranks, whose noises do not add up to a discrete Gaussian otherwise, but is "
            f"{noise_multiplier:g}"
        )
    t = math.isqrt(math.floor(share)) + 1
    return Grid(exponent, math.floor(norm**2), t, math.ceil(share / t))


def on_grid(gradient: dict[str, mx.array], grid: Grid) -> tuple[dict[str, mx.array], mx.array]:
    """One unit's clipped gradient, truncated toward zero to integers, and whether its norm is within the bound.

    Truncation makes no coordinate larger, so it makes no norm larger; the scale is a power of two, which is exact.
    """
    scale, longest = mx.array(2.0**-grid.exponent), math.isqrt(grid.max_squared_norm)
    bound, integers = mx.array(grid.max_squared_norm, mx.int64), {}
    within, high, low = mx.array(True), mx.array(0, mx.int64), mx.array(0, mx.int64)
    for path, g in gradient.items():
        scaled = g.astype(mx.float32) * scale
        # what no coordinate may be is refused before it is squared; the squares are added in two halves: no overflow
        within = within & mx.all(mx.abs(scaled) < longest + 1)  # NaN compares false
        integers[path] = mx.where(mx.abs(scaled) < longest + 1, scaled, 0.0).astype(mx.int64)  # truncates toward zero
        squares = integers[path] * integers[path]
        high, low = high + (squares >> HALF).sum(), low + (squares & ((1 << HALF) - 1)).sum()
    within = within & (high < mx.array(1 << (62 - HALF), mx.int64)) & ((high << HALF) + low <= bound)
    return {path: mx.where(within, z, mx.array(0, mx.int64)) for path, z in integers.items()}, within


def integer_sums(
    units: Iterable[dict[str, mx.array]], zeros: dict[str, mx.array], grid: Grid
) -> tuple[dict[str, mx.array], int]:
    """Exact sum of the units' clipped gradients on the grid, and how many were left out, their norm past the bound."""
    total = {path: z.astype(mx.int64) for path, z in zeros.items()}
    left_out = 0
    for gradient in units:
        integers, within = on_grid(gradient, grid)
        total = {path: total[path] + z for path, z in integers.items()}
        mx.eval(total, within)
        left_out += not within.item()
    return total, left_out


def add_discrete(sums: dict[str, mx.array], grid: Grid, words: Words) -> dict[str, mx.array]:
    """Integer sums with exact noise, still integers."""
    return {
        path: mx.array(np.array(z) + discrete_gaussian(z.size, grid.t, grid.m, words).reshape(z.shape))
        for path, z in sums.items()
    }


def off_grid(sums: dict[str, mx.array], grid: Grid) -> dict[str, mx.array]:
    """Noised integers as float32."""
    return {
        path: mx.array(np.ldexp(np.array(z).astype(np.float64), grid.exponent).astype(np.float32))
        for path, z in sums.items()
    }


def discrete_gaussian(n: int, t: int, m: int, words: Words) -> Integers:
    """Draw n integers of the discrete Gaussian of variance parameter m t, by rejection from a discrete Laplace.

    Canonne, Kamath and Steinke 2020, The Discrete Gaussian for Differential Privacy, algorithm 3 (arXiv:2004.00010).
    """
    drawn = np.empty(n, np.int64)
    filled = 0
    while filled < n:
        y = discrete_laplace(max(64, math.ceil((n - filled) * 1.4)), t, words)
        y = y[_bernoulli_exp(abs(abs(y) - m), 2 * m * t, words)][: n - filled]
        drawn[filled : filled + len(y)] = y
        filled += len(y)
    return drawn


def discrete_laplace(n: int, t: int, words: Words) -> Integers:
    """Integers of probability proportional to exp(-|x| / t), algorithm 2, as many of n tries as were accepted."""
    u = _uniform(np.full(n, t, np.int64), words)
    u = u[_bernoulli_exp_fraction(u, np.full(n, t, np.int64), words)]
    x = u + t * _geometric(len(u), words)
    negative = (words(len(x)) >> np.uint64(63)).astype(bool)
    drawn: Integers = np.where(negative, -x, x)[~(negative & (x == 0))]
    return drawn


def _bernoulli_exp(distance: Integers, d: int, words: Words) -> NDArray[np.bool_]:
    """Coins of probability exp(-distance^2 / d)."""
    if (distance < 2**31).all():
        whole, rest = np.divmod(distance**2, d)
    else:  # past 64 bits: Python's integers; so far from the middle that it hardly ever happens
        parts = [divmod(int(x) ** 2, d) for x in distance]
        whole, rest = (np.array(column, np.int64) for column in zip(*parts, strict=True))
    alive = _bernoulli_exp_fraction(rest, np.full(len(rest), d, np.int64), words)
    return alive & _all_ones(np.where(alive, whole, 0), words)


def _all_ones(count: Integers, words: Words) -> NDArray[np.bool_]:
    """Whether ``count`` coins of probability exp(-1) all fall."""
    alive = np.ones(len(count), bool)
    left = count.copy()
    while (open_ := np.flatnonzero(alive & (left > 0))).size:
        ones = np.ones(len(open_), np.int64)
        alive[open_] = _bernoulli_exp_fraction(ones, ones, words)
        left[open_] -= 1
    return alive


def _geometric(n: int, words: Words) -> Integers:
    """How many coins of probability exp(-1) fall before one does not."""
    count = np.zeros(n, np.int64)
    active = np.arange(n)
    while active.size:
        ones = np.ones(len(active), np.int64)
        active = active[_bernoulli_exp_fraction(ones, ones, words)]
        count[active] += 1
    return count


def _bernoulli_exp_fraction(n: Integers, d: Integers, words: Words) -> NDArray[np.bool_]:
    """Coins of probability exp(-n / d), with n at most d: algorithm 1."""
    odd = np.zeros(len(n), bool)
    active, k = np.arange(len(n)), 1
    while active.size:
        falls = _uniform(d[active] * k, words) < n[active]
        odd[active[~falls]] = k % 2 == 1
        active, k = active[falls], k + 1
    return odd


def _uniform(below: Integers, words: Words) -> Integers:
    """Uniform integers from 0 up to and without ``below``, by rejection of too large bit strings."""
    if not below.size:
        return below
    mask = np.uint64((1 << int(below.max() - 1).bit_length()) - 1)
    drawn: Integers = np.empty(len(below), np.int64)
    active = np.arange(len(below))
    while active.size:
        drawn[active] = (words(len(active)) & mask).astype(np.int64)
        active = active[drawn[active] >= below[active]]
    return drawn
