"""A guard around an augmentation: what goes in and what comes out are checked, and that it does what it says."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from .batch import Batch
from .report import RuleResult, ValidationReport
from .schema import Schema
from .statistics import channel_statistics


class GuardedAugmentation:
    """An augmentation whose inputs and outputs are checked; see ``gate.augmentation``.

    Attributes:
        before: Report of the latest input.
        after: Report of the latest output, with the rules of the augmentation.
    """

    def __init__(
        self, function: Callable[..., Any], schema: Schema, labels: bool, deterministic: bool, max_drift: float | None
    ) -> None:
        self._function, self._schema = function, schema
        self._labels, self._deterministic, self._max_drift = labels, deterministic, max_drift
        self.before = self.after = ValidationReport(f"{schema.name} {schema.version}", 0, [])

    def __call__(self, *data: Any) -> Any:
        """Augment a batch, ``(x)`` or ``(x, labels)``, after and before checks.

        Raises:
            GateError: Input or output do not pass.
        """
        given = data[0] if len(data) == 1 else data
        self.before = self._schema.check(given)
        self.before.raise_if_bad()
        old = {k: a.copy() for k, a in Batch(given).arrays.items()}  # a function may write into its input
        start = _states()
        result = self._function(*data)
        untouched = _unchanged(old, given)
        self.after = self._schema.check(result)
        new = Batch(result).arrays
        results = self.after.results
        results.append(_result("in_place", int(not untouched), "leave its input as it is", "changes it"))
        if self._labels:
            results.append(_labels_kept(old, new, self._schema.label))
        if self._max_drift is not None:
            results.extend(self._drift(old, new))
        if self._deterministic and untouched:
            _restore(start)
            again = Batch(self._function(*data)).arrays
            differ = sum(not _equal(new.get(k), a) for k, a in again.items())
            results.append(_result("determinism", differ, "repeat itself from the same random state", "does not"))
        self.after.raise_if_bad()
        return result

    def _drift(self, old: dict[str, Any], new: dict[str, Any]) -> list[RuleResult]:
        results = []
        for name in old.keys() & new.keys():
            if name == self._schema.label or old[name].dtype.kind not in "fiu" or new[name].dtype.kind not in "fiu":
                continue
            rule = self._schema.fields.get(name)
            axis = rule.axis if rule is not None else None
            if axis is not None and (axis > min(old[name].ndim, new[name].ndim) - 2):
                continue
            a, b = (channel_statistics(x[name], axis) for x in (old, new))
            if len(a.mean) != len(b.mean):
                continue
            scale = np.where(a.std > 0, a.std, 1.0)
            shift, widening = np.abs(b.mean - a.mean) / scale, np.abs(b.std - a.std) / scale
            worst = float(np.maximum(shift, widening).max(initial=0))
            bad = int((np.maximum(shift, widening) > self._max_drift).sum())
            limit = f"move mean and std of {name} by at most {self._max_drift:g} standard deviations"
            results.append(
                RuleResult("augmentation_drift", name, bad, limit, f"moves them by {worst:.3g}" if bad else "")
            )
        return results


def augmentation(
    fn: Callable[..., Any],
    schema: Schema,
    *,
    labels: bool = True,
    deterministic: bool = True,
    max_drift: float | None = 1.0,
) -> GuardedAugmentation:
    """Guard an augmentation by checks before and after it.

    What goes in and what comes out must both satisfy the schema. Beyond that, labels stay as they were, means and
    standard deviations stay near where they were, the input itself is not written to, and, from the same state of the
    generators of ``random``, NumPy and MLX, the function gives the same again.

    Args:
        fn: Takes a batch ``x``, or ``x`` and labels, and returns as many.
        schema: What batches must be, before and after.
        labels: Whether labels must stay.
        deterministic: Whether to run it a second time and compare; turn it off in training, once it has passed.
        max_drift: Largest change of a channel's mean and standard deviation, in standard deviations; None for any.

    Returns:
        GuardedAugmentation: Takes what ``fn`` takes.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark import gate
        >>> schema = gate.Schema(fields={"x": gate.Field(low=0, high=1), "y": gate.Field(values=(0, 1))})
        >>> flip = gate.augmentation(lambda x, y: (x[:, ::-1], y), schema)
        >>> flip(np.array([[0.0, 0.5], [0.25, 1.0]]), np.array([0, 1]))[0].tolist()
        [[0.5, 0.0], [1.0, 0.25]]
        >>> brighter = gate.augmentation(lambda x, y: (x + 0.5, y), schema)
        >>> try:
        ...     brighter(np.array([[0.0, 0.75]]), np.array([1]))
        ... except gate.GateError as e:
        ...     print(e.report.counts["range"])
        1
    """
    return GuardedAugmentation(fn, schema, labels, deterministic, max_drift)


def _result(rule: str, count: int, limit: str, found: str) -> RuleResult:
    return RuleResult(rule, "augmentation", count, limit, found if count else "")


def _labels_kept(old: dict[str, Any], new: dict[str, Any], label: str) -> RuleResult:
    limit = "leave labels as they are"
    a, b = old.get(label), new.get(label)
    if a is None and b is None:
        return _result("labels", 0, limit, "")
    if a is None or b is None or a.shape != b.shape:
        return _result(
            "labels", max(len(a) if a is not None else 0, len(b) if b is not None else 0), limit, "loses them"
        )
    changed = int((a != b).sum())
    return _result("labels", changed, limit, f"changes {changed}")


def _unchanged(old: dict[str, Any], given: Any) -> bool:
    return all(_equal(old[k], a) for k, a in Batch(given).arrays.items())


def _equal(a: Any, b: Any) -> bool:
    return a is not None and np.array_equal(a, b, equal_nan=a.dtype.kind == "f" and b.dtype.kind == "f")


def _states() -> tuple[Any, Any, int]:
    """Where the generators of random and NumPy are, and a seed that MLX's starts from anew, since it cannot be set."""
    seed: Any = mx.random.randint(0, 2**31 - 1, ()).item()
    mx.random.seed(seed)
    return random.getstate(), np.random.get_state(), seed


def _restore(states: tuple[Any, Any, int]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    mx.random.seed(states[2])
