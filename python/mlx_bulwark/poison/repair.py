"""After a scan: take the suspects out, train again, or unlearn them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..smoothing.bounds import check_count
from ..training.loop import fit
from .classes import Array, checked_labels
from .scan import ScanReport

LossFunction = Callable[..., mx.array]


class Kept(NamedTuple):
    """What is left of a training set."""

    x: Any
    y: Array
    indices: Array
    """int64: which rows these were."""


def remove(x: Any, y: Any, report: ScanReport) -> Kept:
    """Take the suspects of a scan out of a training set.

    Args:
        x: Inputs ``[n, ...]`` that were scanned, NumPy or MLX.
        y: Their labels ``[n]``.
        report: What ``scan`` returned. A set that it did not accuse has no suspects, unless a rate was given.

    Returns:
        Kept: Inputs, labels and indices of the other rows, in their order.

    Raises:
        ValueError: The report is of another number of rows.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark.poison import remove, scan_features
        >>> x, y = np.random.default_rng(0).normal(size=(40, 3)), np.zeros(40, int)
        >>> report = scan_features(x, y, methods=["spectre"], expected_rate=0.1)
        >>> remove(x, y, report).x.shape
        (34, 3)

    Source:
        B. Tran, J. Li, A. Madry, "Spectral Signatures in Backdoor Attacks", 2018.
    """
    labels = checked_labels("remove", y, len(x))
    if len(report.y) != len(labels):
        raise ValueError(f"[remove] report must be of these {len(labels)} rows but is of {len(report.y)}")
    kept = np.setdiff1d(np.arange(len(labels)), report.suspects)
    return Kept(x[mx.array(kept)] if isinstance(x, mx.array) else np.asarray(x)[kept], labels[kept], kept)


def cross_entropy(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    """Mean cross-entropy of a batch."""
    return nn.losses.cross_entropy(model(x).astype(mx.float32), y, reduction="mean")


def retrain(
    make_model: Callable[[], nn.Module],
    x: Any,
    y: Any,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    loss_fn: LossFunction = cross_entropy,
    make_optimizer: Callable[[], optim.Optimizer] = lambda: optim.Adam(1e-3),
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Train a new model on what was kept, as the first one was or plainly.

    Args:
        make_model: Makes a model with fresh weights; ``mx.random`` is seeded before it is called.
        x: Inputs ``[n, ...]``, NumPy or MLX.
        y: Labels ``[n]``, integers >= 0.
        epochs: Passes over the data.
        batch_size: Rows of a step, at most n.
        loss_fn: ``loss_fn(model, x, y)``, a scalar: any loss of ``mlx_bulwark.training`` too.
        make_optimizer: Makes the optimizer.
        seed: Of the weights and the shuffles.
        progress: Show a progress bar.

    Returns:
        Module: The trained model, in evaluation mode.

    Raises:
        ValueError: An argument has a wrong value or shape.

    Example:
        >>> import mlx.nn as nn, numpy as np
        >>> from mlx_bulwark.poison import retrain
        >>> x, y = np.eye(4, dtype=np.float32).repeat(8, axis=0), np.arange(4).repeat(8)
        >>> model = retrain(lambda: nn.Linear(4, 4), x, y, epochs=2, batch_size=8)
        >>> model.training
        False

    Source:
        B. Tran, J. Li, A. Madry, "Spectral Signatures in Backdoor Attacks", 2018.
    """
    labels = checked_labels("retrain", y, len(x))
    check_count("retrain", "epochs", epochs)
    if not len(labels):
        raise ValueError("[retrain] x must have rows but is empty")
    mx.random.seed(seed)
    model = make_model()
    data = x, labels.astype(np.int32)
    fit(model, loss_fn, data, make_optimizer(), epochs, batch_size=min(batch_size, len(labels)), seed=seed,
        progress=progress)  # fmt: skip
    model.eval()
    return model


def unlearn(
    model: nn.Module,
    x: Any,
    y: Any,
    suspects: Any,
    *,
    epochs: int = 5,
    batch_size: int = 64,
    weight: float = 1.0,
    most_loss: float | None = None,
    make_optimizer: Callable[[], optim.Optimizer] = lambda: optim.Adam(1e-3),
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Make a model forget suspects: descend on the other rows' loss, ascend on theirs.

    The ascent is bounded: a suspect whose loss is beyond that of a guess pushes no further, so that the rest is not
    torn down with it. Clean rows among the suspects are unlearned too.

    Args:
        model: The poisoned model, from ``[b, ...]`` to ``[b, c]``; changed in place, and left in the mode it had.
        x: Inputs ``[n, ...]`` of its training set, NumPy or MLX.
        y: Their labels ``[n]``, integers >= 0.
        suspects: Integers: rows to unlearn, such as ``report.suspects``; at least one, and not all.
        epochs: Passes over the other rows.
        batch_size: Rows of a step, as many suspects beside them.
        weight: Of the suspects' loss against that of the others.
        most_loss: Loss beyond which a suspect pushes no further; by default twice the logarithm of c.
        make_optimizer: Makes the optimizer.
        seed: Of the shuffles.
        progress: Show a progress bar.

    Raises:
        ValueError: An argument has a wrong value or shape.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, numpy as np
        >>> from mlx_bulwark.poison import retrain, unlearn
        >>> x, y = np.eye(4, dtype=np.float32).repeat(8, axis=0), np.arange(4).repeat(8)
        >>> y[:8] = 3  # wrong
        >>> model = retrain(lambda: nn.Linear(4, 4), x, y, epochs=200, batch_size=8)
        >>> before = int(model(mx.array(x[:1])).argmax().item())
        >>> unlearn(model, x, y, np.arange(8), epochs=200, batch_size=8)
        >>> before, int(model(mx.array(x[:1])).argmax().item()) == 3
        (3, False)

    Source:
        Y. Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", 2021.
    """
    labels = checked_labels("unlearn", y, len(x))
    check_count("unlearn", "epochs", epochs)
    rows = np.unique(np.asarray(suspects))
    if rows.dtype.kind not in "iu" or not 0 < len(rows) < len(labels) or rows[0] < 0 or rows[-1] >= len(labels):
        raise ValueError(f"[unlearn] suspects must be some, not all, of the {len(labels)} rows but are {len(rows)}")
    if not weight > 0:
        raise ValueError(f"[unlearn] weight must be > 0 but is {weight}")
    kept = np.setdiff1d(np.arange(len(labels)), rows)
    beside = np.random.default_rng(seed).permutation(np.resize(rows, len(kept)))

    def taken(indices: Array) -> Any:
        return x[mx.array(indices)] if isinstance(x, mx.array) else np.asarray(x)[indices]

    def loss_fn(model: nn.Module, own: mx.array, right: mx.array, other: mx.array, wrong: mx.array) -> mx.array:
        logits = model(other).astype(mx.float32)
        bound = 2 * float(np.log(logits.shape[1])) if most_loss is None else most_loss
        forgotten = mx.minimum(nn.losses.cross_entropy(logits, wrong), bound)
        return cross_entropy(model, own, right) - weight * mx.mean(forgotten)

    data = taken(kept), labels[kept].astype(np.int32), taken(beside), labels[beside].astype(np.int32)
    fit(model, loss_fn, data, make_optimizer(), epochs, batch_size=min(batch_size, len(kept)), seed=seed,
        progress=progress)  # fmt: skip
