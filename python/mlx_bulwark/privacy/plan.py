"""The settings of an engine, and what they make of each step."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .clipping import AdaptiveClipping, Clipping, ClippingMode, make_clipping
from .events import Event, Gaussian, Mechanism, Run, Sampling
from .sampling import SamplingMode, make_sampling
from .schedules import Schedule


@dataclass(frozen=True)
class Plan:
    """Settings, checked, from which the event of every step follows. Public: nothing in it depends on data."""

    sampling: Sampling
    sample_rate: float
    clipping: Clipping
    noise_multiplier: float | Schedule
    max_grad_norm: float | Schedule  # over the whole model

    @property
    def scheduled(self) -> bool:
        """Whether a step may differ from the one before."""
        return callable(self.noise_multiplier) or callable(self.max_grad_norm)

    def mechanism(self, noise_multiplier: float, max_grad_norm: float) -> Mechanism:
        """Return how a clipped sum is released with a step's noise and clipping norm."""
        return Gaussian(noise_multiplier, max_grad_norm)

    def event_at(self, steps: int) -> Event:
        """Return what the step after so many steps spends."""
        sigma, norm = _at(self.noise_multiplier, steps), _at(self.max_grad_norm, steps)
        if not 0 <= sigma < math.inf or (sigma == 0 and callable(self.noise_multiplier)):
            raise ValueError(
                "[PrivacyEngine] noise_multiplier must be at least 0, above it in a schedule, and finite but is "
                f"{sigma} after {steps} steps"
            )
        if callable(self.max_grad_norm) and not 0 < norm < math.inf:
            raise ValueError(
                f"[PrivacyEngine] max_grad_norm must be positive and finite but is {norm} after {steps} steps"
            )
        self.clipping.noise_ratio(sigma)
        return Event(self.sampling, self.mechanism(float(sigma), float(norm)))

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
) -> Plan:
    """Plan from the arguments of `PrivacyEngine`."""
    scheme, rate = make_sampling(sampling, dataset_size, sample_rate, batch_size, cycle_length)
    sigma = _at(noise_multiplier, 0)
    if not 0 <= sigma < math.inf:
        raise ValueError(f"[PrivacyEngine] noise_multiplier must be at least 0 and finite but is {sigma}")
    if callable(max_grad_norm):
        if clipping == "adaptive" or isinstance(clipping, AdaptiveClipping):
            raise ValueError("[PrivacyEngine] max_grad_norm must be a number with adaptive clipping but is a schedule")
        rule, _ = make_clipping(clipping, max_grad_norm(0), sigma, rate * dataset_size)
        return Plan(scheme, rate, rule, noise_multiplier, max_grad_norm)
    rule, norm = make_clipping(clipping, max_grad_norm, sigma, rate * dataset_size)
    return Plan(scheme, rate, rule, noise_multiplier, norm)


def _at(value: float | Schedule, steps: int) -> float:
    return value(steps) if callable(value) else value
