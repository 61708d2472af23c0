"""What a step spends: an event is a mechanism under a sampling scheme; what a run spends is a composition of events.

A new scheme or mechanism is one frozen dataclass here. `Event.releases` is where the two meet: it says which
(subsampled) Gaussian releases a number of equal steps amounts to, and `composed_epsilon` needs to know nothing else.
"""

import functools
import itertools
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from scipy import special

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
    name: ClassVar[str] = "poisson"
    adjacency: ClassVar[str] = ADJACENCY

    def parts(self, first: int, steps: int) -> Parts:
        """How often one example may take part in a number of steps in a row, from step ``first``."""
        return Parts(self.sample_rate, steps)


@dataclass(frozen=True)
class CyclicPoisson:
    """A fixed random partition into groups; step t tosses the coins of group t mod ``cycle_length`` alone."""

    sample_rate: float
    cycle_length: int
    name: ClassVar[str] = "cyclic_poisson"
    adjacency: ClassVar[str] = ADJACENCY

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
    name: ClassVar[str] = "shuffle"
    adjacency: ClassVar[str] = "replace one example by zeros (zero-out)"

    def parts(self, first: int, steps: int) -> Parts:
        """How often one example may take part in a number of steps in a row, from step ``first``."""
        epochs = (first + steps - 1) // self.steps_per_epoch - first // self.steps_per_epoch + 1 if steps else 0
        return Parts(1.0, epochs)


@dataclass(frozen=True)
class Full:
    """All examples in every step."""

    name: ClassVar[str] = "full"
    adjacency: ClassVar[str] = ADJACENCY

    def parts(self, first: int, steps: int) -> Parts:
        """How often one example may take part in a number of steps in a row, from step ``first``."""
        return Parts(1.0, steps)


@dataclass(frozen=True)
class Gaussian:
    """Sums clipped to ``max_grad_norm`` with independent noise of ``noise_multiplier`` times that."""

    noise_multiplier: float
    max_grad_norm: float
    name: ClassVar[str] = "gaussian"


@dataclass(frozen=True)
class Banded:
    """Clipped sums with noise correlated by C^-1, where C is Toeplitz with these coefficients in its first column."""

    noise_multiplier: float
    max_grad_norm: float
    coefficients: tuple[float, ...]
    name: ClassVar[str] = "banded"

    def sensitivity(self, times: int) -> float:
        """Bound on the norm of a sum of ``times`` columns of C with unit vectors, wherever an example takes part."""
        c = np.abs(self.coefficients)
        overlaps = np.sort(np.correlate(c, c, "full")[len(c) - 1 :])[::-1][:times]
        # columns that lie next to each other overlap most; the bound holds for every other order of overlaps too
        pairs = times * overlaps[0] + 2 * sum((times - lag) * o for lag, o in enumerate(overlaps) if lag)
        return math.sqrt(pairs)


@dataclass(frozen=True)
class Discrete:
    """Clipped gradients truncated to integers, summed exactly, with exact discrete Gaussian noise."""

    noise_multiplier: float
    max_grad_norm: float
    name: ClassVar[str] = "discrete"


Sampling = Poisson | CyclicPoisson | Shuffle | Full
Mechanism = Gaussian | Banded | Discrete
SAMPLINGS: dict[str, type[Sampling]] = {kind.name: kind for kind in (Poisson, CyclicPoisson, Shuffle, Full)}
MECHANISMS: dict[str, type[Mechanism]] = {kind.name: kind for kind in (Gaussian, Banded, Discrete)}


class Release(NamedTuple):
    """``times`` releases of a Gaussian of sensitivity 1; ``sample_rate`` is 1 where nothing is amplified.

    A ``discrete`` one is concentrated like the Gaussian, and its Renyi divergences of integer orders under Poisson
    sampling are the same: E[(Q/P)^k] is exp(k (k - 1) |mu|^2 / 2 sigma^2) for shifts by integers too. Of its whole
    privacy loss distribution that is not true.
    """

    sample_rate: float
    noise_multiplier: float
    times: int
    discrete: bool = False


@dataclass(frozen=True)
class Event:
    """What one step spends. Public: it depends on settings alone, never on data."""

    sampling: Sampling
    mechanism: Mechanism

    def __post_init__(self) -> None:
        for part in (self.sampling, self.mechanism):
            for field in fields(part):
                value = getattr(part, field.name)
                if isinstance(value, tuple):
                    if not value or abs(math.hypot(*value) - 1) > 1e-9:
                        raise ValueError(f"[Event] {field.name} must have norm 1 but has {math.hypot(*value):.6g}")
                elif not value >= 0 or (value == 0 and field.name != "noise_multiplier"):
                    raise ValueError(f"[Event] {field.name} must be positive but is {value}")
        if getattr(self.sampling, "sample_rate", 1) > 1 or self.mechanism.noise_multiplier == math.inf:
            raise ValueError("[Event] sample_rate must be at most 1 and noise_multiplier finite but they are not")

    def to_json(self) -> dict[str, Any]:
        """Return the names of scheme and mechanism and their settings, in one flat object."""
        return {
            "sampling": self.sampling.name,
            **_settings(self.sampling),
            "mechanism": self.mechanism.name,
            **_settings(self.mechanism),
        }

    @staticmethod
    def from_json(entry: dict[str, Any]) -> "Event":
        """Return the event that `to_json` was asked of; ValueError where it is none."""
        kinds: dict[str, dict[str, Any]] = {"sampling": SAMPLINGS, "mechanism": MECHANISMS}
        parts = {}
        known = set(kinds)
        for part, classes in kinds.items():
            if entry[part] not in classes:
                raise ValueError(f"{part} {entry[part]!r} is not known")
            kind = classes[entry[part]]
            names = {f.name: f.type for f in fields(kind)}
            parts[part] = kind(**{name: _number(entry[name], t) for name, t in names.items()})
            known |= set(names)
        if set(entry) - known:
            raise ValueError(f"{', '.join(sorted(set(entry) - known))} not known")
        return Event(**parts)

    def releases(self, first: int, steps: int) -> list[Release]:
        """Return what a number of steps of this event, one after the other from step ``first``, amounts to."""
        rate, times = self.sampling.parts(first, steps)
        if isinstance(self.mechanism, Banded) and times:
            # amplified only where the bands of two participations of one example do not overlap: then C, and with it
            # the whole run, falls apart into one Poisson-sampled Gaussian for each round
            scheme, bands = self.sampling, len(self.mechanism.coefficients)
            if not (isinstance(scheme, CyclicPoisson) and bands <= scheme.cycle_length):
                return [Release(1.0, self.mechanism.noise_multiplier / self.mechanism.sensitivity(times), 1)]
        return [Release(rate, self.mechanism.noise_multiplier, times, isinstance(self.mechanism, Discrete))]


class Run(NamedTuple):
    """Steps of one event in a row, within one session: an engine that resumes draws new partitions and orders."""

    event: Event
    steps: int
    session: int = 0


def joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Return the runs without empty ones, and neighbours of one event and session as one."""
    out: list[Run] = []
    for run in runs:
        if out and (out[-1].event, out[-1].session) == (run.event, run.session):
            out[-1] = out[-1]._replace(steps=out[-1].steps + run.steps)
        elif run.steps:
            out.append(run)
    return tuple(out)


def _settings(part: Any) -> dict[str, Any]:
    return {k: str(v) if v == math.inf else v for k, v in asdict(part).items()}  # JSON has no infinity


def _number(value: Any, kind: Any) -> Any:
    if isinstance(value, list):
        return tuple(float(_number(v, float)) for v in value)
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value == "inf"):
        raise ValueError(f"{value!r} is not a number")
    return int(value) if kind is int else float(value)


def releases_of(runs: Iterable[Run]) -> tuple[Release, ...]:
    """Return what runs, the first of which starts at step 0, amount to together; equal releases counted together."""
    totals: dict[Release, int] = {}
    first = 0
    for _, stretch in itertools.groupby((run for run in runs if run.steps), _kept_by_a_schedule):
        together = tuple(stretch)
        for release in _releases_of_a_stretch(together, first):
            if release.times and release.sample_rate:
                alike = release._replace(times=1)
                totals[alike] = totals.get(alike, 0) + release.times
        first += sum(run.steps for run in together)
    return tuple(release._replace(times=times) for release, times in totals.items())


def _kept_by_a_schedule(run: Run) -> tuple[Any, ...]:
    """What stays while noise and clipping norm change: one partition, one order of the examples."""
    return run.session, run.event.sampling, type(run.event.mechanism)


def _releases_of_a_stretch(runs: tuple[Run, ...], first: int) -> list[Release]:
    """Steps of one partition, one after the other from step ``first``.

    In a round of a cycle, or an epoch, an example takes part once at most, in a step whose noise is at least the
    least of the round: by parallel composition a round spends no more than one release with that.
    """
    event = runs[0].event
    scheme = event.sampling
    if len(runs) == 1 or not isinstance(scheme, CyclicPoisson | Shuffle) or isinstance(event.mechanism, Banded):
        starts = itertools.accumulate((run.steps for run in runs), initial=first)
        return [r for run, at in zip(runs, starts, strict=False) for r in run.event.releases(at, run.steps)]
    if isinstance(scheme, Shuffle):
        length, begun = scheme.steps_per_epoch, first % scheme.steps_per_epoch
    else:
        length, begun = scheme.cycle_length, 0
    sigmas = np.repeat([run.event.mechanism.noise_multiplier for run in runs], [run.steps for run in runs])
    starts_of_rounds = [0, *range(length - begun, len(sigmas), length)]
    rate, discrete = scheme.parts(first, 1).rate, isinstance(event.mechanism, Discrete)
    return [Release(rate, float(s), 1, discrete) for s in np.minimum.reduceat(sigmas, starts_of_rounds)]


# dp-accounting's PLD drops tails of 1e-15 and composes by FFT in float64: far below this delta nothing else is left.
SMALLEST_PLD_DELTA = 1e-12
FINE, COARSE = 1e-4, 1e-3  # grids of the privacy loss; the first is dp-accounting's own choice
INTEGER_ORDERS = (*range(2, 65), *range(72, 129, 8), 160, 192, 224, 256, 384, 512, 768, 1024)
DISTINCT = 12  # noise multipliers that are composed on the fine grid
LEVELS_PER_OCTAVE = 48  # where there are more, they are rounded down to so many: 1.5 % at most


@functools.lru_cache(maxsize=4096)
def composed_epsilon(
    releases: tuple[Release, ...], delta: float, accountant: Accountant, grid: float | None = None
) -> float:
    """Epsilon of a composition of releases at delta, by dp-accounting; ``grid`` that of the privacy losses."""
    if accountant == "pld" and delta < SMALLEST_PLD_DELTA:
        raise ValueError(
            f"[epsilon] delta must be at least {SMALLEST_PLD_DELTA:g} with accountant 'pld' but is {delta:g}; "
            "accountant 'rdp' takes any"
        )
    if not releases:
        return 0.0
    if any(r.noise_multiplier == 0 for r in releases):
        return math.inf
    if any(r.discrete for r in releases):
        if accountant != "rdp":
            raise ValueError(f"[epsilon] accountant must be 'rdp' for discrete noise but is {accountant!r}")
        return _concentrated_epsilon(releases, delta) or integer_rdp_epsilon(releases, delta)
    if accountant == "rdp":
        return _rdp_epsilon(releases, delta)
    if grid is None:  # the work grows with epsilon over the grid: what is far too large is not needed so finely
        rdp = max(integer_rdp_epsilon(releases, delta), 1e-3)
        octaves = max(0, math.ceil(math.log2(rdp / 24))) + min(0, math.floor(math.log2(rdp / 0.1)))
        grid = (FINE if len(releases) <= DISTINCT else COARSE) * 2.0**octaves
    return _pld_epsilon(releases if len(releases) <= DISTINCT else _fewer(releases), delta, grid)


def _fewer(releases: tuple[Release, ...]) -> tuple[Release, ...]:
    """Return the releases with noise rounded down to a few levels, which is sound: less noise spends more."""
    totals: dict[tuple[float, float], int] = {}
    for rate, sigma, times, _ in releases:
        level = 2.0 ** (math.floor(math.log2(sigma) * LEVELS_PER_OCTAVE) / LEVELS_PER_OCTAVE)
        totals[rate, level] = totals.get((rate, level), 0) + times
    return tuple(Release(*key, times) for key, times in totals.items())


def _pld_epsilon(releases: tuple[Release, ...], delta: float, grid: float) -> float:
    composed = functools.reduce(lambda p, q: p.compose(q), (_pld(*r[:3], grid) for r in releases))
    with np.errstate(over="ignore"):  # it divides by masses of the far tail
        return float(composed.get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=128)
def _pld(sample_rate: float, noise_multiplier: float, times: int, grid: float) -> Any:
    if sample_rate == 1:  # Gaussians compose to a Gaussian, without the rounding of each to the grid
        return _step_pld(1.0, noise_multiplier / math.sqrt(times), grid)
    return _step_pld(sample_rate, noise_multiplier, grid).self_compose(times)


@functools.lru_cache(maxsize=64)
def _step_pld(sample_rate: float, noise_multiplier: float, grid: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    # Pessimistic, for add-or-remove-one.
    return pld.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=grid, use_connect_dots=True
    )


def _concentrated_epsilon(releases: tuple[Release, ...], delta: float) -> float | None:
    """Epsilon by zero-concentrated privacy, whose orders need not be whole; None where a release is sampled."""
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    if any(r.sample_rate != 1 for r in releases):
        return None
    rho = sum(r.times / (2 * r.noise_multiplier**2) for r in releases)
    orders = 1 + np.geomspace(0.02, 1e5, 4000)
    return float(rdp.compute_epsilon(orders, rho * orders, delta)[0])


def integer_rdp_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    """Epsilon by Renyi divergences of integer orders: sound, somewhat larger, and computed in no time.

    Mironov et al. 2019 (arXiv:1908.10530), section 3.3.
    """
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    total = sum(_integer_rdp(r.sample_rate, r.noise_multiplier) * r.times for r in releases)
    return float(rdp.compute_epsilon(INTEGER_ORDERS, total, delta)[0]) if releases else 0.0


@functools.lru_cache(maxsize=4096)
def _integer_rdp(sample_rate: float, noise_multiplier: float) -> Any:
    orders = np.array(INTEGER_ORDERS, float)
    if sample_rate == 1:
        return orders / (2 * noise_multiplier**2)
    k = np.arange(INTEGER_ORDERS[-1] + 1.0)
    n = orders[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = (
            special.gammaln(n + 1)
            - special.gammaln(k + 1)
            - special.gammaln(n - k + 1)
            + (n - k) * math.log1p(-sample_rate)
            + k * math.log(sample_rate)
            + k * (k - 1) / (2 * noise_multiplier**2)
        )
    return np.maximum(special.logsumexp(np.where(k <= n, terms, -math.inf), axis=1), 0) / (orders - 1)


def _rdp_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    total = sum(_rdp(r.sample_rate, r.noise_multiplier) * r.times for r in releases)
    return float(rdp.compute_epsilon(rdp.DEFAULT_RDP_ORDERS, total, delta)[0])


@functools.lru_cache(maxsize=4096)
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
