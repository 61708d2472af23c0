"""Guards of running pipelines: batches are checked as they come, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from .quarantine import Quarantine
from .report import GateError, RuleResult, ValidationReport, absorb
from .schema import Policy, Schema
from .statistics import Array

if TYPE_CHECKING:
    from ..provenance.manifest import AppendsLines

REMEMBERED = 1_000_000


class Memory:
    """What a stream keeps between batches: hashes of rows, and the last row of each series."""

    def __init__(self, remember: int) -> None:
        self._most = remember
        self._hashes: dict[int, None] = {}
        self._tails: dict[str, dict[str, Any]] = {}

    def seen(self, hashes: Array) -> Any:
        """Which rows earlier batches had; these rows are remembered, and the oldest forgotten."""
        known, new = self._hashes, hashes.tolist()
        found = np.array([h in known for h in new], bool)
        known.update(dict.fromkeys(new))
        for h in list(known)[: max(0, len(known) - self._most)]:
            del known[h]
        return found

    def with_tails(self, arrays: dict[str, Array]) -> tuple[dict[str, Array], int]:
        """Arrays behind the last rows of the series before, and how many those are."""
        tails = [t for t in self._tails.values() if set(t) == set(arrays)]
        if not tails:
            return arrays, 0
        return {k: np.concatenate([np.stack([t[k] for t in tails]), a]) for k, a in arrays.items()}, len(tails)

    def keep_tails(self, arrays: dict[str, Array], groups: Any, last: Any) -> None:
        """Remember the last row of each series."""
        for i in last:
            self._tails.pop(str(groups[i]), None)
            self._tails[str(groups[i])] = {k: a[i] for k, a in arrays.items()}
        for name in list(self._tails)[: max(0, len(self._tails) - self._most)]:
            del self._tails[name]


class Stream:
    """Batches that passed a schema, and what was found in all so far.

    Attributes:
        report: Of all batches so far; row numbers count from the beginning of the stream.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        schema: Schema,
        policy: Policy,
        quarantine: Quarantine | None,
        remember: int,
        audit_log: AppendsLines | None,
    ) -> None:
        self._batches, self._schema, self._policy = iter(batches), schema, policy
        self._quarantine, self._audit_log = quarantine, audit_log
        self._memory = Memory(remember)
        self._places: dict[tuple[str, str], RuleResult] = {}
        self._ended = False
        self.report = ValidationReport(f"{schema.name} {schema.version}", 0, [])

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            try:
                data = next(self._batches)
            except StopIteration:
                self._end()
                raise
            data, kept = self._checked(data)
            if kept:
                return data

    def _checked(self, data: Any) -> tuple[Any, int]:
        check, report = self._schema._run(data, memory=self._memory)
        first_row = self.report.rows
        try:
            passed = self._schema._judged(
                data, check, report, self._policy, self._quarantine, self._audit_log, first_row
            )
        finally:
            absorb(self.report, self._places, report)
        return passed.data, report.rows - report.dropped

    def _end(self) -> None:
        """The number of rows is known only now."""
        if self._ended or self._schema.rows is None:
            return
        self._ended = True
        least, most = self._schema.rows
        n = self.report.rows
        off = max(least - n, 0) + (max(n - most, 0) if most is not None else 0)
        words = f"have {least} to {'any number of' if most is None else most} rows"
        self.report.results.append(RuleResult("rows", "data", off, words, f"has {n}" if off else ""))
        if off and self._policy != "report":
            raise GateError(f"[gate] the stream must {words} but has {n}", self.report)


def stream(
    iterable: Iterable[Any],
    schema: Schema,
    *,
    policy: Policy = "raise",
    quarantine: str | os.PathLike[str] | Quarantine | None = None,
    remember: int = REMEMBERED,
    audit_log: AppendsLines | None = None,
) -> Stream:
    """Guard a running input pipeline: check every batch as it comes, in bounded memory.

    Rules of fields and rows are held batch by batch, shares and tests against trusted data among them, so batches
    should not be tiny. Repeated rows are found across batches by a 64-bit hash, series go on from batch to batch, and
    the number of rows is judged at the end.

    Args:
        iterable: Gives batches, each as ``Schema.check`` takes it.
        schema: What batches must be.
        policy: ``"raise"``, ``"drop"`` or ``"report"``, as of ``Schema.validate``.
        quarantine: Where dropped rows go; row numbers count from the beginning of the stream.
        remember: How many rows and series are remembered, of some 100 bytes each; older ones are forgotten.
        audit_log: As of ``Schema.validate``: a line a batch.

    Returns:
        Stream: An iterator of the batches that pass, with a running ``report``.

    Raises:
        ValueError: An argument is wrong.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark import gate
        >>> schema = gate.Schema(fields={"x": gate.Field(low=0, high=1)})
        >>> guarded = gate.stream((np.full(4, v) for v in (0.5, 3.0, 1.0)), schema, policy="report")
        >>> len(list(guarded)), guarded.report.rows, guarded.report.counts["range"]
        (3, 12, 4)
    """
    kept = _quarantine("stream", policy, quarantine, remember)
    return Stream(iterable, schema, policy, kept, remember, audit_log)


class Dataset:
    """A guarded pipeline that can be gone through again; every pass is a stream of its own.

    Attributes:
        report: Of the latest pass.
    """

    def __init__(
        self,
        pipeline: Iterable[Any],
        schema: Schema,
        policy: Policy,
        quarantine: Quarantine | None,
        remember: int,
        audit_log: AppendsLines | None,
        sample_batch: int | None,
    ) -> None:
        self._pipeline, self._schema, self._policy = pipeline, schema, policy
        self._quarantine, self._remember, self._audit_log = quarantine, remember, audit_log
        self._sample_batch = sample_batch
        self._stream: Stream | None = None

    @property
    def report(self) -> ValidationReport:
        """What the latest pass has found."""
        if self._stream is None:
            return ValidationReport(f"{self._schema.name} {self._schema.version}", 0, [])
        return self._stream.report

    def __iter__(self) -> Iterator[Any]:
        if self._stream is not None and hasattr(self._pipeline, "reset"):
            self._pipeline.reset()  # a stream of mlx.data
        items = self._pipeline if self._sample_batch is None else _stacked(self._pipeline, self._sample_batch)
        self._stream = Stream(items, self._schema, self._policy, self._quarantine, self._remember, self._audit_log)
        return self._stream if self._sample_batch is None else _unstacked(self._stream)

    def __len__(self) -> int:
        return len(self._pipeline)  # type: ignore[arg-type]  # a pipeline without a length says so itself


def dataset(
    pipeline: Iterable[Any],
    schema: Schema,
    *,
    policy: Policy = "raise",
    quarantine: str | os.PathLike[str] | Quarantine | None = None,
    remember: int = REMEMBERED,
    audit_log: AppendsLines | None = None,
    sample_batch: int | None = None,
) -> Dataset:
    """Guard a dataset: a plain iterable, or a buffer or stream of mlx.data.

    Args:
        pipeline: Gives batches, or single samples with ``sample_batch``: mappings of arrays, as mlx.data's, tuples or
            arrays. It is asked to ``reset()`` before a further pass, if it can.
        schema: What batches must be.
        policy: As of ``stream``.
        quarantine: As of ``stream``.
        remember: As of ``stream``.
        audit_log: As of ``stream``.
        sample_batch: The pipeline gives single samples: so many are put together for the check, and given one by one.

    Returns:
        Dataset: Gives what passes, at every pass anew.

    Raises:
        ValueError: An argument is wrong.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark import gate
        >>> samples = [{"image": np.zeros((2, 2)), "label": k} for k in (0, 1, 7)]
        >>> schema = gate.Schema(fields={"label": gate.Field(values=(0, 1))})
        >>> guarded = gate.dataset(samples, schema, policy="report", sample_batch=2)
        >>> [int(sample["label"]) for sample in guarded], guarded.report.counts["values"]
        ([0, 1, 7], 1)
    """
    if sample_batch is not None and sample_batch < 1:
        raise ValueError(f"[dataset] sample_batch must be 1 or more but is {sample_batch}")
    kept = _quarantine("dataset", policy, quarantine, remember)
    return Dataset(pipeline, schema, policy, kept, remember, audit_log, sample_batch)


def _quarantine(name: str, policy: str, quarantine: Any, remember: int) -> Quarantine | None:
    if policy not in get_args(Policy):
        raise ValueError(f"[{name}] policy must be one of {', '.join(get_args(Policy))} but is {policy!r}")
    if policy == "drop" and quarantine is None:
        raise ValueError(f"[{name}] quarantine must be given under the policy 'drop' but is None")
    if remember < 1:
        raise ValueError(f"[{name}] remember must be 1 or more but is {remember}")
    return quarantine if quarantine is None or isinstance(quarantine, Quarantine) else Quarantine(quarantine)


def _stacked(samples: Iterable[Any], size: int) -> Iterator[Any]:
    waiting: list[Any] = []
    for sample in samples:
        waiting.append(sample)
        if len(waiting) == size:
            yield _batch(waiting)
            waiting = []
    if waiting:
        yield _batch(waiting)


def _batch(samples: list[Any]) -> Any:
    first = samples[0]
    if isinstance(first, Mapping):
        names = set(first)
        if any(set(s) != names for s in samples):
            raise ValueError("[dataset] samples must have the same fields but have different ones")
        return {k: _column([s[k] for s in samples]) for k in first}
    if isinstance(first, tuple):
        return tuple(_column(list(column)) for column in zip(*samples, strict=True))
    return _column(samples)


def _column(values: list[Any]) -> Array:
    if all(isinstance(v, (str, bytes)) for v in values):
        return np.array([v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values], object)
    shapes = {np.shape(v) for v in values}
    if len(shapes) > 1:
        raise ValueError(f"[dataset] samples must have one shape but have {', '.join(map(str, sorted(shapes)))}")
    return np.stack([np.asarray(v) for v in values])


def _unstacked(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Mapping):
            yield from ({k: a[i] for k, a in batch.items()} for i in range(len(next(iter(batch.values())))))
        elif isinstance(batch, tuple):
            yield from zip(*batch, strict=True)
        else:
            yield from batch
