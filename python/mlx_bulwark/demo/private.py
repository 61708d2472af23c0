"""Private training, and the same without privacy: both models, step by step side by side."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from ..privacy import Batch, PrivacyEngine, compute_epsilon
from ..privacy.taps import named_arrays
from .data import DATASETS, Array, Split
from .figures import Figures
from .model import CNN, accuracy, loss_fn
from .options import DemoOptions
from .progress import Stop, waiting

# Found by trial at epsilon 3. A clipped gradient is at most 0.1 long, hence the large learning rate.
MAX_GRAD_NORM = 0.1
LEARNING_RATE = 3.0
NONPRIVATE_LEARNING_RATE = 0.05
MOMENTUM = 0.9

POINTS = 20  # of the curves: accounting by PLD takes as long as a step
NORM_EDGES = np.logspace(-6, 4, 81)


@dataclass
class _Record:
    """What both models did so far."""

    private_seconds: list[float] = field(default_factory=list)
    nonprivate_seconds: list[float] = field(default_factory=list)
    norm_counts: Array = field(default_factory=lambda: np.zeros(len(NORM_EDGES) - 1, np.int64))
    examples: int = 0
    clipped: int = 0
    refused: int = 0
    loss: float | None = None

    def add(self, losses: mx.array, norms: Array, refused: int) -> None:
        """Add what the examples of one physical batch showed."""
        self.examples += len(norms)
        self.refused += refused
        self.clipped += int((norms > MAX_GRAD_NORM).sum())
        finite = norms[np.isfinite(norms)]
        self.norm_counts += np.histogram(finite.clip(NORM_EDGES[0], NORM_EDGES[-1]), NORM_EDGES)[0]
        if len(norms):
            self.loss = float(np.array(losses).sum()) / len(norms)


def _calibrate(options: DemoOptions, figures: Figures, say: Callable[[str], None]) -> PrivacyEngine:
    assert figures.train_examples is not None
    began = time.perf_counter()
    with waiting(f"Finding the noise for epsilon {options.epsilon:g} after {options.steps} steps"):
        engine = PrivacyEngine.for_epsilon(
            options.epsilon,
            options.delta,
            figures.train_examples,
            steps=options.steps,
            batch_size=options.batch_size,
            max_grad_norm=MAX_GRAD_NORM,
        )
    figures.calibration_seconds = time.perf_counter() - began
    figures.noise_multiplier, figures.max_grad_norm = engine.noise_multiplier, engine.max_grad_norm
    figures.sample_rate, figures.accountant = engine.sample_rate, engine.accountant
    figures.clipping = str(engine.clipping)
    say(
        f"noise      multiplier {engine.noise_multiplier:.3f}, for epsilon {options.epsilon:g} at delta "
        f"{options.delta:g} after {options.steps} steps (found in {figures.calibration_seconds:.1f} s)"
    )
    return engine


def _train(engine: PrivacyEngine, options: DemoOptions, split: Split, figures: Figures, stop: Stop) -> nn.Module:
    """Train both; return the private one."""
    record = _Record()
    private, plain = (_model(options, split) for _ in range(2))
    figures.parameters = sum(p.size for _, p in named_arrays(private.trainable_parameters()))
    figures.learning_rate = LEARNING_RATE * min(2.0, math.sqrt(100 / options.steps))  # fewer steps have to go further
    figures.nonprivate_learning_rate = NONPRIVATE_LEARNING_RATE
    private_step = _private_step(engine, private, figures.learning_rate, options.steps, record)
    plain_step = _plain_step(engine, plain, options.steps, record)
    batches = engine.batches((split.images, split.labels))
    figures.microbatch_size = batches.microbatch_size
    stretch = math.ceil(options.steps / POINTS)

    def measure() -> None:
        shares = [accuracy(m, split.test_images, split.test_labels) for m in (private, plain)]
        figures.add_point(engine.steps, engine.epsilon(), *shares)

    def bound() -> float:
        """Epsilon at the end of the stretch that begins: at least what is spent within it."""
        ahead = min(options.steps, engine.steps + stretch)
        return compute_epsilon(engine.noise_multiplier, engine.sample_rate, ahead, options.delta, engine.accountant)

    stop.held = True
    with tqdm(total=options.steps, desc="Training", unit="step", dynamic_ncols=True) as bar:
        measure()
        epsilon = bound()
        try:
            for batch in batches:
                stop.check()
                private_step(batch)
                plain_step(batch)
                rate = record.examples / sum(record.private_seconds)
                spent = f"loss {record.loss or 0:.2f}, epsilon <= {epsilon:.2f}, {rate:,.0f} examples/s"
                bar.set_postfix_str(spent, refresh=False)
                if not batch.last:
                    continue
                bar.update()
                if engine.steps % stretch == 0 and engine.steps < options.steps:
                    measure()
                    epsilon = bound()
            stop.check()
        finally:
            _conclude(figures, record, engine)
            if figures.curve["step"][-1] < engine.steps:
                measure()
    return private


def _model(options: DemoOptions, split: Split) -> nn.Module:
    mx.random.seed(options.seed)
    dataset = DATASETS[options.data]
    return CNN(split.side, dataset.channels, dataset.kernel_size, dataset.stride)


def _private_step(
    engine: PrivacyEngine, model: nn.Module, learning_rate: float, steps: int, record: _Record
) -> Callable[[Batch], None]:
    schedule = optim.cosine_decay(learning_rate, steps)
    optimizer = engine.wrap(optim.SGD(schedule, momentum=MOMENTUM))
    loss_and_grad = engine.value_and_grad(model, loss_fn)

    def step(batch: Batch) -> None:
        began = time.perf_counter()
        losses, gradients = loss_and_grad(model, batch)
        optimizer.update(model, gradients)
        mx.eval(losses, model.parameters(), optimizer.state, engine.state)
        record.private_seconds.append(time.perf_counter() - began)
        norms = np.array(gradients.norms)[np.array(batch.mask)]
        record.add(losses, norms, int(np.array(gradients.num_refused)))

    return step


def _plain_step(engine: PrivacyEngine, model: nn.Module, steps: int, record: _Record) -> Callable[[Batch], None]:
    """Ordinary training on the same rows: padding is masked out here too, so that both sides do the same work.

    The rare second physical batch of one draw is a small step of its own.
    """
    optimizer = optim.SGD(optim.cosine_decay(NONPRIVATE_LEARNING_RATE, steps), momentum=MOMENTUM)

    def mean_loss(model: nn.Module, images: mx.array, labels: mx.array, mask: mx.array) -> mx.array:
        return (loss_fn(model, images, labels) * mask).sum() / engine.expected_batch_size

    loss_and_grad = nn.value_and_grad(model, mean_loss)

    def step(batch: Batch) -> None:
        began = time.perf_counter()
        loss, gradients = loss_and_grad(model, *batch.data, batch.mask)
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)
        record.nonprivate_seconds.append(time.perf_counter() - began)

    return step


def _conclude(figures: Figures, record: _Record, engine: PrivacyEngine) -> None:
    figures.steps, figures.epsilon = engine.steps, engine.epsilon()
    figures.loss, figures.refused_examples = record.loss, record.refused
    if not record.examples or not record.nonprivate_seconds:
        return
    private, plain = (_median(s) for s in (record.private_seconds, record.nonprivate_seconds))
    figures.private_step_seconds, figures.nonprivate_step_seconds = private, plain
    figures.private_over_nonprivate = private / plain
    figures.clip_fraction = record.clipped / record.examples
    figures.mean_batch_size = record.examples / figures.steps
    figures.examples_per_second = record.examples / sum(record.private_seconds)
    seen = np.flatnonzero(record.norm_counts)
    bins = slice(seen[0], seen[-1] + 1)
    figures.norm_edges = NORM_EDGES[bins.start : bins.stop + 1].tolist()
    figures.norm_counts = record.norm_counts[bins].tolist()


def _median(seconds: list[float]) -> float:
    """Of all steps but the first, which warms caches up."""
    return statistics.median(seconds[1:] or seconds)
