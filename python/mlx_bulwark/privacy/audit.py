"""What an attacker can prove about a private training run: canaries, and a lower confidence bound on epsilon."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from .gradients import LossFunction
from .one_run import GuessBound, Guesses, check_probability, one_run_bounds, plan_guesses

if TYPE_CHECKING:
    from .engine import PrivacyEngine

Vector = np.ndarray[Any, Any]
Arrays = tuple[Any, ...]
TrainingFunction = Callable[[Arrays], tuple[nn.Module, "PrivacyEngine | None"]]

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
LEARNING_RATE = 1e-3
GRADIENT_NORM = 10.0  # of a Dirac canary, over the clipping norm: a clip that is missing shows as well


@dataclass(frozen=True)
class AttackPoint:
    """How many members an attack finds at a false-positive rate.

    Attributes:
        false_positive_rate: share of the excluded canaries that may be taken for members.
        true_positive_rate: share of the included canaries that are found.
        low: lower end of the Clopper-Pearson interval of the true-positive rate.
        high: upper end.
    """

    false_positive_rate: float
    true_positive_rate: float
    low: float
    high: float


@dataclass(frozen=True)
class MembershipAttack:
    """A membership-inference attack on the canaries of one run.

    Attributes:
        method: ``"dirac"``, ``"loss"`` or ``"likelihood ratio"``.
        auc: area under its ROC curve; 0.5 is chance.
        points: true-positive rates at low false-positive rates.
        epsilon: lower bound on epsilon by Clopper-Pearson on a half of the canaries that did not choose the threshold.
            Its confidence supposes that canaries of one run are independent trials; `AuditReport.epsilon` does not.
    """

    method: str
    auc: float
    points: list[AttackPoint]
    epsilon: float


@dataclass(frozen=True)
class AuditReport:
    """What one audit found. Depends on the canaries alone, and on real examples only through the trained model.

    Attributes:
        epsilon: lower bound on epsilon that holds with probability ``confidence``.
        accounted_epsilon: upper bound by the accountant; ``inf`` where nothing is accounted.
        delta: delta of both.
        confidence: of the lower bound.
        canaries: number of canaries, each included by a fair coin of its own.
        ceiling: the largest lower bound that so many canaries could show.
        bounds: the bound for each number of guesses that was planned; ``epsilon`` is the largest.
        attack: the membership-inference attack on the same scores.
        scores: score of each canary, high for those that seem to have taken part.
        included: which canaries took part.
    """

    epsilon: float
    accounted_epsilon: float
    delta: float
    confidence: float
    canaries: int
    ceiling: float
    bounds: list[GuessBound]
    attack: MembershipAttack
    scores: Vector
    included: Vector

    @property
    def violated(self) -> bool:
        """Whether the accounted epsilon is refuted: the lower bound is above it."""
        return self.epsilon > self.accounted_epsilon

    def __repr__(self) -> str:
        return f"AuditReport({self.epsilon:.3g} <= epsilon <= {self.accounted_epsilon:.3g}, violated={self.violated})"

    def __str__(self) -> str:
        percent = f"{100 * self.confidence:g} %"
        best = max(self.bounds, key=lambda bound: bound.epsilon)
        lines = [
            f"lower bound   epsilon >= {self.epsilon:.2f} with {percent} confidence at delta {self.delta:g}: "
            f"{best.correct} of {best.guesses} guesses right, {self.canaries} canaries",
            f"accounted     epsilon <= {self.accounted_epsilon:.2f}",
            f"attack        {self.attack.method}: AUC {self.attack.auc:.3f}, "
            + ", ".join(
                f"TPR {100 * p.true_positive_rate:.1f} % [{100 * p.low:.1f}, {100 * p.high:.1f}] at FPR "
                f"{100 * p.false_positive_rate:g} %"
                for p in self.attack.points
            ),
            f"              epsilon >= {self.attack.epsilon:.2f} if the canaries were independent trials",
            f"verdict       {self._verdict(percent)}",
        ]
        return "\n".join(lines)

    def _verdict(self, percent: str) -> str:
        if self.violated:
            return (
                "REFUTED. This training leaks more than its accounted epsilon allows: noise, clipping, sampling or "
                f"accounting is wrong. A correct one is refuted in at most {100 - 100 * self.confidence:g} % of audits."
            )
        text = (
            "not refuted. The lower bound is what this attack could prove, not an estimate of epsilon: a stronger "
            "attack may prove more, and never more than a correct accountant allows."
        )
        if self.ceiling < self.accounted_epsilon:
            text += (
                f" {self.canaries} canaries can prove {self.ceiling:.2f} at most, less than the accounted epsilon: "
                "no fault whatever could have been found by them; use more, or audit at a smaller epsilon."
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values for JSON: infinity becomes None, arrays become lists.

        Returns:
            A dictionary.

        Example:
            >>> import mlx_bulwark as bw
            >>> from mlx_bulwark.privacy import audit_engine
            >>> engine = bw.PrivacyEngine(50, sample_rate=1.0, noise_multiplier=2.0, max_grad_norm=1.0, delta=1e-5)
            >>> audit_engine(engine, canaries=50, steps=1, progress=False).to_dict()["canaries"]
            50
        """
        values = dataclasses.asdict(self)
        values["scores"] = [float(s) for s in self.scores]
        values["included"] = [bool(b) for b in self.included]
        values["violated"] = self.violated
        values["kind"] = "privacy_audit"
        return cast("dict[str, Any]", _finite(values))

    def write_json(self, path: Path | str) -> None:
        """Write all figures to a JSON file.

        Args:
            path: the file.

        Example:
            >>> import os, tempfile, mlx_bulwark as bw
            >>> from mlx_bulwark.privacy import audit_engine
            >>> engine = bw.PrivacyEngine(50, sample_rate=1.0, noise_multiplier=2.0, max_grad_norm=1.0, delta=1e-5)
            >>> report = audit_engine(engine, canaries=50, steps=1, progress=False)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report.write_json(os.path.join(folder, "audit.json"))
            ...     os.listdir(folder)
            ['audit.json']
        """
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def plot(self, path: Path | str) -> None:
        """Draw the scores of included and excluded canaries, and the bound over the number of guesses.

        Args:
            path: the PNG file.

        Raises:
            ImportError: matplotlib is missing.

        Example:
            >>> import os, tempfile, mlx_bulwark as bw
            >>> from mlx_bulwark.privacy import audit_engine
            >>> engine = bw.PrivacyEngine(50, sample_rate=1.0, noise_multiplier=2.0, max_grad_norm=1.0, delta=1e-5)
            >>> report = audit_engine(engine, canaries=50, steps=1, progress=False)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report.plot(os.path.join(folder, "audit.png"))
            ...     os.listdir(folder)
            ['audit.png']
        """
        from .audit_plot import draw

        draw(self, Path(path))


def audit_engine(
    engine: "PrivacyEngine",
    model: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    data: Any = None,
    *,
    canaries: int = 1000,
    steps: int | None = None,
    delta: float | None = None,
    confidence: float = 0.95,
    guesses: Guesses = None,
    compiled: bool = True,
    seed: int | None = None,
    progress: bool = True,
) -> AuditReport:
    """Audit an engine white-box, with canaries whose gradients are one-hot.

    Each canary is an example whose gradient is ten clipping norms in a parameter of its own, which clipping makes one.
    A fair coin includes it or leaves it out of the whole run. The run goes through ``engine.batches``,
    ``value_and_grad`` or ``compiled_step`` and ``wrap``, like any training; the attacker sees where the canaries'
    parameters end up. This is the strongest attack on a Gaussian mechanism, so what it cannot find is small; but it
    tests the engine with these settings, and no loss function or layer of yours that it is not given.

    Args:
        engine: a fresh engine with the settings to be audited; the audit spends its steps.
        model: a model to be trained beside the canaries, clipped and noised together with them. The audit changes it.
        loss_fn: its loss, as for ``engine.value_and_grad``.
        data: its examples, an array or a tuple of arrays. ``engine.dataset_size`` must be at least examples plus
            canaries; what is left are rows that never take part.
        canaries: number m of canaries. They can prove an epsilon of about log(m / 6) at the most, and less
            where m * delta is not small: the report's ceiling.
        steps: number of optimizer steps; default: the engine's planned ones.
        delta: delta of the guarantee; default: the engine's.
        confidence: probability with which the lower bound holds.
        guesses: number of canaries to guess about, one half as included, the other as not; or a pair of both numbers;
            chosen before the run. Default: 0.9 m, m/2, m/4, ... m/64, each with a seventh of the allowed error.
        compiled: train by ``engine.compiled_step``, else by ``value_and_grad`` and ``update``.
        seed: of the coins. Default: fresh ones from the operating system.
        progress: show a progress bar on a terminal.

    Returns:
        The report.

    Raises:
        ValueError: an argument is out of range, the engine was used before, or delta is not known.

    Example:
        >>> import mlx_bulwark as bw
        >>> from mlx_bulwark.privacy import audit_engine
        >>> engine = bw.PrivacyEngine.for_epsilon(8, 1e-5, 1000, steps=1, sample_rate=1.0, max_grad_norm=1.0)
        >>> report = audit_engine(engine, canaries=1000, progress=False)
        >>> 0 < report.epsilon < report.accounted_epsilon <= 8
        True

    Source:
        Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846); Dirac canaries: Nasr et al. 2023 (arXiv:2302.07956).
    """
    if steps is None and engine.planned_steps is not None:
        steps = engine.planned_steps
    if engine.steps > 0 or steps is None or steps < 1:
        raise ValueError(
            "[audit_engine] engine must be fresh, and steps given here or to it, but it has made "
            f"{engine.steps} and steps is {steps}"
        )
    if engine.max_grad_norm == math.inf:
        raise ValueError("[audit_engine] engine must clip but has max_grad_norm inf")
    delta = _delta("audit_engine", delta, engine)
    _check_plan("audit_engine", canaries, delta, confidence, guesses)
    included = _coins(np.random.default_rng(seed), canaries)
    audited = _Audited(model, loss_fn, canaries, GRADIENT_NORM * engine.max_grad_norm)
    rows = _rows_beside_canaries(engine.dataset_size, included, data)
    optimizer = engine.wrap(optim.SGD(LEARNING_RATE))
    compiled_step = engine.compiled_step(audited, optimizer, audited.losses) if compiled else None
    loss_and_grad = engine.value_and_grad(audited, audited.losses)
    with tqdm(total=steps, desc="audit", unit="step", disable=None if progress else True) as bar:
        for batch in engine.batches(rows, steps=steps):
            # An excluded canary is drawn like any example and contributes nothing: as if it were not there.
            batch = dataclasses.replace(batch, mask=batch.mask & batch.data[0])
            if compiled_step is not None:
                mx.eval(compiled_step(batch))
            else:
                _, gradients = loss_and_grad(audited, batch)
                optimizer.update(audited, gradients)
            mx.eval(audited.state, optimizer.state, engine.state)
            bar.update(int(batch.last))
    moved = -np.array(audited.canaries.weight).ravel().astype(np.float64)
    step_length = LEARNING_RATE * engine.max_grad_norm / engine.expected_batch_size
    scores = moved / (step_length * engine.sample_rate * steps)  # about 1 where included, 0 where not
    return _report("dirac", scores, included, engine.epsilon(delta), delta, confidence, guesses)


def audit_privacy(
    train: TrainingFunction,
    data: Any,
    canaries: Any,
    loss_fn: LossFunction,
    *,
    delta: float | None = None,
    confidence: float = 0.95,
    guesses: Guesses = None,
    shadow_models: int = 0,
    seed: int | None = None,
    progress: bool = True,
) -> AuditReport:
    """Audit a training function of your own black-box: canary examples in the data, their losses under the model.

    A fair coin includes each canary in the data or leaves it out; then ``train`` runs once, as it would without an
    audit. The attacker sees the losses of all canaries under the trained model. The bound tells what such an attacker
    can prove: choose canaries that are learned one by one and by heart, such as examples with wrong labels.

    Args:
        train: called with a tuple of arrays, the data and the included canaries in random order; returns the trained
            model and its engine, or None in its place if the training is not private.
        data: the examples, an array or a tuple of arrays.
        canaries: m further examples in the same form.
        loss_fn: ``loss_fn(model, *arrays)``, one loss an example, [B].
        delta: delta of the guarantee; default: the engine's.
        confidence: probability with which the lower bound holds.
        guesses: number of canaries to guess about, one half as included, the other as not; or a pair of both numbers;
            chosen before the run. Default: 0.9 m, m/2, m/4, ... m/64, each with a seventh of the allowed error.
        shadow_models: even number of further trainings, whose losses tell the attacker what to expect of each canary
            included and excluded. 0: the loss alone.
        seed: of coins and order. Default: fresh ones from the operating system.
        progress: show a progress bar on a terminal.

    Returns:
        The report.

    Raises:
        ValueError: an argument is out of range, losses are not finite, or delta is not known.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim, mlx_bulwark as bw, numpy as np
        >>> from mlx_bulwark.privacy import audit_privacy
        >>> def loss_fn(model, x, y):
        ...     return nn.losses.cross_entropy(model(x), y, reduction="none")
        >>> def train(data):
        ...     engine = bw.PrivacyEngine(len(data[0]), batch_size=20, noise_multiplier=1.0, max_grad_norm=1.0, steps=5)
        ...     model, optimizer = nn.Linear(8, 2), engine.wrap(optim.SGD(0.5))
        ...     step = engine.compiled_step(model, optimizer, loss_fn)
        ...     for batch in engine.batches(data):
        ...         mx.eval(step(batch), model.state, optimizer.state, engine.state)
        ...     return model, engine
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.standard_normal((300, 8)).astype(np.float32), rng.integers(0, 2, 300)
        >>> report = audit_privacy(train, (x[:200], y[:200]), (x[200:], y[200:]), loss_fn, delta=1e-5, progress=False)
        >>> report.violated
        False

    Source:
        Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846); likelihood ratios from shadow models: Carlini et al. 2022
        (arXiv:2112.03570).
    """
    real, planted = _numpy("data", data), _numpy("canaries", canaries)
    if len(real) != len(planted) or any(a.shape[1:] != b.shape[1:] for a, b in zip(real, planted, strict=False)):
        raise ValueError("[audit_privacy] canaries must have the form of data but has other arrays or shapes")
    if shadow_models < 0 or shadow_models % 2:
        raise ValueError(f"[audit_privacy] shadow_models must be even and at least 0 but is {shadow_models}")
    m = len(planted[0])
    _check_plan("audit_privacy", m, 0.5 if delta is None else delta, confidence, guesses)
    rng = np.random.default_rng(seed)
    included = _coins(rng, m)
    shadows = [half for _ in range(shadow_models // 2) for coins in [_coins(rng, m)] for half in (coins, ~coins)]
    losses = []
    engine = None
    runs = tqdm([included, *shadows], "trainings", disable=None if progress and shadows else True)
    for i, coins in enumerate(runs):
        model, trained_by = train(_shuffled(rng, real, [a[coins] for a in planted]))
        losses.append(_losses(model, loss_fn, planted))
        engine = trained_by if i == 0 else engine
    delta = _delta("audit_privacy", delta, engine)
    accounted = math.inf if engine is None else engine.epsilon(delta)
    method = "likelihood ratio" if shadows else "loss"
    scores = _likelihood_ratios(losses[0], losses[1:], shadows) if shadows else -losses[0]
    return _report(method, scores, included, accounted, delta, confidence, guesses)


class _Audited(nn.Module):
    """A model beside a table with one parameter for each canary."""

    def __init__(self, model: nn.Module | None, loss_fn: LossFunction | None, canaries: int, norm: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if (model is None) != (loss_fn is None):
            raise ValueError("[audit_engine] model and loss_fn must be given together but one is missing")
        self.canaries = nn.Embedding(canaries, 1)
        self.canaries.weight = mx.zeros((canaries, 1))
        self.model = model
        self._norm, self._loss_fn = norm, loss_fn

    def losses(self, _: nn.Module, takes_part: mx.array, canary: mx.array, *data: mx.array) -> mx.array:
        """Losses [B]: of the canary where the row is one (0, 1, ...), else of the model (-1)."""
        planted = self._norm * self.canaries(mx.maximum(canary, 0))[:, 0]
        own = mx.zeros(planted.shape) if self._loss_fn is None else self._loss_fn(self.model, *data)
        return mx.where(canary >= 0, planted, own)


def _rows_beside_canaries(size: int, included: Vector, data: Any) -> Arrays:
    """Rows of the engine's data set: whether they take part, their canary or -1, and the model's own arrays."""
    own = () if data is None else _numpy("data", data)
    m, n = len(included), len(own[0]) if own else 0
    if size < m + n:
        raise ValueError(
            f"[audit_engine] engine must have a dataset_size of at least {m + n}, canaries and examples, but has {size}"
        )
    takes_part = np.concatenate([included, np.arange(size - m) < n])
    canary = np.concatenate([np.arange(m), np.full(size - m, -1)]).astype(np.int32)
    # A canary's row needs data of the right shape, which its loss does not look at.
    rows = np.concatenate([np.zeros(m, np.int64), np.arange(n), np.zeros(size - m - n, np.int64)])
    return (takes_part, canary, *(a[rows] for a in own))


def _report(
    method: str,
    scores: Vector,
    included: Vector,
    accounted: float,
    delta: float,
    confidence: float,
    guesses: Guesses,
) -> AuditReport:
    if not np.isfinite(scores).all():
        raise ValueError(
            f"[audit] scores must be finite but {int((~np.isfinite(scores)).sum())} of {len(scores)} are not: "
            "the training diverged"
        )
    bounds = one_run_bounds(scores, included, delta, confidence, guesses)
    return AuditReport(
        epsilon=max(bound.epsilon for bound in bounds),
        accounted_epsilon=accounted,
        delta=delta,
        confidence=confidence,
        canaries=len(scores),
        ceiling=max(bound.ceiling for bound in bounds),
        bounds=bounds,
        attack=_attack(method, scores, included, delta, confidence),
        scores=scores,
        included=included,
    )


def _attack(method: str, scores: Vector, included: Vector, delta: float, confidence: float) -> MembershipAttack:
    from scipy.stats import rankdata

    members, others = scores[included], scores[~included]
    n, k = len(members), len(others)
    above = rankdata(scores)[included].sum() - n * (n + 1) / 2
    points = [_attack_point(members, others, rate, confidence) for rate in FALSE_POSITIVE_RATES]
    epsilon = _clopper_pearson_epsilon(scores, included, delta, confidence)
    return MembershipAttack(method, float(above / (n * k)), points, epsilon)


def _attack_point(members: Vector, others: Vector, rate: float, confidence: float) -> AttackPoint:
    allowed = math.floor(rate * len(others))
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -math.inf
    found = int((members > threshold).sum())
    low, high = _clopper_pearson(found, len(members), (1 - confidence) / 2)
    return AttackPoint(rate, found / len(members), float(low), float(high))


def _clopper_pearson_epsilon(scores: Vector, included: Vector, delta: float, confidence: float) -> float:
    """Bound from the error rates at a threshold that the even canaries choose and the odd ones test."""
    thresholds = np.quantile(scores[::2], np.linspace(0, 1, 101))
    best, bound = -1.0, 0.0
    for members_above in (True, False):
        sign = 1 if members_above else -1
        chosen, tested = (
            _rates_epsilon(sign * scores[half], included[half] == members_above, sign * thresholds, delta, confidence)
            for half in (slice(None, None, 2), slice(1, None, 2))
        )
        if chosen.max() > best:
            best, bound = float(chosen.max()), float(tested[chosen.argmax()])
    return bound


def _rates_epsilon(scores: Vector, positive: Vector, thresholds: Vector, delta: float, confidence: float) -> Vector:
    """For each threshold the bound of the attack that takes the scores above it for positive."""
    if positive.all() or not positive.any():
        return np.zeros(len(thresholds))
    above = scores > thresholds[:, None]
    level = (1 - confidence) / 2
    low = _clopper_pearson((above & positive).sum(1), positive.sum(), level)[0]
    high = _clopper_pearson((above & ~positive).sum(1), (~positive).sum(), level)[1]
    return cast(Vector, np.log(np.maximum(low - delta, high) / high))


def _clopper_pearson(found: Any, trials: Any, level: float) -> tuple[Any, Any]:
    """Bounds of a binomial probability; each is wrong with a probability of at most level."""
    from scipy.stats import beta

    low = np.where(found > 0, beta.ppf(level, np.maximum(found, 1), trials - found + 1), 0.0)
    high = np.where(found < trials, beta.ppf(1 - level, found + 1, np.maximum(trials - found, 1)), 1.0)
    return low, high


def _likelihood_ratios(losses: Vector, shadow_losses: list[Vector], shadow_coins: list[Vector]) -> Vector:
    """Log-likelihood ratio of each loss under normal laws fitted to the shadow models, with and without the canary."""
    x, shadows, coins = _log_odds(losses), _log_odds(np.stack(shadow_losses)), np.stack(shadow_coins)
    means, variances = [], []
    for side in (coins, ~coins):
        mean = (shadows * side).sum(0) / side.sum(0)
        means.append(mean)
        # One variance for all canaries: a few models cannot tell that of each (Carlini et al., section VI.B).
        variances.append(((shadows - mean) ** 2 * side).sum() / max(1, side.sum() - side.shape[1]) + 1e-12)
    (mean_in, mean_out), (var_in, var_out) = means, variances
    ratio = (x - mean_out) ** 2 / var_out - (x - mean_in) ** 2 / var_in
    return cast(Vector, ratio / 2)


def _log_odds(losses: Vector) -> Vector:
    """log(p / (1 - p)) of the likelihood p = exp(-loss), nearer to normal than the loss; the loss where it has none."""
    if (losses < 0).any():
        return -losses
    safe = np.clip(losses, 1e-12, None)
    return cast(Vector, -safe - np.log(-np.expm1(-safe)))


def _losses(model: nn.Module, loss_fn: LossFunction, arrays: Arrays, rows: int = 1024) -> Vector:
    training = model.training
    model.eval()
    parts = []
    for i in range(0, len(arrays[0]), rows):
        losses = loss_fn(model, *(mx.array(a[i : i + rows]) for a in arrays))
        parts.append(np.array(losses.astype(mx.float32)).astype(np.float64))
    model.train(training)
    return np.concatenate(parts)


def _shuffled(rng: np.random.Generator, real: Arrays, planted: list[Vector]) -> Arrays:
    order = rng.permutation(len(real[0]) + len(planted[0]))
    return tuple(np.concatenate([a, b])[order] for a, b in zip(real, planted, strict=True))


def _numpy(name: str, data: Any) -> Arrays:
    arrays = tuple(np.asarray(a) for a in (data if isinstance(data, (tuple, list)) else (data,)))
    if not arrays or len({len(a) for a in arrays}) != 1:
        raise ValueError(f"[audit] {name} must be arrays with one number of rows but has {[len(a) for a in arrays]}")
    return arrays


def _coins(rng: np.random.Generator, n: int) -> Vector:
    return rng.random(n) < 0.5


def _delta(op: str, delta: float | None, engine: "PrivacyEngine | None") -> float:
    delta = engine.delta if delta is None and engine is not None else delta
    if delta is None:
        raise ValueError(f"[{op}] delta must be given, here or to the engine")
    return delta


def _check_plan(op: str, canaries: int, delta: float, confidence: float, guesses: Guesses) -> None:
    if canaries < 10:
        raise ValueError(f"[{op}] canaries must be at least 10 but is {canaries}")
    check_probability(op, "delta", delta, zero=True)
    check_probability(op, "confidence", confidence)
    plan_guesses(canaries, guesses)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
