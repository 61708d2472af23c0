"""Scores of files larger than memory: a chunk at a time, resumed where it was interrupted, shared among ranks."""

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from sklearn.utils.validation import check_is_fitted
from tqdm import tqdm

from . import storage
from ._types import Float64, Floats
from .base import OutlierDetector, labels
from .inputs import refuse_bad
from .tables import Table, open_table

_REFUSED = 1


@dataclass(frozen=True)
class ScoredFile:
    """What ``score_file`` did.

    Attributes:
        path: The file of the scores.
        rows: How many rows were scored, those of an interrupted run among them.
        outliers: How many of them ``predict`` calls outliers.
        resumed: How many rows an interrupted run had scored.
    """

    path: Path
    rows: int
    outliers: int
    resumed: int


def score_file(
    detector: OutlierDetector,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    columns: list[str] | None = None,
    chunk_rows: int = 65536,
    progress: bool = True,
    group: mx.distributed.Group | None = None,
) -> ScoredFile:
    """Score the rows of a file of any size, in the memory of a few chunks.

    Scores reach the disk chunk by chunk, in ``out`` with ``.part`` behind it, beside a note of how far they are. A call
    that is interrupted is resumed by the same call: the same detector, file and chunks; otherwise it starts anew, with
    a warning. ``out`` appears when all is done.

    Args:
        detector: Fitted; one of neighbours with ``novelty=True``.
        path: .npy with shape ``[n, d]``, .parquet, .arrow or .feather (Arrow IPC, file or stream), or .csv with a
            header. All but .npy need pyarrow, the extra ``arrow``.
        out: .npy gets ``score_samples``, float64 ``[n]``; .csv gets row, score_samples and predict.
        columns: Names of the columns (numbers, for .npy), in the order of the detector's; by default its
            ``feature_names_in_``, or all.
        chunk_rows: Rows of a chunk.
        progress: Whether to show a progress bar.
        group: Ranks that share the work: each scores every size-th chunk, and rank 0 writes. All of them make the call,
            and all read the file.

    Returns:
        ScoredFile: What was done.

    Raises:
        ValueError: The file does not have the detector's columns, or has NaN, inf or text; or a file's name ends in
            something else.
        OSError: A file cannot be read or written.
        ImportError: pyarrow is missing.

    Example:
        >>> import numpy as np, os, tempfile
        >>> from mlx_bulwark.outliers import ECOD, score_file
        >>> x = np.random.default_rng(0).normal(size=(1000, 3))
        >>> folder = tempfile.mkdtemp()
        >>> file, out = (os.path.join(folder, name) for name in ("x.npy", "scores.npy"))
        >>> np.save(file, x)
        >>> detector = ECOD().fit(x[:500])
        >>> done = score_file(detector, file, out, progress=False)
        >>> bool((np.load(done.path) == detector.score_samples(x)).all())
        True
    """
    out = Path(out)
    if out.suffix.lower() not in (".npy", ".csv"):
        raise ValueError(f"[score_file] out must end in .npy or .csv but is {out}")
    if chunk_rows < 1:
        raise ValueError(f"[score_file] chunk_rows must be 1 or more but is {chunk_rows}")
    check_is_fitted(detector)
    if not hasattr(detector, "score_samples"):
        raise ValueError(f"[score_file] detector must have novelty=True but is {detector!r}")
    names = getattr(detector, "feature_names_in_", None)
    table = open_table(os.fspath(path), columns or (None if names is None or _unnamed(path) else list(map(str, names))))
    if table.width != detector.n_features_in_:
        raise ValueError(
            f"[score_file] {table.path} must have the detector's {detector.n_features_in_} columns but has "
            f"{table.width}"
        )
    if not table.rows:
        raise ValueError(f"[score_file] {table.path} must have rows but is empty")
    work = _Work(detector, table, out, chunk_rows, group if group is not None and group.size() > 1 else None)
    resumed = work.begin()
    with tqdm(
        total=table.rows, initial=resumed, unit=" rows", unit_scale=True, disable=not progress or work.rank > 0
    ) as bar:
        for scored in work.go():
            bar.update(scored)
    return ScoredFile(out, table.rows, work.finish(), resumed)


def _unnamed(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).lower().endswith(".npy")


class _Work:
    """The chunks of a file, and how many of them are done."""

    def __init__(
        self, detector: Any, table: Table, out: Path, chunk_rows: int, group: mx.distributed.Group | None
    ) -> None:
        self.detector, self.table, self.out, self.chunk_rows, self.group = detector, table, out, chunk_rows, group
        self.rank, self.size = (group.rank(), group.size()) if group else (0, 1)
        self.part, self.note = (out.with_name(out.name + end) for end in (".part", ".part.json"))
        self.done = 0

    def begin(self) -> int:
        """Rows that an interrupted run has scored."""
        if self.rank == 0:
            status = self.table.path.stat()
            self.job = {
                "detector": storage.fingerprint(self.detector),
                "file": [str(self.table.path.resolve()), status.st_size, status.st_mtime_ns],
                "columns": self.table.columns,
                "chunk_rows": self.chunk_rows,
            }
            self.done = self._resumable()
            if not self.done:
                self._create()
        if self.group:
            # on the CPU: a rank may have no GPU
            self.done = int(self._gathered(np.array([self.done], np.uint32))[0, 0])
        return min(self.done * self.chunk_rows, self.table.rows)

    def go(self) -> Iterator[int]:
        """Score what is left, and say after each round how many rows that were."""
        chunks = self.table.chunks(self.done, self.chunk_rows, self.size, self.rank)
        while self.done * self.chunk_rows < self.table.rows:
            start = self.done * self.chunk_rows
            scores = self._round(chunks)[: self.table.rows - start]
            self.done += self.size
            if self.rank == 0:
                self._write(start, scores)
            yield len(scores)

    def finish(self) -> int:
        """Put the scores in their place; how many are outliers."""
        outliers = 0
        if self.rank == 0:
            scores = np.load(self.part, mmap_mode="r", allow_pickle=False)
            pieces = range(0, len(scores), self.chunk_rows)
            decision = (np.array(scores[i : i + self.chunk_rows]) - self.detector.offset_ for i in pieces)
            outliers = sum(int((d < 0).sum()) for d in decision)
            if self.out.suffix.lower() == ".csv":
                self._write_csv(scores)
                self.part.unlink()
            else:
                self.part.replace(self.out)
            self.note.unlink()
        return int(self._gathered(np.array([outliers], np.uint32))[0, 0]) if self.group else outliers

    def _round(self, chunks: Iterator[tuple[int, Floats]]) -> Float64:
        """Scores of one chunk of each rank."""
        if not self.group:
            return self._scores(*next(chunks))
        mine, error = np.zeros(self.chunk_rows), None
        try:
            for start, x in [c for c in [next(chunks, None)] if c is not None]:
                mine[: len(x)] = self._scores(start, x)
        except Exception as e:
            error = e
        refused = np.flatnonzero(self._gathered(np.array([_REFUSED * (error is not None)], np.uint32)))
        if error is not None:
            raise error
        if len(refused):
            raise RuntimeError(f"[score_file] all ranks must be able to read their rows but rank {refused[0]} is not")
        return self._gathered(mine.view(np.uint32)).reshape(-1).view(np.float64)

    def _gathered(self, mine: Any) -> Any:
        everyone = mx.distributed.all_gather(mx.array(mine)[None], group=self.group, stream=mx.cpu)
        return np.array(everyone)

    def _scores(self, start: int, x: Floats) -> Float64:
        names = getattr(self.detector, "feature_names_in_", self.table.columns)
        refuse_bad(type(self.detector).__name__, x, names, first_row=start)
        return -self.detector._scores_of(self.detector._prepared(x))

    def _resumable(self) -> int:
        try:
            note = json.loads(self.note.read_text())
        except (OSError, ValueError):
            return 0
        done = note.pop("done", 0)
        if note == self.job and self.part.is_file():
            return int(done)
        why = "is of another detector, file or chunk_rows: starting anew"
        warnings.warn(f"[score_file] {self.part} {why}", stacklevel=4)
        return 0

    def _create(self) -> None:
        np.lib.format.open_memmap(self.part, "w+", np.float64, (self.table.rows,)).flush()
        self._note()

    def _write(self, start: int, scores: Float64) -> None:
        first = self.part.stat().st_size - 8 * self.table.rows
        with self.part.open("r+b") as f:
            f.seek(first + 8 * start)
            f.write(scores.tobytes())
            f.flush()
            os.fsync(f.fileno())
        self._note()

    def _note(self) -> None:
        new = self.note.with_name(self.note.name + ".new")
        new.write_text(json.dumps(self.job | {"done": self.done}))
        new.replace(self.note)

    def _write_csv(self, scores: Any) -> None:
        new = self.out.with_name(self.out.name + ".new")
        with new.open("w") as f:
            f.write("row,score_samples,predict\n")
            for i in range(0, len(scores), self.chunk_rows):
                piece = np.array(scores[i : i + self.chunk_rows])
                lines = zip(piece.tolist(), labels(piece - self.detector.offset_).tolist(), strict=True)
                f.writelines(f"{row},{score!r},{label}\n" for row, (score, label) in enumerate(lines, i))
        new.replace(self.out)
