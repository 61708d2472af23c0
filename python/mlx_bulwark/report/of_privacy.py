"""Sections about privacy: budgets, private training, audits."""

import math

from .adapting import Data, adapter, blank, count, few, real, table
from .parts import Figure, Plot, Section, number, percent
from .svg import Axes, Level, Series, line_chart

STRONG, WEAK = 1.0, 10.0  # epsilon: below a strong promise, above hardly one


@adapter("privacy")
def _privacy(data: Data) -> Section:
    epsilon = math.inf if data["epsilon"] is None else real(data["epsilon"])
    section = _budget(epsilon, data.get("epsilon_target"), real(data["delta"]), int(data["steps"]))
    section.sure = (
        f"Recomputed by the {str(data['accountant']).upper()} accountant from the ledger; it holds for "
        f"{data['adjacency']}. What else the data were used for is not in it."
    )
    if data.get("torn"):
        section.notes.append("The last line of the ledger is torn: no update followed it, and it is left out.")
    rows = []
    for run in data.get("runs", []):
        told = {k: v for k, v in run.items() if k not in ("steps", "session", "coefficients")}
        rows.append(
            (f"{int(run['steps']):,}", "; ".join(f"{k.replace('_', ' ')} {number(v)}" for k, v in told.items()))
        )
    if rows:
        section.tables.append(table("Training runs in the ledger", ("steps", "how"), rows, "steps"))
    _epsilon_curve(section, data)
    return section


def _budget(epsilon: float, target: float | None, delta: float, steps: int) -> Section:
    section = Section("privacy", "Privacy budget", "good", "")
    spent = f"{epsilon:.3g}" if epsilon < math.inf else "without limit"
    of = f" of {target:g}" if target is not None else ""
    section.verdict = f"Training has spent epsilon {spent}{of}, at delta {delta:g}, in {count(steps, 'step')}."
    odds = f"{math.exp(min(epsilon, 700)):.3g}"
    changes = f"whether one person took part changes the odds of any outcome by a factor of at most {odds}"
    if epsilon <= STRONG:
        meaning = f"{changes}: a strong promise."
    elif epsilon <= WEAK:
        meaning = f"{changes}."
    else:
        meaning = "the promise to a single person is weak."
        section.status = "attention"
        section.advice = "Train with more noise, fewer steps or smaller batches, or do not publish the model."
    if target is not None and epsilon > target * (1 + 1e-6):
        section.status = "problem"
        section.advice = "Stop training: the budget is overspent."
    section.verdict += f" In words: {meaning}"
    section.figures = [
        Figure("Epsilon spent", spent, f"of {target:g}" if target is not None else "no limit was given"),
        Figure("Delta", f"{delta:g}", "chance that the bound fails"),
        Figure("Steps", f"{steps:,}"),
    ]
    return section


def _epsilon_curve(section: Section, data: Data) -> None:
    curve, target = data.get("curve"), data.get("epsilon_target")
    if not curve or not curve.get("step"):
        return
    steps, epsilon = [real(v) for v in curve["step"]], [real(v) for v in curve["epsilon"]]
    levels = [Level(f"budget {real(target):g}", real(target))] if target is not None else []
    top = max([*epsilon, *(level.y for level in levels)]) * 1.12
    axes = Axes("step", "epsilon spent", y_range=(0.0, top or 1.0))
    svg = line_chart(
        f"Epsilon spent over steps, {epsilon[-1]:.3g} at step {steps[-1]:g}",
        axes,
        [Series("epsilon", steps, epsilon)],
        levels,
    )
    section.plots.append(Plot(svg, "Privacy that was spent so far. It only grows: every step looks at the data again."))


@adapter("private_training")
def _private_training(data: Data) -> Section:
    section = _budget(real(data["epsilon"]), real(data["epsilon_target"]), real(data["delta"]), int(data["steps"]))
    section.kind, section.title = "private_training", "Private training"
    section.sure = (
        f"Accounted by {str(data['accountant']).upper()} with noise multiplier {number(data['noise_multiplier'])} and "
        f"gradients clipped to {number(data['max_grad_norm'])}, over {int(data['train_examples'] or 0):,} examples. "
        "Accuracies in this report look at data without noise and are not covered by epsilon."
    )
    names = (("test_accuracy", "private"), ("nonprivate_test_accuracy", "without privacy"))
    for name, words in names:
        if data.get(name) is not None:
            section.figures.append(Figure("Test accuracy", percent(real(data[name])), words))
    if data.get("interrupted"):
        section.notes.append("The training was interrupted.")
    _epsilon_curve(section, data)
    curve = data.get("curve") or {}
    if curve.get("step") and all(curve.get(name) for name, _ in names):
        series = [Series(words, curve["step"], curve[name]) for name, words in names]
        axes = Axes("step", "test accuracy", y_range=(0.0, 1.0), percent=True)
        said = ", ".join(f"{words} {percent(curve[name][-1])}" for name, words in names)
        svg = line_chart(f"Test accuracy over steps, in the end: {said}", axes, series)
        section.plots.append(
            Plot(svg, "What privacy costs: the same model trained on the same batches with and without.")
        )
    return section


@adapter("privacy_utility")
def _privacy_utility(data: Data) -> Section:
    points = data["points"]
    section = Section("privacy_utility", "Accuracy over epsilon", "info", "")
    plain = data.get("nonprivate_test_accuracies") or []
    mean = sum(plain) / len(plain) if plain else None
    section.verdict = (
        f"Test accuracy of {percent(points[0]['mean_test_accuracy'])} at epsilon {number(points[0]['epsilon'])}"
    )
    section.verdict += f", {percent(points[-1]['mean_test_accuracy'])} at {number(points[-1]['epsilon'])}"
    section.verdict += f", {percent(mean)} without privacy." if mean is not None else "."
    section.sure = f"{count(len(data['seeds']), 'training')} at each epsilon, delta {data['delta']:g}."
    section.notes.append(str(data["note"]))
    epsilon = [real(p["epsilon"]) for p in points]
    levels = [Level("without privacy", mean)] if mean is not None else []
    series = [Series("private", epsilon, [real(p["mean_test_accuracy"]) for p in points], dots=True)]
    axes = Axes("epsilon", "test accuracy", y_range=(0.0, 1.0), percent=True)
    svg = line_chart("Test accuracy over epsilon", axes, series, levels)
    section.plots.append(Plot(svg, "More privacy is further left; higher is more useful."))
    rows = [(number(p["epsilon"]), number(p["noise_multiplier"]), percent(p["mean_test_accuracy"])) for p in points]
    columns = ("epsilon", "noise multiplier", "test accuracy")
    section.tables.append(table("Trainings", columns, rows, "|".join(columns)))
    return section


@adapter("privacy_audit")
def _privacy_audit(data: Data) -> Section:
    refuted = bool(data["violated"])
    section = Section("privacy_audit", "Audit of privacy", "problem" if refuted else "good", "")
    low, accounted = real(data["epsilon"]), real(data["accounted_epsilon"])
    if refuted:
        section.verdict = f"The accounted epsilon {accounted:.3g} is refuted: at least {low:.3g} leaks."
        section.advice = "Do not publish the model. Look for examples that touch more than their own gradient."
    else:
        section.verdict = (
            f"An attacker shows that epsilon is at least {low:.3g}; {accounted:.3g} is accounted, and stands."
        )
    section.sure = (
        f"{percent(real(data['confidence']))} confidence, by {int(data['canaries']):,} canaries, which can show "
        f"{real(data['ceiling']):.3g} at most. That nothing is refuted is no proof."
    )
    attack = data["attack"]
    section.figures = [
        Figure("Epsilon, at least", f"{low:.3g}", "by the audit"),
        Figure("Epsilon, at most", f"{accounted:.3g}", "by accounting"),
        Figure("Attack AUC", f"{real(attack['auc']):.3f}", "0.5 is chance"),
    ]
    columns = ("false positives", "members found", "low", "high")
    names = ("false_positive_rate", "true_positive_rate", "low", "high")
    rows = [tuple(percent(p[n]) for n in names) for p in attack["points"]]
    section.tables.append(table("Membership inference by the same scores", columns, rows, "|".join(columns)))
    return section


@adapter("privacy_layers")
def _privacy_layers(data: Data) -> Section:
    layers = data["layers"]
    refused = [layer for layer in layers if layer["status"] == "refused"]
    section = Section("privacy_layers", "Layers under privacy", "good" if data["is_valid"] else "problem", "")
    if refused:
        section.verdict = (
            f"{count(len(refused), 'layer')} cannot be trained privately: {few([str(x['path']) for x in refused])}."
        )
        section.advice = "PrivacyEngine.fix replaces what it can; freeze or replace the rest."
    else:
        section.verdict = f"All {count(len(layers), 'layer')} can be trained privately or are frozen."
    columns = tuple(layers[0]) if layers else ("layer",)
    rows = [tuple(blank(layer.get(c)) for c in columns) for layer in layers]
    marked = [i for i, layer in enumerate(layers) if layer["status"] == "refused"]
    section.tables.append(table("Layers", tuple(c.replace("_", " ") for c in columns), rows, "", marked))
    return section
