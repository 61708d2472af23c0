"""Sections about data: drift, the gate, poison, outliers."""

from .adapting import Data, adapter, blank, count, few, real, table
from .of_models import _how_sure, _methods
from .parts import Figure, Plot, Section, number, percent
from .svg import bar_chart


@adapter("drift")
def _drift(data: Data) -> Section:
    results = data["results"]
    found = [r for r in results if r["verdict"] == "drift"]
    section = Section("drift", "Drift of the data", "problem" if data["drift"] else "good", "")
    old, new = int(data["reference_rows"]), int(data["new_rows"])
    if found:
        names = list(dict.fromkeys(str(r["name"]) for r in found))
        section.verdict = f"The new data do not look like the reference: {few(names)} drifted."
        section.advice = (
            "Find out what changed at the source before results on these data are trusted; if the change is meant, "
            "take new reference data and retrain."
        )
    else:
        section.verdict = "The new data look like the reference: no drift that is large enough to matter was found."
    section.sure = (
        f"{len(results)} tests of {new:,} rows against {old:,}; where nothing has drifted, the chance of any alarm "
        f"is {percent(real(data['alpha']))}."
    )
    section.figures = [
        Figure("Drifted", f"{len(found)} of {len(results)}", "tests"),
        Figure("New rows", f"{new:,}", f"against {old:,} of the reference"),
    ]
    effects = [(str(r["name"]), r["test"], r["effect"], r["verdict"] == "drift") for r in results]
    shown = sorted((e for e in effects if isinstance(e[2], (int, float))), key=lambda e: -e[2])[:15]
    if shown:
        labels = [f"{name} ({_TESTS.get(test, test)})" if name == "all columns" else name for name, test, _, _ in shown]
        svg = bar_chart(
            "Effect sizes: " + ", ".join(f"{label} {e[2]:.2g}" for label, e in zip(labels, shown, strict=True)),
            "effect size",
            labels,
            [max(0.0, float(e[2])) for e in shown],
            [e[3] for e in shown],
        )
        section.plots.append(
            Plot(svg, "How far each column has moved, 0 not at all, 1 altogether; filled red where it is drift.")
        )
    rows = []
    for r in results:
        figures = (blank(r.get(k)) for k in ("effect", "least_effect", "p_adjusted", "psi"))
        rows.append((str(r["name"]), _TESTS.get(r["test"], r["test"]), *figures, r["verdict"], r["reason"]))
    columns = ("column", "test", "effect", "matters from", "adjusted p", "PSI", "verdict", "why")
    marked = [i for i, r in enumerate(results) if r["verdict"] == "drift"]
    section.tables.append(table("Every test", columns, rows, "effect|matters from|adjusted p|PSI", marked))
    section.notes.append(
        "Adjusted p: probability of so large a difference by chance, corrected for the number of tests. PSI: "
        "population stability index, above 0.25 usually called a large shift."
    )
    return section


_TESTS = {
    "ks": "Kolmogorov-Smirnov",
    "chi2": "chi-square",
    "missing": "missing values",
    "mmd": "MMD",
    "classifier": "classifier",
}


@adapter("gate")
def _gate(data: Data) -> Section:
    broken = [r for r in data["results"] if r["count"]]
    rows, bad = int(data["rows"]), int(data["bad_rows"])
    section = Section("gate", "Data gate", "good" if data["ok"] else "problem", "")
    if broken:
        places = list(dict.fromkeys(str(r["where"]) for r in broken))
        many = "is" if len(broken) == 1 else "are"
        section.verdict = (
            f"{count(len(broken), 'rule')} of the schema {data['schema']} {many} broken, "
            f"in {few(places)}; {bad:,} of {count(rows, 'row')} are touched."
        )
        section.advice = "Do not train on these rows: mend them at their source, or leave them out and keep them apart."
    else:
        section.verdict = (
            f"All {len(data['results'])} rules of the schema {data['schema']} hold for {count(rows, 'row')}."
        )
    section.sure = "Every row was looked at; a schema finds what breaks its rules, and no poison that keeps them."
    section.figures = [
        Figure("Rules broken", f"{len(broken)} of {len(data['results'])}"),
        Figure("Rows", f"{rows:,}", f"{bad:,} break a rule"),
        Figure("Dropped", f"{int(data['dropped']):,}", "rows left out"),
    ]
    told = [
        (r["rule"], str(r["where"]), f"{int(r['count']):,}", r["limit"], r["found"], ", ".join(map(str, r["rows"][:5])))
        for r in broken
    ]
    if told:
        columns = ("rule", "where", "count", "must", "but", "first rows")
        section.tables.append(table("Broken rules", columns, told, "count"))
    return section


@adapter("input_gate")
def _input_gate(data: Data) -> Section:
    rows, refused = int(data["rows"]), int(data["refused"])
    section = Section("input_gate", "Guard of inputs", "attention" if refused else "good", "")
    section.verdict = f"{refused:,} of {count(rows, 'input')} were refused or masked."
    section.advice = "Find out who sends what is out of range or not a number." if refused else ""
    names = {"nan": "not a number", "inf": "infinite", "below": "below the bounds", "above": "above the bounds"}
    section.figures = [Figure(words.capitalize(), f"{int(data[name]):,}", "rows") for name, words in names.items()]
    return section


@adapter("poison_scan")
def _poison_scan(data: Data) -> Section:
    accused, rows, suspects = bool(data["accused"]), int(data["rows"]), data["suspects"]
    section = Section("poison_scan", "Poison scan of the training data", "problem" if accused else "good", "")
    if accused:
        section.verdict = (
            f"The training data look poisoned: {count(len(suspects), 'row')} of {rows:,} "
            f"({percent(len(suspects) / max(rows, 1))}) are suspected."
        )
        section.advice = (
            "Look at the worst samples below, remove the suspects (mlx_bulwark.poison.remove), train again and inspect "
            "the new model."
        )
    else:
        section.verdict = f"No sign of poison was found in {count(rows, 'row')}."
    section.sure = _how_sure(data["p_value"], data["methods"])
    section.figures = [
        Figure("Rows", f"{rows:,}", "that were scanned"),
        Figure("Suspects", f"{len(suspects):,}", "advised for removal"),
        Figure("Level", percent(real(data["false_alarm_rate"])), "chance to accuse a clean set"),
    ]
    section.tables.append(_methods(data["methods"]))
    worst = [(str(w["row"]), str(w["label"]), blank(w["score"]), w["reason"]) for w in data["worst"]]
    marked = [i for i, w in enumerate(data["worst"]) if w["row"] in set(suspects)]
    if worst:
        columns = ("row", "label", "score", "why")
        section.tables.append(table("The rows ranked worst", columns, worst, "row|label|score", marked))
        words = "those on red ground are advised for removal" if marked else "none of them is advised for removal"
        section.notes.append(f"The ranking always has a first row, in clean data too: {words}.")
    section.notes += [f"{name.replace('_', ' ')} was left out: {why}" for name, why in data.get("skipped", {}).items()]
    return section


@adapter("outliers")
def _outliers(data: Data) -> Section:
    rows, outliers = int(data["rows"]), int(data["outliers"])
    section = Section("outliers", "Outliers", "attention" if outliers else "good", "")
    section.verdict = (
        f"{count(outliers, 'row')} of {rows:,} ({percent(outliers / max(rows, 1))}) do not belong with the others."
    )
    if outliers:
        section.advice = "Look at the worst rows: errors are mended or left out, rare but true rows stay."
    same = data["reference"] == data["file"]
    section.sure = (
        f"Scores above {number(data['threshold'])} count, a line drawn at a share of the rows that the detector was "
        f"fitted to ({'these same rows' if same else data['reference']}): some rows lie beyond it in any data."
    )
    told = []
    for w in data["worst"]:
        why = "; ".join(
            f"{r['column']} is {number(r['value'])}, usually {number(r['low'])} to {number(r['high'])}"
            for r in w["reasons"]
        )
        told.append((str(w["row"]), blank(w["anomaly_score"]), "outlier" if w["outlier"] else "usual", why))
    marked = [i for i, w in enumerate(data["worst"]) if w["outlier"]]
    columns = ("row", "score", "verdict", "why")
    section.tables.append(table(f"Worst rows of {data['file']}", columns, told, "row|score", marked))
    section.notes.append(f"Detector: {' '.join(str(data['detector']).split())}")
    return section
