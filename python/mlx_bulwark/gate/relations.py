"""Rules of fields together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .report import Mask
from .rules import Relation
from .statistics import by_row

if TYPE_CHECKING:
    from .check import Check


def check_relation(check: Check, rule: Relation) -> None:
    """Hold one rule, where its fields are there and of their kind."""
    if not all(name in check.batch.arrays for name in (rule.left, *rule.right)):
        return
    where = f"{rule.left} {rule.op} {' + '.join(rule.right)}"
    if rule.op == "determines":
        check.rows(
            "determines", where, _undetermined(check, rule), "have one right value for a left", "{} rows have another"
        )
    elif not all(check.numeric(name) for name in (rule.left, *rule.right)):
        check.data("relation", where, 1, "be about numbers", "is not")
    elif rule.op == "correlates":
        _correlation(check, rule, where)
    elif rule.op == "padded":
        check.rows("padding", where, _mispadded(check, rule), "be padded from their length on", "{} rows are not")
    else:
        check.rows("relation", where, _unequal(check, rule), "hold", "{} rows break it")


def _field(check: Check, name: str) -> Any:
    a = check.batch.arrays[name][: check.batch.rows]
    return a.astype("M8[ns]").astype(np.int64) if a.dtype.kind == "M" else a.astype(np.float64)


def _unequal(check: Check, rule: Relation) -> Mask:
    left = _field(check, rule.left)
    right = sum(_field(check, name) for name in rule.right)
    difference = left - right
    holds = {
        "<": difference < rule.tolerance,
        "<=": difference <= rule.tolerance,
        "==": np.abs(difference) <= rule.tolerance,
        "!=": np.abs(difference) > rule.tolerance,
    }[rule.op]
    wrong = ~holds & ~np.isnan(difference)  # what is missing has its own rule
    return np.asarray(by_row(wrong, len(left)).any(axis=1))


def _correlation(check: Check, rule: Relation, where: str) -> None:
    x, y = _field(check, rule.left).ravel(), _field(check, rule.right[0]).ravel()
    low, high = rule.within or (-1.0, 1.0)
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good] - x[good].mean() if good.any() else x[good], y[good] - y[good].mean() if good.any() else y[good]
    spread = float(np.sqrt((x @ x) * (y @ y)))
    r = float(x @ y) / spread if spread > 0 else float("nan")
    check.data(
        "correlation", where, int(not low <= r <= high), f"have a correlation from {low:g} to {high:g}", f"has {r:.4g}"
    )


def _undetermined(check: Check, rule: Relation) -> Mask:
    n = check.batch.rows
    left = np.unique(check.batch.arrays[rule.left][:n].astype(str), return_inverse=True)[1]
    right = np.unique(check.batch.arrays[rule.right[0]][:n].astype(str), return_inverse=True)[1]
    pairs, counts = np.unique(np.stack([left, right], 1), axis=0, return_counts=True)
    order = np.lexsort((-counts, pairs[:, 0]))  # the commonest right value of a left is the right one
    usual = np.zeros(left.max(initial=-1) + 1, np.int64)
    usual[pairs[order][::-1, 0]] = pairs[order][::-1, 1]
    return np.asarray(right != usual[left])


def _mispadded(check: Check, rule: Relation) -> Mask:
    n = check.batch.rows
    a, lengths = check.batch.arrays[rule.left][:n], _field(check, rule.right[0])
    behind = np.arange(a.shape[1]) >= lengths[:, None]
    padded = (a == rule.value).all(axis=tuple(range(2, a.ndim)))
    return np.asarray((padded != behind).any(axis=1) | (lengths > a.shape[1]))
