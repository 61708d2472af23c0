"""Rows that are copies of others: exact ones by a hash that is then confirmed, near ones by nearest neighbours."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..ops.neighbors import knn
from .report import Mask
from .statistics import Array, by_row

if TYPE_CHECKING:
    from .check import Check

_SEED = 0x6D6C78  # any: equal hashes are confirmed by the rows themselves


def check_copies(check: Check) -> None:
    """Hold the schema's limits of copies."""
    schema = check.schema
    if schema.duplicates is not None:
        _exact(check, schema.duplicates)
    if schema.conflicts is not None and schema.label in check.batch.arrays:
        _conflicts(check, schema.label, schema.conflicts)
    if schema.near_duplicates is not None:
        _near(check)


def compared(check: Check, chosen: tuple[str, ...] | None, label: bool) -> list[str]:
    """Fields that tell whether rows are the same."""
    names = [n for n in (chosen or check.batch.arrays) if n in check.batch.arrays]
    return [n for n in names if label or chosen or n != check.schema.label]


def check_unique(check: Check, name: str) -> None:
    """Hold that no row repeats the value of an earlier one in a field."""
    a = check.batch.arrays[name]
    hashes = row_hashes([a])
    bad = np.arange(len(a)) != leaders([a], hashes)
    if check.memory is not None:
        bad |= check.memory.seen(hashes ^ np.uint64(zlib.crc32(name.encode()) << 32))  # beside those of whole rows
    flat = by_row(a, len(a))
    if a.dtype.kind == "O":
        missing = np.array([any(v is None or v != v for v in row) for row in flat], bool)
    else:
        missing = (flat != flat).any(axis=1)
    check.rows("unique", name, bad & ~missing, "repeat no earlier value", "{} rows do")


def _exact(check: Check, share: float) -> None:
    names = compared(check, check.schema.duplicate_fields, label=True)
    n = check.batch.rows
    arrays = [check.batch.arrays[k][:n] for k in names]
    hashes = row_hashes(arrays)
    bad = np.arange(n) != leaders(arrays, hashes)
    if check.memory is not None:
        bad |= check.memory.seen(hashes)
    limit = f"repeat no earlier row in {', '.join(names)}" if not share else f"repeat at most {share:.3%} of rows"
    if bad.sum() <= share * n:
        check.holds("duplicates", "rows", limit)
    else:
        check.rows("duplicates", "rows", bad, limit, "{} rows do")


def _conflicts(check: Check, label: str, share: float) -> None:
    names = compared(check, check.schema.duplicate_fields, label=False)
    n = check.batch.rows
    arrays = [check.batch.arrays[k][:n] for k in names if k != label]
    first, labels = leaders(arrays, row_hashes(arrays)), check.batch.arrays[label][:n]
    bad = by_row(np.asarray(labels != labels[first]), n).any(axis=1)
    limit = "have one label for equal features" if not share else f"differ in at most {share:.3%} of rows"
    if bad.sum() <= share * n:
        check.holds("conflicts", label, limit)
    else:
        check.rows("conflicts", label, bad, limit, "{} rows have another label than the first such row")


def _near(check: Check) -> None:
    rule = check.schema.near_duplicates
    assert rule is not None
    n = check.batch.rows
    names = [k for k in compared(check, rule.fields, label=False) if check.batch.arrays[k].dtype.kind in "fiub"]
    limit = f"lie farther than {rule.distance:g} from any other row"
    if n < 2 or not names:
        check.holds("near_duplicates", "rows", limit)
        return
    x = np.concatenate([check.batch.arrays[k][:n].reshape(n, -1).astype(np.float32) for k in names], axis=1)
    found = knn(mx.array(x), k=1)
    nearest, distance = np.asarray(found.indices)[:, 0], np.asarray(found.distances)[:, 0]
    close = distance <= rule.distance
    bad = np.zeros(n, bool)
    bad[np.maximum(np.arange(n), nearest)[close]] = True  # the later one of each pair
    if bad.sum() <= rule.share * n:
        check.holds("near_duplicates", "rows", limit)
    else:
        check.rows("near_duplicates", "rows", bad, limit, "{} rows do not")


def row_hashes(arrays: list[Array]) -> Any:
    """A 64-bit hash of every row: sums of its words times random odd numbers."""
    n = len(arrays[0]) if arrays else 0
    rng = np.random.default_rng(_SEED)
    total = np.zeros(n, np.uint64)
    for a in arrays:
        words = _words(a)
        keys = rng.integers(0, 2**63, words.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
        for start in range(0, n, 1 << 14):
            part = words[start : start + (1 << 14)].astype(np.uint64)
            part ^= part >> np.uint64(29)
            part = (part + np.uint64(1)) * keys
            total[start : start + (1 << 14)] += (part ^ (part >> np.uint64(31))).sum(axis=1, dtype=np.uint64)
    return total


def leaders(arrays: list[Array], hashes: Any) -> Any:
    """The number of the first row that each row is equal to: its own, where it is the first."""
    n = len(hashes)
    order = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.r_[True, hashes[order][1:] != hashes[order][:-1]]) if n else np.zeros(0, int)
    first = np.empty(n, np.int64)
    first[order] = np.repeat(order[starts], np.diff(np.r_[starts, n]))
    later = np.flatnonzero(first != np.arange(n))
    same: Mask = np.ones(len(later), bool)
    for a in arrays:
        same &= np.asarray(_same(a[later], a[first[later]]))
    first[later[~same]] = later[~same]
    return first


def _same(a: Array, b: Array) -> Any:
    equal = a == b
    if a.dtype.kind == "f":
        equal |= np.isnan(a) & np.isnan(b)
    return np.asarray(by_row(np.asarray(equal, bool), len(a)).all(axis=1))


def _words(a: Array) -> Any:
    flat = by_row(a, len(a))
    if a.dtype.kind == "O":
        return np.array([[hash(str(v)) & 0xFFFFFFFFFFFFFFFF for v in row] for row in flat], np.uint64).reshape(
            flat.shape
        )
    if a.dtype.kind == "f":
        flat = np.where(np.isnan(flat), np.nan, flat) + 0.0  # one NaN, one zero
    flat = np.ascontiguousarray(flat)
    return flat.view(f"u{flat.dtype.itemsize}") if flat.dtype.itemsize <= 8 else flat.view(np.uint64)
