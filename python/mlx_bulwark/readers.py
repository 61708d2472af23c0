"""Files of arrays and tables that are not trusted: sizes are bounded before anything is read, and no code is run."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.lib import format as npy

Array = np.ndarray[Any, Any]

MAX_BYTES = 4 << 30
KINDS = (".npz", ".npy", ".csv", ".json", ".jsonl", ".parquet", ".safetensors")
_MOST_HEADER = 1 << 20  # of .npy and of what describes a zip member
_MOST_MEMBERS = 10_000
_MOST_CELL = 1 << 20
_MOST_DEPTH = 64
_SAFETENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


class ReadError(ValueError):
    """A file cannot be read safely; the message names the file and the reason."""


def read(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> dict[str, Array]:
    """Read a file of arrays or a table that is not trusted.

    What is read is bounded before it is read: by the size of the file, by what it declares of itself, and by what comes
    out as it is unpacked. Links, devices and pipes are refused, pickles are never loaded, and nothing is written.

    Args:
        path: .npz, .npy, .csv (UTF-8, with a header), .json (an object of lists, or a list of objects), .jsonl (an
            object a line), .parquet (needs pyarrow, the extra ``arrow``) or .safetensors.
        max_bytes: Most bytes of the file and of the arrays that come of it.

    Returns:
        dict: Arrays by name; ``"x"`` for .npy.

    Raises:
        ReadError: The file is not what it claims to be, or is too large.
        OSError: It cannot be opened.
        ImportError: pyarrow is missing.

    Example:
        >>> import numpy as np, os, tempfile
        >>> from mlx_bulwark.gate import read
        >>> file = os.path.join(tempfile.mkdtemp(), "data.npz")
        >>> np.savez(file, x=np.zeros((2, 3)), y=np.array([0, 1]))
        >>> {name: a.shape for name, a in read(file).items()}
        {'x': (2, 3), 'y': (2,)}
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ReadError(f"[read] {path} must end in one of {', '.join(KINDS)} but does not")
    with _opened(path, max_bytes) as f:
        try:
            return reader(f, path, max_bytes)
        except (ReadError, ImportError):
            raise
        except RecursionError:
            raise ReadError(f"[read] {path} cannot be read: it is nested too deeply") from None
        except Exception as e:  # parsers of others raise anything on hostile input
            reason = " ".join(str(e).split())[:300] or type(e).__name__
            raise ReadError(f"[read] {path} cannot be read: {reason}") from e


def _opened(path: Path, max_bytes: int) -> BinaryIO:
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.is_symlink():
        raise ReadError(f"[read] {path} must be a file but is a link")
    number = os.open(path, flags)
    status = os.fstat(number)
    if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes:
        return os.fdopen(number, "rb")
    os.close(number)
    if not stat.S_ISREG(status.st_mode):
        raise ReadError(f"[read] {path} must be a file but is a folder, a device or a pipe")
    raise ReadError(f"[read] {path} must have at most {max_bytes} bytes but has {status.st_size}")


def _npy(f: BinaryIO, path: Path, max_bytes: int) -> dict[str, Array]:
    return {"x": _npy_array(f, str(path), max_bytes, os.fstat(f.fileno()).st_size)}


class NpyHeader(NamedTuple):
    """What an .npy file holds, and at which byte its numbers start."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    start: int


def npy_header(f: Any, name: str, size: int) -> NpyHeader:
    """Read the header of .npy, and compare what it declares with the bytes that are there."""
    version = npy.read_magic(f)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ReadError(f"[read] {name} must have version 1, 2 or 3 of .npy but has {version[0]}.{version[1]}")
    width = 2 if version == (1, 0) else 4
    raw = f.read(width)
    if len(raw) < width:
        raise ReadError(f"[read] {name} must have a header but ends in it")
    length = int.from_bytes(raw, "little")
    if length > _MOST_HEADER:
        raise ReadError(f"[read] {name} must have a header of at most {_MOST_HEADER} bytes but declares {length}")
    head = io.BytesIO(raw + f.read(length))
    parse = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = parse(head)
    if dtype.hasobject:
        raise ReadError(f"[read] {name} must hold numbers or text but holds Python objects, which are pickles")
    if any(n < 0 for n in shape):
        raise ReadError(f"[read] {name} must have a shape of sizes but has {list(shape)}")
    wanted, start = math.prod(shape) * dtype.itemsize, 6 + 2 + width + length
    if wanted != size - start:
        raise ReadError(f"[read] {name} must hold the {wanted} bytes that it declares but has {size - start}")
    return NpyHeader(shape, fortran, dtype, start)


def _npy_array(f: Any, name: str, max_bytes: int, size: int) -> Array:
    shape, fortran, dtype, _ = npy_header(f, name, size)
    wanted = math.prod(shape) * dtype.itemsize
    if wanted > max_bytes:
        raise ReadError(f"[read] {name} must have at most {max_bytes} bytes but declares {wanted}")
    data = bytearray(wanted)
    got, view = 0, memoryview(data)
    while got < wanted:
        block = f.read(min(1 << 20, wanted - got))
        if not block:
            raise ReadError(f"[read] {name} must hold {wanted} bytes but ends after {got}")
        view[got : got + len(block)] = block
        got += len(block)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _npz(f: BinaryIO, path: Path, max_bytes: int) -> dict[str, Array]:
    with zipfile.ZipFile(f) as archive:
        members = archive.infolist()
        if len(members) > _MOST_MEMBERS:
            raise ReadError(f"[read] {path} must have at most {_MOST_MEMBERS} members but has {len(members)}")
        if len({m.filename for m in members}) < len(members):
            raise ReadError(f"[read] {path} must have different members but has some twice")
        total = sum(m.file_size for m in members)
        if total > max_bytes:
            raise ReadError(f"[read] {path} must unpack to at most {max_bytes} bytes but declares {total}")
        arrays, left = {}, max_bytes
        for m in members:
            name = f"{path}:{m.filename}"
            _refuse_member(m, name)
            with archive.open(m) as member:
                arrays[m.filename[:-4]] = _npy_array(member, name, left, m.file_size)
                if member.read(1):
                    raise ReadError(f"[read] {name} must have the {m.file_size} bytes that it declares but has more")
            left -= m.file_size
    return arrays


def _refuse_member(m: zipfile.ZipInfo, name: str) -> None:
    parts = m.filename.replace("\\", "/").split("/")
    if m.filename.startswith(("/", "\\")) or ".." in parts or ":" in m.filename or "\0" in m.orig_filename:
        raise ReadError(f"[read] {name} must have a plain name but leads elsewhere")
    if not m.filename.endswith(".npy"):
        raise ReadError(f"[read] {name} must end in .npy but does not")
    if m.flag_bits & 1:
        raise ReadError(f"[read] {name} must not be encrypted but is")
    if m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ReadError(f"[read] {name} must be stored or deflated but has method {m.compress_type}")


def _csv(f: BinaryIO, path: Path, max_bytes: int) -> dict[str, Array]:
    with io.TextIOWrapper(f, encoding="utf-8-sig", newline="") as text:
        return _csv_table(csv.reader(_lines(text, path), strict=True), path)


def _csv_table(rows: Any, path: Path) -> dict[str, Array]:
    try:
        names = next(rows, None)
        if not names:
            raise ReadError(f"[read] {path} must have a header but is empty")
        if len(set(names)) < len(names):
            raise ReadError(f"[read] {path} must have different columns but has some twice")
        columns: list[list[str]] = [[] for _ in names]
        for row in rows:
            if len(row) != len(names):
                raise ReadError(
                    f"[read] {path} must have {len(names)} cells in line {rows.line_num} but has {len(row)}"
                )
            for column, cell in zip(columns, row, strict=True):
                column.append(cell)
    except csv.Error as e:
        raise ReadError(f"[read] {path} must be CSV but line {rows.line_num}: {e}") from None
    return {name: _column(column) for name, column in zip(names, columns, strict=True)}


def _lines(text: io.TextIOWrapper, path: Path) -> Any:
    while line := text.readline(_MOST_CELL):
        if len(line) >= _MOST_CELL:
            raise ReadError(f"[read] {path} must have lines below {_MOST_CELL} characters but has a longer one")
        if "\0" in line:
            raise ReadError(f"[read] {path} must be text but holds a zero byte")
        yield line


def _column(cells: list[str]) -> Array:
    """Integers, else numbers where an empty cell is missing, else text where an empty cell is None."""
    filled = [c for c in cells if c.strip()]
    if filled and all(_is_number_text(c) for c in filled):
        if len(filled) == len(cells):
            try:
                return np.array([int(c) for c in cells], np.int64)
            except (ValueError, OverflowError):
                pass
        return np.array([float(c) if c.strip() else math.nan for c in cells])
    return np.array([c if c else None for c in cells] + [None], object)[:-1]


def _is_number_text(cell: str) -> bool:
    if "_" in cell or len(cell) > 400:
        return False
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _json(f: BinaryIO, path: Path, max_bytes: int) -> dict[str, Array]:
    return _table(_parsed(f.read(max_bytes + 1), path), path)


def _jsonl(f: BinaryIO, path: Path, max_bytes: int) -> dict[str, Array]:
    return _table([_parsed(line, path) for line in f if line.strip()], path)


def _parsed(raw: bytes, path: Path) -> Any:
    depth = deepest = 0
    for c in raw:  # json recurses in C: an overflow there would be a crash
        if c in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in b"]}":
            depth -= 1
    if deepest > _MOST_DEPTH:
        raise ReadError(f"[read] {path} must be nested at most {_MOST_DEPTH} deep but is {deepest}")
    return json.loads(raw.decode("utf-8-sig"))


def _table(plain: Any, path: Path) -> dict[str, Array]:
    if isinstance(plain, list):
        if not all(isinstance(row, dict) for row in plain):
            raise ReadError(f"[read] {path} must be a list of objects but has something else")
        names = list(dict.fromkeys(k for row in plain for k in row))
        plain = {k: [row.get(k) for row in plain] for k in names}
    if not isinstance(plain, dict) or not all(isinstance(v, list) for v in plain.values()):
        raise ReadError(f"[read] {path} must be an object of lists or a list of objects but is not")
    return {k: _values(v) for k, v in plain.items()}


def _values(values: list[Any]) -> Array:
    kinds = {type(v) for v in values}
    if values and kinds <= {int, float, type(None)}:
        if kinds == {int}:
            try:
                return np.array(values, np.int64)
            except OverflowError:
                pass
        return np.array([math.nan if v is None else float(v) for v in values])
    if kinds == {bool}:
        return np.array(values)
    if kinds == {list}:
        array = np.array(values)
        if array.dtype.kind in "fiub":
            return array
    out = np.empty(len(values), object)
    out[:] = [v if isinstance(v, (str, int, float, type(None))) else json.dumps(v) for v in values]
    return out


def parquet_file(source: Any) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` whose metadata are bounded."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(
        source, thrift_string_size_limit=_MOST_HEADER * 16, thrift_container_size_limit=_MOST_HEADER
    )


def _parquet(f: BinaryIO, path: Path, max_bytes: int) -> dict[str, Array]:
    try:
        import pyarrow as pa
    except ImportError as e:
        raise ImportError(f'[read] pyarrow is missing for {path}; pip install "mlx-bulwark[arrow]" brings it') from e
    with parquet_file(f) as file:
        declared = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        rows, width = file.metadata.num_rows, len(file.schema_arrow.names)
        if max(declared, 0) > max_bytes or rows * width * 8 > 8 * max_bytes:
            raise ReadError(f"[read] {path} must unpack to at most {max_bytes} bytes but declares {declared}")
        parts, size = [], 0
        for batch in file.iter_batches(batch_size=65536):
            size += batch.nbytes
            if size > max_bytes:
                raise ReadError(f"[read] {path} must unpack to at most {max_bytes} bytes but holds more")
            parts.append(batch)
        table = pa.Table.from_batches(parts, file.schema_arrow)
        table.validate(full=True)
    names = table.column_names
    if len(set(names)) < len(names):
        raise ReadError(f"[read] {path} must have different columns but has some twice")
    return {name: np.asarray(table.column(name).to_numpy()) for name in names}


def _safetensors(f: BinaryIO, path: Path, max_bytes: int) -> dict[str, Array]:
    size = os.fstat(f.fileno()).st_size
    raw = f.read(8)
    length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
    if not 2 <= length <= min(size - 8, 100 * _MOST_HEADER):
        raise ReadError(f"[read] {path} must have a header within its {size} bytes but declares {length}")
    head = _parsed(f.read(length), path)
    if not isinstance(head, dict):
        raise ReadError(f"[read] {path} must have an object as its header but has a {type(head).__name__}")
    head.pop("__metadata__", None)
    arrays, at = {}, 0
    for name, entry in sorted(head.items(), key=lambda kv: _offsets(kv[1], kv[0], path)):
        start, stop = _offsets(entry, name, path)
        dtype, shape = _SAFETENSORS.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None:
            raise ReadError(f"[read] {path}:{name} must have a known dtype but has {entry.get('dtype')!r:.40}")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
            raise ReadError(f"[read] {path}:{name} must have a shape of sizes but has {shape!r:.40}")
        if start != at or stop - start != math.prod(shape) * np.dtype(dtype).itemsize or stop > size - 8 - length:
            raise ReadError(f"[read] {path}:{name} must fill its place in the file but does not")
        a = np.frombuffer(f.read(stop - start), dtype).reshape(shape)
        arrays[name] = _from_bfloat16(a) if entry["dtype"] == "BF16" else a
        at = stop
    if at != size - 8 - length:
        raise ReadError(f"[read] {path} must end with its last array but has {size - 8 - length - at} bytes more")
    return arrays


def _offsets(entry: Any, name: str, path: Path) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)):
        raise ReadError(f"[read] {path}:{name} must have data_offsets of two integers but has not")
    if not 0 <= offsets[0] <= offsets[1]:
        raise ReadError(f"[read] {path}:{name} must have offsets that rise but has {offsets}")
    return offsets[0], offsets[1]


def _from_bfloat16(a: Array) -> Any:
    return mx.array(a).view(mx.bfloat16)


_READERS: dict[str, Callable[[BinaryIO, Path, int], dict[str, Array]]] = {
    ".npz": _npz,
    ".npy": _npy,
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
}


def is_image(samples: Any) -> bool:
    """Whether rows are images, ``[n, H, W]`` or ``[n, H, W, C]``."""
    return samples.ndim == 3 or (samples.ndim == 4 and samples.shape[-1] in (1, 3, 4))
