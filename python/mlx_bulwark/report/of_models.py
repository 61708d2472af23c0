"""Sections about models: attacks, certificates, backdoors, numbers."""

from typing import Any

import numpy as np

from .adapting import Data, adapter, blank, count, few, interval, real, table
from .parts import Figure, Gallery, Picture, Plot, Section, number, percent
from .png import data_uri
from .svg import Axes, Series, line_chart

FOOLED, SOME_FOOLED = 0.5, 0.1  # attack success rates from which a model is called weak, and worth a look
COLOURS = 6


@adapter("robust_accuracy")
def _robust_accuracy(data: Data) -> Section:
    runs = sorted(data.get("runs") or [data], key=lambda r: _radius(r) or 0.0)
    last = runs[-1]
    n, clean = int(last["inputs"]), real(last["clean_accuracy"])
    robust = real(last.get("robust_accuracy_over_eps", last["robust_accuracy"]))
    rate = last["attack_success_rate"]
    radius = _radius(last)
    limit = (
        f"by at most {number(radius)} ({_norm(last['attacks'][0]['norm'])})"
        if radius is not None
        else "without a limit"
    )
    flags = {f["name"]: f["reason"] for run in runs for f in run.get("flags", [])}
    fooled = 0.0 if rate is None else real(rate)
    section = Section("robust_accuracy", "Attacks on the model", "good", "")
    section.verdict = (
        f"Whoever may change an input {limit} brings the accuracy from {percent(clean)} down to {percent(robust)}: "
        f"{percent(fooled)} of the inputs that the model gets right can be turned wrong."
    )
    section.sure = (
        f"An upper bound of the true robustness over {n:,} inputs (95 % interval by sampling "
        f"{interval(robust, n)}): attacks show what is breakable, and never that nothing else is."
    )
    if fooled >= SOME_FOOLED:
        section.status = "problem" if fooled >= FOOLED else "attention"
        section.advice = (
            "Train against such attacks (mlx_bulwark.training), or certify what holds (mlx-bulwark certify), and keep "
            "inputs that a stranger can shape away from decisions that matter."
        )
    if flags:
        section.status = "problem" if section.status == "problem" else "attention"
        section.notes += [f"Do not trust the robust accuracy: {reason} ({name})." for name, reason in flags.items()]
        section.advice = "Settle the doubts below before any robust accuracy is quoted. " + section.advice
    section.figures = [
        Figure("Clean accuracy", percent(clean), "without an attack"),
        Figure("Robust accuracy", percent(robust), f"worst case of {len(last['attacks'])} attacks"),
        Figure("Attack success", percent(fooled), "of inputs that were right"),
        Figure("Inputs", f"{n:,}", "that were attacked"),
    ]
    if all(_radius(r) is not None for r in runs):
        section.plots.append(_robust_curve(runs, clean, _norm(last["attacks"][0]["norm"])))
    rows, worst = [], []
    for run in runs:
        for a in run["attacks"]:
            shares = percent(a["robust_accuracy"]), percent(a["attack_success_rate"])
            distance, queries = (blank(a[key]) for key in ("median_distance", "mean_queries"))
            rows.append((a["name"], _norm(a["norm"]), blank(a["eps"]), *shares, distance, queries))
        if len(run["attacks"]) > 1:
            worst.append(len(rows))
            shares = percent(run["robust_accuracy"]), percent(run["attack_success_rate"])
            rows.append(("all together", "", blank(_radius(run)), *shares, "", ""))
    columns = ("attack", "norm", "radius", "accuracy left", "success", "median distance", "queries")
    numeric = "radius|accuracy left|success|median distance|queries"
    section.tables.append(table("Each attack by itself", columns, rows, numeric, strong=worst))
    return section


_NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0"}


def _norm(name: str) -> str:
    return _NORMS.get(name.lower(), name)


def _radius(run: Data) -> float | None:
    eps = run.get("eps", max((a["eps"] for a in run["attacks"] if a["eps"] is not None), default=None))
    return None if eps is None else real(eps)


def _robust_curve(runs: list[Data], clean: float, norm: str) -> Plot:
    eps = [0.0, *(real(_radius(r)) for r in runs)]
    together = [clean, *(real(r.get("robust_accuracy_over_eps", r["robust_accuracy"])) for r in runs)]
    series = [Series("all attacks together", eps, together, dots=True)]
    names = [a["name"] for a in runs[0]["attacks"]]
    if 1 < len(names) <= 5 and all([a["name"] for a in r["attacks"]] == names for r in runs):
        for i, name in enumerate(names):
            series.append(
                Series(name, eps, [clean, *(real(r["attacks"][i]["robust_accuracy"]) for r in runs)], dots=True)
            )
    axes = Axes(f"attack radius ({norm})", "accuracy", y_range=(0.0, 1.0), percent=True)
    said = ", ".join(f"{percent(a)} at {e:g}" for e, a in zip(eps, together, strict=True))
    svg = line_chart(f"Accuracy over attack radius: {said}", axes, series)
    return Plot(
        svg, "Accuracy over the radius of the attack: the further left it falls, the easier the model is fooled."
    )


@adapter("certificates")
def _certificates(data: Data) -> Section:
    runs = [r for r in data["runs"] if r.get("inputs")]
    section = Section("certificates", "Certified robustness", "info", "")
    if not runs:
        section.verdict = "No input was certified."
        section.advice = "Let mlx-bulwark certify run to its end."
        return section
    best = max(runs, key=lambda r: real(r["average_certified_radius"]))
    shares = _shares(best)
    radius = max((r for r, share in shares if share >= 0.5), default=0.0)
    n, at_zero = int(best["inputs"]), shares[0][1]
    section.status = "good" if radius > 0 else "attention"
    section.verdict = f"Of {n:,} inputs {percent(at_zero)} are classified right with a certificate; " + (
        f"half and more stay right whatever an attacker does within radius {radius:g}."
        if radius
        else "fewer than half keep it at any radius that was told."
    )
    section.sure = (
        "A proof and no experiment: each certificate is wrong with at most the probability alpha that it was made "
        f"with. The share of inputs is itself a sample (95 % interval {interval(at_zero, n)})."
    )
    if not radius:
        section.advice = (
            "Train with noise of the sigma that is certified with (mlx_bulwark.smoothing), then certify again."
        )
    if data.get("interrupted"):
        section.notes.append("It was interrupted: not all inputs are in.")
    series, rows = [], []
    for run in runs[:COLOURS]:
        points = _shares(run)
        series.append(
            Series(f"sigma {number(run['sigma'])}", [r for r, _ in points], [a for _, a in points], dots=True)
        )
    for run in runs:
        abstained, mean = percent(real(run["abstained"])), blank(run["average_certified_radius"])
        told = dict(_shares(run))
        rows.append((number(run["sigma"]), f"{int(run['inputs']):,}", abstained, mean, percent(told.get(0.0))))
    said = ", ".join(f"{percent(a)} at {r:g}" for r, a in shares)
    axes = Axes("radius that no attack within can use", "certified accuracy", y_range=(0.0, 1.0), percent=True)
    caption = "Share of inputs that are right and certified at each radius: higher and further right is better."
    svg = line_chart(f"Certified accuracy over radius at sigma {number(best['sigma'])}: {said}", axes, series)
    section.plots.append(Plot(svg, caption))
    columns = ("sigma", "inputs", "abstained", "mean radius", "certified at 0")
    section.tables.append(table("By noise level", columns, rows, "|".join(columns)))
    section.notes.append("Sigma is the noise that inputs are smoothed by; an abstention counts as wrong.")
    return section


def _shares(run: Data) -> list[tuple[float, float]]:
    return sorted((real(r), real(share)) for r, share in run["certified_accuracy"].items())


@adapter("model_inspection")
def _model_inspection(data: Data) -> Section:
    accused = bool(data["accused"])
    section = Section("model_inspection", "Backdoor inspection of the model", "problem" if accused else "good", "")
    methods = data.get("methods", {})
    classes = sorted({int(c) for m in [data, *methods.values()] for c in m.get("accused_classes", [])})
    if accused:
        to = f" towards class {few([str(c) for c in classes])}" if classes else ""
        section.verdict = f"The model behaves as one with a backdoor does{to}."
        section.advice = (
            "Do not use these weights. Scan the training data (mlx-bulwark scan), remove what it suspects and train "
            "again, or take weights of a source that can be trusted."
        )
    else:
        section.verdict = "No sign of a backdoor was found."
    section.sure = _how_sure(data.get("p_value"), methods)
    section.notes += [str(data["reason"])] if data.get("reason") else []
    triggers = list(data.get("triggers", []))
    for found in methods.values():
        triggers += found.get("triggers", [])
    if methods:
        section.tables.append(_methods(methods))
    if triggers:
        _show_triggers(section, triggers, classes)
    section.notes += [f"{name} was left out: {why}" for name, why in data.get("skipped", {}).items()]
    return section


def _how_sure(p_value: Any, methods: Data) -> str:
    told = f" of {count(len(methods), 'method')}" if methods else ""
    if p_value is None:
        return f"No probability could be given{told}: there is nothing to compare with."
    odds = f"{real(p_value):.2g}" if real(p_value) >= 1e-12 else "less than 1e-12"
    return (
        f"Were nothing wrong, so strong a sign{told} would come with probability {odds}. "
        "What no method looks for is not found."
    )


def _methods(methods: Data) -> Any:
    rows = [
        (
            str(name).replace("_", " "),
            "accuses" if m.get("accused") else "ranks only" if m.get("p_value") is None else "nothing found",
            blank(m.get("p_value")),
            str(m.get("reason", "")),
        )
        for name, m in methods.items()
    ]
    marked = [i for i, m in enumerate(methods.values()) if m.get("accused")]
    return table("What each method says", ("method", "verdict", "p", "why"), rows, "p", marked)


def _show_triggers(section: Section, triggers: list[Data], classes: list[int]) -> None:
    pictures = []
    for t in sorted(triggers, key=lambda t: real(t["norm"]))[:12]:
        mask, pattern = np.asarray(t["mask"], np.float32), np.asarray(t["pattern"], np.float32)
        if pattern.ndim not in (2, 3):
            break
        accused = ", accused" if int(t["target"]) in classes else ""
        words = (
            f"class {int(t['target'])}{accused}: size {number(t['norm'])}, leads {percent(real(t['success']))} there"
        )
        pictures.append(Picture(data_uri(mask * pattern), words, f"Reversed trigger of {words}"))
    if pictures:
        section.galleries.append(
            Gallery("Smallest change that leads any input to a class, the smallest first", pictures)
        )
    rows = [
        (str(t["target"]), blank(t["norm"]), percent(real(t["success"])), blank(t.get("anomaly_index")))
        for t in triggers
    ]
    marked = [i for i, t in enumerate(triggers) if int(t["target"]) in classes]
    columns = ("class", "size", "success", "anomaly index")
    section.tables.append(table("Reversed triggers", columns, rows, "|".join(columns), marked))
    section.notes.append(
        "A class that a far smaller change leads to than to any other is the mark of a planted trigger."
    )


adapter("NeuralCleanse")(lambda data: _model_inspection(data | {"accused": bool(data["accused_classes"])}))


@adapter("numerics")
def _numerics(data: Data) -> Section:
    faults, layers = data["faults"], data["layers"]
    section = Section("numerics", "Numbers in the model", "problem" if faults else "good", "")
    if faults:
        section.verdict = (
            f"{count(len(faults), 'fault')} in {count(len(layers), 'layer')}: {few([str(f) for f in faults], 2)}."
        )
        section.advice = "Mend the layers named below before the outputs are trusted, or run them in a wider dtype."
    else:
        section.verdict = f"All {count(len(layers), 'layer')} compute without NaN, overflow or lost gradients."
    section.sure = "Seen on the inputs of this probe alone."
    section.notes += [str(f) for f in faults]
    rows = [
        (
            layer["name"] or "model",
            layer["kind"],
            layer["dtype"],
            blank(layer["largest"]),
            blank(layer["amplification"]),
        )
        for layer in layers
    ]
    columns = ("layer", "kind", "dtype", "largest output", "amplification")
    marked = [i for i, layer in enumerate(layers) if layer["faults"]]
    section.tables.append(table("Layers", columns, rows, "largest output|amplification", marked))
    return section
