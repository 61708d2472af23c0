"""Data-parallel training: each rank adds its share of the noise to its own clipped sums, then the ranks add them up.

Nothing without noise leaves a rank, and all ranks see the same noised sum. The shares come from keys that the ranks
draw for themselves: their variances add up to the accounted one, and no key travels.
"""

import hashlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .events import Sampling, Shuffle
from .taps import PrivacyError, named_arrays

T = TypeVar("T")
_MESSAGE_BYTES = 1 << 25  # sums travel together up to this size: many small messages are slow, one large copy is too


class Ranks:
    """The processes of one training, this one among them."""

    def __init__(self, group: mx.distributed.Group, timeout: float) -> None:
        if not 0 < timeout < threading.TIMEOUT_MAX:
            raise ValueError(f"[PrivacyEngine] group_timeout must be a positive number of seconds but is {timeout}")
        self.group, self.timeout = group, timeout
        self.rank, self.size = group.rank(), group.size()
        self._lost = ""

    def share(self, noise_std: mx.array) -> mx.array:
        """Standard deviation of each rank's noise; rounding must not lower that of all together."""
        return noise_std * ((1 + 2.0**-22) / math.sqrt(self.size))

    def add_up(self, sums: dict[str, mx.array]) -> dict[str, mx.array]:
        """Sums over all ranks, to be evaluated by `wait`."""
        total = {}
        for paths in _messages(sums):
            parts = [sums[path].reshape(-1) for path in paths]
            added = self._summed(mx.concatenate(parts))
            ends = np.cumsum([p.size for p in parts])[:-1].tolist()
            total.update({p: a.reshape(sums[p].shape) for p, a in zip(paths, mx.split(added, ends), strict=True)})
        return {path: total[path] for path in sums}

    def _summed(self, packed: mx.array) -> mx.array:
        total: mx.array = mx.distributed.all_sum(packed, group=self.group)
        return total

    def wait(self, *arrays: Any) -> None:
        """Evaluate what other ranks take part in; end where one of them is lost."""
        with self._watched():
            mx.eval(*arrays)

    def refuse_lost(self) -> None:
        """Refuse to go on after a rank was lost: the others would wait for ever."""
        if self._lost:
            raise PrivacyError(f"[update] ranks must all be there but {self._lost}")

    def agree(self, what: str, value: Any) -> None:
        """Refuse to go on where a rank has another value. The values themselves do not travel."""
        digest = hashlib.sha256(repr(value).encode()).digest()
        everyone = np.array(self._gathered(mx.array(np.frombuffer(digest, np.uint32))))
        different = np.flatnonzero((everyone != everyone[0]).any(axis=1))
        if len(different):
            raise PrivacyError(
                f"[distributed] {what} must be the same on all ranks but rank {different[0]} differs from rank 0"
            )

    def from_first(self, value: Any) -> Any:
        """What JSON makes of the first rank's value."""
        return self.from_all(value if self.rank == 0 else None)[0]

    def from_all(self, value: Any) -> list[Any]:
        """What JSON makes of every rank's value. No secret is given to it."""
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = np.array(self._gathered(mx.array([len(text)]))).ravel()
        mine = np.zeros(lengths.max(), np.int32)
        mine[: len(text)] = text
        everyone = np.array(self._gathered(mx.array(mine))).astype(np.uint8)
        return [json.loads(row[:length].tobytes()) for row, length in zip(everyone, lengths, strict=True)]

    def together(self, f: Callable[[], T]) -> T:
        """What a function returns that every rank calls; where it fails on one, all ranks fail."""
        result, problem, cause = None, None, None
        try:
            result = f()
        except (ValueError, OSError) as e:
            problem, cause = str(e), e
        problems = self.from_all(problem)
        for rank, text in enumerate(problems):
            if text is not None:
                raise PrivacyError(text if text == problem else f"{text} (on rank {rank})") from cause
        return cast(T, result)

    def rehearsal(self) -> "Ranks":
        """Ranks of a measurement by this one alone: its messages are made, and not sent."""
        return _Alone(self.group, self.timeout)

    def align(self, model: nn.Module) -> None:
        """Give all ranks the trainable parameters of rank 0; refuse shapes, and frozen parameters, that differ."""
        trainable = dict(named_arrays(model.trainable_parameters()))
        everything = dict(named_arrays(model.parameters()))
        frozen = b"".join(_checksum(a) for path, a in everything.items() if path not in trainable)
        shapes = [(path, a.shape, str(a.dtype), path in trainable) for path, a in everything.items()]
        self.agree("shapes of the parameters, and frozen parameters", (shapes, frozen))
        mine = {path: a.astype(mx.float32) for path, a in trainable.items()}
        first = self.add_up(mine if self.rank == 0 else {path: mx.zeros_like(a) for path, a in mine.items()})
        self.wait(first)
        model.update(tree_unflatten([(path, a.astype(trainable[path].dtype)) for path, a in first.items()]))

    def check_shards(self, mine: int, total: int) -> None:
        """Refuse shards that together are not the data set, on all ranks."""
        rows = np.array(self._gathered(mx.array([mine]))).ravel()
        if rows.sum() != total or not rows.all():
            raise ValueError(
                f"[batches] data must be this rank's shard, such as data[rank::size], all shards with {total} rows, "
                f"dataset_size, but the ranks have {rows.tolist()} rows"
            )

    def local_sampling(self, scheme: Sampling, mine: int, total: int) -> Sampling:
        """Sampling scheme of one rank's shard, such that all ranks together follow the accounted one."""
        if not isinstance(scheme, Shuffle):
            return scheme
        if scheme.batch_size % self.size or mine * self.size != total:
            raise ValueError(
                "[batches] batch_size and dataset_size must be multiples of the number of ranks with "
                f"sampling='shuffle', and the shards of one size, but are {scheme.batch_size} and {total} for "
                f"{self.size} ranks, with {mine} rows on rank {self.rank}"
            )
        return Shuffle(scheme.batch_size // self.size, scheme.steps_per_epoch)

    def _gathered(self, mine: mx.array) -> mx.array:
        everyone: mx.array = mx.distributed.all_gather(mine[None], group=self.group)
        self.wait(everyone)
        return everyone

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self.refuse_lost()
        watchdog = threading.Timer(self.timeout, self._give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        except RuntimeError as e:
            self._lost = f"one was lost: {e}"
            raise PrivacyError(
                f"[distributed] all {self.size} ranks must take part in every step but one was lost, says rank "
                f"{self.rank}: {e}. The step is charged and its update was not made. Start all ranks again; the ledger "
                "and a saved engine state keep what was spent"
            ) from e
        finally:
            watchdog.cancel()

    def _give_up(self) -> None:
        """End the process: its thread waits inside MLX for a rank that does not answer, and cannot be woken."""
        message = (
            f"[distributed] rank {self.rank} has waited {self.timeout:g} seconds for the {self.size - 1} others, which "
            "do not answer. A step that was begun is charged and its update was not made. This process ends; start all "
            "ranks again, the ledger and a saved engine state keep what was spent. Where a rank may take longer, raise "
            "group_timeout"
        )
        print(message, file=sys.stderr, flush=True)
        os._exit(1)


class _Alone(Ranks):
    def _summed(self, packed: mx.array) -> mx.array:
        return packed + mx.zeros((), packed.dtype)  # a sum is an array of its own

    def align(self, model: nn.Module) -> None:
        """Leave the model as it is."""


def make_ranks(group: mx.distributed.Group | None, timeout: float) -> Ranks | None:
    """Ranks of a group; None where this process is alone."""
    return Ranks(group, timeout) if group is not None and group.size() > 1 else None


def _messages(sums: dict[str, mx.array]) -> list[list[str]]:
    """Paths in an order that is the same on all ranks, in pieces of at most `_MESSAGE_BYTES`, or of one path."""
    pieces: list[list[str]] = []
    room = 0
    for path in sorted(sums):
        size = sums[path].nbytes
        if size > room:
            pieces.append([])
            room = _MESSAGE_BYTES
        pieces[-1].append(path)
        room -= size
    return pieces


def _checksum(a: mx.array) -> bytes:
    """Four words over the bits of an array, by sums that wrap: no copy of a large model is made on the host."""
    flat = a.reshape(-1)
    words = mx.view(flat, mx.uint32) if a.nbytes % 4 == 0 else mx.view(flat, mx.uint8).astype(mx.uint32)
    places = mx.arange(words.size, dtype=mx.uint32)
    sums = [(words * factor).sum() for factor in (1, places + 1, places * 2654435761 + 1, places * places + 1)]
    return np.array(mx.stack(sums)).tobytes()
