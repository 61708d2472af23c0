"""The regular security assessment: attacks, scans and drift, held against a stored baseline."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..attacks.command import AttackOptions, attack_model, make_attacks
from ..attacks.evaluate import EpsSweep
from ..gate.drift import Drift, DriftReport
from ..poison.inspect import inspect
from ..poison.scan import scan
from ..smoothing.command import OptionError, load_data, load_model
from .adapting import few
from .page import Report

Array = np.ndarray[Any, np.dtype[Any]]
FORMAT = 1
ALPHA = 0.01  # chance that an assessment without any change cries wolf over an accuracy; the same again over drift
MOST_COLUMNS = 64  # of inputs that drift looks at one by one; beyond, at projections
PROJECTIONS = 32
MOST_REFERENCE = 1000  # rows kept in the baseline
SETTINGS = ("eps", "norm", "attacks", "bounds", "steps", "restarts", "queries", "inputs", "seed")


@dataclass(frozen=True)
class AssessOptions:
    """Options of the command: those of the attacks, and its own.

    Attributes:
        attack: What to attack, and how.
        train: Training data to scan for poison; None for no scan.
        inspect: Look for a backdoor in the model, by the held-out data.
        baseline: The stored baseline.
        update: Write it in place of comparing to it.
        tolerance: Drop of an accuracy that does not matter; None for the baseline's.
    """

    attack: AttackOptions
    train: Path | None
    inspect: bool
    baseline: Path
    update: bool
    tolerance: float | None


@dataclass(frozen=True)
class Measured:
    """One share of inputs: which of them are right."""

    name: str
    right: Array


@dataclass(frozen=True)
class _Subject:
    """What is assessed, and what it is held against."""

    model: Any
    x: Array
    y: Array
    train: tuple[Array, Array] | None
    settings: dict[str, Any]
    stored: dict[str, Any] | None
    tolerance: float


def assess(options: AssessOptions, say: Callable[[str], None]) -> tuple[dict[str, Any], Report]:
    """Measure, compare to the baseline or write it, and make the report.

    Args:
        options: What to do.
        say: Called with a line at each stage.

    Returns:
        tuple: The assessment, whose ``ok`` says that nothing is worse, and the report.

    Raises:
        OptionError: An option, a file or the baseline cannot be used.
    """
    subject, attack = _subject(options), options.attack
    x, y = subject.x[: attack.inputs], subject.y[: attack.inputs]
    say(
        f"attacks    {', '.join(attack.attacks)} on {len(x):,} inputs, radius {', '.join(f'{e:g}' for e in attack.eps)}"
    )
    sweep = attack_model(attack, subject.model, x, y)
    say("drift      of inputs, confidences and predicted classes")
    columns = _columns(subject.model, subject.x, attack.batch_size)
    drift = None if subject.stored is None else _drift(subject.stored, columns, attack.seed)
    scans, accused = _scans(options, subject, say)
    measured = _measured(sweep)
    now = {
        "kind": "assessment baseline",
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": subject.settings,
        "tolerance": subject.tolerance,
        "data": _digest(x, y),
        "figures": {m.name: {"right": int(m.right.sum()), "inputs": len(m.right), "bits": _bits(m)} for m in measured},
        "flags": sorted({f.name for r in sweep.reports.values() for f in r.flags}),
        "accused": accused,
        "reference": {name: v[:MOST_REFERENCE].tolist() for name, v in columns.items()},
    }
    if subject.stored is None:
        _write(options.baseline, now)
    assessment = _compared(subject.stored, now, drift, subject.tolerance)
    report = Report("Security assessment").add(assessment)
    for data, samples in [(sweep, None), *([] if drift is None else [(drift, None)]), *scans]:
        report.add(data, samples=samples, bounds=attack.bounds)
    return assessment, report


def _subject(options: AssessOptions) -> _Subject:
    """What is assessed, read and checked before anything takes time."""
    attack = options.attack
    tolerance = 0.01 if options.tolerance is None else options.tolerance
    if not 0 <= tolerance < 1:
        raise OptionError(f"--tolerance must be at least 0 and below 1 but is {tolerance:g}")
    settings = {name: _listed(getattr(attack, name)) for name in SETTINGS}
    stored = None if options.update else load_baseline(options.baseline)
    if stored is not None:
        _same_settings(settings, stored)
        tolerance = stored["tolerance"] if options.tolerance is None else tolerance
    _writable(options)
    make_attacks(attack, attack.eps[0])
    x, y = load_data(attack.data)
    train = None if options.train is None else _training_data(options.train)
    if not len(x):
        raise OptionError("--data must have rows but has none")
    model: Any = load_model(attack.model, attack.weights)
    if train is not None and not isinstance(model, nn.Module):
        raise OptionError(f"--train must go with a mlx.nn.Module but --model returned {type(model).__name__}")
    if hasattr(model, "eval"):
        model.eval()
    return _Subject(model, x, y, train, settings, stored, tolerance)


def _scans(
    options: AssessOptions, subject: _Subject, say: Callable[[str], None]
) -> tuple[list[tuple[Any, Any]], dict[str, bool]]:
    """What looks for backdoors and poison where it is wanted, with the rows that it can show; and what is accused."""
    attack = options.attack
    found: list[tuple[Any, Any]] = []
    accused: dict[str, bool] = {}
    settings: dict[str, Any] = {"batch_size": attack.batch_size, "seed": attack.seed, "progress": attack.progress}
    if options.inspect:
        say(f"inspection of the model by {len(subject.x):,} held-out inputs")
        inspected = inspect(subject.model, (subject.x, subject.y), bounds=attack.bounds, **settings)
        found.append((inspected, None))
        accused["model looks as one with a backdoor"] = inspected.accused
    if subject.train is not None:
        say(f"scan       of {len(subject.train[0]):,} training rows for poison")
        scanned = scan(subject.model, *subject.train, **settings)
        found.append((scanned, subject.train[0]))
        accused["training data look poisoned"] = scanned.accused
    return found, accused


def load_baseline(path: Path) -> dict[str, Any]:
    """Read a baseline; OptionError where it is none."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptionError(f"--baseline must be a baseline but {path} is missing; --update writes it") from None
    except (OSError, ValueError) as e:
        raise OptionError(f"--baseline must be a baseline but {path} cannot be read: {e}") from None
    parts = {"settings": dict, "figures": dict, "reference": dict, "accused": dict, "flags": list, "tolerance": float}
    whole = isinstance(stored, dict) and stored.get("format") == FORMAT
    if not whole or not all(isinstance(stored.get(name), kind) for name, kind in parts.items()):
        raise OptionError(f"--baseline must be of this version but {path} is not; --update writes it anew")
    return dict(stored)


def _writable(options: AssessOptions) -> None:
    """Minutes of work are not lost for want of a folder."""
    folder = options.baseline.parent
    if options.update and not folder.is_dir():
        raise OptionError(f"--baseline must be in a folder that exists but {folder} is none")


def _training_data(path: Path) -> tuple[Array, Array]:
    try:
        return load_data(path)
    except OptionError as e:
        raise OptionError(str(e).replace("--data", "--train")) from None


def _same_settings(settings: dict[str, Any], stored: dict[str, Any]) -> None:
    for name, value in settings.items():
        if stored["settings"].get(name) != value:
            option = {"attacks": "attack"}.get(name, name)
            was = stored["settings"].get(name)
            raise OptionError(f"--{option} must be as in the baseline, {was}, but is {value}; or write it by --update")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _measured(sweep: EpsSweep) -> list[Measured]:
    first = next(iter(sweep.reports.values()))
    measured, standing = [Measured("clean accuracy", first.correct)], first.correct
    for eps, report in sweep.reports.items():
        standing = standing & report.correct & ~report.fooled.any(axis=0)
        measured.append(Measured(f"robust accuracy at {eps:g}", standing))
    return measured


def _columns(model: Any, x: Array, batch_size: int) -> dict[str, Array]:
    """What drift looks at: inputs, or projections of them, and what the model makes of them."""
    flat = x.reshape(len(x), -1).astype(np.float64)
    if flat.shape[1] <= MOST_COLUMNS:
        columns = {f"input {j}": flat[:, j] for j in range(flat.shape[1])}
    else:
        directions = np.random.default_rng(0).normal(size=(flat.shape[1], PROJECTIONS)) / np.sqrt(flat.shape[1])
        columns = {f"projection {j}": column for j, column in enumerate((flat @ directions).T)}
        columns |= {"mean of an input": flat.mean(axis=1), "spread of an input": flat.std(axis=1)}
    logits = [np.array(model(mx.array(x[i : i + batch_size].astype(np.float32)))) for i in range(0, len(x), batch_size)]
    scores = np.concatenate(logits).astype(np.float64)
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    confidence = (shifted / shifted.sum(axis=1, keepdims=True)).max(axis=1)
    rounded = {name: np.array([float(f"{v:.6g}") for v in column]) for name, column in columns.items()}
    return rounded | {"confidence": confidence.round(6), "predicted class": scores.argmax(axis=1)}


def _drift(stored: dict[str, Any], columns: dict[str, Array], seed: int) -> DriftReport:
    try:
        reference = {name: np.asarray(v) for name, v in stored["reference"].items()}
        return Drift(reference, alpha=ALPHA, categorical=["predicted class"], seed=seed).compare(columns)
    except ValueError as e:
        raise OptionError(f"--data must be like those of the baseline but {e}") from None


def _digest(x: Array, y: Array) -> str:
    digest = hashlib.sha256(f"{x.dtype} {x.shape} {y.shape}".encode())
    for array in (np.ascontiguousarray(x), np.ascontiguousarray(y.astype(np.int64))):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _bits(m: Measured) -> str:
    return np.packbits(m.right).tobytes().hex()


def _right(figure: dict[str, Any]) -> Array:
    packed = np.frombuffer(bytes.fromhex(figure["bits"]), np.uint8)
    right: Array = np.unpackbits(packed, count=figure["inputs"]).astype(bool)
    return right


def _write(path: Path, baseline: dict[str, Any]) -> None:
    path.write_text(json.dumps(baseline, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _compared(
    stored: dict[str, Any] | None, now: dict[str, Any], drift: DriftReport | None, tolerance: float
) -> dict[str, Any]:
    figures, events = [], []
    if stored is not None:
        paired = stored["data"] == now["data"]
        level = ALPHA / len(now["figures"])
        for name, figure in now["figures"].items():
            figures.append(_figure(name, stored["figures"][name], figure, paired, level, tolerance))
        if drift is not None and drift.drift:
            names = list(dict.fromkeys(r.name for r in drift.findings))
            events.append(f"the data or what the model makes of them drifted: {few(names)}")
        events += [f"the attacks raise a doubt that is new: {f}" for f in now["flags"] if f not in stored["flags"]]
        events += [f"the {what}" for what, is_so in now["accused"].items() if is_so and not stored["accused"].get(what)]
    else:
        figures = [
            {
                "name": name,
                "before": None,
                "now": f["right"] / f["inputs"],
                "inputs": f["inputs"],
                "p_value": None,
                "worse": False,
            }
            for name, f in now["figures"].items()
        ]
    return {
        "kind": "assessment",
        "ok": not events and not any(f["worse"] for f in figures),
        "baseline": None if stored is None else stored.get("created"),
        "tolerance": tolerance,
        "alpha": ALPHA,
        "paired": stored is not None and stored["data"] == now["data"],
        "figures": figures,
        "events": events,
        "standing": _standing(stored, now),
    }


def _standing(stored: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """What is wrong and yet no news: nobody would hear of it once it is in the baseline."""
    before = now if stored is None else stored
    doubts = [f"the attacks raise a doubt: {f}" for f in now["flags"] if f in before["flags"]]
    return doubts + [f"the {what}" for what, is_so in now["accused"].items() if is_so and before["accused"].get(what)]


def _figure(
    name: str, before: dict[str, Any], now: dict[str, Any], paired: bool, level: float, tolerance: float
) -> dict[str, Any]:
    shares = [f["right"] / f["inputs"] for f in (before, now)]
    p_value = lost_by_chance(_right(before), _right(now)) if paired else dropped_by_chance(before, now)
    worse = p_value <= level and shares[0] - shares[1] > tolerance
    found = {"name": name, "before": shares[0], "now": shares[1], "inputs": now["inputs"]}
    return found | {"p_value": p_value, "worse": worse}


def lost_by_chance(before: Array, now: Array) -> float:
    """P-value of McNemar's exact test, one-sided: so many inputs lost among those that changed, on the same inputs."""
    from scipy.stats import binom

    lost, won = int((before & ~now).sum()), int((~before & now).sum())
    return float(binom.sf(lost - 1, lost + won, 0.5)) if lost + won else 1.0


def dropped_by_chance(before: dict[str, Any], now: dict[str, Any]) -> float:
    """P-value of Fisher's exact test, one-sided: so much smaller a share of other inputs."""
    from scipy.stats import hypergeom

    right, n0, n1 = before["right"] + now["right"], before["inputs"], now["inputs"]
    return float(hypergeom.cdf(now["right"], n0 + n1, right, n1))
