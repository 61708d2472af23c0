"""The settings of an engine, and what they make of each step."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from .banded import strategy
from .clipping import AdaptiveClipping, Clipping, ClippingMode, make_clipping
from .events import Accountant, Banded, Discrete, Event, Gaussian, Mechanism, Run, Sampling
from .sampling import SamplingMode, make_sampling
from .schedules import Schedule

NoiseMode = Literal["gaussian", "banded", "discrete"]


@dataclass(frozen=True)
class Plan:
    """Settings, checked, from which the event of every step follows. Public: nothing in it depends on data."""

    sampling: Sampling
    sample_rate: float
    clipping: Clipping
    noise_multiplier: float | Schedule
    max_grad_norm: float | Schedule  # over the whole model
    noise: NoiseMode = "gaussian"
    coefficients: tuple[float, ...] = ()  # of banded noise
    horizon: int = 0  # the number of steps that it is made for

    @property
    def scheduled(self) -> bool:
        """Whether a step may differ from the one before."""
        return callable(self.noise_multiplier) or callable(self.max_grad_norm)

    def mechanism(self, noise_multiplier: float, max_grad_norm: float) -> Mechanism:
        """Return how a clipped sum is released with a step's noise and clipping norm."""
        if self.noise == "banded":
            return Banded(noise_multiplier, max_grad_norm, self.coefficients)
        if self.noise == "discrete":
            return Discrete(noise_multiplier, max_grad_norm)
        return Gaussian(noise_multiplier, max_grad_norm)

    def event_at(self, steps: int) -> Event:
        """Return what the step after so many steps spends."""
        sigma, norm = _at(self.noise_multiplier, steps), _at(self.max_grad_norm, steps)
        if not 0 <= sigma < math.inf or (sigma == 0 and callable(self.noise_multiplier)):
            raise ValueError(
                "[PrivacyEngine] noise_multiplier must be at least 0, above it in a schedule, and finite but is "
                f"{sigma} after {steps} steps"
            )
        if (callable(self.max_grad_norm) or self.noise == "discrete") and not 0 < norm < math.inf:
            raise ValueError(
                f"[PrivacyEngine] max_grad_norm must be positive and finite but is {norm} after {steps} steps"
            )
        self.clipping.noise_ratio(sigma)
        return Event(self.sampling, self.mechanism(float(sigma), float(norm)))

    def outline(self) -> list[Any]:
        """Return what tells this plan from others; of a schedule, its first steps."""
        return [self.sampling, self.clipping, *(self.event_at(n) for n in range(64 if self.scheduled else 1))]

    def runs(self, first: int, count: int, session: int = 0) -> list[Run]:
        """Return a number of steps after the first ones as runs."""
        if not self.scheduled:
            return [Run(self.event_at(first), count, session)]
        events = itertools.groupby(range(first, first + count), self.event_at)
        return [Run(event, len(list(steps)), session) for event, steps in events]

    def scaled(self, factor: float) -> "Plan":
        """Return the plan with so many times the noise."""
        sigma = self.noise_multiplier
        return replace(self, noise_multiplier=(lambda n: factor * sigma(n)) if callable(sigma) else factor * sigma)


def make_plan(
    dataset_size: int,
    *,
    noise_multiplier: float | Schedule,
    max_grad_norm: float | Schedule | Mapping[str, float],
    sample_rate: float | None = None,
    batch_size: float | None = None,
    sampling: SamplingMode = "poisson",
    cycle_length: int | None = None,
    clipping: ClippingMode | AdaptiveClipping = "flat",
    noise: NoiseMode = "gaussian",
    bands: int | None = None,
    steps: int | None = None,
) -> Plan:
    """Plan from the arguments of `PrivacyEngine`."""
    scheme, rate = make_sampling(sampling, dataset_size, sample_rate, batch_size, cycle_length)
    _check_noise_mode(noise, bands, steps, cycle_length, (noise_multiplier, max_grad_norm), clipping)
    sigma = _at(noise_multiplier, 0)
    if not 0 <= sigma < math.inf:
        raise ValueError(f"[PrivacyEngine] noise_multiplier must be at least 0 and finite but is {sigma}")
    if callable(max_grad_norm):
        if clipping == "adaptive" or isinstance(clipping, AdaptiveClipping):
            raise ValueError("[PrivacyEngine] max_grad_norm must be a number with adaptive clipping but is a schedule")
        rule, _ = make_clipping(clipping, max_grad_norm(0), sigma, rate * dataset_size)
        return Plan(scheme, rate, rule, noise_multiplier, max_grad_norm)
    rule, norm = make_clipping(clipping, max_grad_norm, sigma, rate * dataset_size)
    coefficients = strategy(bands or cycle_length or 1, steps) if noise == "banded" and steps else ()
    return Plan(scheme, rate, rule, noise_multiplier, norm, noise, coefficients, steps or 0)


def default_accountant(accountant: Accountant | None, noise: NoiseMode) -> Accountant:
    """The tight one where it holds."""
    if noise == "discrete" and accountant == "pld":
        raise ValueError(
            "[PrivacyEngine] accountant must be 'rdp' with noise='discrete', whose privacy loss is not a Gaussian's, "
            "but is 'pld'"
        )
    return accountant or ("rdp" if noise == "discrete" else "pld")


def _check_noise_mode(
    noise: NoiseMode,
    bands: int | None,
    steps: int | None,
    cycle_length: int | None,
    values: tuple[object, ...],
    clipping: ClippingMode | AdaptiveClipping,
) -> None:
    if noise not in get_args(NoiseMode):
        raise ValueError(
            f"[PrivacyEngine] noise must be one of {', '.join(map(repr, get_args(NoiseMode)))} but is {noise!r}"
        )
    adaptive = clipping == "adaptive" or isinstance(clipping, AdaptiveClipping)
    if noise == "discrete" and adaptive:
        raise ValueError("[PrivacyEngine] clipping must not be adaptive with noise='discrete' but is")
    if noise != "banded":
        if bands is not None:
            raise ValueError(f"[PrivacyEngine] bands must be given with noise='banded' only but is {bands}")
        return
    if steps is None or steps < 1:
        raise ValueError(f"[PrivacyEngine] steps must be given with noise='banded', made for so many, but is {steps}")
    if bands is None and cycle_length is None:
        raise ValueError("[PrivacyEngine] bands must be given with noise='banded' but is None")
    if bands is not None and (bands < 1 or int(bands) != bands):
        raise ValueError(f"[PrivacyEngine] bands must be a positive whole number but is {bands}")
    if any(callable(v) for v in values) or adaptive:
        raise ValueError(
            "[PrivacyEngine] noise_multiplier and max_grad_norm must stay the same in a run with noise='banded' but "
            "change: noise that is to cancel in the sum must have one scale"
        )


def _at(value: float | Schedule, steps: int) -> float:
    return value(steps) if callable(value) else value
