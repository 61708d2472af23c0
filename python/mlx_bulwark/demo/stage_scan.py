"""Poison, found and taken out."""

from typing import Any

import numpy as np

from ..poison import scan as scan_for_poison
from ..poison.attacks import attack_success_rate
from .progress import waiting
from .sections import scanned
from .stage import Digits, Outcome, Scene, percent

FALSE_ALARM_RATE = 0.01
WORST = 12  # suspects whose images are shown


def scan(scene: Scene) -> Outcome:
    """Scan the poisoned digits with the model that was trained on them, remove the suspects, and train again."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    assert scene.poisoned is not None
    assert scene.poisoned_model is not None
    poisoned, trusted = scene.poisoned, scene.trusted
    # many small products: threads of BLAS on a busy machine spend their time waiting for each other
    with waiting(f"Scanning {len(poisoned.y)} digits"), threadpool_limits(1):
        report = scan_for_poison(
            scene.poisoned_model,
            poisoned.x,
            poisoned.y,
            trusted=(trusted.x, trusted.y),
            false_alarm_rate=FALSE_ALARM_RATE,
            seed=scene.options.seed,
        )
    scene.stop.check()
    verdict = "poisoned" if report.accused else "not accused"
    p_value = "" if report.p_value is None else f", p = {report.p_value:.1e}"
    scene.tell("verdict", f"{verdict}{p_value}; {percent(FALSE_ALARM_RATE)} of clean sets would be accused")
    found = _against_truth(report, poisoned)
    scene.tell("suspects", _words(found))
    if len(report.suspects):
        worst = int(report.suspects[0])
        scene.tell("worst", f"row {worst}: {report.reason(worst)}")
    kept = np.setdiff1d(np.arange(len(poisoned.y)), report.suspects)
    cleaned = Digits(poisoned.x[kept], poisoned.y[kept].astype(scene.arrived.y.dtype))
    model = scene.clean_model = scene.trained(cleaned, "again, without the suspects")
    test = scene.test
    before, after = (attack_success_rate(m, test.x, test.y, poisoned) for m in (scene.poisoned_model, model))
    right = scene.accuracy(model)
    scene.tell("backdoor", f"{percent(after)} of the other test digits follow the patch, {percent(before)} did before")
    was = scene.accuracy(scene.poisoned_model)
    scene.tell("model", f"{percent(right)} of the test digits are named right, {percent(was)} were")
    figures = found | {
        "p_value": report.p_value,
        "accused": report.accused,
        "false_alarm_rate": FALSE_ALARM_RATE,
        "test_accuracy_before": was,
        "test_accuracy": right,
        "attack_success_rate_before": before,
        "attack_success_rate": after,
    }
    worst_rows = report.suspects[:WORST]
    reasons = [f"{row}: {report.reason(int(row))}" for row in worst_rows]
    section = scanned(figures, poisoned.x[worst_rows], poisoned.y[worst_rows], reasons)
    return Outcome(figures, "attack success after removal", percent(before), percent(after), section)


def _against_truth(report: Any, poisoned: Any) -> dict[str, Any]:
    """Recall and precision: here it is known which rows are poison."""
    hits = len(np.intersect1d(report.suspects, poisoned.indices))
    suspects = len(report.suspects)
    return {
        "suspects": suspects,
        "poisoned_examples": len(poisoned.indices),
        "found": hits,
        "recall": hits / len(poisoned.indices),
        "precision": hits / suspects if suspects else None,
    }


def _words(found: dict[str, Any]) -> str:
    return (
        f"{found['suspects']} rows, of which {found['found']} are poison; {found['poisoned_examples']} were planted: "
        f"recall {percent(found['recall'])}"
        + (f", precision {percent(found['precision'])}" if found["precision"] is not None else "")
    )
