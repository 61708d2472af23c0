"""One adapter for each kind of data: JSON values in, a section in plain words out."""

from collections.abc import Callable, Sequence
from typing import Any

from .parts import Figure, Plot, Section, Table, number, percent, plain_words
from .samples import show_worst
from .svg import Axes, Series, bar_chart, line_chart

Data = dict[str, Any]
MOST_ROWS = 200
FOOLED, SOME_FOOLED = 0.5, 0.1  # attack success rates from which a model is called weak, and worth a look
P_LEAST = 1e-6

_ADAPTERS: dict[str, Callable[[Data], Section]] = {}


def section_of(data: Data, samples: Any = None, bounds: tuple[float, float] = (0.0, 1.0)) -> Section:
    """The section that data make; what is not known, or not as it should be, is shown as a plain table."""
    kind = data.get("kind")
    adapter = _ADAPTERS.get(kind) if isinstance(kind, str) else None
    if adapter is None:
        section = _plain_section(data, "")
    else:
        try:
            section = adapter(data)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as e:
            words = (
                f"The data are not of the form that this version knows ({type(e).__name__}: {e}); shown as they are."
            )
            section = _plain_section(data, words)
    section.data = data
    show_worst(section, samples, bounds)
    return section


def _adapter(kind: str) -> Callable[[Callable[[Data], Section]], Callable[[Data], Section]]:
    def keep(function: Callable[[Data], Section]) -> Callable[[Data], Section]:
        _ADAPTERS[kind] = function
        return function

    return keep


def _plain_section(data: Data, trouble: str) -> Section:
    kind = str(data.get("kind", "data"))
    title = kind.replace("_", " ").strip().capitalize() or "Data"
    verdict = trouble or "Shown as it came: this version of the report has no words for this kind of data."
    section = Section(kind, title, "attention" if trouble else "info", verdict)
    rows = [(name, plain_words(value)) for name, value in data.items() if name != "kind"]
    section.tables.append(_table("Everything that was given", ("name", "value"), rows))
    return section


def _table(
    caption: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    numeric: str = "",
    marked: Any = (),
    strong: Any = (),
) -> Table:
    """A table; ``numeric`` names columns of numbers, and what does not fit is counted."""
    return Table(
        caption,
        columns,
        rows[:MOST_ROWS],
        frozenset(i for i, c in enumerate(columns) if c in numeric.split("|")),
        frozenset(strong),
        frozenset(marked),
        max(0, len(rows) - MOST_ROWS),
    )


def _float(value: Any) -> float:
    """A number; those that JSON lacks come as words."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _interval(share: float, n: int) -> str:
    """95 % interval of a share of n by Clopper and Pearson, in words."""
    from scipy.stats import beta

    hits = round(share * n)
    low = beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1.0
    return f"{percent(float(low))} to {percent(float(high))}"


@_adapter("robust_accuracy")
def _robust_accuracy(data: Data) -> Section:
    runs = sorted(data.get("runs") or [data], key=lambda r: _radius(r) or 0.0)
    last = runs[-1]
    n, clean = int(last["inputs"]), _float(last["clean_accuracy"])
    robust = _float(last.get("robust_accuracy_over_eps", last["robust_accuracy"]))
    rate = last["attack_success_rate"]
    radius = _radius(last)
    limit = (
        f"by at most {number(radius)} ({_norm(last['attacks'][0]['norm'])})"
        if radius is not None
        else "without a limit"
    )
    flags = {f["name"]: f["reason"] for run in runs for f in run.get("flags", [])}
    fooled = 0.0 if rate is None else _float(rate)
    section = Section("robust_accuracy", "Attacks on the model", "good", "")
    section.verdict = (
        f"Whoever may change an input {limit} brings the accuracy from {percent(clean)} down to {percent(robust)}: "
        f"{percent(fooled)} of the inputs that the model gets right can be turned wrong."
    )
    section.sure = (
        f"An upper bound of the true robustness over {n:,} inputs (95 % interval by sampling "
        f"{_interval(robust, n)}): attacks show what is breakable, and never that nothing else is."
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
            distance, queries = (_or_blank(a[key]) for key in ("median_distance", "mean_queries"))
            rows.append((a["name"], _norm(a["norm"]), _or_blank(a["eps"]), *shares, distance, queries))
        if len(run["attacks"]) > 1:
            worst.append(len(rows))
            shares = percent(run["robust_accuracy"]), percent(run["attack_success_rate"])
            rows.append(("all together", "", _or_blank(_radius(run)), *shares, "", ""))
    columns = ("attack", "norm", "radius", "accuracy left", "success", "median distance", "queries")
    numeric = "radius|accuracy left|success|median distance|queries"
    section.tables.append(_table("Each attack by itself", columns, rows, numeric, strong=worst))
    return section


def _or_blank(value: Any) -> str:
    return "" if value is None else number(value)


_NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0"}


def _norm(name: str) -> str:
    return _NORMS.get(name.lower(), name)


def _radius(run: Data) -> float | None:
    eps = run.get("eps", max((a["eps"] for a in run["attacks"] if a["eps"] is not None), default=None))
    return None if eps is None else _float(eps)


def _robust_curve(runs: list[Data], clean: float, norm: str) -> Plot:
    eps = [0.0, *(_float(_radius(r)) for r in runs)]
    together = [clean, *(_float(r.get("robust_accuracy_over_eps", r["robust_accuracy"])) for r in runs)]
    series = [Series("all attacks together", eps, together, dots=True)]
    names = [a["name"] for a in runs[0]["attacks"]]
    if 1 < len(names) <= 5 and all([a["name"] for a in r["attacks"]] == names for r in runs):
        for i, name in enumerate(names):
            series.append(
                Series(name, eps, [clean, *(_float(r["attacks"][i]["robust_accuracy"]) for r in runs)], dots=True)
            )
    axes = Axes(f"attack radius ({norm})", "accuracy", y_range=(0.0, 1.0), percent=True)
    said = ", ".join(f"{percent(a)} at {e:g}" for e, a in zip(eps, together, strict=True))
    svg = line_chart(f"Accuracy over attack radius: {said}", axes, series)
    return Plot(
        svg, "Accuracy over the radius of the attack: the further left it falls, the easier the model is fooled."
    )


@_adapter("drift")
def _drift(data: Data) -> Section:
    results = data["results"]
    found = [r for r in results if r["verdict"] == "drift"]
    section = Section("drift", "Drift of the data", "problem" if data["drift"] else "good", "")
    old, new = int(data["reference_rows"]), int(data["new_rows"])
    if found:
        names = list(dict.fromkeys(str(r["name"]) for r in found))
        section.verdict = f"The new data do not look like the reference: {_few(names)} drifted."
        section.advice = (
            "Find out what changed at the source before results on these data are trusted; if the change is meant, "
            "take new reference data and retrain."
        )
    else:
        section.verdict = "The new data look like the reference: no drift that is large enough to matter was found."
    section.sure = (
        f"{len(results)} tests of {new:,} rows against {old:,}; where nothing has drifted, the chance of any alarm "
        f"is {percent(_float(data['alpha']))}."
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
        figures = (_or_blank(r.get(k)) for k in ("effect", "least_effect", "p_adjusted", "psi"))
        rows.append((str(r["name"]), _TESTS.get(r["test"], r["test"]), *figures, r["verdict"], r["reason"]))
    columns = ("column", "test", "effect", "matters from", "adjusted p", "PSI", "verdict", "why")
    marked = [i for i, r in enumerate(results) if r["verdict"] == "drift"]
    section.tables.append(_table("Every test", columns, rows, "effect|matters from|adjusted p|PSI", marked))
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


def _few(names: list[str], most: int = 4) -> str:
    shown = names[:most]
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


@_adapter("audit_log")
def _audit_log(data: Data) -> Section:
    ok = bool(data["ok"])
    section = Section("audit_log", "Audit log", "good" if ok else "problem", "")
    if "error" in data:
        section.verdict, section.advice = f"The log could not be verified: {data['error']}", _RESTORE
        return section
    section.verdict = f"{int(data['count']):,} lines: {data['verdict']}."
    if not ok:
        section.advice = _RESTORE
    section.sure = (
        "Every line holds the hash of all before it; only an anchor kept elsewhere shows that the end was cut."
    )
    section.figures = [
        Figure("Lines", f"{int(data['count']):,}"),
        Figure("Findings", str(len(data["findings"]))),
        Figure("Last hash", str(data["chain"])[:16], "keep it elsewhere to find a cut end"),
    ]
    section.notes += [str(f) for f in data["findings"]]
    if data.get("torn"):
        section.notes.append(f"The last {int(data['torn']):,} bytes are a torn line, which nobody was told is written.")
    if lines := data.get("lines"):
        rows = [(str(r["n"]), str(r["time"]), str(r["kind"]), plain_words(r["fields"])) for r in lines[-MOST_ROWS:]]
        table = _table("The newest lines", ("line", "time", "what", "fields"), rows, "line")
        section.tables.append(table)
    return section


_RESTORE = "Restore the file from a copy that can be trusted, and find out who could write to it."
