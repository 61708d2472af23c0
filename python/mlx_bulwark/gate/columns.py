"""Tables of any kind as named columns of numbers or categories."""

import math
from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Column(NamedTuple):
    """A column.

    Attributes:
        values: float64, or the words of categories; missing ones left out.
        present: bool ``[n]``, which rows have a value.
    """

    values: Array
    present: Array

    @property
    def numeric(self) -> bool:
        """Whether it has numbers."""
        return self.values.dtype.kind == "f"

    @property
    def missing(self) -> int:
        """How many rows have no value."""
        return int((~self.present).sum())


def columns_of(where: str, data: Any, categorical: Iterable[str] = ()) -> dict[str, Column]:
    """Columns by their names; arrays have numbers for names, and all axes but the first make columns."""
    words = set(categorical)
    raw = {str(name): values for name, values in _raw(where, data)}
    if unknown := sorted(words - set(raw)):
        raise ValueError(f"[{where}] categorical must be columns of the data but has {', '.join(unknown)}")
    lengths = {len(values) for values in raw.values()}
    if len(lengths) != 1:
        raise ValueError(f"[{where}] data must have columns of one length but has {sorted(lengths) or 'no columns'}")
    return {name: _column(where, name, values, name in words) for name, values in raw.items()}


def _raw(where: str, data: Any) -> Iterable[tuple[Any, Array]]:
    if isinstance(data, mx.array):
        data = np.array(data.astype(mx.float32) if data.dtype in (mx.float16, mx.bfloat16) else data)
    if isinstance(data, Mapping):
        return [column for name, values in data.items() for column in _named(name, np.asarray(values))]
    if hasattr(data, "column_names"):  # Arrow
        return [(name, data.column(name).to_numpy()) for name in data.column_names]
    if hasattr(data, "columns") and not isinstance(data, np.ndarray):  # pandas, Polars
        return [(name, data[name].to_numpy()) for name in data.columns]
    array = np.asarray(data)
    if not array.ndim:
        raise ValueError(f"[{where}] data must be an array [n, ...], a dataframe or columns but is {data!r}")
    flat = array.reshape(len(array), int(np.prod(array.shape[1:])))
    return [(j, flat[:, j]) for j in range(flat.shape[1])]


def _named(name: Any, values: Array) -> list[tuple[Any, Array]]:
    """A column, or those of an array of rows."""
    if values.ndim < 2:
        return [(name, values)]
    flat = values.reshape(len(values), int(np.prod(values.shape[1:])))
    return [(f"{name}[{j}]", flat[:, j]) for j in range(flat.shape[1])]


def _column(where: str, name: str, values: Array, words: bool) -> Column:
    if values.ndim != 1:
        raise ValueError(f"[{where}] column {name!r} must be one value a row but has shape {list(values.shape)}")
    if values.dtype.kind in "mM":
        present = ~np.isnat(values)
        values = values.astype(f"{values.dtype.kind}8[us]").astype(np.float64) / 1e6
    elif values.dtype.kind in "fiu":
        values = values.astype(np.float64)
        present = ~np.isnan(values)
    elif values.dtype.kind in "bUS":
        present = np.ones(len(values), bool)
    elif values.dtype.kind == "O":
        present = np.array([not _is_missing(v) for v in values], bool)
    else:
        raise ValueError(f"[{where}] column {name!r} must be numbers or words but has dtype {values.dtype}")
    values = values[present]
    if values.dtype.kind == "O" and not words and all(_is_number(v) for v in values):
        values = values.astype(np.float64)
    if words or values.dtype.kind != "f":
        values = np.array([_word(v) for v in values.tolist()], dtype=str)
    return Column(values, present)


def _is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) and not isinstance(value, (bool, np.bool_, complex))


def _word(value: Any) -> str:
    """A category's word: whole numbers alike, whatever their type."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
