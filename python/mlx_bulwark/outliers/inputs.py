"""What detectors take: NumPy and MLX arrays, lists and dataframes; and what they refuse, with where and how many."""

from typing import Any

import mlx.core as mx
import numpy as np
from sklearn.utils.validation import validate_data

from ._types import Floats

NAMED_PLACES = 3  # of bad values, in a message


def admit(detector: Any, X: Any, *, reset: bool, least: int = 1) -> Floats:
    """Numbers of X as float32 or float64, row by row; its width and names of columns are kept, or checked."""
    name = type(detector).__name__
    if isinstance(X, mx.array):
        X = as_numpy(X)
    try:
        x: Floats = validate_data(
            detector,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            ensure_all_finite=False,
            ensure_min_samples=least,
        )
    except (ValueError, TypeError) as e:
        if message := _words(X):
            raise ValueError(f"[{name}] {message}") from e
        raise
    refuse_bad(name, x, getattr(detector, "feature_names_in_", None))
    return x


def as_numpy(x: mx.array) -> Any:
    """An MLX array as NumPy's; half precision as float32."""
    return np.array(x.astype(mx.float32) if x.dtype in (mx.float16, mx.bfloat16) else x)


def refuse_bad(name: str, x: Floats, columns: Any = None, first_row: int = 0) -> None:
    """Refuse NaN and infinities, with how many and where."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(x.sum(dtype=np.float64)):
            return
    bad = ~np.isfinite(x)
    if not bad.any():  # the sum was too large
        return
    nans, rows = int(np.isnan(x).sum()), np.flatnonzero(bad.any(axis=1))
    counts = [f"{count} {what}" for count, what in ((nans, "NaN"), (int(bad.sum()) - nans, "inf")) if count]
    places = [
        f"{column_name(j, columns)} ({int(bad[:, j].sum())}, first in row {first_row + int(bad[:, j].argmax())})"
        for j in np.flatnonzero(bad.any(axis=0))[:NAMED_PLACES]
    ]
    further = int(bad.any(axis=0).sum()) - len(places)
    raise ValueError(
        f"[{name}] X must have no NaN and no inf but has {' and '.join(counts)}, in {len(rows)} of {len(x)} rows: "
        f"{', '.join(places)}{f', and {further} further columns' if further else ''}"
    )


def column_name(j: int, columns: Any) -> str:
    """How a column is called in messages."""
    return f"column {j}" if columns is None else f"column {columns[j]!r}"


def _words(X: Any) -> str:
    """What of X is no number: its columns, where they have types of their own, or the first such value."""
    dtypes = _dtypes(X)
    if dtypes:
        words = [f"{name!r} ({kind})" for name, kind in dtypes.items() if not _is_numeric(kind)]
        return f"X must be numeric but has {len(words)} columns that are not: {', '.join(words)}" if words else ""
    try:
        values = np.asarray(X, dtype=object)
    except ValueError:
        return ""
    if values.ndim != 2:
        return ""
    bad = [(i, j) for i, j in np.ndindex(values.shape) if isinstance(values[i, j], str) and not _parses(values[i, j])]
    if not bad:
        return ""
    i, j = bad[0]
    first = f"the first {values[i, j]!r} in row {i}, column {j}"
    return f"X must be numeric but has {len(bad)} values that are not, {first}"


def _dtypes(X: Any) -> dict[str, str]:
    """Types of the columns of a dataframe or a table; empty for all else."""
    if not hasattr(X, "columns") or isinstance(X, np.ndarray):
        return {}
    if hasattr(X, "dtypes") and hasattr(X.dtypes, "items"):  # pandas
        return {str(k): str(v) for k, v in X.dtypes.items()}
    schema = getattr(X, "schema", None)
    if schema is not None and hasattr(schema, "items"):  # polars
        return {str(k): str(v) for k, v in schema.items()}
    if schema is not None:  # Arrow
        return {field.name: str(field.type) for field in schema}
    return {}


def _is_numeric(kind: str) -> bool:
    return kind.lower().startswith(("int", "uint", "float", "double", "half", "bool", "decimal"))


def _parses(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
