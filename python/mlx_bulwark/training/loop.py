"""A training loop that stops where robustness is best."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

from ..attacks.base import Attack, predicted
from ..convolutions import faster_convolutions
from ..smoothing.bounds import check_count
from .averaging import EMA
from .inputs import evaluation_mode, logits_of
from .refusals import refuse_private

Validation = tuple[float, float]  # share of inputs that are right, and right under attack


@dataclass
class History:
    """What `fit` saw, one entry an epoch."""

    losses: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    """Share of the validation inputs that are right."""
    robust_accuracy: list[float] = field(default_factory=list)
    """Share that the attack leaves right."""
    best_epoch: int | None = None
    """The epoch, from 0, whose weights the model has now; None without validation."""


def fit(
    model: nn.Module,
    loss_fn: Callable[..., mx.array],
    data: tuple[Any, ...],
    optimizer: optim.Optimizer,
    epochs: int,
    *,
    batch_size: int = 128,
    ema: EMA | None = None,
    validation: tuple[mx.array, mx.array] | None = None,
    attack: Attack | None = None,
    patience: int | None = None,
    seed: int = 0,
    compile: bool = True,
    progress: bool = True,
) -> History:
    """Train with any loss of this package, and keep the weights that resist best.

    A loop of one's own does as well, with one thing to know: robustness overfits long before accuracy does, and the
    last weights are seldom the best. So this one attacks the validation inputs after each epoch, keeps the best
    weights, and stops after ``patience`` epochs that were no better.

    Args:
        model: The model, in training mode meanwhile; afterwards with the best weights, in the mode that it had.
        loss_fn: ``loss_fn(model, *arrays)``, a scalar.
        data: Arrays ``[n, ...]``, numpy or mlx, whose rows are shuffled together.
        optimizer: Any MLX optimizer.
        epochs: Passes over the data. Of each pass, what does not fill a batch is left out, others every time.
        batch_size: Rows of a step.
        ema: An average of the weights, which is updated at each step; what is validated and kept is the average.
        validation: Inputs ``[m, *shape]`` and classes ``[m]``.
        attack: Attack on the validation inputs, such as ``PGD(eps=0.1)``. Without, plain accuracy decides.
        patience: Epochs without a better validation after which training ends; by default it goes on.
        seed: Of the shuffles. Random starts and dropout draw from ``mx.random``.
        compile: Compile a step. With False ``loss_fn`` may do what only Python can.
        progress: Show a progress bar.

    Returns:
        History: Losses, accuracies, and which epoch was best.

    Raises:
        ValueError: An argument has a wrong value or shape.
        PrivacyError: The optimizer is one of a privacy engine.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> from mlx_bulwark.attacks import PGD
        >>> from mlx_bulwark.training import EMA, adversarial_loss, fit
        >>> x = mx.random.uniform(shape=(64, 4))
        >>> y, model = (x[:, 0] > 0.5).astype(mx.int32), nn.Linear(4, 2)
        >>> loss_fn = lambda model, x, y: adversarial_loss(model, x, y, 0.1, steps=3)
        >>> history = fit(model, loss_fn, (x, y), optim.Adam(0.01), 3, batch_size=16, ema=EMA(model, 0.9),
        ...               validation=(x, y), attack=PGD(0.1, steps=5), progress=False)
        >>> len(history.robust_accuracy)
        3

    Source:
        L. Rice, E. Wong, Z. Kolter, "Overfitting in Adversarially Robust Deep Learning", 2020.
    """
    refuse_private("fit", optimizer)
    rows = _check(data, batch_size, epochs, validation, attack, patience)
    history, best = History(), -1.0
    step = _step(model, loss_fn, optimizer, ema, compile)
    generator, kept, modes = np.random.default_rng(seed), model.parameters(), _modes(model)
    model.train()
    bar = tqdm(total=epochs * (rows // batch_size), desc="fit", unit="step", disable=None if progress else True)
    try:
        for epoch in range(epochs):
            losses = []
            for batch in _batches(data, generator.permutation(rows), batch_size):
                losses.append(step(*batch))
                mx.async_eval(losses[-1], model.state, optimizer.state, ema.state if ema else [])
                bar.update()
            history.losses.append(float(np.mean([loss.item() for loss in losses])))
            if validation is None:
                continue
            with ema.applied(model) if ema else nullcontext():
                found = _validate(model, *validation, attack, batch_size)
                history.accuracy.append(found[0])
                history.robust_accuracy.append(found[1])
                if found[1] > best:
                    best, history.best_epoch = found[1], epoch
                    kept = tree_map(lambda a: a, model.parameters())
            bar.set_postfix(accuracy=f"{found[0]:.3f}", robust=f"{found[1]:.3f}")
            if patience is not None and epoch - (history.best_epoch or 0) >= patience:
                break
    finally:
        bar.close()
        for module, training in modes:
            module.train(training)
    if validation is not None:
        model.update(kept)
    elif ema:
        ema.copy_to(model)
    return history


def _modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(module, module.training) for module in model.modules()]


def _step(
    model: nn.Module,
    loss_fn: Callable[..., mx.array],
    optimizer: optim.Optimizer,
    ema: EMA | None,
    compile: bool,
) -> Callable[..., mx.array]:
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    optimizer.init(model.trainable_parameters())

    def step(*arrays: mx.array) -> mx.array:
        loss: mx.array
        with faster_convolutions(model):
            loss, gradients = loss_and_grad(model, *arrays)
        optimizer.update(model, gradients)
        if ema:
            ema.update(model)
        return loss

    state = [model.state, optimizer.state, mx.random.state, ema.state if ema else {}]
    return mx.compile(step, inputs=state, outputs=state) if compile else step


def _batches(data: tuple[Any, ...], order: Any, batch_size: int) -> Iterator[tuple[mx.array, ...]]:
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        yield tuple(a[mx.array(rows)] if isinstance(a, mx.array) else mx.array(a[rows]) for a in data)


def _validate(model: nn.Module, x: mx.array, y: mx.array, attack: Attack | None, batch_size: int) -> Validation:
    right, resisting = [], []
    with evaluation_mode(model):
        for start in range(0, len(x), batch_size):
            inputs, classes = x[start : start + batch_size], y[start : start + batch_size]
            if attack is None:
                correct = predicted(logits_of(model, inputs)) == classes
                resists = correct
            else:
                result = attack(model, inputs, classes)
                correct, resists = result.correct, mx.logical_and(result.correct, mx.logical_not(result.success))
            right.append(np.array(correct))
            resisting.append(np.array(resists))
    return float(np.concatenate(right).mean()), float(np.concatenate(resisting).mean())


def _check(data: Any, batch_size: Any, epochs: Any, validation: Any, attack: Any, patience: Any) -> int:
    check_count("fit", "batch_size", batch_size)
    check_count("fit", "epochs", epochs)
    if patience is not None:
        check_count("fit", "patience", patience)
    if not isinstance(data, tuple) or not data or len({len(a) for a in data}) != 1:
        raise ValueError("[fit] data must be a tuple of arrays with the same number of rows but is not")
    rows = len(data[0])
    if rows < batch_size:
        raise ValueError(f"[fit] data must have at least one batch of {batch_size} rows but has {rows}")
    if validation is None and (attack is not None or patience is not None):
        raise ValueError("[fit] validation must be given with attack and patience but is None")
    if validation is not None and (len(validation) != 2 or not len(validation[0])):
        raise ValueError("[fit] validation must be inputs and classes, at least one, but is not")
    return rows
