"""Rules of fields from trusted values."""

import math
from typing import Any

import numpy as np

from ..ops.tails import MAD_SCALE
from .batch import Batch
from .fields import _is_missing, value_key
from .rules import Field, Outlier, Trusted
from .statistics import channel_statistics, channels, laid_out

MOST_VALUES = 1000  # different ones of labels and categories
_LEAST_EACH = 5  # rows a value, on average, for a field to be one of categories
_FAR = 2.0  # times as far as the farthest trusted value


def infer_fields(batch: Batch, quantiles: tuple[float, float], margin: float) -> dict[str, Field]:
    """Rules of every field."""
    return {name: _field(batch, name, a, quantiles, margin) for name, a in batch.arrays.items()}


def _field(batch: Batch, name: str, a: Any, quantiles: tuple[float, float], margin: float) -> Field:
    shape = tuple(a.shape[1:])
    if a.dtype.kind in "fiub":
        counts = _counts(a) if a.dtype.kind != "f" and not shape else None
        if counts is not None:
            trusted = Trusted(rows=len(a), counts=counts)
            values = tuple(int(k) for k in counts)
            return Field(dtype=batch.dtypes[name], shape=shape, values=values, trusted=trusted)
        return _numeric(batch, name, a, quantiles, margin)
    missing = np.isnat(a) if a.dtype.kind in "mM" else np.array([_is_missing(v) for v in a.ravel()], bool)
    share = _share(int(missing.sum()), a.size)
    if a.dtype.kind == "O" and not shape:
        counts = _counts(a)
        if counts is not None:
            trusted = Trusted(rows=len(a), counts=counts)
            return Field(dtype="text", shape=(), missing=share, values=tuple(counts), trusted=trusted)
        return Field(dtype="text", shape=(), missing=share, max_length=2 * max(len(str(v)) for v in a), clean_text=True)
    first, last = _moments(a, missing, margin) if a.dtype.kind == "M" else (None, None)
    return Field(dtype=batch.dtypes[name], shape=shape, missing=share, earliest=first, latest=last)


def _moments(a: Any, missing: Any, margin: float) -> tuple[str | None, str | None]:
    """First and last moment, widened."""
    if missing.all():
        return None, None
    us = a[~missing].astype("M8[us]").astype(np.int64)
    wide = int(margin * float(us.max() - us.min()))
    least, most = (int(np.datetime64(t, "us").astype(np.int64)) for t in ("0001-01-01", "9999-12-31"))
    ends = max(int(us.min()) - wide, least), min(int(us.max()) + wide, most)
    first, last = (str(np.datetime64(t, "us")) for t in ends)
    return first, last


def _counts(a: Any) -> dict[str, int] | None:
    """How often each value occurs, if the values are categories."""
    flat = [str(v) for v in a if not _is_missing(v)] if a.dtype.kind == "O" else a
    kinds, counts = np.unique(flat, return_counts=True)
    if not len(kinds) or len(kinds) > MOST_VALUES or len(a) < _LEAST_EACH * len(kinds):
        return None
    return dict(zip(map(value_key, kinds.tolist()), counts.tolist(), strict=True))


def _share(missing: int, size: int) -> float:
    """A budget that no batch from the same source of a thousand values and more meets by chance; none for none."""
    return min(1.0, 3 * missing / size + 0.01) if missing else 0.0


def _numeric(batch: Batch, name: str, a: Any, quantiles: tuple[float, float], margin: float) -> Field:
    axis = a.ndim - 2 if a.ndim > 1 else None
    width = channels(a, axis)
    s = channel_statistics(a, axis, batch.device.get(name))
    seen = s.count > 0
    span = np.where(seen, s.maximum - s.minimum, 0)
    low, high = np.where(seen, s.minimum - margin * span, 0.0), np.where(seen, s.maximum + margin * span, 0.0)
    x = laid_out(a, axis)
    cuts = [_cuts(x[:, j], quantiles) for j in range(width)]
    trusted = Trusted(
        rows=len(a),
        values=tuple(int(c) for c in s.count),
        low=tuple(c[0] for c in cuts),
        high=tuple(c[1] for c in cuts),
        outside=tuple(c[2] for c in cuts),
        mean=tuple(s.mean.tolist()),
        std=tuple(s.std.tolist()),
        missing=int(s.nans.sum()),
    )
    kind = a.dtype.kind == "f"
    limit = max((c[5] for c in cuts), default=0.0)
    return Field(
        dtype=batch.dtypes[name],
        shape=tuple(a.shape[1:]),
        axis=axis,
        low=tuple(low.tolist()) if axis is not None else float(low[0]),
        high=tuple(high.tolist()) if axis is not None else float(high[0]),
        missing=_share(int(s.nans.sum()), a.size),
        infinite=_share(int(s.infs.sum()), a.size),
        outlier=Outlier(center=tuple(c[3] for c in cuts), scale=tuple(c[4] for c in cuts), limit=_FAR * limit)
        if kind and limit > 0
        else None,
        trusted=trusted,
    )


def _cuts(column: Any, quantiles: tuple[float, float]) -> tuple[float, float, int, float, float, float]:
    """Both quantiles, how many values are at or beyond them, median, robust scale, and the largest robust z."""
    x = np.sort(column[np.isfinite(column)].astype(np.float64))
    n = len(x)
    if not n:
        return 0.0, 0.0, 1, 0.0, 0.0, 0.0
    a, b = max(1, math.floor(quantiles[0] * n)), min(n, math.ceil(quantiles[1] * n) + 1)
    center = float(np.median(x))
    scale = MAD_SCALE * float(np.median(np.abs(x - center)))
    far = max(x[-1] - center, center - x[0]) / scale if scale > 0 else 0.0
    return float(x[a - 1]), float(x[b - 1]), a + n - b + 1, center, scale, float(far)
