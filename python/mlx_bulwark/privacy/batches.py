"""Physical batches of what a sampling scheme draws: fixed shapes, padded and masked, a unit never split."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import mlx.core as mx
import numpy as np

from .sampling import DrawWords, FullSampler, PoissonSampler, Sampler, ShuffleSampler
from .taps import PrivacyError

UnitReduction = Literal["mean", "sum"]
Augment = Callable[..., Any]
Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Batch:
    """A physical batch: rows, which of them are examples, and whether it ends its logical batch.

    Pass it whole to the functions of the engine: the mask says which rows are padding, and a step without it would
    count them.
    """

    data: tuple[mx.array, ...]  # arrays [P, ...]
    mask: mx.array  # [P] bool: False in padding rows
    last: bool
    units: mx.array | None = None  # [P] int32 below P: which unit a row is of; None: each its own
    unit_reduction: UnitReduction = "mean"
    step: int | None = None  # which step of the engine draws it

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "[Batch] batch must be passed whole, f(model, batch), or as batch.data with its mask, units, "
            "unit_reduction and last, but was unpacked"
        )


class UnitRows:
    """Which rows of the data belong to which unit, and the choice of at most ``max_rows`` of each.

    Args:
        units: [rows], ids of any type that numpy can sort; None: every row is a unit.
        rows: number of rows of the data.
        max_rows: most rows of one unit in one step; None: all of them, where every row is a unit.
    """

    def __init__(self, units: Any, rows: int, max_rows: int | None) -> None:
        if units is None:
            self.starts, self.rows = np.arange(rows + 1), np.arange(rows)
            self.max_rows = 1
            return
        ids = np.array(units)
        if ids.shape != (rows,):
            raise ValueError(f"[batches] units must have shape [{rows}], an id for each row, but has {list(ids.shape)}")
        if max_rows is None or max_rows < 1:
            raise ValueError(f"[batches] max_rows_per_unit must be at least 1 where units are given but is {max_rows}")
        _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.rows = np.argsort(inverse, kind="stable")
        self.max_rows = int(max_rows)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def bounded_counts(self) -> Rows:
        """Rows of each unit in a step, [units]."""
        return np.minimum(np.diff(self.starts), self.max_rows)

    def choose(self, units: Rows, words: DrawWords) -> tuple[Rows, Rows]:
        """Rows of these units, at most ``max_rows`` of each and every choice alike, and how many of each."""
        counts = self.starts[units + 1] - self.starts[units]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = self.rows[np.repeat(self.starts[units], counts) + within]
        if (counts > self.max_rows).any():
            owner = np.repeat(np.arange(len(units)), counts)
            # a random order within each unit, of which the first are taken; a tie of 64 bits never happens
            order = np.lexsort((np.array(words(2 * len(rows))).view(np.uint64), owner))
            rows = rows[np.sort(order[within < self.max_rows])]
            counts = np.minimum(counts, self.max_rows)
        return rows, counts


class Source:
    """Where the rows of physical batches come from: the data, its units, and what is done to a row."""

    def __init__(
        self,
        data: tuple[Any, ...],
        dataset_size: int,
        units: Any = None,
        max_rows_per_unit: int | None = None,
        unit_reduction: UnitReduction = "mean",
        augment: Augment | None = None,
        multiplicity: int = 1,
    ) -> None:
        expected = dataset_size if units is None else len(data[0])
        for i, a in enumerate(data):
            if len(a) != expected:
                raise ValueError(f"[batches] data[{i}] must have {expected} rows but has {len(a)}")
        if unit_reduction not in get_args(UnitReduction):
            raise ValueError(f"[batches] unit_reduction must be 'mean' or 'sum' but is {unit_reduction!r}")
        if multiplicity < 1 or (multiplicity > 1 and augment is None):
            raise ValueError(
                f"[batches] multiplicity must be at least 1, and 1 where augment is not given, but is {multiplicity}"
            )
        if units is None and max_rows_per_unit is not None:
            raise ValueError("[batches] max_rows_per_unit must come with units but comes alone")
        self.rows = UnitRows(units, expected, max_rows_per_unit)
        if len(self.rows) != dataset_size:
            raise ValueError(
                f"[batches] units must have {dataset_size} different ids, the engine's dataset_size, but has "
                f"{len(self.rows)}"
            )
        if getattr(getattr(augment, "__self__", augment), "is_universal", False):
            raise PrivacyError(
                "[batches] augment must not be a universal perturbation but is one: it was made from many examples "
                "without noise, so that each of them changes the rows of the others; take adversarial_twins"
            )
        self._data, self._unit_reduction = data, unit_reduction
        self._augment, self.multiplicity = augment, multiplicity

    @property
    def rows_per_unit(self) -> int:
        """Most rows that one unit may have in a step, copies counted."""
        return self.rows.max_rows * self.multiplicity

    def default_microbatch_size(self, sampler: Sampler) -> int:
        """Rows of a step and three standard deviations, in eights: one draw in 700 takes a second physical batch."""
        counts = self.rows.bounded_counts * self.multiplicity
        if isinstance(sampler, FullSampler):
            return int(counts.sum())
        if isinstance(sampler, ShuffleSampler):
            return int(np.sort(counts)[-sampler.batch_size :].sum())
        rate = sampler.rate if isinstance(sampler, PoissonSampler) else sampler.group_rate / sampler.cycle_length
        size: int = math.ceil(rate * counts.sum() + 3 * math.sqrt(rate * (1 - rate) * (counts**2).sum()))
        return int(max(min(counts.sum(), (size + 7) // 8 * 8), self.rows_per_unit))

    def trial_batch(self, size: int) -> Batch:
        """A batch of this size, full of units that have as many rows as they may, as measurements want it."""
        rows = np.arange(-(-size // self.multiplicity)) % len(self._data[0])
        counts = np.full(-(-len(rows) // self.rows.max_rows), self.rows.max_rows)
        counts[-1] = len(rows) - counts[:-1].sum()
        return self.batch(rows, counts, size, True, 0)

    def batch(self, chosen: Rows, counts: Rows, size: int, last: bool, step: int) -> Batch:
        """A physical batch of these rows, ``counts`` of each unit."""
        taken = min(len(chosen) * self.multiplicity, size)
        rows = np.zeros(size, np.int64)  # padding repeats the first example and is masked
        rows[:taken] = np.repeat(chosen, self.multiplicity)[:taken]
        data = tuple(_take(a, rows) for a in self._data)
        if self._augment is not None:
            data = _augmented(self._augment, data, size)
        units = None
        if self.rows_per_unit > 1:
            ids = np.zeros(size, np.int32)
            ids[:taken] = np.repeat(np.arange(len(counts)), counts * self.multiplicity)[:taken]
            units = mx.array(ids)
        return Batch(data, mx.array(np.arange(size) < taken), last, units, self._unit_reduction, step)


class Batches:
    """Iterates over the physical batches of sampled logical batches; ``len`` counts the logical ones.

    Made by `PrivacyEngine.batches`. Which units take part may be as secret as the noise: amplification by sampling
    rests on it. The draw comes from the same keyed generator, in a domain of its own.
    """

    def __init__(
        self,
        source: Source,
        sampler: Sampler,
        steps: int,
        microbatch_size: int,
        draw_words: DrawWords,
        first_step: Callable[[], int],
    ) -> None:
        if microbatch_size < source.rows_per_unit:
            raise ValueError(
                f"[batches] microbatch_size must hold the {source.rows_per_unit} rows that one unit may have but is "
                f"{microbatch_size}"
            )
        self._source, self._sampler, self._steps = source, sampler, steps
        self._draw_words, self._first_step = draw_words, first_step
        self.microbatch_size = microbatch_size

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        first, size = self._first_step(), self.microbatch_size
        for step in range(first, first + self._steps):
            units = self._sampler.draw(step, self._draw_words)
            rows, counts = self._source.rows.choose(units, self._draw_words)
            pieces = pack(counts * self._source.multiplicity, size)
            ends = np.concatenate([[0], np.cumsum(counts)])
            for i, (a, b) in enumerate(pieces):
                yield self._source.batch(rows[ends[a] : ends[b]], counts[a:b], size, i == len(pieces) - 1, step)


def pack(counts: Rows, capacity: int) -> list[tuple[int, int]]:
    """Split units, in their order and none in two, into pieces of at most ``capacity`` rows; at least one piece."""
    ends = np.cumsum(counts)
    pieces, start = [], 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        end = int(np.searchsorted(ends, before + capacity, side="right"))
        pieces.append((start, end))
        start = end
    return pieces or [(0, 0)]


def _augmented(augment: Augment, data: tuple[mx.array, ...], size: int) -> tuple[mx.array, ...]:
    result = augment(*data)
    arrays = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    for i, a in enumerate(arrays):
        if not isinstance(a, mx.array) or a.ndim == 0 or a.shape[0] != size:
            has = f"shape {list(a.shape)}" if isinstance(a, mx.array) else f"type {type(a).__name__}"
            raise ValueError(f"[batches] augment must return arrays of {size} rows but result {i} has {has}")
    return arrays


def _take(a: Any, rows: Rows) -> mx.array:
    if isinstance(a, mx.array):
        return mx.take(a, mx.array(rows), axis=0)
    return mx.array(np.ascontiguousarray(a[rows]))
