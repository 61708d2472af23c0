"""Free adversarial training."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ..attacks.losses import cross_entropy
from ..ops.step import Norm, projected_step
from ..smoothing.bounds import check_count
from .inputs import check_batch, logits_of
from .losses import check_weight
from .refusals import refuse_private


class FreeAdversarialTraining:
    """Adversarial training at the price of plain training: one backward pass moves the weights and the inputs.

    Each batch is replayed ``replays`` times; the perturbation goes on from replay to replay, and from batch to batch.
    Train for 1 / replays of the epochs. The model is in the mode that it has: attack and training share their passes.

    It is refused under the privacy engine: the perturbation carries what one batch holds to the next.

    Args:
        model: Takes ``[b, *shape]``, returns logits ``[b, c]``.
        optimizer: Any MLX optimizer.
        eps: Radius of the ball, in the unit of the input.
        replays: Updates a batch, m in the paper.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        alpha: Length of a step of the perturbation in the same norm, by default ``eps``.
        bounds: Lowest and highest value of an input.
        compile: Compile an update.

    Raises:
        ValueError: An argument has a wrong value.
        PrivacyError: The optimizer is one of a privacy engine.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> from mlx_bulwark.training import FreeAdversarialTraining
        >>> step = FreeAdversarialTraining(nn.Linear(4, 3), optim.SGD(0.1), 0.1, replays=4)
        >>> step(mx.zeros((8, 4)), mx.zeros(8, mx.int32)).shape
        ()

    Source:
        A. Shafahi et al., "Adversarial Training for Free!", 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        eps: float,
        *,
        replays: int = 8,
        norm: Norm = "linf",
        alpha: float | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        compile: bool = True,
    ) -> None:
        where = "FreeAdversarialTraining"
        refuse_private(where, optimizer)
        check_count(where, "replays", replays)
        check_weight(where, "eps", eps)
        check_weight(where, "alpha", eps if alpha is None else alpha)
        self.model, self.optimizer = model, optimizer
        self.eps, self.replays, self.norm, self.bounds = eps, replays, norm, bounds
        self.alpha = eps if alpha is None else alpha
        self.perturbation: mx.array | None = None
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state, mx.random.state]
        self._update = mx.compile(self._replay, inputs=state, outputs=state) if compile else self._replay

    def __call__(self, x: mx.array, y: mx.array) -> mx.array:
        """Update the model ``replays`` times on one batch.

        Args:
            x: Inputs ``[b, *shape]`` within the bounds, float32, float16 or bfloat16.
            y: Classes ``[b]``, integers.

        Returns:
            array: The mean loss of the replays, a scalar.

        Raises:
            ValueError: An argument has a wrong shape or dtype.
        """
        check_batch("FreeAdversarialTraining", x, y)
        kept = mx.zeros_like(x) if self.perturbation is None else self.perturbation
        if len(kept) < len(x):
            kept = mx.concatenate([kept, mx.zeros((len(x) - len(kept), *x.shape[1:]), x.dtype)])
        moved, losses = kept[: len(x)], []
        for _ in range(self.replays):
            loss, moved = self._update(x, y, moved)
            losses.append(loss)
            mx.async_eval(loss, moved, self.model.state, self.optimizer.state)
        self.perturbation = mx.concatenate([moved, kept[len(x) :]])
        return mx.stack(losses).mean()

    def _replay(self, x: mx.array, y: mx.array, moved: mx.array) -> tuple[mx.array, mx.array]:
        def loss_of(parameters: dict[str, mx.array], moved: mx.array) -> mx.array:
            self.model.update(parameters)
            inputs = x + moved if self.bounds is None else mx.clip(x + moved, *self.bounds)
            return cross_entropy(logits_of(self.model, inputs), y).mean()

        both = mx.value_and_grad(loss_of, argnums=(0, 1))
        loss, (gradients, ascent) = both(self.model.trainable_parameters(), moved)
        self.optimizer.update(self.model, gradients)
        return loss, projected_step(moved, ascent, mx.zeros_like(moved), self.eps, self.alpha, self.norm)
