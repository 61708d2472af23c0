"""Sections about records: provenance, the audit log, the monitor, the installation."""

from typing import Any

from .adapting import MOST_ROWS, Data, adapter, blank, count, few, real, table
from .parts import Figure, Plot, Section, number, percent, plain_words
from .svg import Axes, Level, Series, line_chart

MOST_CHARTS = 8


@adapter("audit_log")
def _audit_log(data: Data) -> Section:
    ok = bool(data["ok"])
    section = Section("audit_log", "Audit log", "good" if ok else "problem", "")
    section.verdict = f"{int(data['count']):,} lines: {data['verdict']}."
    if not ok:
        section.advice = _RESTORE
    section.sure = (
        "Every line holds the hash of all before it; only an anchor kept elsewhere shows that the end was cut."
    )
    section.figures = [
        Figure("Lines", f"{int(data['count']):,}"),
        Figure("Findings", str(len(data["findings"]))),
        Figure("Last hash", str(data["chain"])[:12], "keep it elsewhere to find a cut end"),
    ]
    section.notes += [str(f) for f in data["findings"]]
    if data.get("torn"):
        section.notes.append(f"The last {int(data['torn']):,} bytes are a torn line, which nobody was told is written.")
    if lines := data.get("lines"):
        rows = [
            (str(r["n"]), str(r["time"])[:19].replace("T", " "), str(r["kind"]), plain_words(r["fields"]))
            for r in lines[-MOST_ROWS:]
        ]
        section.tables.append(table("The newest lines", ("line", "time (UTC)", "what", "fields"), rows, "line"))
    return section


_RESTORE = "Restore the file from a copy that can be trusted, and find out who could write to it."


@adapter("manifest")
def _manifest(data: Data) -> Section:
    findings = data["findings"]
    section = Section("manifest", "Provenance", "good" if data["ok"] else "problem", "")
    if findings:
        kinds = list(dict.fromkeys(str(f["kind"]) for f in findings))
        section.verdict = f"{count(len(findings), 'finding')} in {count(int(data['checked']), 'file')}: {few(kinds)}."
        section.advice = (
            "Do not use these files until each difference is explained; fetch them again from their source."
        )
    else:
        section.verdict = f"All {count(int(data['checked']), 'file')} are what the manifest says."
    section.sure = "Every file was hashed again."
    signed = data.get("signature")
    section.sure += f" Signature: {signed}." if signed else " Whether the manifest is signed was not told."
    names = (("root", "Merkle root"), ("source", "Source"), ("licence", "Licence"), ("git_commit", "Git commit"))
    rows = [(words, str(data[name])) for name, words in names if data.get(name)]
    rows += [("Made from", plain_words(parent)) for parent in data.get("parents") or []]
    if rows:
        section.tables.append(table("Where it comes from", ("what", "value"), rows))
    if findings:
        told = [(str(f["kind"]), str(f["path"]), str(f["message"])) for f in findings]
        section.tables.append(table("Findings", ("kind", "path", "what"), told))
    section.notes += [f"Notice: {f['path']} {f['message']}" for f in data.get("notices", [])]
    return section


@adapter("monitor")
def _monitor(data: Data) -> Section:
    opened = {s: int(n) for s, n in data["open_alerts"].items() if n}
    drifted = [name for name, w in data["windows"].items() if w["drift"]]
    worst = "problem" if opened.get("critical") else "attention" if opened or drifted else "good"
    section = Section("monitor", "Monitoring", worst, "")  # type: ignore[arg-type]
    counted = data.get("counters", {})
    seen = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counted.items() if isinstance(n, int))
    if opened or drifted:
        parts = [f"{n} open {severity} alert{'' if n == 1 else 's'}" for severity, n in opened.items()]
        parts += [f"drift in {few(drifted)}"] if drifted else []
        section.verdict = f"The running model needs a look: {few(parts)}."
        section.advice = (
            "Read the newest alerts, find the batch that is named first, and roll back if its checkpoint is at fault."
        )
    else:
        section.verdict = "The running model is in control: no alert is open."
    run_length = data.get("run_length")
    section.sure = f"Seen so far: {seen or 'nothing'}."
    if run_length:
        section.sure += f" All charts together are set to one false alarm in {real(run_length):,.0f} points on average."
    for name, found in list(data["series"].items())[:MOST_CHARTS]:
        if found["points"]:
            section.plots.append(_control_chart(name, found))
    if alerts := data.get("alerts"):
        rows = [
            (str(a["at"])[:19].replace("T", " "), a["severity"], a["source"], a["message"]) for a in alerts[-MOST_ROWS:]
        ]
        marked = [i for i, a in enumerate(alerts[-MOST_ROWS:]) if not a.get("acknowledged")]
        columns = ("time (UTC)", "severity", "source", "message")
        section.tables.append(table("Alerts; those on red ground are open", columns, rows, "", marked))
    if windows := data["windows"]:
        rows = [
            (str(n), blank(w.get("p_value")), blank(w.get("effect")), _drift_word(w["drift"]))
            for n, w in windows.items()
        ]
        marked = [i for i, w in enumerate(windows.values()) if w["drift"]]
        section.tables.append(table("Windows of drift", ("window", "p", "effect", "verdict"), rows, "p|effect", marked))
    if waiting := {name: box["waiting"] for name, box in (data.get("outbox") or {}).items() if box["waiting"]}:
        section.notes.append(f"Alerts that wait for delivery: {plain_words(waiting)}.")
    return section


def _drift_word(drift: bool | None) -> str:
    return "not yet tested" if drift is None else "drift" if drift else "none"


def _control_chart(name: str, found: Data) -> Plot:
    points = found["points"]
    y = [real(p["value"]) for p in points]
    x = [float(i + 1) for i in range(len(points))]
    bad = [i for i, p in enumerate(points) if p["signals"]]
    centre = _centre(found.get("baseline"))
    levels = [Level("baseline", centre)] if centre is not None else []
    marks = Series("out of control", [x[i] for i in bad], [y[i] for i in bad]) if bad else None
    series = [Series(name, x, y, dots=len(y) <= 60)]
    words = f"{name}: {count(len(y), 'point')}, {len(bad)} out of control"
    svg = line_chart(f"Control chart of {words}", Axes("point", name, whole=True), series, levels, marks)
    return Plot(svg, words + ("; dots in red are where a rule was broken." if bad else "."))


def _centre(baseline: Any) -> float | None:
    if isinstance(baseline, dict):
        baseline = baseline.get("mean")
    return None if baseline is None else real(baseline)


@adapter("doctor")
def _doctor(data: Data) -> Section:
    checks = data["checks"]
    off = [c for c in checks if not c["ok"]]
    section = Section("doctor", "This installation", "good" if data["ok"] else "problem", "")
    if off:
        names = list(dict.fromkeys(str(c["op"]) for c in off))
        section.verdict = f"{len(off)} of {count(len(checks), 'check')} of the kernels are off: {few(names)}."
        section.advice = "Set BULWARK_BACKEND=reference until this is mended, and report it with this page."
    else:
        section.verdict = (
            f"All {count(len(checks), 'check')} of the kernels agree with their references on this machine."
        )
    told = ("system", "chip", "python", "mlx", "backend", "reason", "instruction_set", "device")
    rows = [(n.replace("_", " "), plain_words(data[n])) for n in told if n in data]
    section.tables.append(table("Where it ran", ("what", "value"), rows))
    if off:
        lines = [
            (str(c["op"]), str(c["backend"]), blank(c["error"]), blank(c["tolerance"]), str(c["message"] or ""))
            for c in off
        ]
        columns = ("op", "backend", "error", "at most", "why")
        section.tables.append(table("Checks that are off", columns, lines, "error|at most"))
    return section


@adapter("assessment")
def _assessment(data: Data) -> Section:
    worse = [f for f in data["figures"] if f["worse"]]
    section = Section("assessment", "Against the baseline", "good" if data["ok"] else "problem", "")
    points = number(100 * real(data["tolerance"]))
    tolerance = f"{points} point{'' if points == '1' else 's'} of 100"
    standing = [str(matter) for matter in data.get("standing", [])]
    if data["baseline"] is None:
        section.status = "info"
        section.verdict = "This run was stored as the baseline: the next assessments are held against it."
        if standing:
            section.status = "attention"
            section.verdict += f" What it is held against is itself in doubt: {'; '.join(standing)}."
            section.advice = "Settle this first and store the baseline anew: it will not be told as a regression."
    elif data["ok"]:
        section.verdict = f"Nothing is worse than the baseline of {str(data['baseline'])[:10]}."
        if standing:
            section.status = "attention"
            section.verdict += f" What was wrong with the baseline still is: {'; '.join(standing)}."
            section.advice = "Settle this: the baseline had it too, so it is not told as a regression."
    else:
        drops = [f"{f['name']} fell from {percent(f['before'])} to {percent(f['now'])}" for f in worse]
        section.verdict = (
            f"Worse than the baseline of {str(data['baseline'])[:10]}: {'; '.join([*drops, *data['events']])}."
        )
        section.advice = (
            "Do not release these weights before the cause is known. If the change is meant, store a new baseline by "
            "--update."
        )
    if data["baseline"] is not None:
        test = "McNemar's test on the same inputs" if data["paired"] else "Fisher's test, since the inputs are others"
        section.sure = (
            f"An accuracy counts as worse where it fell by more than {tolerance} and chance explains that with "
            f"probability {real(data['alpha']):g} at most, over all of them together, by {test}."
        )
    rows = [
        (
            f["name"],
            "" if f["before"] is None else percent(f["before"]),
            percent(f["now"]),
            "" if f["before"] is None else f"{100 * (f['now'] - f['before']):+.1f}",
            blank(f["p_value"]),
            "" if f["before"] is None else "worse" if f["worse"] else "as before",
        )
        for f in data["figures"]
    ]
    columns = ("figure", "baseline", "now", "points", "p", "verdict")
    marked = [i for i, f in enumerate(data["figures"]) if f["worse"]]
    section.tables.append(table("Figures", columns, rows, "baseline|now|points|p", marked))
    return section
