"""Poisson-sampled batches: every example enters a batch by its own secret coin."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Batch:
    """A physical batch: rows, which of them are examples, and whether it ends its logical batch.

    Pass it whole to the functions of the engine: the mask says which rows are padding, and a step without it would
    count them.
    """

    data: tuple[mx.array, ...]  # arrays [P, ...]
    mask: mx.array  # [P] bool: False in padding rows
    last: bool

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "[Batch] batch must be passed whole, f(model, batch), or as batch.data with mask=batch.mask and "
            "last=batch.last, but was unpacked"
        )


class PoissonBatches:
    """Iterates over the physical batches of Poisson-sampled logical batches; ``len`` counts the logical ones.

    Made by `PrivacyEngine.batches`. Which examples take part is as secret as the noise: amplification by sampling
    rests on it. The draw comes from the same keyed generator, in a domain of its own.
    """

    def __init__(
        self,
        data: tuple[Any, ...],
        sample_rate: float,
        steps: int,
        physical_batch_size: int,
        draw_words: Callable[[int], mx.array],
    ) -> None:
        self._data, self._steps, self._draw_words = data, steps, draw_words
        self._size = len(data[0])
        self._sample_rate = sample_rate
        self.physical_batch_size = physical_batch_size

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._steps):
            chosen = self._draw()
            pieces = max(1, math.ceil(len(chosen) / self.physical_batch_size))
            for i in range(pieces):
                part = chosen[i * self.physical_batch_size : (i + 1) * self.physical_batch_size]
                yield self._batch(part, i == pieces - 1)

    def _draw(self) -> np.ndarray[Any, Any]:
        if self._sample_rate == 1:
            return np.arange(self._size)
        words = np.array(self._draw_words(2 * self._size))
        threshold = np.uint64(int(self._sample_rate * 2.0**64))
        return np.flatnonzero(words.view(np.uint64) < threshold)

    def _batch(self, chosen: np.ndarray[Any, Any], last: bool) -> Batch:
        rows = np.zeros(self.physical_batch_size, np.int64)  # padding repeats the first example and is masked
        rows[: len(chosen)] = chosen
        mask = mx.array(np.arange(self.physical_batch_size) < len(chosen))
        return Batch(tuple(_take(a, rows) for a in self._data), mask, last)


def default_physical_batch_size(dataset_size: int, sample_rate: float) -> int:
    """Expected batch size and three standard deviations, in eights: one draw in 700 takes a second physical batch."""
    mean = dataset_size * sample_rate
    size = math.ceil(mean + 3 * math.sqrt(mean * (1 - sample_rate)))
    return min(dataset_size, (size + 7) // 8 * 8)


def _take(a: Any, rows: np.ndarray[Any, Any]) -> mx.array:
    if isinstance(a, mx.array):
        return mx.take(a, mx.array(rows), axis=0)
    return mx.array(np.ascontiguousarray(a[rows]))
