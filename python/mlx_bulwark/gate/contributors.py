"""Rules of contributors: who may contribute, how much, with what score, and how far they agree with the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from .rules import Contributors

if TYPE_CHECKING:
    from .check import Check


def check_contributors(check: Check, rule: Contributors) -> dict[str, dict[str, float]]:
    """Hold the rules of contributors; returns what each of them is like."""
    n = check.batch.rows
    names, who = np.unique(check.batch.arrays[rule.field][:n].astype(str), return_inverse=True)
    rows = np.bincount(who, minlength=len(names))
    table = {str(k): {"rows": float(r), "share": float(r / n)} for k, r in zip(names, rows, strict=True)}

    def judge(kind: str, wrong: Any, limit: str) -> None:
        told = ", ".join(f"{k!r:.40}" for k in names[wrong][:3]).replace("{", "{{").replace("}", "}}")
        count = int(wrong.sum())
        check.rows(kind, rule.field, wrong[who], limit, f"{count} do not: {told}, {{}} rows", count)

    if rule.known is not None:
        judge("contributor_known", ~np.isin(names, np.array(rule.known, str)), "be a known contributor")
    if rule.max_share is not None:
        judge("contributor_share", rows > rule.max_share * n, f"give at most {rule.max_share:.1%} of rows")
    if rule.max_rows is not None:
        judge("contributor_rows", rows > rule.max_rows, f"give at most {rule.max_rows} rows")
    if rule.min_score is not None and rule.score is not None and check.numeric(rule.score):
        low = ~(check.batch.arrays[rule.score][:n] >= rule.min_score)
        check.rows("contributor_score", rule.score, low, f"be at least {rule.min_score:g}", "{} rows are not")
    label = check.schema.label
    if rule.item in check.batch.arrays and label in check.batch.arrays:
        agreed, judged = _agreement(check, who, len(names), rule.item, label)
        for k, a, j in zip(names, agreed, judged, strict=True):
            table[str(k)] |= {"judged": float(j), "agreement": float(a / j) if j else float("nan")}
        if rule.min_agreement is not None:
            # Clopper and Pearson: who has labelled little is not blamed for bad luck
            top = np.where(
                agreed < judged, stats.beta.ppf(rule.confidence, agreed + 1, np.maximum(judged - agreed, 1)), 1
            )
            wrong = (judged > 0) & (top < rule.min_agreement)
            judge("contributor_agreement", wrong, f"agree with the others in {rule.min_agreement:.1%} of their labels")
    return table


def _agreement(check: Check, who: Any, contributors: int, item: str, label: str) -> tuple[Any, Any]:
    """Of every contributor: labels that agree with the plurality of the others on the item, and labels in all."""
    n = check.batch.rows
    items = np.unique(check.batch.arrays[item][:n].astype(str), return_inverse=True)[1]
    labels = np.unique(check.batch.arrays[label][:n].astype(str), return_inverse=True)[1]
    agreed, judged = np.zeros(contributors), np.zeros(contributors)
    order = np.argsort(items, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(items[order])) + 1):
        if len(group) < 3:  # of two who differ neither is in the wrong
            continue
        votes = np.bincount(labels[group])
        for i in group:
            others = votes.copy()
            others[labels[i]] -= 1
            if (others == others.max()).sum() == 1:
                judged[who[i]] += 1
                agreed[who[i]] += int(others.argmax() == labels[i])
    return agreed, judged
