"""Banded matrix factorization: noise that is correlated over steps, so that it cancels in the sum of all updates.

With C lower triangular, Toeplitz and banded, its first column of norm 1, step t releases its clipped sum plus the t-th
row of C^-1 z times the noise's standard deviation, with z independent standard normals. That is post-processing of
C G + z, a Gaussian mechanism in which one participation has sensitivity 1.
"""

import functools
import math

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..ops.noise import add_gaussian

Array = NDArray[np.float64]
NEGLIGIBLE = 2.0**-27  # of the first: what rounding to float32 takes from the noise anyway


@functools.lru_cache(maxsize=32)
def strategy(bands: int, steps: int) -> tuple[float, ...]:
    """Coefficients of the banded Toeplitz C with the least squared error of all prefix sums; their norm is 1.

    McKenna 2024, Scaling up the Banded Matrix Factorization Mechanism for Differentially Private ML (arXiv:2405.15913).
    """
    from scipy.optimize import minimize

    bands = min(bands, steps)
    start = square_root(bands)
    if bands == 1:
        return (1.0,)
    weights = np.arange(steps, 0.0, -1.0)

    def loss(tail: Array) -> tuple[float, Array]:
        c = np.concatenate([[1.0], tail])
        d = inverse(c, steps)
        if not np.isfinite(d).all() or abs(d).max() > 1e6:
            return 1e30, np.zeros_like(tail)
        error, norm = _squared_error(d, weights), float(c @ c)
        h = inverse(c, steps, d)  # 1 / c^2: the derivative of 1 / c by c_j is its shift by j, negated
        g = np.cumsum((2 * weights * np.cumsum(d))[::-1])[::-1]
        slope = np.array([-g[j:] @ h[: steps - j] for j in range(1, bands)])
        return math.log(error) + math.log(norm), slope / error + 2 * tail / norm

    found = minimize(loss, start[1:] / start[0], jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-13})
    c = np.concatenate([[1.0], found.x])
    return tuple(float(x) for x in c / np.linalg.norm(c))


def square_root(bands: int) -> Array:
    """First coefficients of the square root of the prefix-sum matrix, of norm 1: the banded square-root strategy."""
    c = np.ones(bands)
    for j in range(1, bands):
        c[j] = c[j - 1] * (2 * j - 1) / (2 * j)
    unit: Array = c / np.linalg.norm(c)
    return unit


def inverse(coefficients: Array, steps: int, start: Array | None = None) -> Array:
    """First column of C^-1, or of C^-1 times another Toeplitz matrix that starts with ``start``."""
    from scipy.signal import lfilter

    impulse = np.zeros(steps)
    impulse[0] = 1.0
    column: Array = lfilter([1.0], coefficients, impulse if start is None else start)
    return column


def prefix_error(coefficients: Array, steps: int) -> float:
    """Root mean squared error of the prefix sums of C^-1 z, per unit of noise."""
    weights = np.arange(steps, 0.0, -1.0)
    return math.sqrt(_squared_error(inverse(coefficients, steps), weights) / steps)


def _squared_error(d: Array, weights: Array) -> float:
    return float(weights @ np.cumsum(d) ** 2)


@functools.lru_cache(maxsize=32)
def taps(coefficients: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """Coefficients of C^-1 as far as they are not negligible: noise from the normals of the last steps."""
    d = inverse(np.array(coefficients), steps)
    rest = np.cumsum(abs(d[::-1]))[::-1]
    return tuple(float(x) for x in d[: max(1, int((rest > NEGLIGIBLE * d[0]).sum()))])


def add_banded(
    sums: dict[str, mx.array],
    weights: tuple[float, ...],
    noise_std: mx.array,
    key: mx.array,
    step: int | mx.array,
) -> dict[str, mx.array]:
    """Add the step's row of C^-1 z: the normals of earlier steps are drawn again from their counters, not stored.

    ``step`` counts from 0 under this key, below 2^23. Every step has 2^40 blocks of the generator for itself.
    """
    weights = weights[: step + 1] if isinstance(step, int) else weights
    steps = mx.array(step, mx.int32) - mx.arange(len(weights), dtype=mx.int32)
    stds = mx.where(steps >= 0, noise_std * mx.array([abs(w) for w in weights]), 0.0)
    firsts = mx.stack([mx.zeros_like(steps), mx.maximum(steps, 0) << 8], axis=1).astype(mx.uint32)
    plus, minus = sums, {path: mx.zeros_like(s) for path, s in sums.items()}
    for weight, std, first in zip(weights, stds, firsts, strict=True):
        if weight > 0:
            plus = add_gaussian(plus, std, key, first)
        elif weight < 0:
            minus = add_gaussian(minus, std, key, first)
    return {path: plus[path] - minus[path] for path in sums}
