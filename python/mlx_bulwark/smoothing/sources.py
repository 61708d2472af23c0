"""Where the noise of a smoothed classifier enters."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..ops.noise import blocks_used, gaussian
from ..ops.smooth import Distribution, noisy_copies


class Source(ABC):
    """Logits of noisy copies of one input."""

    @abstractmethod
    def refresh(self) -> None:
        """See the weights as they are now."""

    @abstractmethod
    def prepare(self, x: mx.array) -> list[mx.array]:
        """Make what all batches of the input share; first what gets noise."""

    def blocks(self, m: int, state: list[mx.array]) -> int:
        """Tell how many counter values m copies use."""
        return blocks_used((m, *state[0].shape))

    @abstractmethod
    def logits(self, state: list[mx.array], m: int, key: mx.array, counter: mx.array) -> Any:
        """Run the model on m copies."""


class InputNoise(Source):
    """Noise on the input of the model."""

    def __init__(
        self,
        model: Callable[[mx.array], Any],
        sigma: float,
        distribution: Distribution,
        bounds: tuple[float, float] | None,
        levels: int | None,
    ) -> None:
        self._model, self._sigma = model, sigma
        self._options: dict[str, Any] = {"distribution": distribution, "bounds": bounds, "levels": levels}

    def refresh(self) -> None:
        """Nothing to do: the model is read at every call."""

    def prepare(self, x: mx.array) -> list[mx.array]:
        """Nothing is shared but the input."""
        return [x]

    def logits(self, state: list[mx.array], m: int, key: mx.array, counter: mx.array) -> Any:
        """Run the model on noisy copies of its input."""
        return self._model(noisy_copies(state[0], m, self._sigma, key, counter, **self._options))


class LinearOutputNoise(Source):
    """The same noise, drawn on the output of the first layer: y + L z has the covariance sigma^2 W W^T of W noise."""

    def __init__(self, model: Any, sigma: float) -> None:
        layers = model.layers if isinstance(model, nn.Sequential) else []
        first = layers[0] if layers else None
        if type(first) is not nn.Linear or first.weight.shape[0] >= first.weight.shape[1]:
            has = repr(first) if first is not None else f"type {type(model).__name__}"
            raise ValueError(
                "[Smooth] exact_first_layer must come with a nn.Sequential whose first layer is a nn.Linear of fewer "
                f"outputs than inputs but has {has}"
            )
        self._layers, self._sigma = layers, sigma
        self.refresh()

    def refresh(self) -> None:
        """L^T of L L^T = sigma^2 W W^T: W^T = QR gives L = R^T, whatever the rank, without squaring W."""
        wide = np.array(self._layers[0].weight.astype(mx.float32)).astype(np.float64)
        self._factor = mx.array((self._sigma * np.asarray(np.linalg.qr(wide.T, mode="r"))).astype(np.float32))

    def prepare(self, x: mx.array) -> list[mx.array]:
        """Run the first layer once."""
        first = self._layers[0]
        if x.shape != (first.weight.shape[1],):
            raise ValueError(
                f"[Smooth] x must be [b, {first.weight.shape[1]}] for exact_first_layer but has inputs of "
                f"shape {x.shape}"
            )
        return [first(x), self._factor.astype(x.dtype)]

    def logits(self, state: list[mx.array], m: int, key: mx.array, counter: mx.array) -> Any:
        """Run all layers but the first."""
        y, factor = state
        y = y + gaussian((m, *y.shape), 1.0, key, counter, dtype=y.dtype, domain="smoothing") @ factor
        for layer in self._layers[1:]:
            y = layer(y)
        return y
