"""Drift: whether new data still come from where the reference came from, column by column and together."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .columns import Array, Column, columns_of
from .two_sample import (
    TwoSample,
    benjamini_hochberg,
    chi_square,
    classifier_two_sample,
    kolmogorov_smirnov,
    maximum_mean_discrepancy,
    population_stability_index,
    wasserstein,
)

Verdict = Literal["drift", "small", "none", "untested"]

JOINT = {"mmd": ("MMD", 0.03), "classifier": ("AUC - 0.5", 0.05)}  # name of the effect, and the least that matters
LEAST_ROWS = 20  # complete rows of each side for tests of all columns together
MOST_CATEGORIES = 20  # of a column, that these tests tell apart
FARTHEST = 10.0  # interquartile ranges from the median: an outlier is not to rule the kernel
MOST_DRAWN = 40  # bars
NAMED = 3  # categories in a reason


@dataclass(frozen=True)
class DriftResult:
    """What was found of a column, or of all columns together.

    Attributes:
        name: Of the column; ``"all columns"``.
        test: ``"ks"``, ``"chi2"``, ``"missing"``, ``"mmd"`` or ``"classifier"``.
        statistic: Of the test.
        p_value: Of the test.
        p_adjusted: By Benjamini and Hochberg over the tests of columns, by Bonferroni over those of all columns.
        effect: How far apart the data are: the KS statistic, the share of rows that have moved, the difference of the
            shares of missing values, the MMD, the AUC above 0.5.
        least_effect: Below it, drift does not matter.
        verdict: ``"drift"``; ``"small"``, there but too small to matter; ``"none"``; ``"untested"``.
        reason: Why, in words.
        psi: Population stability index, over bins of the reference.
        psi_null_mean: What it is on average without drift.
        wasserstein: Earth mover's distance, in the column's unit.
    """

    name: str
    test: str
    statistic: float
    p_value: float
    p_adjusted: float
    effect: float
    least_effect: float
    verdict: Verdict
    reason: str
    psi: float | None = None
    psi_null_mean: float | None = None
    wasserstein: float | None = None


@dataclass(frozen=True)
class DriftReport:
    """What a comparison has found.

    Attributes:
        results: Of each test, in the order of the columns, those of all columns last.
        alpha: Rate of false alarms: the probability of any finding where nothing has drifted.
        reference_rows: Rows of the reference.
        new_rows: Rows that were compared to it.
    """

    results: tuple[DriftResult, ...]
    alpha: float
    reference_rows: int
    new_rows: int

    @property
    def drift(self) -> bool:
        """Whether anything has drifted."""
        return bool(self.findings)

    @property
    def findings(self) -> tuple[DriftResult, ...]:
        """The results whose verdict is ``"drift"``."""
        return tuple(r for r in self.results if r.verdict == "drift")

    def table(self) -> str:
        """Return the results as text, a line each."""
        width = max((len(r.name) for r in self.results), default=6)
        lines = [f"{'column':<{width}}  {'test':<10} {'effect':>8} {'adj. p':>9} {'PSI':>7} {'(null)':>7}  verdict"]
        for r in self.results:
            psi = f"{_short(r.psi):>7} {_short(r.psi_null_mean):>7}"
            lines.append(
                f"{r.name:<{width}}  {r.test:<10} {_short(r.effect):>8} {_short(r.p_adjusted):>9} {psi}  "
                f"{r.verdict}: {r.reason}"
            )
        found = len(self.findings)
        verdict = f"{found} of {len(self.results)} tests found drift" if found else "no drift found"
        lines.append(
            f"{verdict}; {self.reference_rows:,} rows against {self.new_rows:,}, rate of false alarms {self.alpha:g}"
        )
        return "\n".join(lines)

    __str__ = table

    def to_json(self) -> str:
        """Return the report as JSON."""
        content = {
            "kind": "drift",
            "drift": self.drift,
            "alpha": self.alpha,
            "reference_rows": self.reference_rows,
            "new_rows": self.new_rows,
            "results": [{k: _finite(v) for k, v in asdict(r).items()} for r in self.results],
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw effect sizes beside what matters.

        Args:
            path: PNG file.

        Raises:
            ImportError: matplotlib is missing.
            OSError: The file cannot be written.
        """
        _draw(self, Path(path))


class Drift:
    """Compare new data to a reference that is frozen when the object is made.

    Numbers are compared by the Kolmogorov-Smirnov test, categories by chi-square, missing values by their share, and
    all columns together, correlations included, by the MMD and by a classifier. Drift is what is both significant and
    large enough to matter: in a large sample everything is significant.

    The rate of false alarms is ``alpha`` for the whole comparison: half for the columns, by Benjamini and Hochberg,
    half for the tests of all columns. Rows must be independent: those of a time series, or several of one source, make
    p-values too small.

    Args:
        reference: Trusted data: ``[n, ...]`` in NumPy or MLX, whose axes but the first make columns, a dataframe of
            pandas, Polars or Arrow, or columns by name. Words, booleans and objects are categories; NaN and None are
            missing; times are seconds.
        alpha: Rate of false alarms.
        min_effect: Least effect that matters, for the tests of columns: KS statistic, share of rows that moved.
        min_joint_effect: The same for the tests of all columns, by name; by default MMD 0.03 and an AUC of 0.55.
        categorical: Columns of numbers that are categories.
        joint: Tests of all columns together, ``"mmd"`` and ``"classifier"``; empty for none.
        bins: Of the PSI, by quantiles of the reference.
        max_rows: Rows of each side that the tests of all columns look at, drawn at random.
        seed: Of what is drawn.

    Raises:
        ValueError: An argument has a wrong value, or the reference cannot be read as columns.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.gate import Drift
        >>> rng = np.random.default_rng(0)
        >>> drift = Drift({"age": rng.normal(40, 10, 1000), "city": rng.choice(["Rome", "Oslo"], 1000)}, joint=())
        >>> report = drift.compare({"age": rng.normal(50, 10, 500), "city": rng.choice(["Rome", "Oslo"], 500)})
        >>> [r.name for r in report.findings]
        ['age']

    Source:
        S. Rabanser, S. Guennemann, Z. Lipton, "Failing Loudly: An Empirical Study of Methods for Detecting Dataset
        Shift", 2019.
    """

    def __init__(
        self,
        reference: Any,
        *,
        alpha: float = 0.05,
        min_effect: float = 0.1,
        min_joint_effect: dict[str, float] | None = None,
        categorical: Iterable[str | int] = (),
        joint: Sequence[str] = ("mmd", "classifier"),
        bins: int = 10,
        max_rows: int = 2000,
        seed: int = 0,
    ) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"[Drift] alpha must be above 0 and below 1 but is {alpha}")
        if not 0 <= min_effect < 1:
            raise ValueError(f"[Drift] min_effect must be at least 0 and below 1 but is {min_effect}")
        unknown = sorted({*joint, *(min_joint_effect or {})} - set(JOINT))
        if unknown or len(set(joint)) < len(joint):
            raise ValueError(f"[Drift] joint must be some of {', '.join(JOINT)} but has {list(joint)} {unknown}")
        if bins < 2 or max_rows < LEAST_ROWS:
            raise ValueError(f"[Drift] bins must be 2 or more and max_rows {LEAST_ROWS} but are {bins} and {max_rows}")
        self.alpha, self.min_effect, self.joint = float(alpha), float(min_effect), tuple(joint)
        self.min_joint_effect = {**{name: least for name, (_, least) in JOINT.items()}, **(min_joint_effect or {})}
        self.bins, self.max_rows, self.seed = bins, max_rows, seed
        self._categorical = tuple(str(c) for c in categorical)
        self._reference = columns_of("Drift", reference, self._categorical)
        self._rows = len(next(iter(self._reference.values())).present)
        if self._rows < 2:
            raise ValueError(f"[Drift] reference must have 2 rows or more but has {self._rows}")
        self._edges = {name: _edges(c.values, bins) for name, c in self._reference.items() if c.numeric}

    def compare(self, new: Any) -> DriftReport:
        """Compare new data to the reference.

        Args:
            new: Data of the same columns, of any number of rows from 2 on.

        Returns:
            DriftReport: What was found, with reasons.

        Raises:
            ValueError: ``new`` has other columns than the reference, or words where that has numbers.
        """
        columns = columns_of("Drift.compare", new, self._categorical)
        self._refuse_other_columns(columns)
        rows = len(next(iter(columns.values())).present)
        if rows < 2:
            raise ValueError(f"[Drift.compare] new must have 2 rows or more but has {rows}")
        level = self.alpha / 2 if self.joint and len(columns) > 1 else self.alpha
        found = [r for name, column in columns.items() for r in self._of_column(name, column)]
        tested = [r for r in found if r.verdict != "untested"]
        adjusted = benjamini_hochberg([r.p_value for r in tested]).tolist()
        judged = {id(r): _judged(r, p, level) for r, p in zip(tested, adjusted, strict=True)}
        together = self._together(columns, level) if len(columns) > 1 else []
        return DriftReport(tuple([judged.get(id(r), r) for r in found] + together), self.alpha, self._rows, rows)

    def _refuse_other_columns(self, columns: dict[str, Column]) -> None:
        missing, extra = (
            sorted(self._reference.keys() - columns.keys()),
            sorted(columns.keys() - self._reference.keys()),
        )
        if missing or extra:
            words = [f"no {', '.join(missing)}"] * bool(missing) + [f"also {', '.join(extra)}"] * bool(extra)
            raise ValueError(
                f"[Drift.compare] new must have the columns of the reference but has {' and '.join(words)}"
            )
        for name, column in columns.items():
            if self._reference[name].numeric and not column.numeric and len(column.values):
                first = str(column.values[0])
                raise ValueError(f"[Drift.compare] column {name!r} must be numbers but has words, the first {first!r}")

    def _of_column(self, name: str, new: Column) -> list[DriftResult]:
        old = self._reference[name]
        results = []
        if not len(old.values) or not len(new.values):
            side = "reference" if not len(old.values) else "new data"
            results.append(_untested(name, "ks" if old.numeric else "chi2", f"the {side} has no values"))
        elif old.numeric:
            results.append(self._numbers(name, old.values, new.values))
        else:
            results.append(self._categories(name, old.values, new.values.astype(str)))
        if old.missing or new.missing:
            counts = [[c.missing, len(c.values)] for c in (old, new)]
            shares = [c.missing / len(c.present) for c in (old, new)]
            words = f"missing in {shares[0]:.1%} of the reference, {shares[1]:.1%} now"
            results.append(_result(name, "missing", chi_square(*counts), self.min_effect, words))
        return results

    def _numbers(self, name: str, old: Array, new: Array) -> DriftResult:
        edges = self._edges[name]
        counts = [np.bincount(np.searchsorted(edges, v, side="left"), minlength=len(edges) + 1) for v in (old, new)]
        psi = population_stability_index(*counts)
        finite = [v[np.isfinite(v)] for v in (old, new)]
        moved = wasserstein(*finite) if all(map(len, finite)) else math.nan
        middle = [float(np.median(v)) for v in (old, new)]
        words = f"median {middle[0]:.4g}, now {middle[1]:.4g}"
        result = _result(name, "ks", kolmogorov_smirnov(old, new), self.min_effect, words)
        return replace(result, psi=psi.value, psi_null_mean=psi.null_mean, wasserstein=moved)

    def _categories(self, name: str, old: Array, new: Array) -> DriftResult:
        categories, places = np.unique(np.concatenate([old, new]), return_inverse=True)
        split = np.split(places.ravel(), [len(old)])
        counts = [np.bincount(place, minlength=len(categories)) for place in split]
        shares = [c / c.sum() for c in counts]
        most = int(np.abs(shares[0] - shares[1]).argmax())
        words = f"{str(categories[most])!r} in {shares[0][most]:.1%} of the reference, {shares[1][most]:.1%} now"
        unseen = np.flatnonzero(counts[0] == 0)
        if len(unseen):
            first = ", ".join(f"{str(categories[i])!r} ({counts[1][i]} rows)" for i in unseen[:NAMED])
            words += f"; {len(unseen)} categories that the reference has not: {first}"
        psi = population_stability_index(*counts)
        result = _result(name, "chi2", chi_square(*counts), self.min_effect, words)
        return replace(result, psi=psi.value, psi_null_mean=psi.null_mean)

    def _together(self, columns: dict[str, Column], level: float) -> list[DriftResult]:
        if not self.joint:
            return []
        generator = np.random.default_rng(self.seed)
        old, new = _encoded(self._reference, columns, self.max_rows, generator)
        results = []
        for test in self.joint:
            if min(len(old), len(new)) < LEAST_ROWS or not old.shape[1]:
                results.append(_untested("all columns", test, f"fewer than {LEAST_ROWS} complete rows that vary"))
                continue
            if test == "mmd":  # so many permutations that the least p-value can be significant
                permutations = max(199, math.ceil(2 * len(self.joint) / level) - 1)
                found = maximum_mean_discrepancy(old, new, permutations, self.seed)
            else:
                found = classifier_two_sample(old, new, self.seed)
            words = f"of {len(old):,} and {len(new):,} rows"
            result = _result("all columns", test, found, self.min_joint_effect[test], words)
            results.append(_judged(result, min(1.0, found.p_value * len(self.joint)), level))
        return results


def _result(name: str, test: str, found: TwoSample, least: float, words: str) -> DriftResult:
    return DriftResult(name, test, found.statistic, found.p_value, 1.0, found.effect, least, "none", words)


def _untested(name: str, test: str, reason: str) -> DriftResult:
    return DriftResult(name, test, math.nan, math.nan, math.nan, math.nan, math.nan, "untested", reason)


def _judged(result: DriftResult, p_adjusted: float, level: float) -> DriftResult:
    significant, large = p_adjusted <= level, result.effect >= result.least_effect
    effect = {"ks": "KS", "chi2": "moved share", "missing": "difference"}.get(result.test) or JOINT[result.test][0]
    size = f"{effect} {result.effect:.3g}"
    verdict: Verdict = "none"
    if significant and large:
        verdict, why = "drift", f"{size} >= {result.least_effect:g}, adjusted p {p_adjusted:.2g} <= {level:g}"
    elif significant:
        verdict, why = "small", f"significant, adjusted p {p_adjusted:.2g}, but {size} < {result.least_effect:g}"
    elif large:
        why = f"{size}, which chance explains in so few rows, adjusted p {p_adjusted:.2g}"
    else:
        why = f"{size}, adjusted p {p_adjusted:.2g}"
    return replace(result, p_adjusted=p_adjusted, verdict=verdict, reason=f"{why}; {result.reason}")


def _edges(values: Array, bins: int) -> Array:
    """Upper ends of all bins but the last; ties make fewer bins."""
    if not len(values):
        return np.zeros(0)
    edges = np.unique(np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf"))
    kept: Array = edges[edges < values.max()]
    return kept


def _encoded(
    old: dict[str, Column], new: dict[str, Column], most: int, generator: np.random.Generator
) -> tuple[Array, Array]:
    """Complete rows of both sides, columns of one scale; what is done to them knows not which side a row is from."""
    chosen = []
    for side in (old, new):
        complete = np.logical_and.reduce([_usable(c) for c in side.values()])
        rows = np.flatnonzero(complete)
        chosen.append(np.sort(generator.permutation(rows)[:most]))
    parts = [np.zeros((sum(map(len, chosen)), 0))]
    for name, column in old.items():
        pooled = np.concatenate([_at(c, rows) for c, rows in zip((column, new[name]), chosen, strict=True)])
        parts.append(_scaled(pooled) if column.numeric else _one_hot(pooled))
    encoded = np.concatenate(parts, axis=1)
    return encoded[: len(chosen[0])], encoded[len(chosen[0]) :]


def _usable(column: Column) -> Array:
    usable: Array = column.present.copy()
    if column.numeric:
        usable[usable] = np.isfinite(column.values)
    return usable


def _at(column: Column, rows: Array) -> Array:
    values: Array = column.values[np.cumsum(column.present)[rows] - 1]
    return values


def _scaled(values: Array) -> Array:
    """By median and interquartile range, or by the deviation where more than half the values are one."""
    if not len(values):
        return np.zeros((0, 0))
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    centred = values - middle
    spread = (high - low) / 1.349 or float(np.abs(centred).mean())
    if not 0 < spread < math.inf:
        return np.zeros((len(values), 0))
    scaled: Array = np.clip(centred / spread, -FARTHEST, FARTHEST)[:, None]
    return scaled


def _one_hot(values: Array) -> Array:
    categories, counts = np.unique(values, return_counts=True)
    frequent = categories[np.argsort(-counts, kind="stable")[:MOST_CATEGORIES]]
    ones: Array = (values[:, None] == frequent).astype(np.float64)
    return ones


def _short(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3g}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(report: DriftReport, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('[drift] matplotlib is missing; pip install "mlx-bulwark[demo]" brings it') from e
    tested = (r for r in report.results if r.verdict != "untested")
    shown = sorted(tested, key=lambda r: r.effect / (r.least_effect or 1))[-MOST_DRAWN:]
    colours = {"drift": "#c44e52", "small": "#ccb974", "none": "#4878a8"}
    figure = Figure(figsize=(7, 1.2 + 0.28 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, r in enumerate(shown):
        axes.barh(place, r.effect / (r.least_effect or 1), color=colours[r.verdict])
    axes.axvline(1, color="#888888", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(shown)), [f"{r.name} ({r.test})" for r in shown], fontsize=8)
    axes.set_xlabel("effect, 1 is the least that matters; red: drift, yellow: significant but small")
    figure.savefig(path, format="png", dpi=130)
