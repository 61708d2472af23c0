"""Noise at inference: the cheap defence, which proves nothing."""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn

from ..ops.noise import Counter, advance_counter, blocks_used, random_key
from ..ops.smooth import noisy_copies
from .bounds import check_count, check_positive


def perturb(
    x: mx.array,
    sigma: float,
    *,
    bounds: tuple[float, float] | None = None,
    key: mx.array | None = None,
    counter: Counter = 0,
) -> mx.array:
    """Add fresh secret noise to inputs before a model sees them.

    It blurs what an adversarial input was fitted to, at some cost in accuracy. It is not a certificate: an attacker
    who averages gradients over noise (EOT-PGD) undoes most of it. ``Smooth.certify`` gives the proof.

    Args:
        x: Inputs of any shape, float32, float16 or bfloat16.
        sigma: Standard deviation of the noise, in the unit of ``x``.
        bounds: Lowest and highest value, to which the result is clipped.
        key: uint32 ``[8]``. By default a fresh one from the operating system, at each call; a compiled function would
            keep the one that it was traced with, so it takes its key and a counter that advances as inputs.
        counter: First block of the noise under ``key``, of which ``blocks_used(x)`` are used.

    Returns:
        array: Like ``x``.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.smoothing import perturb
        >>> x = mx.full((2, 3), 0.5)
        >>> noisy = perturb(x, 0.1, bounds=(0, 1))
        >>> noisy.shape, bool((noisy == x).all())
        ((2, 3), False)

    Source:
        J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019;
        A. Athalye et al., "Synthesizing Robust Adversarial Examples", 2018 (EOT).
    """
    check_positive("perturb", "sigma", sigma)
    return noisy_copies(x, 1, sigma, random_key() if key is None else key, counter, bounds=bounds)[0]


class SmoothedModel(nn.Module):
    """A classifier whose predictions are averaged over fresh noise: the cheap defence, not a certificate.

    It returns the log of the mean probability over ``copies`` noisy copies of each input, which serves as logits and
    is differentiable, as EOT attacks want it. The noise has a key from the operating system, which is no parameter and
    is never saved; so the module cannot be copied or pickled. In a compiled function ``model.state`` must be among
    inputs and outputs, or the noise repeats.

    Args:
        model: Takes ``[m, *shape]``, returns logits ``[m, c]``.
        sigma: Standard deviation of the noise, in the unit of the input.
        copies: Noisy copies of each input.
        bounds: Lowest and highest value, to which copies are clipped.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.smoothing import SmoothedModel
        >>> model = SmoothedModel(nn.Linear(4, 3), sigma=0.25)
        >>> bool(mx.allclose(mx.exp(model(mx.zeros((2, 4)))).sum(axis=1), mx.ones(2)))
        True

    Source:
        J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019.
    """

    def __init__(
        self,
        model: Callable[[mx.array], mx.array],
        sigma: float,
        copies: int = 8,
        *,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        check_positive("SmoothedModel", "sigma", sigma)
        check_count("SmoothedModel", "copies", copies)
        self.model = model
        self.sigma, self.copies, self.bounds = float(sigma), int(copies), bounds
        self._key, self._counter = random_key(), mx.array([0, 0], mx.uint32)

    def __call__(self, x: mx.array) -> mx.array:
        """Average predictions ``[b, c]`` over fresh noise."""
        if not isinstance(x, mx.array) or x.ndim < 2:
            has = f"shape {x.shape}" if isinstance(x, mx.array) else f"type {type(x).__name__}"
            raise ValueError(f"[SmoothedModel] x must be an array [b, *shape] but has {has}")
        counter = self._counter
        self._counter = advance_counter(counter, blocks_used((self.copies, *x.shape)))
        noisy = noisy_copies(x, self.copies, self.sigma, self._key, counter, bounds=self.bounds)
        logits = self.model(noisy.reshape(-1, *x.shape[1:])).astype(mx.float32)
        each = nn.log_softmax(logits, axis=-1).reshape(self.copies, len(x), -1)
        return mx.logsumexp(each, axis=0) - math.log(self.copies)

    def __reduce__(self) -> NoReturn:
        raise TypeError("[SmoothedModel] it holds a secret key: it cannot be copied or pickled; copy its model")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__reduce__()
