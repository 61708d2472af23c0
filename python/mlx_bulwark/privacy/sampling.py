"""Which units take part in a step: a sampler is made from the scheme that is accounted, so that they cannot differ."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np

from ..ops.noise import bit_blocks_used, random_bits, random_key
from .events import CyclicPoisson, Full, Poisson, Sampling, Shuffle

SamplingMode = Literal["poisson", "cyclic_poisson", "shuffle", "full"]
Units = np.ndarray[Any, np.dtype[np.int64]]
DrawWords = Callable[[int], mx.array]  # n -> n secret words that nobody else gets


@dataclass(frozen=True)
class PoissonSampler:
    """Every unit by its own coin of probability ``rate``. The coins are secret: amplification rests on them."""

    size: int
    rate: float

    def draw(self, step: int, words: DrawWords) -> Units:
        """Units of a step; the step does not matter."""
        return coins(np.arange(self.size), self.rate, words)


@dataclass(frozen=True)
class CyclicPoissonSampler:
    """A fixed random partition into ``cycle_length`` groups; step t tosses coins in group t mod ``cycle_length``.

    A unit chooses its group by itself, so that one unit more or less moves no other. A resumed run draws another
    partition and is accounted as such.
    """

    size: int
    group_rate: float
    cycle_length: int
    seed: mx.array = field(default_factory=lambda: random_key(), repr=False, compare=False)

    @functools.cached_property
    def groups(self) -> Units:
        """Group of every unit, [size]."""
        # 64 bits modulo the number of groups are uniform to within cycle_length / 2^64
        words = _uint64(random_bits((2 * self.size,), self.seed, 0, domain="poisson"))
        groups: Units = (words % np.uint64(self.cycle_length)).astype(np.int64)
        return groups

    def draw(self, step: int, words: DrawWords) -> Units:
        """Units of a step."""
        return coins(np.flatnonzero(self.groups == step % self.cycle_length), self.group_rate, words)


@dataclass(frozen=True)
class ShuffleSampler:
    """A random permutation for every epoch, in batches of fixed size; the last of an epoch may be smaller.

    A resumed run draws another order for the epoch that it is in, and is accounted as such.
    """

    size: int
    batch_size: int
    seed: mx.array = field(default_factory=lambda: random_key(), repr=False, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every unit takes part exactly once."""
        return math.ceil(self.size / self.batch_size)

    def draw(self, step: int, words: DrawWords) -> Units:
        """Units of a step."""
        epoch, i = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[i * self.batch_size : (i + 1) * self.batch_size]

    @functools.cached_property
    def _last_order(self) -> dict[int, Units]:
        return {}

    def _order(self, epoch: int) -> Units:
        if epoch not in self._last_order:
            counter = epoch * bit_blocks_used(2 * self.size)
            # sorting 64-bit words: a tie, which would favour the lower unit, has probability size^2 / 2^65
            words = _uint64(random_bits((2 * self.size,), self.seed, counter, domain="poisson"))
            self._last_order.clear()
            self._last_order[epoch] = np.argsort(words, kind="stable")
        return self._last_order[epoch]


@dataclass(frozen=True)
class FullSampler:
    """All units in every step."""

    size: int

    def draw(self, step: int, words: DrawWords) -> Units:
        """All units."""
        return np.arange(self.size)


def make_sampling(
    mode: SamplingMode,
    dataset_size: int,
    sample_rate: float | None,
    batch_size: float | None,
    cycle_length: int | None,
) -> tuple[Sampling, float]:
    """Check an engine's arguments; return the scheme and the expected batch size over the size of the data set."""
    if mode not in get_args(SamplingMode):
        raise ValueError(
            f"[PrivacyEngine] sampling must be one of {', '.join(map(repr, get_args(SamplingMode)))} but is {mode!r}"
        )
    if dataset_size < 1 or int(dataset_size) != dataset_size:
        raise ValueError(f"[PrivacyEngine] dataset_size must be a positive whole number but is {dataset_size}")
    if (cycle_length is not None) != (mode == "cyclic_poisson"):
        raise ValueError(
            f"[PrivacyEngine] cycle_length must be given with sampling='cyclic_poisson', and only there, but is "
            f"{cycle_length} with {mode!r}"
        )
    if mode == "full" and sample_rate is None and batch_size is None:
        return Full(), 1.0
    if (sample_rate is None) == (batch_size is None):
        raise ValueError("[PrivacyEngine] sample_rate or batch_size must be given, and not both")
    rate = batch_size / dataset_size if batch_size is not None else sample_rate
    if rate is None or not 0 < rate <= 1:
        raise ValueError(f"[PrivacyEngine] sample_rate must be in (0, 1] but is {rate}")
    if mode == "full":
        if rate != 1:
            raise ValueError(f"[PrivacyEngine] sample_rate must be 1 with sampling='full' but is {rate}")
        return Full(), 1.0
    if mode == "shuffle":
        return _shuffle(dataset_size, rate), rate
    if cycle_length is not None:
        return _cyclic(rate, cycle_length), rate
    return Poisson(float(rate)), float(rate)


def _shuffle(dataset_size: int, rate: float) -> Shuffle:
    size = round(rate * dataset_size)
    if abs(size - rate * dataset_size) > 1e-6 or size < 1:
        raise ValueError(
            "[PrivacyEngine] batch_size must be a whole number with sampling='shuffle' but is "
            f"{rate * dataset_size:.6g}"
        )
    return Shuffle(size, math.ceil(dataset_size / size))


def _cyclic(rate: float, cycle_length: int) -> CyclicPoisson:
    if cycle_length < 1 or int(cycle_length) != cycle_length:
        raise ValueError(f"[PrivacyEngine] cycle_length must be a positive whole number but is {cycle_length}")
    if rate * cycle_length > 1 + 1e-9:
        raise ValueError(
            f"[PrivacyEngine] cycle_length must be at most 1 / sample_rate = {1 / rate:.6g} but is {cycle_length}: a "
            "group would be too small for a batch"
        )
    return CyclicPoisson(float(rate), int(cycle_length))


def make_sampler(sampling: Sampling, size: int, seed: mx.array | None = None) -> "Sampler":
    """Make the sampler of an accounted scheme over ``size`` units; a run with banded noise may go on with its seed."""
    more = {} if seed is None else {"seed": seed}
    match sampling:
        case Poisson(rate):
            return PoissonSampler(size, rate)
        case CyclicPoisson():
            return CyclicPoissonSampler(size, sampling.group_rate, sampling.cycle_length, **more)
        case Shuffle(batch_size):
            return ShuffleSampler(size, batch_size, **more)
        case Full():
            return FullSampler(size)


Sampler = PoissonSampler | CyclicPoissonSampler | ShuffleSampler | FullSampler


def coins(units: Units, rate: float, words: DrawWords) -> Units:
    """Those of the units whose coin of probability ``rate`` fell."""
    if rate == 1:
        return units
    heads = _uint64(words(2 * len(units))) < np.uint64(int(rate * 2.0**64))
    drawn: Units = units[heads]
    return drawn


def _uint64(words: mx.array) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.array(words).view(np.uint64)
