"""The price of privacy: the accuracy of the demo's model over epsilon."""

import io
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..privacy import Batch, Batches, PrivacyEngine
from ..privacy.accounting import ADJACENCY
from .data import DATASETS, Split, load
from .figures import _backend, _versions
from .model import accuracy
from .options import DemoOptions, OptionError
from .private import LEARNING_RATE, MAX_GRAD_NORM, _model, _plain_step, _private_step, _Record
from .progress import Stop, stoppable

NOTE = (
    "Accuracies are of held-out images and not covered by epsilon. Every training is one of its own: all of them "
    "together spend about the sum of their epsilons, so draw this curve on data that may be known."
)


@dataclass(frozen=True)
class Point:
    """Trainings at one epsilon, one for each seed."""

    epsilon: float  # spent, at most what was asked for
    noise_multiplier: float
    test_accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean test accuracy over the seeds."""
        return statistics.fmean(self.test_accuracies)


@dataclass
class UtilityCurve:
    """Test accuracy over epsilon, and that of the same model without privacy."""

    dataset: str
    delta: float
    steps: int
    batch_size: int
    seeds: tuple[int, ...]
    points: list[Point] = field(default_factory=list)
    nonprivate_test_accuracies: tuple[float, ...] = ()
    train_examples: int = 0
    test_examples: int = 0
    max_grad_norm: float = MAX_GRAD_NORM
    accountant: str = "pld"
    adjacency: str = ADJACENCY
    interrupted: bool = False
    note: str = NOTE
    backend: str = field(default_factory=lambda: _backend()[0])
    versions: dict[str, str] = field(default_factory=_versions)

    def write_json(self, path: Path) -> None:
        """Write everything as one JSON object."""
        points = [{**asdict(p), "mean_test_accuracy": p.mean} for p in self.points]
        content = {"kind": "privacy_utility", **asdict(self), "points": points}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def plot(self, path: Path) -> None:
        """Draw the curve into a PNG file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        picture = Figure(figsize=(7.5, 4.6), layout="constrained")
        FigureCanvasAgg(picture)
        axes = picture.subplots()
        for p in self.points:
            axes.plot([p.epsilon] * len(p.test_accuracies), p.test_accuracies, ".", color="#1f5fa8", alpha=0.4)
        spent, means = zip(*((p.epsilon, p.mean) for p in self.points), strict=True)
        axes.plot(spent, means, "o-", color="#1f5fa8", label="private")
        if self.nonprivate_test_accuracies:
            plain = statistics.fmean(self.nonprivate_test_accuracies)
            axes.axhline(plain, color="#8a8a8a", linestyle="--", label="without privacy")
        axes.set_title(
            f"{self.dataset}: {self.steps} steps, delta {self.delta:g}, {self.adjacency}, {len(self.seeds)} seed(s)",
            fontsize=10,
        )
        axes.set(xlabel="epsilon", ylabel="test accuracy (not covered by epsilon)", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
        data = io.BytesIO()
        picture.savefig(data, format="png", dpi=130)
        path.write_bytes(data.getvalue())


def privacy_utility(
    options: DemoOptions, epsilons: Sequence[float], seeds: int, say: Callable[[str], None]
) -> UtilityCurve:
    """Train the demo's model at each epsilon and for each seed, and once a seed without privacy.

    Args:
        options: data, delta, steps and batch size; its epsilon is not used, and its seed is the first one.
        epsilons: privacy budgets, each at most 20.
        seeds: number of splits and initial weights that are averaged over.
        say: called with each line that a person should read.

    Returns:
        The curve. Ctrl-C ends it after the trainings that are whole; ``interrupted`` tells so.

    Raises:
        OptionError: an option cannot be used; nothing was trained then.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from mlx_bulwark.demo import DemoOptions
        >>> from mlx_bulwark.demo.utility import privacy_utility
        >>> options = DemoOptions(steps=2, out=Path(tempfile.mkdtemp()))
        >>> [point.epsilon <= 8.0 for point in privacy_utility(options, [8.0], seeds=1, say=lambda line: None).points]
        [True]
    """
    if not epsilons:
        raise OptionError("--epsilon must be given at least once but is not")
    for epsilon in epsilons:
        DemoOptions(epsilon, *list(asdict(options).values())[1:]).check()
    if seeds < 1:
        raise OptionError(f"--seeds must be at least 1 but is {seeds}")
    numbers = tuple(range(options.seed, options.seed + seeds))
    curve = UtilityCurve(options.data, options.delta, options.steps, options.batch_size, numbers)
    splits = [load(options.data, seed) for seed in numbers]
    N = curve.train_examples = len(splits[0].images)
    curve.test_examples = len(splits[0].test_images)
    if options.batch_size > N:
        raise OptionError(f"--batch-size must be at most the {N} training images but is {options.batch_size}")
    say(
        f"data       {DATASETS[options.data].title}: {N} images to train on, {curve.test_examples} held out for testing"
    )
    trainings = (len(epsilons) + 1) * seeds
    try:
        with stoppable() as stop, tqdm(total=trainings * options.steps, unit="step", dynamic_ncols=True) as bar:
            stop.held = True
            for epsilon in sorted(epsilons):
                bar.set_description(f"epsilon {epsilon:g}")
                curve.points.append(_point(epsilon, options, splits, bar, stop))
            bar.set_description("without privacy")
            plain = [_trained(_engine(1.0, options, N), options, split, bar, stop, False) for split in splits]
            curve.nonprivate_test_accuracies = tuple(plain)
    except KeyboardInterrupt:
        curve.interrupted = True
    return curve


def _point(epsilon: float, options: DemoOptions, splits: list[Split], bar: Any, stop: Stop) -> Point:
    shares, spent, sigma = [], 0.0, math.nan
    for split in splits:
        engine = _engine(epsilon, options, len(split.images))
        shares.append(_trained(engine, options, split, bar, stop, True))
        spent, sigma = engine.epsilon(), engine.noise_multiplier
    return Point(spent, sigma, tuple(shares))


def _engine(epsilon: float, options: DemoOptions, N: int) -> PrivacyEngine:
    return PrivacyEngine.for_epsilon(
        epsilon, options.delta, N, steps=options.steps, batch_size=options.batch_size, max_grad_norm=MAX_GRAD_NORM
    )


def _trained(engine: PrivacyEngine, options: DemoOptions, split: Split, bar: Any, stop: Stop, private: bool) -> float:
    """Test accuracy after a training."""
    model, record = _model(options, split), _Record()
    rate = LEARNING_RATE * min(2.0, math.sqrt(100 / options.steps))
    step = (
        _private_step(engine, model, rate, options.steps, record)
        if private
        else _plain_step(engine, model, options.steps, record)
    )
    for batch in _watched(engine.batches((split.images, split.labels)), bar, stop):
        step(batch)
    return accuracy(model, split.test_images, split.test_labels)


def _watched(batches: Batches, bar: Any, stop: Stop) -> Iterator[Batch]:
    for batch in batches:
        stop.check()
        yield batch
        bar.update(batch.last)
