"""Rules of rows in time: order, gaps, jumps and hanging sensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .report import Mask
from .rules import Series

if TYPE_CHECKING:
    from .check import Check


def check_series(check: Check, rule: Series) -> None:
    """Hold the rules of every series."""
    rows = check.batch.rows
    wanted = (rule.time, rule.group, *(rule.max_jump or {}), *(rule.max_run or {}))
    arrays = {k: a[:rows] for k, a in check.batch.arrays.items() if k in wanted}
    before = 0  # last rows of a stream's batches before this one
    if check.memory is not None:
        arrays, before = check.memory.with_tails(arrays)
    n = before + rows
    time = _numbers(arrays[rule.time])
    order, first, groups = _order(arrays, rule, n)
    steps = np.r_[0, np.diff(time[order])] if n else np.zeros(0)

    def judge(kind: str, where: str, wrong: Any, limit: str) -> None:
        bad: Mask = np.zeros(n, bool)
        bad[order] = wrong & ~first
        check.rows(kind, where, bad[before:], limit, "{} rows do not")

    judge("time_order", rule.time, steps <= 0 if rule.strict else steps < 0, "go forward in time")
    if rule.max_gap is not None:
        judge("time_gap", rule.time, steps > rule.max_gap, f"follow within {rule.max_gap:g}")
    for name, most in (rule.max_jump or {}).items():
        if check.numeric(name):
            x = _numbers(arrays[name])[order]
            judge("jump", name, np.abs(np.r_[0, np.diff(x)] if n else x) > most, f"change by at most {most:g} a step")
    for name, longest in (rule.max_run or {}).items():
        if check.numeric(name):
            runs = _run(arrays[name][order], first)
            judge("run", name, runs > longest, f"repeat at most {longest} times")
    if check.memory is not None and n:
        last = order[np.r_[np.flatnonzero(first[1:]), n - 1]]
        check.memory.keep_tails(arrays, groups, last)


def _order(arrays: dict[str, Any], rule: Series, n: int) -> tuple[Any, Mask, Any]:
    """Rows series by series, which of them begin one, and the series of each row."""
    first = np.zeros(n, bool)
    first[:1] = True
    if rule.group is None or rule.group not in arrays:
        return np.arange(n), first, np.zeros(n, int)
    groups = arrays[rule.group].astype(str)
    _, group = np.unique(groups, return_inverse=True)
    order = np.argsort(group, kind="stable")
    first[1:] = np.diff(group[order]) != 0
    return order, first, groups


def _run(values: Any, first: Mask) -> Any:
    """The length so far of the run of equal values that each row is in."""
    new = first | np.r_[True, values[1:] != values[:-1]] if len(values) else first
    starts = np.flatnonzero(new)
    return np.arange(len(values)) - np.repeat(starts, np.diff(np.r_[starts, len(values)])) + 1


def _numbers(a: Any) -> Any:
    """Times in seconds, relative to the first, so that float64 holds them."""
    if a.dtype.kind not in "mM":
        return a.astype(np.float64)
    if not len(a):
        return np.zeros(0)
    nanoseconds = a.astype("M8[ns]" if a.dtype.kind == "M" else "m8[ns]").astype(np.int64)
    seconds = (nanoseconds - nanoseconds[0]) / 1e9
    return np.where(np.isnat(a), np.nan, seconds)
