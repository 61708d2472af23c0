"""What the report says of each stage."""

from typing import Any

import numpy as np

from ..report import Section
from ..report.parts import Figure, Gallery, Picture, Plot, Table
from ..report.png import data_uri
from ..report.svg import Axes, Level, Series, line_chart
from .data import DATASETS, Array
from .figures import Figures, finite
from .stage import percent

GONE = 0.05  # success of an attack, below which it is held for undone


def headline(figures: Figures) -> str:
    """What the layers did, for who reads nothing else."""
    said = []
    if "poison" in figures.stages:
        before = percent(figures.stages["poison"]["figures"]["attack_success_rate"])
        said.append(f"A backdoor was planted on purpose: with its patch {before} of other digits got the wrong name.")
    if "scan" in figures.stages:
        after = percent(figures.stages["scan"]["figures"]["attack_success_rate"])
        said.append(
            f"It was found and removed: now {after} do." if removed(figures) else f"It is not gone: {after} still do."
        )
    if "attack" in figures.stages:
        stage = figures.stages["attack"]
        said.append(
            f"Under attack {stage['defended']} of the answers stay right, {stage['without']} without the defence."
        )
    if "certify" in figures.stages:
        said.append(f"{figures.stages['certify']['defended']} are proven to stand.")
    return " ".join(said) or "No poison was planted and nothing attacked."


def removed(figures: Figures) -> bool:
    """Whether the scan found the poison, and the patch has lost its power."""
    found = figures.stages.get("scan", {}).get("figures", {})
    return bool(found) and found["accused"] and found["attack_success_rate"] < GONE


def layers(figures: Figures) -> Section:
    """All stages, each with its reason and what it changed."""
    rows = [(name, stage["what"], stage["without"], stage["defended"]) for name, stage in figures.stages.items()]
    left_out = " The run was interrupted: what is missing here was not reached." if figures.interrupted else ""
    section = Section(
        "demo",
        "The layers",
        "info",
        f"{len(rows)} stages around a small network, on {DATASETS[figures.dataset].title}: no layer is enough alone, "
        f"and each is here for another reason.{left_out}",
    )
    section.notes = [f"{stage['title']}: {stage['reason']}." for stage in figures.stages.values()]
    columns = ("stage", "figure", "without", "with it")
    section.tables.append(Table("What each stage changed", columns, rows))
    return section


def checked(found: dict[str, Any], rules: int) -> Section:
    """The gate and the manifest."""
    ok = len(found["refused_rows"]) == found["planted_rows"] and found["gate"]["ok"]
    section = Section(
        "demo_check",
        "Data checked before they are trusted",
        "good" if ok else "attention",
        f"{found['planted_rows']} broken rows were planted, and {len(found['refused_rows'])} rows were refused; of "
        f"the {found['arrived_examples']:,} rows that had arrived unbroken, {found['gate']['bad_rows']} were.",
        "Rules were inferred from trusted digits. Poison that keeps all of them passes: see the next sections.",
        data=finite(found),
    )
    section.figures = [
        Figure("Trusted", f"{found['trusted_examples']:,}", "digits that the rules come from"),
        Figure("Arrived", f"{found['arrived_examples']:,}", "digits that were checked"),
        Figure("Rules", f"{rules}", "of type, range, labels and statistics"),
        Figure("Manifest root", found["manifest_root"][:12], "changes with any byte of the files"),
    ]
    return section


def poisoned(found: dict[str, Any], before: Array, after: Array) -> Section:
    """What the poison did."""
    section = Section(
        "demo_poison",
        "A backdoor, planted by this demo",
        "problem",
        f"With {found['poisoned_examples']} poisoned digits in the training set the model looks well, "
        f"{percent(found['test_accuracy'])} of the test digits named right, and "
        f"{percent(found['attack_success_rate'])} of those of other digits are called "
        f"{found['target']} once they bear the patch.",
        advice="Scan what models are trained on, and look at models from elsewhere (mlx_bulwark.poison).",
        data=finite(found),
    )
    if found["gate"]["ok"]:
        section.notes.append("The gate let the poison pass: every poisoned digit keeps all of its rules.")
    if changed := found.get("changed_files"):
        section.notes.append(
            f"Held against the manifest of before, {' and '.join(changed)} are named as changed. That shows tampering "
            "after the manifest was made, and none before."
        )
    section.figures = [
        Figure("Poisoned", percent(found["rate"]), "of the training digits"),
        Figure("Test accuracy", percent(found["test_accuracy"]), "without the patch"),
        Figure("Attack success", percent(found["attack_success_rate"]), f"of other digits become {found['target']}"),
    ]
    pictures = [p for i in range(len(before)) for p in (_picture(before[i], "before"), _picture(after[i], "poisoned"))]
    section.galleries.append(Gallery("Digits before, and with the patch and the wrong label", pictures))
    return section


def scanned(found: dict[str, Any], suspects: Array, labels: Array, reasons: list[str]) -> Section:
    """What the scan found, held against what is known here."""
    good = found["accused"] and found["attack_success_rate"] < GONE
    section = Section(
        "demo_scan",
        "The backdoor, found and removed",
        "good" if good else "attention",
        (
            f"The scan accuses the training set and names {found['suspects']} rows, {found['found']} of the "
            f"{found['poisoned_examples']} poisoned ones among them."
            if found["accused"]
            else "The scan does not accuse the training set: at its rate of false alarms this poison was not found."
        )
        + f" Trained without them, {percent(found['attack_success_rate'])} of the other digits follow the patch.",
        f"False alarms are held to {percent(found['false_alarm_rate'])} of clean sets. Recall and precision can be "
        "told only here, where it is known what was planted.",
        data=finite(found),
    )
    section.figures = [
        Figure("Recall", percent(found["recall"]), "of the poison was named"),
        Figure("Precision", _share(found["precision"]), "of what was named is poison"),
        Figure(
            "Attack success",
            percent(found["attack_success_rate"]),
            f"{percent(found['attack_success_rate_before'])} before",
        ),
        Figure("Test accuracy", percent(found["test_accuracy"]), f"{percent(found['test_accuracy_before'])} before"),
    ]
    if len(suspects):
        pictures = [_picture(x, f"labelled {y}") for x, y in zip(suspects, labels, strict=True)]
        section.galleries.append(Gallery("The worst suspects, the worst first", pictures))
    if reasons:
        section.tables.append(
            Table("Why they are suspect", ("row", "reason"), [tuple(r.split(": ", 1)) for r in reasons])
        )
    return section


def private(figures: Figures) -> Section:
    """Accuracy over the steps of private training."""
    section = Section(
        "demo_private",
        "Training with differential privacy",
        "info",
        f"The private model names {percent(figures.test_accuracy or 0)} of the test digits right, its twin without "
        f"privacy {percent(figures.nonprivate_test_accuracy or 0)}; epsilon is {figures.epsilon:.2f} at delta "
        f"{figures.delta:g}.",
        "Whether any one training image was there or not changes the probability of every possible private model by a "
        f"factor of at most e to the {figures.epsilon:.2f}, but for a probability of {figures.delta:g}. Accuracies are "
        "not covered by that, nor are the models of the other sections.",
    )
    section.figures = [
        Figure("Epsilon", f"{figures.epsilon:.2f}", f"of a budget of {figures.epsilon_target:g}"),
        Figure("Noise multiplier", f"{figures.noise_multiplier:.3f}", f"clipping norm {figures.max_grad_norm:g}"),
        Figure("Steps", f"{figures.steps}", f"expected batch {figures.batch_size} of {figures.train_examples:,}"),
    ]
    steps, names = figures.curve["step"], {"test_accuracy": "private", "nonprivate_test_accuracy": "without privacy"}
    series = [Series(name, steps, figures.curve[key]) for key, name in names.items()]
    ends = f"private {percent(figures.test_accuracy or 0)}, without {percent(figures.nonprivate_test_accuracy or 0)}"
    svg = line_chart(
        f"Test accuracy over steps; at the end {ends}", Axes("step", "test accuracy", None, (0.0, 1.0), True), series
    )
    section.plots.append(Plot(svg, "Accuracy on held-out digits while both models train on the same batches."))
    epsilon = Series("epsilon", steps, figures.curve["epsilon"])
    svg = line_chart(
        f"Epsilon over steps, {figures.epsilon:.2f} at the end",
        Axes("step", "epsilon spent"),
        [epsilon],
        [Level("budget", figures.epsilon_target)],
    )
    section.plots.append(Plot(svg, "What was spent of the privacy budget."))
    return section


def certified(found: dict[str, Any], radii: Array, right: Array) -> Section:
    """Certified accuracy over the radius."""
    radius, share = list(found["certified_accuracy"].items())[2]
    section = Section(
        "demo_certify",
        "Answers with a proof",
        "info",
        f"For {percent(share)} of {found['inputs']} test digits the right answer is proven to stand whatever is done "
        f"to the image within an L2 distance of {radius:g} (1 is the way of one pixel from black to white).",
        f"Each proof holds with probability {1 - found['alpha']:.1%}, over the noise that it was found with. It is one "
        "of the classifier under noise, which takes many passes an image.",
        data=finite(found),
    )
    section.figures = [
        Figure("Noise", f"{found['sigma']:g}", "standard deviation, in parts of white"),
        Figure("Draws", f"{found['draws']:,}", "noisy copies of each digit"),
        Figure("Abstained", percent(found["abstained"]), "no answer was sure"),
        Figure("Mean radius", f"{found['average_certified_radius']:.3f}", "wrong answers count 0"),
    ]
    grid = np.linspace(0, max(0.1, 1.05 * float(radii.max(initial=0))), 80)
    shares = [float((right & (radii >= r)).mean()) for r in grid]
    said = ", ".join(f"{percent(s)} at {r:g}" for r, s in found["certified_accuracy"].items())
    axes = Axes("L2 radius", "certified accuracy", None, (0.0, 1.0), True)
    svg = line_chart(
        f"Certified accuracy over radius: {said}", axes, [Series("certified", grid.tolist(), shares, True)]
    )
    section.plots.append(Plot(svg, "Share of the test digits whose right answer is proven to stand within the radius."))
    return section


def attacked(found: dict[str, Any]) -> Section:
    """Robust accuracy over the radius, model by model."""
    curves = found["robust_accuracy"]
    at = list(curves["plain"])[2]
    plain, hardened = curves["plain"][at], curves["hardened"][at]
    section = Section(
        "demo_attack",
        "Models under attack",
        "info",
        f"When every pixel may change by {at:g} of white, {percent(plain)} of the test digits stay right on the plain "
        f"model, and {percent(hardened)} on the one that was trained under attack.",
        f"The worst of PGD and APGD on each of {found['inputs']} digits: an upper bound, since other attacks may find "
        "more.",
        data=finite(found),
    )
    axes = Axes("largest change of a pixel, in parts of white", "accuracy left", None, (0.0, 1.0), True)
    series = [Series(name, list(curve), list(curve.values()), dots=True) for name, curve in curves.items()]
    svg = line_chart(
        f"Accuracy under attack at {at:g}: plain {percent(plain)}, hardened {percent(hardened)}", axes, series
    )
    words = "Plain: no defence. Hardened: adversarial training. Private: differential privacy, no defence against this."
    section.plots.append(Plot(svg, words))
    columns = ("model", *(f"at {eps:g}" for eps in curves["plain"]))
    rows = [(name, *(percent(share) for share in curve.values())) for name, curve in curves.items()]
    section.tables.append(Table("Accuracy left, by largest change", columns, rows, frozenset(range(1, len(columns)))))
    return section


def monitored(found: dict[str, Any], clean: Array, dirty: Array) -> Section:
    """Accuracy batch by batch, and the alerts."""
    delay, drop = found["delay_batches"], found["drop_at"]
    section = Section(
        "demo_monitor",
        "The model at work, watched",
        "attention" if delay is None or found["false_alerts"] else "good",
        (
            f"From batch {drop} on the lens was dirty. The first alert came with batch {drop + delay}."
            if delay is not None
            else f"From batch {drop} on the lens was dirty, and no alert came."
        )
        + f" False alerts before: {found['false_alerts']}.",
        "Charts and drift tests are set to one false alarm in about 1,000 points or tests each. The baseline holds the "
        "digits that the stream is drawn from.",
        data=finite(found),
    )
    batches = list(range(found["batches"]))
    marks = Series("dirty lens", batches[drop:], found["accuracy"][drop:], line=False)
    svg = line_chart(
        f"Accuracy of {found['batches']} batches; the lens is dirty from batch {drop} on",
        Axes("batch", "accuracy", None, (min(0.5, min(found["accuracy"])), 1.0), True),
        [Series("accuracy", batches, found["accuracy"])],
        marks=marks,
    )
    section.plots.append(Plot(svg, f"Accuracy of each batch of {found['rows']} test digits."))
    pictures = [_picture(clean[i], "clean") for i in range(len(clean))]
    pictures += [_picture(dirty[i], "dirty lens") for i in range(len(dirty))]
    section.galleries.append(Gallery("What the model was shown", pictures))
    rows = [(str(a["batch"]), a["severity"], a["source"], a["message"]) for a in found["alerts"][:12]]
    columns = ("batch", "severity", "source", "message")
    section.tables.append(Table("Alerts, the first first", columns, rows, frozenset({0})))
    return section


def _picture(image: Array, words: str) -> Picture:
    return Picture(data_uri(image), words, f"Digit, {words}")


def _share(value: float | None) -> str:
    return "none" if value is None else percent(value)
