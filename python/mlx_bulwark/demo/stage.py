"""What every stage of the demo is given, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..provenance import AuditLog
from ..report import Section
from ..training import fit
from .data import DATASETS, Array, Split
from .figures import Figures
from .model import CNN, accuracy
from .options import DemoOptions
from .progress import Stop, waiting

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
EPOCHS = 6

Loss = Callable[..., mx.array]


@dataclass(frozen=True)
class Digits:
    """Images [n, side, side, 1] in [0, 1], and labels [n]."""

    x: Array
    y: Array

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Outcome:
    """What a stage found."""

    figures: dict[str, Any]
    """For JSON."""
    what: str
    """The figure that sums the stage up."""
    without: str = ""
    """Its value without the defence."""
    defended: str = ""
    """Its value with it."""
    section: Section | None = None
    """For the report."""


@dataclass
class Scene:
    """What stages share."""

    options: DemoOptions
    split: Split
    figures: Figures
    stop: Stop
    say: Callable[[str], None]
    log: AuditLog
    """What was done, line by line, each chained to the one before."""
    trusted: Digits = field(init=False)
    """A fifth of the training images: from a source that is trusted."""
    arrived: Digits = field(init=False)
    """The others, which come from anywhere."""
    test: Digits = field(init=False)
    poisoned: Any = None
    poisoned_model: nn.Module | None = None
    clean_model: nn.Module | None = None
    """Trained plainly on what was found clean, or, where nothing was looked for, on what arrived."""
    private_model: nn.Module | None = None
    sections: list[Section] = field(default_factory=list)

    def __post_init__(self) -> None:
        order = np.random.default_rng(self.options.seed).permutation(len(self.split.images))
        first, others = order[: len(order) // 5], order[len(order) // 5 :]
        x, y = unit(self.split.images), self.split.labels
        self.trusted, self.arrived = Digits(x[first], y[first]), Digits(x[others], y[others])
        self.test = Digits(unit(self.split.test_images), self.split.test_labels)

    def tell(self, name: str, text: str) -> None:
        """Tell a person one thing that was found."""
        self.say(f"{name:<10} {text}")

    def network(self) -> CNN:
        """The demo's network, untrained; the same weights each time."""
        mx.random.seed(self.options.seed)
        dataset = DATASETS[self.options.data]
        return CNN(self.split.side, dataset.channels, dataset.kernel_size, dataset.stride)

    def trained(self, data: Digits, what: str, loss: Loss | None = None, epochs: int = EPOCHS) -> nn.Module:
        """Train the network without privacy, and leave it in evaluation mode."""
        model = self.network()
        epochs = self.options.reduced(epochs, least=2)
        schedule = optim.cosine_decay(LEARNING_RATE, max(1, epochs * (len(data) // BATCH_SIZE)))
        with waiting(f"Training {what}"):
            fit(
                model,
                loss or plain_loss,
                (data.x, data.y),
                optim.Adam(schedule),
                epochs,
                batch_size=BATCH_SIZE,
                seed=self.options.seed,
                progress=False,
            )
        self.stop.check()
        model.eval()
        return model

    def plain_model(self) -> nn.Module:
        """A model without any defence but that its data are clean."""
        if self.clean_model is None:
            self.clean_model = self.trained(self.arrived, "a plain model")
        return self.clean_model

    def accuracy(self, model: nn.Module) -> float:
        """Share of the test digits that a model names right."""
        return accuracy(model, self.test.x, self.test.y)


def plain_loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    """Mean cross entropy."""
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


def unit(images: Array) -> Array:
    """Images in [0, 1]."""
    scaled: Array = (images + 1) / 2
    return scaled


def percent(share: float) -> str:
    """A share in words."""
    return f"{100 * share:.1f} %"
