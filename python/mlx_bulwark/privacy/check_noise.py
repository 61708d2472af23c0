"""Runs steps of zero gradients and looks at the noise that they release.

Every test is exact: with independent standard normal values z, |z|^2 is chi-squared, and <z, w> / |w| is again standard
normal, whatever the length. Repeats are looked for as equal values and as three consecutive values seen before.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from scipy import stats

from .clipping import QUANTILE
from .discrete import make_grid
from .events import Banded, Discrete
from .optimizer import ClippedGradients
from .taps import PrivacyError

if TYPE_CHECKING:
    from .engine import PrivacyEngine

FALSE_ALARM_RATE = 1e-6  # of one call, over all its tests
_KEPT = 1024  # values a leaf and step that are compared with all others
_ALL = "all parameters"
_SAME = 1e-7  # probability that two float32 draws are equal, from above: 1.9e-8 by the density and the spacing


@dataclass
class _Tests:
    """Probabilities of what was seen, under sound noise."""

    found: list[tuple[float, str]] = field(default_factory=list)

    def normal(self, value: float, what: str) -> None:
        """A value that should be standard normal."""
        self.found.append((float(2 * stats.norm.sf(abs(value))), what))

    def squares(self, total: float, count: int, what: str) -> None:
        """A sum of squares that should be chi-squared."""
        p = 2 * min(stats.chi2.cdf(total, count), stats.chi2.sf(total, count))
        self.found.append((float(p), f"{what} but has {math.sqrt(total / count):.4g} times as much"))

    def judge(self) -> None:
        """Raise the least probable, if it is too improbable."""
        p, what = min(self.found)
        if not p >= FALSE_ALARM_RATE / len(self.found):
            raise PrivacyError(f"[check] noise must {what} (probability {p:.1e} if it were sound)")


def check_noise(engine: "PrivacyEngine", leaves: dict[str, Any], steps: int) -> float:
    """Rehearse steps of zero gradients; return the largest relative error of a leaf's standard deviation."""
    leaves = {path: shape for path, shape in leaves.items() if math.prod(shape)}
    tests = _Tests()
    squares, counts = dict.fromkeys(leaves, 0.0), dict.fromkeys(leaves, 0)
    kept: list[dict[str, Any]] = []
    # two engines, as two ranks would have: keys of their own
    ranks = [engine._without_books(), engine._without_books()]
    for rank, rehearsed in enumerate(ranks):
        before: dict[str, Any] = {}
        for step, noise in enumerate(_released(rehearsed, leaves, steps)):
            for path, z in noise.items():
                _require_finite(path, z)
                squares[path] += float(z @ z)
                counts[path] += z.size
                if before:
                    what = f"be independent from step to step but {path} is not in steps {step - 1} and {step}"
                    tests.normal(_projected(z, before[path]), what)
            before = noise
            kept.append({"rank": rank, "step": step, **{path: z[:_KEPT] for path, z in noise.items()}})
    for path in leaves:
        tests.squares(squares[path], counts[path], f"have the accounted standard deviation on {path}")
    _compare_pairs(kept, leaves, tests, _same(engine))
    _compare_leaves(kept, leaves, tests)
    _refuse_repeats(kept, leaves, tests)
    tests.judge()
    return max((abs(math.sqrt(squares[p] / counts[p]) - 1) for p in leaves if counts[p]), default=0.0)


def _released(engine: "PrivacyEngine", leaves: dict[str, Any], steps: int) -> Iterator[dict[str, Any]]:
    """Noise of steps of zero gradients in units of the accounted one: eager ones, then compiled ones."""
    ratio = engine._clipping.noise_ratio(engine.event.mechanism.noise_multiplier)
    counts = {QUANTILE: mx.zeros(())} if engine._clipping.quantile else {}

    def release(zeros: dict[str, mx.array]) -> Any:
        return engine._release(ClippedGradients(engine, zeros, mx.zeros((0,)), mx.array(0), True))

    whole: list[dict[str, Any]] = []
    mechanism = engine.event.mechanism
    coefficients = mechanism.coefficients if isinstance(mechanism, Banded) else (1.0,)
    compiled = mx.compile(release, inputs=engine.state, outputs=engine.state)
    discrete = isinstance(mechanism, Discrete)
    for step in range(steps):
        zeros = {path: mx.zeros(shape, mx.int64 if discrete else mx.float32) for path, shape in leaves.items()} | counts
        unit = ratio * engine.state["max_grad_norm"].item() / engine.expected_batch_size
        released = (release if discrete or step < (steps + 1) // 2 else compiled)(zeros)
        whole.append({path: np.array(g).astype(np.float64).ravel() / unit for path, g in released.items()})
        # C times correlated noise is what it was made of, and that is independent
        past = whole[::-1][: len(coefficients)]
        yield {p: sum(c * w[p] for c, w in zip(coefficients, past, strict=False)) for p in released}


def _require_finite(path: str, z: Any) -> None:
    if not np.isfinite(z).all():
        raise PrivacyError(f"[check] noise must be finite but is not on {path}")


def _projected(z: Any, w: Any) -> float:
    norm = np.linalg.norm(w)
    return float(z @ w / norm) if norm else 0.0


def _same(engine: "PrivacyEngine") -> float:
    mechanism = engine.event.mechanism
    if not isinstance(mechanism, Discrete):
        return _SAME
    grid = make_grid(mechanism.noise_multiplier, mechanism.max_grad_norm)
    return 1 / math.sqrt(4 * math.pi * grid.m * grid.t)


def _compare_pairs(kept: list[dict[str, Any]], leaves: dict[str, Any], tests: _Tests, same: float) -> None:
    """Each leaf, and all together, at any two steps or ranks."""
    for k in kept:
        k[_ALL] = np.concatenate([k[path] for path in leaves])
    for path in (*leaves, _ALL):
        z = np.stack([k[path] for k in kept])
        norms = np.linalg.norm(z, axis=1)
        for i, j in zip(*np.triu_indices(len(kept), 1), strict=True):
            if norms[j]:
                tests.normal(float(z[i] @ z[j] / norms[j]), f"be independent but {path} is not in {_pair(kept, i, j)}")
        equal = sum(int((z[i + 1 :] == z[i]).sum()) for i in range(len(kept)))
        expected = same * z.shape[1] * len(kept) * (len(kept) - 1) / 2
        seen = float(stats.poisson.sf(equal - 1, expected))
        tests.found.append((seen, f"never repeat but {path} has {equal} values in common between steps"))


def _pair(kept: list[dict[str, Any]], i: Any, j: Any) -> str:
    return " and ".join(f"step {k['step']} of engine {k['rank']}" for k in (kept[i], kept[j]))


def _compare_leaves(kept: list[dict[str, Any]], leaves: dict[str, Any], tests: _Tests) -> None:
    """Any two leaves, over all steps, as far as the shorter one goes."""
    paths = list(leaves)
    padded = np.zeros((len(paths), len(kept), _KEPT))
    for values, path in zip(padded, paths, strict=True):
        of_steps = np.stack([k[path] for k in kept])
        values[:, : of_steps.shape[1]] = of_steps
    z = padded.reshape(len(paths), -1)
    products, norms = z @ z.T, np.sqrt((z != 0).astype(np.float64) @ (z**2).T)
    for i, j in zip(*np.triu_indices(len(paths), 1), strict=True):
        if norms[i, j]:
            tests.normal(products[i, j] / norms[i, j], f"be independent but is not between {paths[i]} and {paths[j]}")


def _refuse_repeats(kept: list[dict[str, Any]], leaves: dict[str, Any], tests: _Tests) -> None:
    """Three values in a row that occur twice, anywhere: a key and counter were used again."""
    runs = [
        (np.lib.stride_tricks.sliding_window_view(k[path], 3), f"{path} in step {k['step']} of engine {k['rank']}")
        for k in kept
        for path in leaves
        if k[path].size >= 3
    ]
    if not runs:
        return
    rows = np.concatenate([values for values, _ in runs])
    origin = np.repeat(np.arange(len(runs)), [len(values) for values, _ in runs])
    order = np.lexsort(rows.T)
    same = np.flatnonzero((rows[order][1:] == rows[order][:-1]).all(axis=1))
    if len(same):
        a, b = (runs[origin[order[same[0] + i]]][1] for i in (0, 1))
        tests.found.append((0.0, f"never repeat but {a} is {b}"))
