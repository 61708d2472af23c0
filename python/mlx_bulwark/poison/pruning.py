"""Fine-pruning: units that clean data leave dormant may serve a backdoor; look at them, and take them out."""

import copy
import sys
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from .classifier import (
    LEAST_CLASSES,
    Array,
    inputs_of,
    integer,
    labels_of,
    logits_of,
    outlier_p_value,
    positive,
    share,
)
from .features import features_and_logits


@dataclass(frozen=True, eq=False)
class PruningCheck:
    """What pruning of dormant units does on trusted data.

    Attributes:
        layer: The linear layer whose inputs are the units.
        order: int64 ``[d]``: the units, the most dormant on trusted inputs first.
        accuracy: float64 ``[d + 1]``: on the trusted inputs, once the first 0, 1, ... units are pruned.
        changed: float64 ``[d + 1]``: share of the trusted inputs that are put into another class than before.
        dormant: Units that can be pruned before the accuracy falls by more than was allowed.
        weights: float64 ``[C]``: what the dormant units speak for each class, less their mean over classes.
        p_value: Of the class for which they speak most, against the other classes; None where there are too few.
        accused: Whether they speak for one class beyond chance.
        reason: Why, in words.
    """

    layer: str
    order: Array
    accuracy: Array
    changed: Array
    dormant: int
    weights: Array
    p_value: float | None
    accused: bool
    reason: str


@dataclass(frozen=True, eq=False)
class FinePruned:
    """A repaired model.

    Attributes:
        weights: Names and arrays, for ``model.load_weights(list(weights.items()))``.
        pruned: int64, ascending: the units that were taken out.
        accuracy_before: On the trusted inputs.
        accuracy_after: On the trusted inputs, which it was tuned on.
    """

    weights: dict[str, mx.array]
    pruned: Array
    accuracy_before: float
    accuracy_after: float


def pruning_check(
    model: nn.Module, trusted: tuple[Any, Any], *, accuracy_loss: float = 0.01, alpha: float = 0.05
) -> PruningCheck:
    """Prune the units before the last layer in the order in which clean data use them, and ask for whom the idle speak.

    A backdoor may live in units that clean inputs leave at rest, and these then speak for its target. The baseline are
    the other classes: what the idle units speak for the top class is compared with what they speak for the others by
    Student's t of a new value, times the classes. Small networks put a backdoor into units that clean inputs use too:
    a model that passes this check may well have one.

    Args:
        model: A classifier in evaluation mode whose last layer is linear and returns the logits.
        trusted: Inputs ``[n, ...]`` without trigger, and their labels ``[n]``.
        accuracy_loss: By how much the accuracy may fall for units to be dormant.
        alpha: Rate of clean models that are accused, were the units' sums normal over classes.

    Returns:
        PruningCheck: The order, accuracies, and a verdict.

    Raises:
        TypeError: The model is no ``nn.Module``.
        ValueError: An argument has a wrong value or shape, or the model ends otherwise.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, numpy as np
        >>> from mlx_bulwark.poison import pruning_check
        >>> mx.random.seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6))
        >>> x = mx.random.uniform(shape=(50, 4))
        >>> check = pruning_check(model, (x, np.array(model(x).argmax(axis=1))))
        >>> float(check.accuracy[0]), len(check.order)
        (1.0, 16)

    Source:
        K. Liu, B. Dolan-Gavitt, S. Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
        2018.
    """
    op = "pruning_check"
    allowed, level = share(op, "accuracy_loss", accuracy_loss), share(op, "alpha", alpha)
    return _check(op, model, trusted, allowed, level)[0]


def fine_prune(
    model: nn.Module,
    trusted: tuple[Any, Any],
    *,
    accuracy_loss: float = 0.04,
    epochs: int = 20,
    learning_rate: float = 1e-2,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> FinePruned:
    """Take out the units that clean data leave dormant, and train the rest on trusted data: a backdoor fades.

    The model is left as it is.

    Args:
        model: As for ``pruning_check``.
        trusted: Inputs ``[n, ...]`` without trigger, and their labels ``[n]``.
        accuracy_loss: By how much the accuracy on them may fall before training.
        epochs: Of training on the trusted inputs; 0 for none.
        learning_rate: Of Adam.
        batch_size: Inputs of a step.
        seed: Of the order of inputs.
        progress: Show a bar on standard error.

    Returns:
        FinePruned: New weights, and what was pruned.

    Raises:
        TypeError: The model is no ``nn.Module``.
        ValueError: An argument has a wrong value or shape, or the model ends otherwise.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, numpy as np
        >>> from mlx_bulwark.poison import fine_prune
        >>> mx.random.seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> x = mx.random.uniform(shape=(50, 4))
        >>> repaired = fine_prune(model, (x, np.array(model(x).argmax(axis=1))), epochs=2)
        >>> sorted(repaired.weights) == ["layers.0.bias", "layers.0.weight", "layers.2.bias", "layers.2.weight"]
        True

    Source:
        K. Liu, B. Dolan-Gavitt, S. Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
        2018.
    """
    from tqdm import tqdm

    op = "fine_prune"
    allowed, rounds = share(op, "accuracy_loss", accuracy_loss), integer(op, "epochs", epochs, 0)
    size = integer(op, "batch_size", batch_size, 1)
    rng = np.random.default_rng(integer(op, "seed", seed, 0))
    pace = positive(op, "learning_rate", learning_rate)
    found, x, y = _check(op, model, trusted, allowed, 0.05)
    pruned = np.sort(found.order[: found.dormant])
    repaired = copy.deepcopy(model)
    head: Any = dict(repaired.named_modules())[found.layer]
    kept = np.ones(len(found.order), np.float32)
    kept[pruned] = 0
    mask = mx.array(kept)
    head.weight = head.weight * mask
    optimizer = optim.Adam(pace)
    step = nn.value_and_grad(repaired, lambda x, y: nn.losses.cross_entropy(repaired(x), y, reduction="mean"))
    for _ in tqdm(range(rounds), desc="Fine-pruning", unit="epoch", disable=not progress, file=sys.stderr):
        for rows in np.array_split(rng.permutation(len(y)), max(1, len(y) // size)):
            _, gradients = step(mx.array(x[rows]), mx.array(y[rows]))
            optimizer.update(repaired, gradients)
            head.weight = head.weight * mask
            mx.eval(repaired.parameters(), optimizer.state)
    after = float((logits_of(op, repaired, x).argmax(axis=1) == y).mean())
    weights = dict(tree_flatten(repaired.parameters()))
    return FinePruned(weights, pruned, float(found.accuracy[0]), after)


def _check(op: str, model: Any, trusted: Any, allowed: float, alpha: float) -> tuple[PruningCheck, Array, Array]:
    try:
        x, labels = trusted
    except (TypeError, ValueError):
        raise ValueError(f"[{op}] trusted must be inputs and labels but is {type(trusted).__name__}") from None
    x = inputs_of(op, "trusted", x, least=2)
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{op}] model must be a mlx.nn.Module, whose layers are known, but is {type(model).__name__}")
    logits = logits_of(op, model, x)
    y = labels_of(op, labels, len(x), logits.shape[1])
    features, _, layer = features_and_logits(model, x)
    weight, bias = _head(op, dict(model.named_modules())[layer], layer, features, logits)
    order = np.argsort(np.abs(features).mean(axis=0), kind="stable").astype(np.int64)
    accuracy, changed = _curves(features.astype(np.float64), weight, bias, order, y)
    low = np.flatnonzero(accuracy < accuracy[0] - allowed - 1e-12)
    dormant = int(low[0]) - 1 if len(low) else len(order)
    speaks = (weight - weight.mean(axis=0))[:, order[:dormant]].sum(axis=1)
    return _judged(layer, order, accuracy, changed, dormant, speaks, alpha), x, y


def _head(op: str, head: Any, layer: str, features: Array, logits: Array) -> tuple[Array, Array]:
    """Weight and bias of the last layer, float64, once they are seen to give the logits."""
    if isinstance(head, nn.Linear):
        weight = np.array(head.weight.astype(mx.float32), np.float64)
        bias = head.get("bias")
        offset = np.zeros(len(weight)) if bias is None else np.array(bias.astype(mx.float32), np.float64)
        if weight.shape == (logits.shape[1], features.shape[1]):
            error = np.abs(features @ weight.T + offset - logits).max()
            if error <= 0.01 * max(1.0, float(np.abs(logits).max())):
                return weight, offset
    raise ValueError(
        f"[{op}] model must end in a linear layer that returns the logits but ends in {type(head).__name__} {layer}"
    )


def _curves(features: Array, weight: Array, bias: Array, order: Array, y: Array) -> tuple[Array, Array]:
    logits = features @ weight.T + bias
    first = logits.argmax(axis=1)
    accuracy, changed = [float((first == y).mean())], [0.0]
    for unit in order:
        logits = logits - features[:, unit, None] * weight[:, unit]
        predicted = logits.argmax(axis=1)
        accuracy.append(float((predicted == y).mean()))
        changed.append(float((predicted != first).mean()))
    return np.array(accuracy), np.array(changed)


def _judged(
    layer: str, order: Array, accuracy: Array, changed: Array, dormant: int, speaks: Array, alpha: float
) -> PruningCheck:
    share_of = f"{dormant} of {len(order)} units are idle on trusted inputs"
    if len(speaks) < LEAST_CLASSES:
        words = f"{share_of}; {len(speaks)} classes cannot be compared, it takes {LEAST_CLASSES}"
        return PruningCheck(layer, order, accuracy, changed, dormant, speaks, None, False, words)
    top = int(speaks.argmax())
    p = outlier_p_value(float(speaks[top]), np.delete(speaks, top))
    accused = p <= alpha
    verdict = "beyond chance" if accused else "no more than chance explains"
    words = f"{share_of} and speak for class {top} most, {verdict} (p {p:.2g})"
    return PruningCheck(layer, order, accuracy, changed, dormant, speaks, p, accused, words)
