"""The one way from clipped sums to an optimizer: noise, expected batch size, one step charged."""

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from .taps import named_arrays

if TYPE_CHECKING:
    from .engine import PrivacyEngine


class ClippedGradients:
    """Clipped gradient sums without noise: only ``engine.wrap(optimizer).update`` takes them, and once.

    Made by the function that `PrivacyEngine.value_and_grad` returns.
    """

    def __init__(
        self,
        engine: "PrivacyEngine",
        sums: dict[str, mx.array],
        sq_norms: mx.array,
        num_refused: mx.array,
        last: bool,
    ) -> None:
        self._engine, self._sums, self._last = engine, sums, last
        self._sq_norms, self._num_refused = sq_norms, num_refused

    @property
    def norms(self) -> mx.array:
        """Per-sample gradient norms before the clip, [B] float32. They depend on the data: not covered by epsilon."""
        return mx.sqrt(self._sq_norms)

    @property
    def num_refused(self) -> mx.array:
        """How many samples had a NaN or Inf gradient and got factor 0, scalar. Not covered by epsilon."""
        return self._num_refused

    def __repr__(self) -> str:
        return "ClippedGradients(not yet noised: pass to engine.wrap(optimizer).update)"


class PrivateOptimizer:
    """An MLX optimizer that takes nothing but `ClippedGradients`. Made by `PrivacyEngine.wrap`."""

    def __init__(self, engine: "PrivacyEngine", optimizer: optim.Optimizer) -> None:
        self._engine = engine
        self.optimizer = optimizer

    def update(self, model: nn.Module, gradients: ClippedGradients) -> None:
        """Add the noise, divide by the expected batch size, charge one step, and let the optimizer update the model.

        Gradients of a physical batch that does not end its logical batch are only added up.

        Args:
            model: the model whose gradients these are.
            gradients: what the engine's ``value_and_grad`` function returned.

        Raises:
            TypeError: the gradients are not `ClippedGradients`.
            PrivacyError: they were used before, come from another engine, or the step is past the planned ones.

        Example:
            >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim, mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(1000, batch_size=100, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> model, optimizer = nn.Linear(4, 1), engine.wrap(optim.SGD(0.1))
            >>> loss_fn = lambda model, x, y: (model(x)[:, 0] - y) ** 2
            >>> losses, grads = engine.value_and_grad(model, loss_fn)(model, mx.ones((100, 4)), mx.zeros(100))
            >>> optimizer.update(model, grads)
            >>> engine.steps
            1

        Source:
            Abadi et al. 2016, Deep Learning with Differential Privacy, algorithm 1 (arXiv:1607.00133).
        """
        if not isinstance(gradients, ClippedGradients):
            raise TypeError(
                f"[update] gradients must be ClippedGradients from engine.value_and_grad but is "
                f"{type(gradients).__name__}; other gradients carry no guarantee"
            )
        mean = self._engine._release(gradients)
        if mean is not None:
            self._apply(model, mean)

    def _apply(self, model: nn.Module, mean: dict[str, mx.array]) -> None:
        dtypes = {path: p.dtype for path, p in named_arrays(model.trainable_parameters())}
        self.optimizer.update(model, tree_unflatten([(path, g.astype(dtypes[path])) for path, g in mean.items()]))

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def learning_rate(self) -> Any:
        """The wrapped optimizer's learning rate."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.optimizer.learning_rate = learning_rate

    def init(self, parameters: Any) -> None:
        """Initialise the wrapped optimizer's state; ``update`` does so by itself where it is not done.

        Args:
            parameters: A model's tree of trainable parameters.

        Example:
            >>> import mlx.nn as nn, mlx.optimizers as optim
            >>> import mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(1000, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> optimizer = engine.wrap(optim.Adam(1e-3))
            >>> optimizer.init(nn.Linear(3, 2).trainable_parameters())
        """
        self.optimizer.init(parameters)
