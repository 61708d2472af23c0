"""Detectors on disk: one safetensors file, arrays beside a JSON header. Nothing in it is ever executed."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import __version__

FORMAT = 1
_TYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U32": "<u4", "U8": "|u1", "BOOL": "|b1"}
_NAMES = {np.dtype(v): k for k, v in _TYPES.items()}
_LARGEST_HEADER = 100_000_000  # as the format allows

_detectors: dict[str, type] = {}
_tuples: dict[str, type] = {}


def register(*classes: type) -> None:
    """Make detectors, and named tuples that they keep, known to ``load``."""
    for c in classes:
        (_tuples if issubclass(c, tuple) else _detectors)[c.__name__] = c


def save(detector: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted detector; an older file is replaced only by a whole one."""
    tensors: dict[str, Any] = {}
    content = {"format": FORMAT, "version": __version__, "detector": _pack(detector, "", tensors)}
    path = Path(path)
    part = path.with_name(path.name + ".part")
    _write_safetensors(part, tensors, {"mlx_bulwark": json.dumps(content, allow_nan=True)})
    part.replace(path)


def fingerprint(detector: Any) -> str:
    """Hash of all that a fitted detector is."""
    tensors: dict[str, Any] = {}
    digest = hashlib.sha256(json.dumps(_pack(detector, "", tensors)).encode())
    for name, a in tensors.items():
        digest.update(f"{name} {a.dtype} {a.shape}".encode() + np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()


def load(path: str | os.PathLike[str]) -> Any:
    """Read a detector that ``save`` wrote.

    Args:
        path: The file.

    Returns:
        OutlierDetector: The detector, fitted.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not such a file, or not whole.

    Example:
        >>> import numpy as np, tempfile, os
        >>> from mlx_bulwark.outliers import RobustZ, load
        >>> detector = RobustZ().fit(np.random.default_rng(0).normal(size=(100, 3)))
        >>> path = os.path.join(tempfile.mkdtemp(), "detector.safetensors")
        >>> detector.save(path)
        >>> load(path).offset_ == detector.offset_
        True
    """
    tensors, metadata = _read_safetensors(Path(path))
    try:
        content = json.loads(metadata["mlx_bulwark"])
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, and that of this version {FORMAT}")
        if "detector" not in content["detector"]:
            raise ValueError("it has no detector")
        return _unpack(content["detector"], tensors)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, RecursionError) as e:
        raise ValueError(f"[load] {path} must be a file of a detector but is not, or was changed: {e!r}") from e


def _pack(value: Any, where: str, tensors: dict[str, Any]) -> Any:
    """A value as JSON; arrays go to ``tensors`` under the path where they stand."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return _pack(value.item(), where, tensors)
    if isinstance(value, mx.array):
        tensors[where] = np.array(value)
        return {"mlx": where}
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "OU":
            return {"strings": [str(v) for v in value.ravel()]}
        tensors[where] = value
        return {"array": where}
    if type(value).__name__ in _tuples and isinstance(value, tuple):
        named: Any = value
        fields = named._asdict()
        return {"tuple": type(value).__name__, "fields": _pack_all(fields, where, tensors)}
    if type(value).__name__ in _detectors:
        fitted = {k: v for k, v in vars(value).items() if k.endswith("_") and not k.startswith("__")}
        return {
            "detector": type(value).__name__,
            "params": _pack_all(value.get_params(deep=False), f"{where}params", tensors),
            "fitted": _pack_all(fitted, where, tensors),
        }
    if isinstance(value, (list, tuple)):
        return {"list": [_pack(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(k, (str, int)) for k in value):
        pairs = [[k, _pack(v, f"{where}.{k}", tensors)] for k, v in value.items()]
        return {"dict": pairs}
    raise ValueError(f"[save] {where} must be a number, a string, an array or a detector but is {type(value).__name__}")


def _pack_all(values: dict[str, Any], where: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: _pack(v, f"{where}/{k}".lstrip("/"), tensors) for k, v in values.items()}


def _unpack(value: Any, tensors: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    if "detector" in value:
        detector = _detectors[value["detector"]](**{k: _unpack(v, tensors) for k, v in value["params"].items()})
        for k, v in value["fitted"].items():
            if not k.endswith("_") or k.startswith("_"):
                raise KeyError(k)
            setattr(detector, k, _unpack(v, tensors))
        if value["fitted"] and hasattr(detector, "_check_loaded"):
            detector._check_loaded()
        return detector
    kinds: dict[str, Callable[[], Any]] = {
        "mlx": lambda: mx.array(tensors[value["mlx"]]),
        "array": lambda: tensors[value["array"]],
        "strings": lambda: np.array(value["strings"], dtype=object),
        "list": lambda: [_unpack(v, tensors) for v in value["list"]],
        "dict": lambda: {k: _unpack(v, tensors) for k, v in value["dict"]},
        "tuple": lambda: _tuples[value["tuple"]](**{k: _unpack(v, tensors) for k, v in value["fields"].items()}),
    }
    (kind,) = [k for k in kinds if k in value]
    return kinds[kind]()


def _write_safetensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """MLX writes no float64."""
    header: dict[str, Any] = {"__metadata__": metadata}
    arrays, offset = [], 0
    for name, a in tensors.items():
        a = np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("<"))
        header[name] = {"dtype": _NAMES[a.dtype], "shape": list(a.shape), "data_offsets": [offset, offset + a.nbytes]}
        offset += a.nbytes
        arrays.append(a)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for a in arrays:
            f.write(a.tobytes())


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        if not 2 <= length <= min(_LARGEST_HEADER, len(content) - 8):
            raise ValueError("its header is cut off")
        header = json.loads(content[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        data = memoryview(content)[8 + length :]
        return {name: _tensor(entry, data) for name, entry in header.items()}, metadata
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(f"[load] {path} must be a whole safetensors file but is not: {e}") from e


def _tensor(entry: dict[str, Any], data: memoryview) -> Any:
    dtype, (start, stop) = np.dtype(_TYPES[entry["dtype"]]), entry["data_offsets"]
    shape = tuple(int(s) for s in entry["shape"])
    size = int(np.prod(shape, dtype=object)) if shape else 1
    if min(shape, default=0) < 0 or not 0 <= start <= stop <= len(data) or stop - start != size * dtype.itemsize:
        raise ValueError("a tensor does not lie within the file")
    return np.frombuffer(data[start:stop], dtype).reshape(shape).copy()
