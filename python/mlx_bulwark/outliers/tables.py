"""Tables in files, read a piece at a time: .npy, Parquet, Arrow and CSV."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..readers import NpyHeader, ReadError, npy_header, parquet_file
from ._types import Floats

KINDS = (".npy", ".parquet", ".arrow", ".feather", ".csv")


class Table(ABC):
    """Numbers in a file.

    Attributes:
        path: The file.
        rows: Number of rows.
        columns: Names of the columns that are read; None for .npy.
        width: Number of columns that are read.
    """

    path: Path
    rows: int
    columns: list[str] | None
    width: int

    @abstractmethod
    def chunks(self, first: int, rows: int, step: int = 1, offset: int = 0) -> Iterator[tuple[int, Floats]]:
        """Every `step`-th chunk of so many rows from chunk `first + offset` on: its first row, and its numbers."""


def open_table(path: str | Path, columns: list[str] | None = None) -> Table:
    """Open a file; `columns` chooses columns by their names, or those of .npy by their numbers."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"[score_file] path must end in one of {', '.join(KINDS)} but is {path}")
    if not path.is_file():
        raise FileNotFoundError(2, "there is no such file", str(path))
    if kind == ".npy":
        return _Npy(path, columns)
    if find_spec("pyarrow") is None:
        raise ImportError(f'[score_file] pyarrow is missing for {path}; pip install "mlx-bulwark[arrow]" brings it')
    return _Arrow(path, columns)


class _Npy(Table):
    def __init__(self, path: Path, columns: list[str] | None) -> None:
        head = _npy_header(path)
        if len(head.shape) != 2 or head.dtype.kind not in "fiub":
            raise ValueError(
                f"[score_file] {path} must hold numbers of shape [n, d] but has shape {list(head.shape)} and dtype "
                f"{head.dtype}"
            )
        self.path, self.rows, self.columns = path, head.shape[0], None
        self._dtype, self._all, self._start = head.dtype, head.shape[1], head.start
        self._by_column = head.fortran
        self._chosen = None if columns is None else _numbers(path, columns, self._all)
        self.width = self._all if self._chosen is None else len(self._chosen)

    def chunks(self, first: int, rows: int, step: int = 1, offset: int = 0) -> Iterator[tuple[int, Floats]]:
        for start in range((first + offset) * rows, self.rows, rows * step):
            yield start, self._read(start, min(rows, self.rows - start))

    def _read(self, start: int, count: int) -> Floats:
        if self._by_column:
            order: Any = {"shape": (self.rows, self._all), "order": "F", "offset": self._start, "mode": "r"}
            x = np.array(np.memmap(self.path, self._dtype, **order)[start : start + count])
        else:  # not through a memory map, whose pages would count as this process's memory
            place = self._start + start * self._all * self._dtype.itemsize
            x = np.fromfile(self.path, self._dtype, count * self._all, offset=place).reshape(count, self._all)
        x = x if self._chosen is None else x[:, self._chosen]
        return x if x.dtype in (np.float32, np.float64) else x.astype(np.float64)


def _npy_header(path: Path) -> NpyHeader:
    with path.open("rb") as f:
        try:
            return npy_header(f, str(path), os.fstat(f.fileno()).st_size)
        except ReadError:
            raise
        except Exception as e:  # NumPy's parser raises anything on hostile input
            raise ReadError(f"[read] {path} cannot be read: {e}") from e


def _numbers(path: Path, columns: list[str], width: int) -> list[int]:
    wrong = [c for c in columns if not c.isdecimal() or int(c) >= width]
    if wrong:
        raise ValueError(f"[score_file] columns of {path} must be numbers below {width} but are {', '.join(wrong)}")
    return [int(c) for c in columns]


class _Arrow(Table):
    def __init__(self, path: Path, columns: list[str] | None) -> None:
        self.path = path
        schema, self.rows = self._look()
        names = list(schema.names)
        missing = [c for c in columns or [] if c not in names]
        if missing:
            raise ValueError(
                f"[score_file] {path} must have the columns {', '.join(columns or [])} but has no "
                f"{' and no '.join(missing)}"
            )
        self.columns = list(columns or names)
        words = [f"{c!r} ({schema.field(c).type})" for c in self.columns if not _is_number(schema.field(c).type)]
        if words:
            raise ValueError(
                f"[score_file] {path} must be numeric but has {len(words)} columns that are not: {', '.join(words)}; "
                "choose others by columns"
            )
        self.width = len(self.columns)

    def chunks(self, first: int, rows: int, step: int = 1, offset: int = 0) -> Iterator[tuple[int, Floats]]:
        wanted = range((first + offset) * rows, self.rows, rows * step)
        parts: list[Any] = []
        at, seen = 0, 0  # the chunk that is put together, and rows before this batch
        for batch in self._batches(rows):
            while at < len(wanted) and wanted[at] < seen + batch.num_rows:
                start, stop = wanted[at], min(wanted[at] + rows, self.rows)
                low = max(start - seen, 0)
                parts.append(batch.slice(low, min(stop - seen, batch.num_rows) - low))
                if stop > seen + batch.num_rows:
                    break
                yield start, np.concatenate([_numeric(p) for p in parts])
                parts, at = [], at + 1
            seen += batch.num_rows

    def _look(self) -> tuple[Any, int]:
        """Names, types and number of rows."""
        if self.path.suffix.lower() == ".parquet":
            with parquet_file(self.path) as f:
                return f.schema_arrow, f.metadata.num_rows
        schema, rows = None, 0
        for batch in self._batches(65536, every=True):
            schema, rows = batch.schema, rows + batch.num_rows
        if schema is None:
            raise ValueError(f"[score_file] {self.path} must have rows but is empty")
        return schema, rows

    def _batches(self, rows: int, every: bool = False) -> Iterator[Any]:
        import pyarrow as pa

        chosen = None if every else self.columns
        if self.path.suffix.lower() == ".parquet":
            with parquet_file(self.path) as f:
                yield from f.iter_batches(batch_size=rows, columns=chosen)
        elif self.path.suffix.lower() == ".csv":
            import pyarrow.csv

            with pyarrow.csv.open_csv(self.path) as f:
                yield from (batch if chosen is None else batch.select(chosen) for batch in f)
        else:
            with pa.memory_map(str(self.path)) as source:
                try:
                    f = pa.ipc.open_file(source)
                    batches = (f.get_batch(i) for i in range(f.num_record_batches))
                except pa.ArrowInvalid:
                    source.seek(0)
                    batches = iter(pa.ipc.open_stream(source))
                yield from (batch if chosen is None else batch.select(chosen) for batch in batches)


def _is_number(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind))


def _numeric(batch: Any) -> Floats:
    """Numbers of a batch; what is missing is NaN."""
    single = all(str(c.type) in ("float", "halffloat") for c in batch.columns)
    out = np.empty((batch.num_rows, batch.num_columns), np.float32 if single else np.float64)
    for j, column in enumerate(batch.columns):
        values = column.cast("double") if str(column.type) not in ("float", "double", "halffloat") else column
        out[:, j] = values.to_numpy(zero_copy_only=False)
    return out
