"""Robust accuracy under several attacks, and the checks that tell whether to believe it."""

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .base import Array, Attack, Model, check_model, predicted
from .checks import Flag, check_model_outputs, check_results, probe
from .plot import plot_robust_accuracy

if TYPE_CHECKING:
    from rich.table import Table

Attacks = Sequence[Attack] | Mapping[str, Attack]


@dataclass(frozen=True)
class AttackSummary:
    """What one attack did to the data."""

    name: str
    norm: str
    eps: float | None
    """Radius, the largest one where each input has its own; None without a limit."""
    robust_accuracy: float
    """Share of all inputs that are classified correctly and not fooled."""
    attack_success_rate: float | None
    """Share of the initially correct inputs that are fooled; None where there are none."""
    mean_distance: float | None
    """Over the fooled inputs, in the attack's norm."""
    median_distance: float | None
    mean_queries: float | None
    """Forward passes spent on an initially correct input."""
    seconds: float


@dataclass(frozen=True, eq=False)
class RobustReport:
    """What ``robust_accuracy`` found; shares are of all inputs unless they say otherwise."""

    inputs: int
    clean_accuracy: float
    robust_accuracy: float
    """Pointwise worst case: correct, and fooled by no attack."""
    attack_success_rate: float | None
    attacks: tuple[AttackSummary, ...]
    flags: tuple[Flag, ...]
    """Reasons not to believe the robust accuracy; none is no proof."""
    correct: Array
    """bool ``[B]``."""
    fooled: Array
    """bool ``[attacks, B]``."""

    def to_json(self) -> str:
        """Return all figures, without those of single inputs, as JSON."""
        return json.dumps(self.figures(), indent=2, allow_nan=False)

    def figures(self) -> dict[str, Any]:
        """Return all figures, without those of single inputs, as numbers, strings, lists and dicts."""
        names = "inputs", "clean_accuracy", "robust_accuracy", "attack_success_rate"
        return (
            {"kind": "robust_accuracy"}
            | {name: getattr(self, name) for name in names}
            | {
                "attacks": [asdict(a) for a in self.attacks],
                "flags": [asdict(f) for f in self.flags],
            }
        )

    def table(self) -> "Table":
        """Return a table for ``rich.print``: robust accuracy, success rate, median distance and mean queries.

        rich comes with the extra ``cli``.
        """
        try:
            from rich.table import Table
        except ImportError as e:
            raise ImportError('[table] rich is missing; pip install "mlx-bulwark[cli]" brings it') from e
        table = Table("attack", "norm")
        for title in ("eps", "accuracy", "success", "distance", "queries", "seconds"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_row("none", "", "", f"{self.clean_accuracy:.4f}", *[""] * 4)
        for a in self.attacks:
            shares = f"{a.robust_accuracy:.4f}", _text(a.attack_success_rate, ".4f"), _text(a.median_distance, ".4g")
            table.add_row(a.name, a.norm, _text(a.eps, "g"), *shares, _text(a.mean_queries, ".0f"), f"{a.seconds:.1f}")
        worst = f"{self.robust_accuracy:.4f}", _text(self.attack_success_rate, ".4f")
        table.add_row("worst case", "", "", *worst, "", "", "", style="bold")
        return table


@dataclass(frozen=True)
class EpsSweep:
    """Reports by radius, in rising order."""

    reports: dict[float, RobustReport]

    def accuracy(self) -> dict[float, float]:
        """Return robust accuracy by radius; an input that falls in a ball has fallen in all larger ones."""
        standing: Any = True
        found = {}
        for eps, report in self.reports.items():
            standing = standing & report.correct & ~report.fooled.any(axis=0)
            found[eps] = float(standing.mean())
        return found

    def to_json(self) -> str:
        """Return the figures of all reports as JSON."""
        robust = self.accuracy()
        runs = [{"eps": e, "robust_accuracy_over_eps": robust[e]} | r.figures() for e, r in self.reports.items()]
        return json.dumps({"kind": "robust_accuracy", "runs": runs}, indent=2, allow_nan=False)

    def plot(self, path: str | os.PathLike[str], *, label: str = "worst case", unit: str = "radius") -> None:
        """Draw accuracy over radius into a PNG file; matplotlib comes with the extra ``demo``."""
        clean = next(iter(self.reports.values())).clean_accuracy
        plot_robust_accuracy({label: {0.0: clean} | self.accuracy()}, path, unit=unit)


def robust_accuracy(
    model: Model,
    data: tuple[mx.array | Array, mx.array | Array],
    attacks: Attacks,
    *,
    batch_size: int = 256,
    checks: bool = True,
    probes: int = 64,
    progress: bool = False,
) -> RobustReport:
    """Attack a data set by several attacks and report the worst case of each input.

    Every attack sees every correctly classified input, so that what they find can be compared. The checks look at the
    model's outputs and gradients, and compare attacks with each other: where stronger attacks do worse, gradients are
    masked and the robust accuracy is not what it seems. They cost some 500 passes over ``probes`` inputs.

    Args:
        model: Takes ``[m, ...]`` and any m, returns logits ``[m, C]``.
        data: Inputs ``[B, ...]``, float32, float16 or bfloat16, within the attacks' bounds, and integer classes
            ``[B]``; arrays of MLX or NumPy.
        attacks: Untargeted attacks, or a mapping from the names to be shown.
        batch_size: Inputs that are attacked at once.
        checks: Whether to make the checks that give the flags.
        probes: Inputs that the checks attack by themselves.
        progress: Show a bar on standard error.

    Returns:
        RobustReport: Accuracies, success rates over initially correct inputs, distances, and flags with their reasons.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.
        TypeError: The model cannot be called.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import FGSM, PGD, robust_accuracy
        >>> model = lambda x: mx.stack([x[:, 0], 0.5 + 0 * x[:, 0]], axis=1)
        >>> x, y = mx.array([[0.6, 0.5], [0.9, 0.5], [0.4, 0.5]]), mx.array([0, 0, 0])
        >>> report = robust_accuracy(model, (x, y), [FGSM(0.2), PGD(0.2, steps=5)])
        >>> [round(a, 3) for a in (report.clean_accuracy, report.robust_accuracy, report.attack_success_rate)]
        [0.667, 0.333, 0.5]
        >>> report.flags
        ()

    Source:
        F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks", 2020; N. Carlini et al., "On Evaluating Adversarial Robustness", 2019.
    """
    check_model("robust_accuracy", model)
    x, y = _checked(data)
    named = _named(attacks)
    for name, count in (("batch_size", batch_size), ("probes", probes)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"[robust_accuracy] {name} must be an integer >= 1 but is {count!r}")
    batches = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
    correct = np.concatenate([np.array(predicted(_logits(model, x[b])) == y[b]) for b in batches])
    fooled, summaries = _attacked(model, x, y, named, batches, correct, progress)
    flags: list[Flag] = []
    if checks:
        first = np.flatnonzero(correct)[:probes]
        flags += check_model_outputs(model, x[mx.array(first)] if len(first) else x[:probes], named.values())
        flags += check_results(named, fooled, correct)
        if len(first):
            flags += probe(model, x[mx.array(first)], y[mx.array(first)], list(named.values()))
    standing = correct & ~fooled.any(axis=0)
    rate = _share(correct & ~standing, correct)
    return RobustReport(
        len(x), float(correct.mean()), float(standing.mean()), rate, summaries, tuple(flags), correct, fooled
    )


def accuracy_over_eps(
    model: Model,
    data: tuple[mx.array | Array, mx.array | Array],
    make_attacks: Callable[[float], Attacks],
    eps: Sequence[float],
    *,
    batch_size: int = 256,
    checks: bool = True,
    progress: bool = False,
) -> EpsSweep:
    """Report the robust accuracy at several radii, for the curve that sanity checks and papers show.

    Args:
        model: As that of ``robust_accuracy``.
        data: As that of ``robust_accuracy``.
        make_attacks: Gives the attacks of a radius.
        eps: Radii >= 0, in the unit of the input.
        batch_size: Inputs that are attacked at once.
        checks: Whether to make the checks that give the flags.
        progress: Show a bar on standard error for each radius.

    Returns:
        EpsSweep: Reports by radius.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import FGSM, accuracy_over_eps
        >>> model = lambda x: mx.stack([x[:, 0], 1 - x[:, 0]], axis=1)
        >>> data = mx.array([[0.6, 0.5], [0.9, 0.5]]), mx.array([0, 0])
        >>> accuracy_over_eps(model, data, lambda eps: [FGSM(eps)], [0.05, 0.2, 0.5]).accuracy()
        {0.05: 1.0, 0.2: 0.5, 0.5: 0.0}

    Source:
        N. Carlini et al., "On Evaluating Adversarial Robustness", 2019, section 4.
    """
    if not len(eps):
        raise ValueError("[accuracy_over_eps] eps must have a radius but is empty")
    reports = {}
    for radius in sorted(set(map(float, eps))):
        reports[radius] = robust_accuracy(
            model, data, make_attacks(radius), batch_size=batch_size, checks=checks, progress=progress
        )
    return EpsSweep(reports)


def _attacked(
    model: Model,
    x: mx.array,
    y: mx.array,
    named: dict[str, Attack],
    batches: list[slice],
    correct: Array,
    progress: bool,
) -> tuple[Array, tuple[AttackSummary, ...]]:
    from tqdm import tqdm

    found: dict[str, list[Any]] = {name: [] for name in named}
    seconds = dict.fromkeys(named, 0.0)
    work = list(product(named, batches))
    for name, rows in tqdm(work, desc="Attack", unit="batch", disable=not progress, file=sys.stderr):
        began = time.perf_counter()
        result = _of_rows(named[name], rows, len(x))(model, x[rows], y[rows])
        found[name].append([np.array(a) for a in (result.success, result.distances, result.queries)])
        seconds[name] += time.perf_counter() - began
    fooled, summaries = [], []
    for name, attack in named.items():
        success, distances, queries = (np.concatenate(parts) for parts in zip(*found[name], strict=True))
        success = success & correct
        fooled.append(success)
        summaries.append(
            AttackSummary(
                name,
                attack.norm,
                _radius(attack),
                float((correct & ~success).mean()),
                _share(success, correct),
                _finite(distances[success].mean()) if success.any() else None,
                _finite(np.median(distances[success])) if success.any() else None,
                float(queries[correct].mean()) if correct.any() else None,
                seconds[name],
            )
        )
    return np.stack(fooled), tuple(summaries)


def _of_rows(attack: Attack, rows: slice, n: int) -> Attack:
    """The attack on some rows: each has its own radius where the attack has one an input."""
    if not isinstance(attack.eps, mx.array):
        return attack
    if len(attack.eps) != n:
        raise ValueError(f"[robust_accuracy] eps must have one radius an input, {n}, but has {len(attack.eps)}")
    part = copy.copy(attack)
    part.eps = attack.eps[rows]
    return part


def _checked(data: Any) -> tuple[mx.array, mx.array]:
    try:
        x, y = (mx.array(a) if isinstance(a, np.ndarray) else a for a in data)
    except (TypeError, ValueError):
        raise ValueError(f"[robust_accuracy] data must be inputs and labels but has {type(data).__name__}") from None
    if not (isinstance(x, mx.array) and isinstance(y, mx.array)) or y.shape != x.shape[:1] or not len(x):
        shapes = " and ".join(str(getattr(a, "shape", type(a).__name__)) for a in (x, y))
        raise ValueError(f"[robust_accuracy] data must have inputs [B, ...], B >= 1, and labels [B] but has {shapes}")
    return x, y


def _named(attacks: Attacks) -> dict[str, Attack]:
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    else:
        named = {}
        for attack in attacks:
            name = type(attack).__name__
            same = sum(name == other.split(" ")[0] for other in named)
            named[f"{name} {same + 1}" if same else name] = attack
    if not named:
        raise ValueError("[robust_accuracy] attacks must have an attack but is empty")
    for name, attack in named.items():
        if not isinstance(attack, Attack):
            raise ValueError(f"[robust_accuracy] attacks must be attacks but {name} has type {type(attack).__name__}")
        if attack.targeted:
            raise ValueError(f"[robust_accuracy] attacks must be untargeted but {name} is targeted")
    return named


def _logits(model: Model, x: mx.array) -> mx.array:
    logits = model(x)
    if not isinstance(logits, mx.array) or logits.ndim != 2 or len(logits) != len(x):
        has = f"shape {logits.shape}" if isinstance(logits, mx.array) else type(logits).__name__
        raise ValueError(f"[robust_accuracy] model must return logits of shape ({len(x)}, C), [B, C], but has {has}")
    return logits


def _radius(attack: Attack) -> float | None:
    if isinstance(attack.eps, mx.array):
        return float(np.array(attack.eps).max())
    return attack.eps


def _share(part: Array, whole: Array) -> float | None:
    return float(part.sum() / whole.sum()) if whole.any() else None


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
