"""What a step spends: an event is a mechanism under a sampling scheme; what a run spends is a composition of events.

A new scheme or mechanism is one frozen dataclass here. `Event.releases` is where the two meet: it says which
(subsampled) Gaussian releases a number of equal steps amounts to, and `composed_epsilon` needs to know nothing else.
"""

import functools
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Accountant = Literal["pld", "rdp"]

ADJACENCY = "add or remove one example"


class Parts(NamedTuple):
    """How often one example may take part in some steps: ``times`` times, each with probability ``rate``."""

    rate: float
    times: int


@dataclass(frozen=True)
class Poisson:
    """Every example enters a batch by a coin of its own, with probability ``sample_rate``."""

    sample_rate: float
    adjacency = ADJACENCY

    def parts(self, first: int, steps: int) -> Parts:
        """How often one example may take part in a number of steps in a row, from step ``first``."""
        return Parts(self.sample_rate, steps)


@dataclass(frozen=True)
class CyclicPoisson:
    """A fixed random partition into groups; step t tosses the coins of group t mod ``cycle_length`` alone."""

    sample_rate: float
    cycle_length: int
    adjacency = ADJACENCY

    @property
    def group_rate(self) -> float:
        """Probability with which an example of the group takes part."""
        return min(1.0, self.sample_rate * self.cycle_length)

    def parts(self, first: int, steps: int) -> Parts:
        """How often one example may take part in a number of steps in a row, from step ``first``."""
        return Parts(self.group_rate, math.ceil(steps / self.cycle_length))


@dataclass(frozen=True)
class Shuffle:
    """A permutation for every epoch, in batches of fixed size: every example once an epoch, and no amplification."""

    batch_size: int
    steps_per_epoch: int
    adjacency = "replace one example by zeros (zero-out)"

    def parts(self, first: int, steps: int) -> Parts:
        """How often one example may take part in a number of steps in a row, from step ``first``."""
        epochs = (first + steps - 1) // self.steps_per_epoch - first // self.steps_per_epoch + 1 if steps else 0
        return Parts(1.0, epochs)


@dataclass(frozen=True)
class Full:
    """All examples in every step."""

    adjacency = ADJACENCY

    def parts(self, first: int, steps: int) -> Parts:
        """How often one example may take part in a number of steps in a row, from step ``first``."""
        return Parts(1.0, steps)


@dataclass(frozen=True)
class Gaussian:
    """Sums clipped to ``max_grad_norm`` with independent noise of ``noise_multiplier`` times that."""

    noise_multiplier: float
    max_grad_norm: float


Sampling = Poisson | CyclicPoisson | Shuffle | Full
Mechanism = Gaussian


class Release(NamedTuple):
    """``times`` releases of a Gaussian of sensitivity 1; ``sample_rate`` is 1 where nothing is amplified."""

    sample_rate: float
    noise_multiplier: float
    times: int


@dataclass(frozen=True)
class Event:
    """What one step spends. Public: it depends on settings alone, never on data."""

    sampling: Sampling
    mechanism: Mechanism

    def releases(self, first: int, steps: int) -> list[Release]:
        """Return what a number of steps of this event, one after the other from step ``first``, amounts to."""
        rate, times = self.sampling.parts(first, steps)
        return [Release(rate, self.mechanism.noise_multiplier, times)]


class Run(NamedTuple):
    """Steps of one event in a row."""

    event: Event
    steps: int


def releases_of(runs: Iterable[Run]) -> tuple[Release, ...]:
    """Return what runs, the first of which starts at step 0, amount to together; equal releases counted together."""
    totals: dict[tuple[float, float], int] = {}
    first = 0
    for run in runs:
        for rate, sigma, times in run.event.releases(first, run.steps):
            if times and rate:
                totals[rate, sigma] = totals.get((rate, sigma), 0) + times
        first += run.steps
    return tuple(Release(*key, times) for key, times in totals.items())


@functools.lru_cache(maxsize=4096)
def composed_epsilon(releases: tuple[Release, ...], delta: float, accountant: Accountant) -> float:
    """Epsilon of a composition of releases at delta, by dp-accounting."""
    if not releases:
        return 0.0
    if any(r.noise_multiplier == 0 for r in releases):
        return math.inf
    return _pld_epsilon(releases, delta) if accountant == "pld" else _rdp_epsilon(releases, delta)


def _pld_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    composed = functools.reduce(lambda p, q: p.compose(q), (_pld(*r) for r in releases))
    return float(composed.get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=256)
def _pld(sample_rate: float, noise_multiplier: float, times: int) -> Any:
    return _step_pld(sample_rate, noise_multiplier).self_compose(times)


@functools.lru_cache(maxsize=64)
def _step_pld(sample_rate: float, noise_multiplier: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    # Pessimistic on a grid of 1e-4, for add-or-remove-one: dp-accounting's own choice in PLDAccountant.
    return pld.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=1e-4, use_connect_dots=True
    )


def _rdp_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    total = sum(_rdp(r.sample_rate, r.noise_multiplier) * r.times for r in releases)
    return float(rdp.compute_epsilon(rdp.DEFAULT_RDP_ORDERS, total, delta)[0])


@functools.lru_cache(maxsize=1024)
def _rdp(sample_rate: float, noise_multiplier: float) -> Any:
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)  # it warns of every order that it leaves out; leaving orders out is sound
    try:
        accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
        accountant.compose(dp.PoissonSampledDpEvent(sample_rate, dp.GaussianDpEvent(noise_multiplier)))
        return np.array(accountant._rdp)
    finally:
        absl.setLevel(level)
