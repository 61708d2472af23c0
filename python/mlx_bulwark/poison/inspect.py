"""A model inspected for a backdoor: several looks, one verdict."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .activation_range import ActivationRange
from .classifier import (
    Array,
    Bounds,
    bounds_of,
    inputs_of,
    integer,
    labels_of,
    least_rate,
    logits_of,
    rank_of,
    share,
)
from .neural_cleanse import NeuralCleanse, ReversedTrigger, neural_cleanse
from .pruning import pruning_check
from .strip import STRIP

METHODS = ("neural_cleanse", "pruning", "strip", "activation_range")
OF_INPUTS = ("strip", "activation_range")  # methods that need inputs to judge


@dataclass(frozen=True, eq=False)
class InspectResult:
    """What one method says of a model.

    Attributes:
        accused: Whether it found signs of a backdoor.
        p_value: Of so clear signs in a clean model; None where the method could not be used.
        reason: Why, in words.
        suspects: int64, ascending: inputs that carry a trigger, of a method that judges inputs.
        details: Figures of the method, for JSON.
    """

    accused: bool
    p_value: float | None
    reason: str
    suspects: Array
    details: dict[str, Any]


@dataclass(frozen=True, eq=False)
class InspectReport:
    """What an inspection has found.

    Attributes:
        accused: Whether the model has a backdoor, or is being attacked through one.
        p_value: Over all methods, by Bonferroni; None where none could be used.
        accused_classes: int64, ascending: targets of a backdoor, as far as they are known.
        suspects: int64, ascending: inputs that carry a trigger.
        methods: Results by name.
        triggers: One a class, where triggers were reversed.
        alpha: Rate of clean models that are accused.
        trusted_rows: Trusted inputs.
        input_rows: Inputs that were judged.
    """

    accused: bool
    p_value: float | None
    accused_classes: Array
    suspects: Array
    methods: dict[str, InspectResult]
    triggers: tuple[ReversedTrigger, ...]
    alpha: float
    trusted_rows: int
    input_rows: int

    @property
    def reason(self) -> str:
        """The verdict in words."""
        said = [f"{name}: {r.reason}" for name, r in self.methods.items() if r.accused]
        if said:
            return "; ".join(said)
        used = [name for name, r in self.methods.items() if r.p_value is not None]
        return f"no sign of a backdoor by {', '.join(used)}" if used else "no method could be used"

    def table(self) -> str:
        """Return the results as text, a line each, and the verdict."""
        width = max(len(name) for name in self.methods)
        lines = []
        for name, r in self.methods.items():
            verdict = "untested" if r.p_value is None else "accused" if r.accused else "clean"
            p = "" if r.p_value is None else f"{r.p_value:.2g}"
            lines.append(f"{name:<{width}}  {verdict:<8}  {p:>8}  {r.reason}")
        head = f"{'method':<{width}}  {'verdict':<8}  {'p':>8}  reason"
        end = "the model is accused of a backdoor" if self.accused else "no backdoor was found"
        return "\n".join([head, *lines, f"{end}; rate of false alarms {self.alpha:g}"])

    __str__ = table

    def to_json(self) -> dict[str, Any]:
        """Return all figures, and masks and patterns of the accused classes, as numbers, strings, lists and dicts."""
        return {
            "kind": "model_inspection",
            "accused": self.accused,
            "p_value": self.p_value,
            "alpha": self.alpha,
            "reason": self.reason,
            "accused_classes": self.accused_classes.tolist(),
            "suspects": self.suspects.tolist(),
            "trusted_rows": self.trusted_rows,
            "input_rows": self.input_rows,
            "methods": {
                name: {
                    "accused": r.accused,
                    "p_value": r.p_value,
                    "reason": r.reason,
                    "suspects": r.suspects.tolist(),
                    "details": r.details,
                }
                for name, r in self.methods.items()
            },
            "triggers": [
                {
                    "target": t.target,
                    "norm": t.norm,
                    "success": t.success,
                    "mask": t.mask.tolist(),
                    "pattern": t.pattern.tolist(),
                }
                for t in self.triggers
                if t.target in self.accused_classes
            ],
        }


def inspect(
    model: Any,
    trusted: Any,
    *,
    num_classes: int | None = None,
    inputs: Any = None,
    bounds: Bounds = (0.0, 1.0),
    methods: Iterable[str] | None = None,
    steps: int = 250,
    false_rejection_rate: float = 0.01,
    alpha: float = 0.05,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> InspectReport:
    """Inspect a model for a backdoor, by what it does to trusted inputs and to those it is being given.

    Neural Cleanse and the pruning check look at the model alone. STRIP and the activation ranges look for inputs that
    carry a trigger, and so need inputs to judge: requests, or a test set of unknown origin. More of these above the
    threshold than clean inputs would be, by the binomial distribution, accuse.

    Args:
        model: A classifier in evaluation mode, from ``[m, ...]`` to logits ``[m, C]``. A function that is no
            ``nn.Module`` is looked at by Neural Cleanse and STRIP alone.
        trusted: Inputs ``[n, ...]`` without trigger, of all classes, within the bounds, and their labels ``[n]``;
            inputs alone leave out the pruning check. Some hundred; 200 or more for the methods that judge inputs.
        num_classes: C, which is checked where it is given.
        inputs: Inputs ``[m, ...]`` to judge.
        bounds: Lowest and highest value of an input.
        methods: Some of ``"neural_cleanse"``, ``"pruning"``, ``"strip"``, ``"activation_range"``; None: all. One that
            cannot be used says why.
        steps: Of Neural Cleanse.
        false_rejection_rate: Of the methods that judge inputs.
        alpha: Rate of clean models that are accused, over all methods that are used.
        batch_size: Inputs of a forward pass.
        seed: Of all that is drawn.
        progress: Show a bar on standard error.

    Returns:
        InspectReport: The verdict, with reasons.

    Raises:
        TypeError: The model cannot be called.
        ValueError: An argument has a wrong value, shape or dtype; the model is in training mode or returns NaN.

    Example:
        >>> import mlx.core as mx, numpy as np
        >>> from mlx_bulwark.poison import inspect
        >>> w = np.zeros((25, 6), np.float32)  # six classes, each of four bright values
        >>> w[np.arange(24), np.arange(24) // 4] = 8
        >>> w[24, 2] = 60  # the backdoor: a bright last value means class 2
        >>> x = np.random.default_rng(0).uniform(0, 1, (100, 25)).astype(np.float32)
        >>> x[:, 24] = 0
        >>> report = inspect(lambda x: x @ mx.array(w), x)
        >>> report.accused, report.accused_classes.tolist()
        (True, [2])

    Source:
        B. Wang et al., "Neural Cleanse", 2019; Y. Gao et al., "STRIP", 2019; K. Liu et al., "Fine-Pruning", 2018.
    """
    op = "inspect"
    level, rate = share(op, "alpha", alpha), share(op, "false_rejection_rate", false_rejection_rate)
    integer(op, "steps", steps, 1)
    integer(op, "batch_size", batch_size, 1)
    integer(op, "seed", seed, 0)
    chosen = _chosen(op, methods)
    x, labels = trusted if isinstance(trusted, (tuple, list)) and len(trusted) == 2 else (trusted, None)
    rows = inputs_of(op, "trusted", x, least=2)
    limits = bounds_of(op, "trusted", rows, bounds)
    classes = logits_of(op, model, rows, batch_size).shape[1]
    if num_classes is not None and num_classes != classes:
        raise ValueError(f"[{op}] num_classes must be the model's {classes} but is {num_classes!r}")
    y = None if labels is None else labels_of(op, labels, len(rows), classes)
    judged = None if inputs is None else inputs_of(op, "inputs", inputs, shape=rows.shape[1:])
    if judged is not None:
        bounds_of(op, "inputs", judged, limits)
        logits_of(op, model, judged, batch_size)
    looks = _Looks(model, rows, y, judged, limits, steps, rate, batch_size, seed, progress)
    return looks.report(chosen, level)


def _chosen(op: str, methods: Iterable[str] | None) -> tuple[str, ...]:
    chosen = METHODS if methods is None else (methods,) if isinstance(methods, str) else tuple(methods)
    if not chosen or len(set(chosen)) < len(chosen) or set(chosen) - set(METHODS):
        raise ValueError(f"[{op}] methods must be some of {', '.join(METHODS)} but is {list(chosen)}")
    return chosen


@dataclass
class _Looks:
    model: Any
    rows: Array
    labels: Array | None
    inputs: Array | None
    bounds: Bounds
    steps: int
    rate: float
    batch_size: int
    seed: int
    progress: bool
    cleanse: NeuralCleanse | None = None

    def report(self, chosen: tuple[str, ...], alpha: float) -> InspectReport:
        import mlx.nn as nn

        without: dict[str, str] = {}
        for name in chosen:
            if name in OF_INPUTS and (self.inputs is None or not len(self.inputs)):
                without[name] = "there are no inputs to judge"
            elif name in ("pruning", "activation_range") and not isinstance(self.model, nn.Module):
                without[name] = "the model is a function, whose units are unknown"
            elif name == "pruning" and self.labels is None:
                without[name] = "the trusted inputs have no labels"
        used = [name for name in chosen if name not in without]
        each = alpha / max(1, len(used))
        results = {n: _untested(without[n]) if n in without else self._look(n, each) for n in chosen}
        p_values = [r.p_value for r in results.values() if r.p_value is not None]
        suspects = np.unique(np.concatenate([r.suspects for r in results.values()])).astype(np.int64)
        cleanse = self.cleanse
        return InspectReport(
            any(r.accused for r in results.values()),
            min(1.0, len(used) * min(p_values)) if p_values else None,
            np.zeros(0, np.int64) if cleanse is None else cleanse.accused_classes,
            suspects,
            results,
            () if cleanse is None else cleanse.triggers,
            alpha,
            len(self.rows),
            0 if self.inputs is None else len(self.inputs),
        )

    def _look(self, name: str, alpha: float) -> InspectResult:
        if self.progress:
            print(f"inspect: {name}", file=sys.stderr)
        look: Callable[[float], InspectResult] = getattr(self, f"_{name}")
        return look(alpha)

    def _neural_cleanse(self, alpha: float) -> InspectResult:
        how: dict[str, Any] = {"steps": self.steps, "seed": self.seed, "progress": self.progress}
        found = self.cleanse = neural_cleanse(self.model, self.rows, bounds=self.bounds, alpha=alpha, **how)
        details = {
            "norms": found.norms.tolist(),
            "anomaly_index": [i if math.isfinite(i) else None for i in found.anomaly_index.tolist()],
            "success": [t.success for t in found.triggers],
        }
        return InspectResult(found.accused, found.p_value, found.reason, np.zeros(0, np.int64), details)

    def _pruning(self, alpha: float) -> InspectResult:
        try:
            found = pruning_check(self.model, (self.rows, self.labels), alpha=alpha)
        except ValueError as e:  # the model ends in another kind of layer
            return _untested(str(e).split("] ", 1)[-1])
        details = {
            "layer": found.layer,
            "dormant": found.dormant,
            "accuracy": found.accuracy.tolist(),
            "changed": found.changed.tolist(),
            "weights": found.weights.tolist(),
        }
        return InspectResult(found.accused, found.p_value, found.reason, np.zeros(0, np.int64), details)

    def _strip(self, alpha: float) -> InspectResult:
        overlays = min(50, len(self.rows) // 3)
        least = least_rate(self.rate, len(self.rows) - overlays)
        how: dict[str, Any] = {"bounds": self.bounds, "batch_size": self.batch_size, "seed": self.seed}
        strip = STRIP(self.model, self.rows, n=max(1, overlays), false_rejection_rate=least, **how)
        found = np.flatnonzero(strip.detect(self.inputs))
        words = "keep their class whatever is laid over them"
        return self._counted(found, least, len(strip.clean_entropy), alpha, words, {"threshold": strip.threshold})

    def _activation_range(self, alpha: float) -> InspectResult:
        if len(self.rows) < 4:
            return _untested("there are fewer than 4 trusted inputs")
        least = least_rate(self.rate, len(self.rows) // 2)
        try:
            ranges = ActivationRange(
                self.model, self.rows, false_alarm_rate=least, batch_size=self.batch_size, seed=self.seed
            )
        except ValueError as e:  # units that do not vary, or a model without layers that are known
            return _untested(str(e).split("] ", 1)[-1])
        found = np.flatnonzero(ranges.detect(self.inputs))
        words = "drive units where no trusted input does"
        details = {"threshold": ranges.threshold, "units": ranges.units(self.inputs).tolist()}
        return self._counted(found, least, len(ranges.trusted_scores), alpha, words, details)

    def _counted(
        self, found: Array, rate: float, calibration: int, alpha: float, words: str, details: dict[str, Any]
    ) -> InspectResult:
        """Whether more inputs are found than clean ones would be, by a threshold that is itself drawn."""
        from scipy.stats import betabinom

        assert self.inputs is not None
        n, rank = len(self.inputs), max(1, rank_of(rate, calibration))
        # The share of clean inputs beyond the calibration's order statistic of that rank is Beta distributed.
        p = float(betabinom.sf(len(found) - 1, n, rank, calibration + 1 - rank))
        accused = p <= alpha
        text = f"{len(found)} of {n} inputs {words}, where {n * rate:.1f} clean ones would (p {p:.2g})"
        suspects = found.astype(np.int64) if accused else np.zeros(0, np.int64)
        details = {**details, "found": len(found), "inputs": n, "rate": rate}
        return InspectResult(accused, p, text, suspects, details)


def _untested(reason: str) -> InspectResult:
    return InspectResult(False, None, reason, np.zeros(0, np.int64), {})
