"""Data as fields: whatever a caller has becomes arrays by name whose first axis is the rows."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FEATURES, LABELS = "x", "y"


class Batch:
    """Named arrays with the same rows.

    Attributes:
        arrays: NumPy arrays by name; text is of dtype object.
        device: The MLX arrays among them, as they came.
        dtypes: Names of dtypes as they came.
    """

    def __init__(self, data: Any) -> None:
        self.arrays: dict[str, Array] = {}
        self.device: dict[str, mx.array] = {}
        self.dtypes: dict[str, str] = {}
        for name, values in as_fields(data).items():
            self._add(name, values)

    @property
    def rows(self) -> int:
        """Rows that all fields have."""
        return min((len(a) for a in self.arrays.values()), default=0)

    def _add(self, name: str, values: Any) -> None:
        if isinstance(values, mx.array):
            self.device[name] = values
            dtype = str(values.dtype).rpartition(".")[2]
            array = np.asarray(values.astype(mx.float32) if values.dtype == mx.bfloat16 else values)
        else:
            array = _array(values)
            dtype = _dtype_name(array)
        if not array.ndim:
            raise ValueError(f"[gate] field {name!r} must have rows but is a single {type(values).__name__}")
        self.arrays[name], self.dtypes[name] = array, "bool" if dtype == "bool_" else dtype


def as_fields(data: Any) -> dict[str, Any]:
    """Fields of arrays, (features, labels), mappings, structured arrays and dataframes, by name."""
    if isinstance(data, (mx.array, np.ndarray)):
        names = getattr(getattr(data, "dtype", None), "names", None)
        return {n: data[n] for n in names} if names else {FEATURES: data}
    if isinstance(data, Mapping):
        return {str(k): v for k, v in data.items()}
    if isinstance(data, tuple) and len(data) == 2:
        features = as_fields(data[0])
        if LABELS in features:
            raise ValueError(f"[gate] features must have no field {LABELS!r} beside labels but have one")
        return {**features, LABELS: data[1]}
    if hasattr(data, "column_names") and hasattr(data, "column"):  # Arrow
        return {str(n): data.column(n).to_numpy() for n in data.column_names}
    if hasattr(data, "columns"):
        names = [str(n) for n in data.columns]
        if len(set(names)) < len(names):
            raise ValueError(f"[gate] columns must have different names but are {', '.join(names)}")
        return {str(n): data[n] for n in data.columns}
    if isinstance(data, list):
        return {FEATURES: np.asarray(data)}
    raise ValueError(
        "[gate] data must be an array, (features, labels), a mapping of arrays or a dataframe but is "
        f"{type(data).__name__}"
    )


def take(data: Any, keep: NDArray[np.bool_]) -> Any:
    """The rows of data that are kept, in the form in which they came."""
    if isinstance(data, mx.array):
        return data[mx.array(np.flatnonzero(keep).astype(np.int32))]
    if isinstance(data, np.ndarray):
        return data[keep]
    if isinstance(data, Mapping):
        return {k: take(v, keep) for k, v in data.items()}
    if isinstance(data, tuple):
        return tuple(take(v, keep) for v in data)
    if isinstance(data, list):
        return [v for v, k in zip(data, keep.tolist(), strict=True) if k]
    if hasattr(data, "loc"):
        return data.loc[keep]
    return data.filter(keep)


def _array(values: Any) -> Array:
    if isinstance(values, (list, tuple)):
        try:
            array = np.asarray(values)
        except ValueError as e:
            raise ValueError(f"[gate] rows must have one shape but {e}") from None
        if array.dtype.kind in "US" and not all(isinstance(v, (str, bytes)) for v in values):
            array = np.asarray(values, dtype=object)  # numbers and text beside each other stay what they are
    elif hasattr(values, "dtype") and hasattr(values, "to_numpy"):
        array = _series(values)
    else:
        array = np.asarray(values)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    if array.dtype.kind == "U" or array.dtype.kind == "T":
        array = array.astype(object)
    return array


def _series(values: Any) -> Array:
    kind = str(values.dtype)
    if getattr(values.dtype, "tz", None) is not None and hasattr(values, "dt"):
        return np.asarray(values.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy())
    if kind in ("str", "string", "category") or kind.startswith("string"):
        return np.asarray(values.to_numpy(dtype=object))
    if kind[0] in "IUF" and hasattr(values, "isna"):  # pandas' own, which may miss values
        if values.isna().any():
            return np.asarray(values.to_numpy(dtype="float64", na_value=np.nan))
        return np.asarray(values.to_numpy(kind.lower()))
    return np.asarray(values.to_numpy())


def _dtype_name(array: Array) -> str:
    if array.dtype.kind == "O":
        return "text"
    return "datetime" if array.dtype.kind in "mM" else array.dtype.name
