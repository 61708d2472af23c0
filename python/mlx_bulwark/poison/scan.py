"""Is a training set poisoned, and which rows are to blame: several detectors, one ranking with reasons."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from scipy import stats
from tqdm import tqdm

from ..smoothing.bounds import check_count
from .classes import Array, Detection, by_class, checked, checked_labels, principal
from .classifier import outlier_p_value
from .clustering import activation_clustering
from .features import features_and_logits
from .influence import self_influence
from .label_noise import cross_fitted, label_noise
from .mixture import class_mixture
from .neighbors import deep_knn, shares_among
from .plot import draw_scan
from .spectral import spectral_signatures
from .spectre import spectre
from .values import LEAST_COUNT, input_rows, telling_columns, telling_values

METHODS = (
    "spectral_signatures",
    "activation_clustering",
    "deep_knn",
    "spectre",
    "label_noise",
    "self_influence",
    "input_knn",
    "telling_values",
    "class_mixture",
)
OF_LOGITS = ("self_influence",)
OF_INPUTS = ("input_knn", "telling_values")
BESIDE_TRUSTED = ("spectral_signatures", "activation_clustering", "spectre", "self_influence")
"""The methods that are run on the trusted rows and the others together, to see which score higher."""
TOP_SHARES = (0.025, 0.05, 0.1, 0.2)  # of a class's scores

LEAST_CLASSES = 4  # for one to be held against the others
SURE = 0.8  # of the neighbours, by which another label outweighs the own one, for the label to count as wrong
LEAST_SPREAD = {"class_mixture": 0.1, "telling_values": 0.45}
"""Standard deviations that the statistics of clean classes have at least: few classes may agree by chance."""
INPUT_COMPONENTS = 50
MOST_INPUT_COLUMNS = 1024
WORST = 20  # rows that the JSON tells the reasons of


@dataclass(frozen=True, eq=False)
class MethodResult:
    """What one method found."""

    scores: Array
    """float64 ``[n]``: higher is more suspect."""
    p_value: float | None
    """Whether the set is poisoned at all, for this method alone; None where it has no baseline."""
    accused: bool
    """The p-value is significant among those of all methods."""
    reason: str
    statistics: dict[int, float] = field(default_factory=dict)
    """By class."""
    accused_classes: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ScanReport:
    """What a scan of a training set found."""

    ranking: Array
    """int64 ``[n]``: all rows, the worst first."""
    scores: Array
    """float64 ``[n]``: the combined score; about 1 where one method is sure, below 0 where none suspects the row."""
    p_value: float | None
    """Whether the set is poisoned at all, corrected for the number of methods; None where no method has a baseline."""
    accused: bool
    suspects: Array
    """int64: rows advised for removal, the worst first; none where the set is not accused and no rate was given."""
    methods: dict[str, MethodResult]
    skipped: dict[str, str]
    """Methods that could not run, and why."""
    y: Array
    false_alarm_rate: float

    def reason(self, row: int) -> str:
        """Say in words what speaks against a row.

        Args:
            row: Its index in the data.

        Returns:
            str: The label, and what each method that suspects the row saw.

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= row < len(self.y):
            raise IndexError(f"[ScanReport.reason] row must be in [0, {len(self.y)}) but is {row}")
        said = [words for name in METHODS if name in self.methods for words in self._says(name, row)]
        return f"label {self.y[row]}: {'; '.join(said) or 'no method suspects it'}"

    def _says(self, name: str, row: int) -> list[str]:
        result = self.methods[name]
        score = float(result.scores[row])
        if name in _WORDS and score > _WORDS[name][0]:
            return [_WORDS[name][1].format(score=score)]
        own = result.scores[self.y == self.y[row]]
        above = float((own >= score).mean())
        if name in _TAILS and above <= 0.02:
            return [f"{_TAILS[name]} is among the highest {max(above, 1 / len(own)):.1%} of its class"]
        return []

    def table(self) -> str:
        """Say what each method found, a line each: its name, its p-value, its verdict and why."""
        lines = [("method", "p", "verdict", "why")]
        for name, m in self.methods.items():
            verdict = "poison" if m.accused else "ranks only" if m.p_value is None else "nothing found"
            lines.append((name, _short(m.p_value), verdict, m.reason))
        lines += [(name, "", "skipped", why) for name, why in self.skipped.items()]
        widths = [max(len(line[j]) for line in lines) for j in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]]) for line in lines
        )

    def plot(self, path: str | os.PathLike[str], x: Any = None, *, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        """Draw the scores of every label, with the suspects, and beneath them images of the worst.

        Args:
            path: PNG file.
            x: What was scanned; of images ``[n, H, W]`` or ``[n, H, W, C]`` the worst suspects are shown, or the worst
                rows where there is no suspect.
            bounds: Of the values of images.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: ``x`` has another number of rows.
            OSError: The file cannot be written.
        """
        draw_scan(self, Path(path), x, bounds)

    def to_json(self) -> dict[str, Any]:
        """Return verdicts, the suspects and the worst rows with their reasons as numbers, strings, lists and dicts."""
        return {
            "kind": "poison_scan",
            "rows": len(self.y),
            "accused": self.accused,
            "p_value": self.p_value,
            "false_alarm_rate": self.false_alarm_rate,
            "suspects": self.suspects.tolist(),
            "methods": {
                name: {
                    "p_value": m.p_value,
                    "accused": m.accused,
                    "reason": m.reason,
                    "accused_classes": list(m.accused_classes),
                    "statistics": {str(k): v for k, v in m.statistics.items()},
                }
                for name, m in self.methods.items()
            },
            "skipped": self.skipped,
            "worst": [
                {"row": int(i), "label": int(self.y[i]), "score": float(self.scores[i]), "reason": self.reason(int(i))}
                for i in self.ranking[:WORST]
            ],
        }


_WORDS = {  # the score above which a method speaks, and what it says
    "class_mixture": (0.5, "in the odd part of its class by features (probability {score:.0%})"),
    "telling_values": (3.0, "holds values that by themselves tell its label (log odds {score:.0f})"),
    "input_knn": (0.0, "inputs near it bear another label (by {score:.0%} of them)"),
    "deep_knn": (0.0, "features near it bear another label (by {score:.0%} of them)"),
    "label_noise": (0.0, "another label is likelier (log odds {score:.1f})"),
}
_TAILS = {
    "spectral_signatures": "its spectral signature",
    "spectre": "its distance from its class after robust whitening",
    "self_influence": "its pull on the last layer",
}


def scan(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    num_classes: int | None = None,
    layer: str | None = None,
    trusted: tuple[Any, Any] | None = None,
    methods: Sequence[str] | None = None,
    expected_rate: float | None = None,
    false_alarm_rate: float = 0.01,
    natural_noise: float = 0.005,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> ScanReport:
    """Scan the data that a model was trained on for poison: backdoors, and wrong labels.

    Rows are ranked by all methods together. Whether the set is poisoned at all is judged by three:

    - ``class_mixture`` and ``telling_values`` hold each class against the others, by a t-test of prediction with a
      Bonferroni correction. That assumes that the statistics of clean classes are like draws from one normal
      distribution, and that most classes are clean; it needs four classes of 20 rows.
    - ``label_noise`` counts labels that nearly all neighbours contradict, in the features and, where given, the inputs,
      against a binomial distribution with the rate of wrong labels that is taken for natural.
    - ``telling_values`` asks as well whether the rows of a class whose values by themselves tell its label look, but
      for those values, like rows of other classes, as where a trigger lies on them: Fisher's exact test in each class.
      That assumes that in clean classes neighbours contradict such rows no more often than others.

    With a trusted split all others but them judge as well. For ``deep_knn`` and ``input_knn`` the rates of rows whose
    neighbours contradict them are compared by Fisher's exact test, in all classes and in each. The remaining methods,
    whose statistics differ between the classes of clean data too, score a class's trusted rows among its others: if all
    come from one source, any of them may be the highest, so that the number of trusted ones among the highest is
    hypergeometric. A model knows its training rows better than others, which costs power and raises no false alarm.
    Without a trusted split these methods only rank.

    Args:
        model: A classifier in evaluation mode that was trained on the data, from ``[b, ...]`` to ``[b, c]``.
        x: Inputs ``[n, ...]``, NumPy or MLX, as the model takes them.
        y: Labels ``[n]``, integers from 0 to c - 1, as the model was trained on.
        num_classes: Number of classes, if the model's outputs are to be held against it.
        layer: Layer whose input is looked at; by default the last one. See ``penultimate_features``.
        trusted: Clean inputs and labels from the same source that the model was not trained on.
        methods: Names out of ``METHODS``; by default all that can run.
        expected_rate: Share of poison, if known, in (0, 0.5]: suspects are then the 1.5 times as many worst rows.
        false_alarm_rate: Of the verdict over all methods, on clean sets under what is assumed above.
        natural_noise: Share of wrong labels that is no reason to accuse a set.
        batch_size: Rows of a forward pass.
        seed: Of what is drawn: folds, starts, projections.
        progress: Show a bar on standard error.

    Returns:
        ScanReport: The ranking, the verdict, and reasons.

    Raises:
        TypeError: The model is no ``nn.Module``.
        ValueError: An argument has a wrong value, shape or dtype, or features or logits are not finite.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, numpy as np
        >>> from mlx_bulwark.poison import scan
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(400) % 4
        >>> x = (rng.normal(size=(400, 8)) + 6 * np.eye(8)[y]).astype(np.float32)
        >>> y[:12] = 3 - y[:12]  # wrong labels
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> report = scan(model, x, y)
        >>> report.accused, sorted(report.ranking[:12].tolist()) == list(range(12))
        (True, True)

    Source:
        B. Tran, J. Li, A. Madry, "Spectral Signatures in Backdoor Attacks", 2018; B. Chen et al., "Detecting Backdoor
        Attacks on Deep Neural Networks by Activation Clustering", 2018; N. Peri et al., "Deep k-NN Defense against
        Clean-label Data Poisoning Attacks", 2020; J. Hayase et al., "SPECTRE", 2021; C. Northcutt et al., "Confident
        Learning", 2021; G. Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent", 2020.
    """
    found = features_and_logits(model, x, layer=layer, batch_size=batch_size)
    if num_classes is not None and found.logits.shape[1] != num_classes:
        raise ValueError(f"[scan] model must return {num_classes} logits but returns {found.logits.shape[1]}")
    labels = checked_labels("scan", np.asarray(y), len(found.features))
    if len(labels) and labels.max() >= found.logits.shape[1]:
        raise ValueError(f"[scan] y must be below the model's {found.logits.shape[1]} classes but has {labels.max()}")
    held = None
    if trusted is not None:
        other = features_and_logits(model, trusted[0], layer=layer, batch_size=batch_size)
        held = other.features, np.asarray(trusted[1]), np.asarray(trusted[0]), other.logits
    return scan_features(
        found.features,
        labels,
        logits=found.logits if layer is None else None,
        inputs=np.asarray(x),
        trusted=held,
        methods=methods,
        expected_rate=expected_rate,
        false_alarm_rate=false_alarm_rate,
        natural_noise=natural_noise,
        seed=seed,
        progress=progress,
    )


def scan_features(
    features: Any,
    y: Any,
    *,
    logits: Any = None,
    inputs: Any = None,
    trusted: tuple[Any, ...] | None = None,
    methods: Sequence[str] | None = None,
    expected_rate: float | None = None,
    false_alarm_rate: float = 0.01,
    natural_noise: float = 0.005,
    seed: int = 0,
    progress: bool = False,
) -> ScanReport:
    """Scan features that are already there: of any model, or the raw columns of a table.

    Args:
        features: Float ``[n, d]``.
        y: Labels ``[n]``, integers >= 0.
        logits: Float ``[n, c]``, what the layer after the features returned; without, ``self_influence`` does not run.
        inputs: Numbers ``[n, ...]``, what the model was given; without, and where they are integers that may be
            tokens, ``input_knn`` and ``telling_values`` do not run.
        trusted: Features and labels of clean rows, then their inputs where ``inputs`` are given, then their logits.
        methods: As for ``scan``.
        expected_rate: As for ``scan``.
        false_alarm_rate: As for ``scan``.
        natural_noise: As for ``scan``.
        seed: As for ``scan``.
        progress: As for ``scan``.

    Returns:
        ScanReport: The ranking, the verdict, and reasons.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype, or is not finite.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison import scan_features
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(400) % 4
        >>> report = scan_features(rng.normal(size=(400, 8)) + 6 * np.eye(8)[y], y)
        >>> report.accused, report.suspects.tolist(), sorted(report.skipped)
        (False, [], ['input_knn', 'self_influence', 'telling_values'])

    Source:
        As ``scan``.
    """
    features, y = checked("scan", features, y)
    _check_options(methods, expected_rate, false_alarm_rate, natural_noise, seed)
    data = _Data(features, y, logits, inputs, trusted, seed)
    wanted = METHODS if methods is None else tuple(dict.fromkeys(methods))
    skipped = {name: why for name in wanted if (why := data.missing(name))}
    usable = [name for name in wanted if name not in skipped]
    with tqdm(usable, desc="Scanning", unit="method", disable=not progress, file=sys.stderr) as bar:
        found = {name: data.detect(name) for name in bar}
    verdicts = {name: v for name in found if (v := _verdict(name, found, data, natural_noise)) is not None}
    level = false_alarm_rate / max(len(verdicts), 1)
    results = {name: _result(name, found[name], verdicts.get(name), level) for name in found}
    p_value = min(1.0, len(verdicts) * min(v.p_value for v in verdicts.values())) if verdicts else None
    scores, parts = _combined(found, y)
    ranking = np.argsort(-scores, kind="stable")
    accused = p_value is not None and p_value <= false_alarm_rate
    if expected_rate is not None:
        suspects = ranking[: math.ceil(1.5 * expected_rate * len(y) - 1e-9)]
    else:
        blamed = _blamed(results, parts, y) if accused else np.zeros(len(y), bool)
        suspects = ranking[blamed[ranking]]
    return ScanReport(ranking, scores, p_value, accused, suspects, results, skipped, y, false_alarm_rate)


@dataclass
class _Verdict:
    p_value: float
    by_class: dict[int, float]
    words: str


class _Data:
    """What the methods look at, and what they found of it."""

    def __init__(self, features: Array, y: Array, logits: Any, inputs: Any, trusted: Any, seed: int) -> None:
        self.features, self.y, self.logits, self.seed = features, y, logits, seed
        self.inputs, self.no_inputs = _usable_inputs(inputs, len(y))
        self.trusted: tuple[Array, Array] | None = None
        self.trusted_inputs: Array | None = None
        self.trusted_logits: Any = None
        if trusted is not None:
            self.trusted = checked("scan", *trusted[:2])
            if self.trusted[0].shape[1] != features.shape[1]:
                raise ValueError(
                    f"[scan] trusted features must have {features.shape[1]} columns but have {self.trusted[0].shape[1]}"
                )
            if len(trusted) > 2 and self.inputs is not None:
                self.trusted_inputs = input_rows("scan", trusted[2])
            if len(trusted) > 3 and logits is not None:
                self.trusted_logits = trusted[3]
        self.found: dict[str, Detection] = {}
        self._makers: dict[str, Callable[[], Detection]] = {
            "spectral_signatures": lambda: spectral_signatures(features, y),
            "activation_clustering": lambda: activation_clustering(features, y, seed=seed).detection,
            "deep_knn": lambda: deep_knn(features, y),
            "spectre": lambda: spectre(features, y, seed=seed),
            "label_noise": lambda: label_noise(cross_fitted(features, y, seed=seed), y).detection,
            "self_influence": lambda: self_influence(features, logits, y),
            "input_knn": lambda: deep_knn(self.input_components(), y, k=10),
            "telling_values": lambda: telling_values(self.inputs, y),
            "class_mixture": lambda: class_mixture(features, self.views(), y).detection,
        }

    def missing(self, name: str) -> str | None:
        if name in OF_LOGITS and self.logits is None:
            return "needs the logits of the layer that the features are given to"
        if name in OF_INPUTS and self.inputs is None:
            return self.no_inputs
        return None

    def detect(self, name: str) -> Detection:
        if name not in self.found:
            self.found[name] = self._makers[name]()
        return self.found[name]

    def input_components(self, trusted: bool = False) -> Array:
        """Principal components of the inputs, with those of the trusted ones behind them."""
        assert self.inputs is not None
        own = input_rows("scan", self.inputs)
        together = trusted and self.trusted_inputs is not None
        return self._components(np.concatenate([own, self.trusted_inputs]) if together else own)

    def contradicted_without(self, marked: Array) -> Array:
        """Which rows neighbours contradict, by the columns that do not tell the label of the marked rows."""
        columns = telling_columns(self.inputs, self.y, marked)
        components = self._components(input_rows("scan", self.inputs)[:, ~columns])
        if not components.shape[1]:
            return np.zeros(len(self.y), bool)
        contradicted: Array = deep_knn(components, self.y, k=10).scores > 0
        return contradicted

    def _components(self, rows: Array) -> Array:
        """Of many columns those of a random projection, which keeps distances."""
        if rows.shape[1] > MOST_INPUT_COLUMNS:
            shape = rows.shape[1], MOST_INPUT_COLUMNS
            rows = rows @ (np.random.default_rng(self.seed).normal(size=shape) / math.sqrt(MOST_INPUT_COLUMNS))
        return principal(rows, INPUT_COMPONENTS) if len(rows) else rows

    def views(self) -> Array:
        """Signs that a row is odd which the model has not learned, about 1 where one is sure."""
        if self.inputs is None:
            return self.detect("deep_knn").scores[:, None]
        telling = np.clip(_told(self.detect("telling_values"), self.y) - 0.5, -1, 2)
        return np.stack([self.detect("input_knn").scores, telling], axis=1)


def _usable_inputs(inputs: Any, rows: int) -> tuple[Any, str]:
    if inputs is None:
        return None, "needs the inputs"
    inputs = np.asarray(inputs)
    if inputs.dtype.kind not in "fbu" and inputs.ndim < 3:
        return None, f"inputs of dtype {inputs.dtype} may be tokens, whose order means nothing"
    if inputs.dtype.kind not in "biuf" or inputs.ndim < 2 or len(inputs) != rows:
        raise ValueError(
            f"[scan] inputs must be {rows} rows of numbers but have {inputs.dtype} of shape {list(inputs.shape)}"
        )
    return inputs, ""


def _told(detection: Detection, y: Array) -> Array:
    """Logarithm of how far telling values exceed what is natural in this set, at least 1 in log odds."""
    natural = [float(np.quantile(detection.scores[rows], 0.99)) for _, rows in by_class(y)]
    level = max(1.0, float(np.median(natural))) if natural else 1.0
    logs: Array = np.log(np.maximum(detection.scores, 1e-9) / level)
    return logs


def _marked(detection: Detection, y: Array) -> Array:
    """Telling values as a part of the combined score: -1 where they are natural, 1 and more where they are not."""
    marked: Array = 2 * np.clip(_told(detection, y) - 1, 0, 3) - 1
    return marked


def _combined(found: dict[str, Detection], y: Array) -> tuple[Array, dict[str, Array]]:
    """The largest of what three methods say, each about 1 where it is sure, and a little of the others."""
    parts: dict[str, Array] = {}
    if "deep_knn" in found:
        parts["label_noise"] = found["deep_knn"].scores
    elif "label_noise" in found:
        parts["label_noise"] = np.tanh(found["label_noise"].scores / 4)
    if "class_mixture" in found:
        parts["class_mixture"] = 2 * found["class_mixture"].scores * _excess(found["class_mixture"], y) - 1
    if "telling_values" in found:
        parts["telling_values"] = _marked(found["telling_values"], y)
    scores = np.maximum.reduce(list(parts.values())) if parts else np.zeros(len(y))
    led = "input_knn" if "input_knn" in found else "spectre"  # without inputs it sees most of a backdoor
    if led == "input_knn":
        scores = scores + 0.5 * found["input_knn"].scores
    elif led in found:
        scores = np.maximum(scores, 0) + 0.5 * _ranks(found[led].scores)
    tails = [_ranks(found[name].scores) for name in found if name not in parts and name != led]
    if tails:
        scores = scores + (0.05 if parts else 1.0) * np.mean(tails, axis=0)
    return scores, parts


def _ranks(scores: Array) -> Array:
    ranks: Array = (stats.rankdata(scores) / len(scores)) if len(scores) else scores
    return ranks


def _excess(detection: Detection, y: Array) -> Array:
    """Of each row's class: how far its statistic exceeds that of most classes, 0 to 1."""
    excess = np.zeros(int(y.max(initial=-1)) + 1)
    middle = float(np.median(list(detection.statistics.values()))) if detection.statistics else 0.0
    if len(detection.statistics) < LEAST_CLASSES:
        middle = 0.5  # what clean classes have, for want of others
    for label, value in detection.statistics.items():
        excess[label] = np.clip((value - middle - 0.1) / 0.35, 0, 1)
    rows: Array = excess[y]
    return rows


def _verdict(name: str, found: dict[str, Detection], data: _Data, natural_noise: float) -> _Verdict | None:
    if name == "label_noise":
        return _wrong_labels(data, natural_noise)
    if name == "class_mixture":
        return _among_classes(found[name].statistics, LEAST_SPREAD[name])
    if name == "telling_values":
        return _telling(found[name], data)
    if data.trusted is not None and name in ("deep_knn", "input_knn"):
        return _beside_trusted(name, data)
    if data.trusted is not None and name in BESIDE_TRUSTED:
        return _among_trusted(name, data)
    return None


def _wrong_labels(data: _Data, natural_noise: float) -> _Verdict:
    wrong = data.detect("deep_knn").scores >= SURE
    if data.inputs is not None:
        wrong = wrong & (data.detect("input_knn").scores >= SURE)
    p_value = float(stats.binom.sf(wrong.sum() - 1, len(wrong), natural_noise))
    share = wrong.mean() if len(wrong) else 0.0
    words = (
        f"{int(wrong.sum()):,} labels ({share:.2%}) that nearly all neighbours contradict; "
        f"{natural_noise:.2%} are taken for natural"
    )
    return _Verdict(p_value, {}, words)


def _telling(detection: Detection, data: _Data) -> _Verdict | None:
    """Both tests of values that tell the label, with a Bonferroni correction."""
    tests = _among_classes(detection.statistics, LEAST_SPREAD["telling_values"]), _marked_strangers(detection, data)
    held = [test for test in tests if test is not None]
    if not held:
        return None
    labels = {label for test in held for label in test.by_class}
    by_class = {c: min(1.0, len(held) * min(test.by_class.get(c, 1.0) for test in held)) for c in labels}
    least = min(held, key=lambda test: test.p_value)
    return _Verdict(min(1.0, len(held) * least.p_value), by_class, least.words)


def _marked_strangers(detection: Detection, data: _Data) -> _Verdict | None:
    """Are the rows whose values tell the label strangers in its class by all other values? Fisher's exact tests."""
    marked = _marked(detection, data.y) > 0
    p_values, words = {}, {}
    for label, rows in by_class(data.y):
        m = marked[rows]
        if m.sum() < LEAST_COUNT:
            p_values[label] = 1.0
            continue
        c = data.contradicted_without(rows[m])[rows]
        counts = [[int((m & c).sum()), int((m & ~c).sum())], [int((~m & c).sum()), int((~m & ~c).sum())]]
        p_values[label] = float(stats.fisher_exact(counts, alternative="greater")[1])
        words[label] = (
            f"without the values that tell class {label}, neighbours contradict {counts[0][0]} of the {m.sum()} rows "
            f"that hold them, and {counts[1][0]} of its {(~m).sum()} others"
        )
    if not p_values:
        return None
    worst = min(p_values, key=lambda label: (p_values[label], label not in words))
    corrected = {label: min(1.0, p * len(p_values)) for label, p in p_values.items()}
    return _Verdict(corrected[worst], corrected, words.get(worst, "no class has rows whose values tell its label"))


def _among_classes(statistics: dict[int, float], spread: float) -> _Verdict | None:
    """Is one class far above the others? A t-test of prediction for each."""
    if len(statistics) < LEAST_CLASSES:
        return None
    p_values = {}
    for label, value in statistics.items():
        others = np.array([v for other, v in statistics.items() if other != label])
        p_values[label] = outlier_p_value(value, others, spread)
    worst = min(p_values, key=lambda label: p_values[label])
    middle = float(np.median(list(statistics.values())))
    words = f"class {worst} stands out most: {statistics[worst]:.2f}, the median class {middle:.2f}"
    return _Verdict(p_values[worst], p_values, words)


def _beside_trusted(name: str, data: _Data) -> _Verdict | None:
    """Are there more rows whose neighbours contradict them than in the trusted split? Fisher's exact tests."""
    assert data.trusted is not None
    own, other, k = data.features, data.trusted[0], 20
    if name == "input_knn":
        if data.trusted_inputs is None:
            return None
        both, k = data.input_components(trusted=True), 10
        own, other = both[: len(data.y)], both[len(data.y) :]
    labels = data.trusted[1]
    if not len(labels) or not len(own):
        return None
    contradicted = _contradicted(own, data.y, other, labels, k)
    p_values = {}
    for label in (None, *np.unique(labels).tolist()):
        rows = [np.ones(len(a), bool) if label is None else a == label for a in (data.y, labels)]
        counts = [[int(c[r].sum()), int((~c[r]).sum())] for c, r in zip(contradicted, rows, strict=True)]
        p_values[label] = float(stats.fisher_exact(counts, alternative="greater")[1]) if sum(counts[0]) else 1.0
    tests = len(p_values)
    corrected = {label: min(1.0, tests * p) for label, p in p_values.items()}
    rates = [float(c.mean()) for c in contradicted]
    words = f"neighbours contradict {rates[0]:.2%} of the rows, {rates[1]:.2%} of the trusted ones"
    return _Verdict(min(corrected.values()), {c: p for c, p in corrected.items() if c is not None}, words)


def _among_trusted(name: str, data: _Data) -> _Verdict | None:
    """Do the highest scores of a class spare its trusted rows? A hypergeometric test for each class and share."""
    assert data.trusted is not None
    if name == "self_influence" and data.trusted_logits is None:
        return None
    features, y = (np.concatenate(pair) for pair in zip((data.features, data.y), data.trusted, strict=True))
    logits = None if data.trusted_logits is None else np.concatenate([data.logits, data.trusted_logits])
    together = _Data(features, y, logits, None, None, data.seed)
    scores, trusted = together.detect(name).scores, np.arange(len(together.y)) >= len(data.y)
    p_values, spared = {}, {}
    for label, rows in by_class(together.y):
        held = trusted[rows]
        if not held.any() or held.all():
            continue
        order = held[np.lexsort((~held, -scores[rows]))]  # a trusted row goes before its equals: no false alarm
        tops = [max(1, round(share * len(order))) for share in TOP_SHARES]
        tests = [float(stats.hypergeom.cdf(order[:top].sum(), len(order), held.sum(), top)) for top in tops]
        p_values[label], spared[label] = min(tests) * len(tests), float(order[: tops[2]].mean() / held.mean())
    if not p_values:
        return None
    corrected = {label: min(1.0, p * len(p_values)) for label, p in p_values.items()}
    worst = min(corrected, key=lambda label: corrected[label])
    words = (
        f"class {worst} stands out most: its highest {TOP_SHARES[2]:.0%} hold {spared[worst]:.0%} of the trusted rows "
        "that are due to them"
    )
    return _Verdict(corrected[worst], corrected, words)


def _contradicted(own: Array, y: Array, other: Array, labels: Array, k: int) -> list[Array]:
    """Which rows of each side are outvoted by their neighbours among the rows that are scanned."""
    found = []
    for rows, given, itself in ((own, y, True), (other, labels, False)):
        shares = shares_among(rows, own, y, k, itself=itself)
        wide = np.zeros((len(rows), max(shares.shape[1], int(given.max(initial=0)) + 1)))
        wide[:, : shares.shape[1]] = shares
        mine = wide[np.arange(len(rows)), given]
        wide[np.arange(len(rows)), given] = 0
        found.append(wide.max(axis=1) > mine)
    return found


def _result(name: str, detection: Detection, verdict: _Verdict | None, level: float) -> MethodResult:
    if verdict is None:
        if name == "class_mixture":
            why = f"fewer than {LEAST_CLASSES} classes have enough rows to hold one against the others"
        elif name == "telling_values":
            why = "no class has enough rows"
        elif name in ("deep_knn", "input_knn"):
            why = "no trusted split to compare to"
        else:
            why = "clean classes differ in it as well: without trusted rows it accuses nobody"
        return MethodResult(detection.scores, None, False, why, detection.statistics)
    classes = tuple(sorted(label for label, p in verdict.by_class.items() if p <= level))
    return MethodResult(
        detection.scores, verdict.p_value, verdict.p_value <= level, verdict.words, detection.statistics, classes
    )


def _blamed(results: dict[str, MethodResult], parts: dict[str, Array], y: Array) -> Array:
    """Rows that the methods which accuse the set blame."""
    blamed = np.zeros(len(y), bool)
    for name, result in results.items():
        if not result.accused:
            continue
        inside = np.isin(y, result.accused_classes)
        if name == "class_mixture":
            blamed |= inside & (result.scores > 0.5)
        elif name in BESIDE_TRUSTED:
            for label in result.accused_classes:
                own = y == label
                blamed |= own & (result.scores >= np.quantile(result.scores[own], 1 - TOP_SHARES[1]))
        elif name == "telling_values":
            blamed |= inside & (parts[name] > 0)
        else:
            blamed |= parts.get("label_noise", result.scores) > 0
    return blamed


def _check_options(methods: Any, expected_rate: Any, false_alarm_rate: Any, natural_noise: Any, seed: Any) -> None:
    unknown = sorted(set(methods or ()) - set(METHODS))
    if isinstance(methods, str) or unknown or (methods is not None and not len(methods)):
        raise ValueError(f"[scan] methods must be some of {', '.join(METHODS)} but are {methods!r}")
    if expected_rate is not None and not 0 < expected_rate <= 0.5:
        raise ValueError(f"[scan] expected_rate must be above 0 and at most 0.5 but is {expected_rate}")
    for name, value in (("false_alarm_rate", false_alarm_rate), ("natural_noise", natural_noise)):
        if not 0 < value < 1:
            raise ValueError(f"[scan] {name} must be above 0 and below 1 but is {value}")
    check_count("scan", "seed", seed + 1)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
