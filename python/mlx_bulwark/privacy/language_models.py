"""Token sequences as private training wants them: one loss an example, rows of any length, batches of any draw.

mlx-lm's own loss divides by the number of tokens in the batch, which couples its examples, and its batches have the
same members in every epoch. What stands here fits `PrivacyEngine`; `mlx_bulwark.lora` is the command made of it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from .steps import _admit, _loss_and_grad
from .taps import PrivacyError

if TYPE_CHECKING:
    from .engine import PrivacyEngine

PAD_TO = 32  # as mlx-lm: a compiled step meets few shapes
Rows = np.ndarray[Any, np.dtype[np.int64]]
Tokens = np.ndarray[Any, np.dtype[np.int32]]


def token_loss(model: nn.Module, tokens: mx.array, spans: mx.array) -> mx.array:
    """Mean cross entropy of the tokens of each example by itself.

    The tokens that count are those of mlx-lm's ``default_loss``; the mean of these losses, weighted by their numbers,
    is that loss.

    Args:
        model: a language model: tokens ``[B, T]`` to logits ``[B, T, V]``.
        tokens: ``[B, T + 1]``, int32, padded at their ends.
        spans: ``[B, 2]``, int32: length of the prompt, whose tokens do not count, and of the whole sequence.

    Returns:
        ``[B]``, float32; 0 for an example in which no token counts.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, mlx_bulwark as bw
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        >>> bw.token_loss(model, mx.array([[1, 2, 3, 0], [4, 5, 0, 0]]), mx.array([[0, 3], [1, 2]])).shape
        (2,)

    Source:
        ``mlx_lm.tuner.trainer.default_loss``.
    """
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    steps = mx.arange(1, targets.shape[1] + 1)
    counts = (steps >= spans[:, :1]) & (steps <= spans[:, 1:])
    losses = nn.losses.cross_entropy(logits, targets).astype(mx.float32)
    return mx.where(counts, losses, 0.0).sum(axis=1) / mx.maximum(counts.sum(axis=1), 1)


class TokenRows:
    """Token sequences of different lengths, for ``engine.batches(rows.data)``.

    A batch is padded to its longest sequence, and further to a multiple of 32 and one, as mlx-lm's are.

    Args:
        sequences: of each example its tokens and the length of its prompt, as mlx-lm's datasets give them; or its
            tokens alone.
        max_seq_length: longer ones are cut off.

    Attributes:
        data: What `PrivacyEngine.batches` takes: tokens and spans, for `token_loss`.
        num_truncated: How many were cut off.

    Example:
        >>> import mlx_bulwark as bw
        >>> engine = bw.PrivacyEngine(3, batch_size=2, noise_multiplier=1.0, max_grad_norm=1.0)
        >>> rows = bw.TokenRows([[1, 2, 3], ([4, 5], 1), [6] * 40])
        >>> [batch.data[1].shape for batch in engine.batches(rows.data, steps=1, microbatch_size=4)]
        [(4, 2)]
    """

    def __init__(self, sequences: Sequence[Any], max_seq_length: int = 2048) -> None:
        if max_seq_length < 2:
            raise ValueError(f"[TokenRows] max_seq_length must be at least 2 but is {max_seq_length}")
        pairs = [s if isinstance(s, tuple) else (s, 0) for s in sequences]
        self._sequences = [np.asarray(tokens[:max_seq_length], np.int32) for tokens, _ in pairs]
        self.num_truncated = sum(len(tokens) > max_seq_length for tokens, _ in pairs)
        lengths = [len(s) for s in self._sequences]
        spans = np.array([(offset, n) for (_, offset), n in zip(pairs, lengths, strict=True)], np.int32)
        self._longest = max_seq_length
        self._spans = spans.reshape(-1, 2)

    @property
    def data(self) -> tuple[Any, Tokens]:
        """Tokens and spans."""
        return self, self._spans

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, rows: Rows) -> Tokens:
        chosen = [self._sequences[i] for i in rows]
        longest = max((len(s) for s in chosen), default=0)
        padded = np.zeros((len(chosen), min(1 + PAD_TO * -(-longest // PAD_TO), self._longest)), np.int32)
        for row, sequence in zip(padded, chosen, strict=True):
            row[: len(sequence)] = sequence
        return padded


class PrivateTuner:
    """What makes ``mlx_lm.tuner.train`` private: its loss, its batches and its optimizer, all three together.

    A step takes one Poisson-sampled batch whole, so ``args.batch_size`` does not count and
    ``args.grad_accumulation_steps`` must be 1; `mlx_bulwark.lora` also splits batches. Validation is mlx-lm's own. The
    loss that is reported of training is NaN, and the tokens 0: both would depend on the data.

    Args:
        engine: its ``dataset_size`` is that of the training data.
        model: what is trained, with its adapters and frozen as it shall be.
        optimizer: any MLX optimizer.

    Attributes:
        optimizer: For ``train``; its ``update`` clips, adds the noise and updates the model.

    Example:
        >>> import mlx.nn as nn, mlx.optimizers as optim, mlx_bulwark as bw
        >>> engine = bw.PrivacyEngine(1000, batch_size=50, noise_multiplier=1.0, max_grad_norm=1.0)
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        >>> tuner = bw.PrivateTuner(engine, model, optim.Adam(1e-4))
        >>> how = {"loss": tuner.loss, "iterate_batches": tuner.iterate_batches}  # train(model, tuner.optimizer, **how)
    """

    def __init__(self, engine: "PrivacyEngine", model: nn.Module, optimizer: optim.Optimizer) -> None:
        self.optimizer = _TunerOptimizer(engine, model, optimizer)
        self._engine = engine

    def loss(self, model: nn.Module, tokens: mx.array, spans: mx.array, mask: mx.array | None = None) -> Any:
        """For ``train``: mlx-lm's own loss in validation; in training, the batch is kept for the optimizer.

        Args:
            model: the model.
            tokens: as of `token_loss`.
            spans: as of `token_loss`.
            mask: ``[B]``, bool: which rows are no padding; in training only.

        Returns:
            Loss and number of tokens.

        Example:
            >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim, mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
            >>> tuner = bw.PrivateTuner(engine, model, optim.Adam(1e-4))
            >>> tuner.loss(model, mx.array([[1, 2, 3]]), mx.array([[0, 3]]), mx.array([True]))[1].item()
            0
        """
        if mask is None:
            from mlx_lm.tuner.trainer import default_loss

            return default_loss(model, tokens, spans)
        self.optimizer.batch = (tokens, spans), mask
        return mx.array(math.nan), mx.array(0)

    def iterate_batches(
        self, dataset: Any, batch_size: int, max_seq_length: int, loop: bool = False, **more: Any
    ) -> Iterator[tuple[mx.array, ...]]:
        """For ``train``: mlx-lm's own batches in validation; in training, Poisson-sampled ones, charged as they come.

        Args:
            dataset: pairs of tokens and length of the prompt.
            batch_size: of validation.
            max_seq_length: longer sequences are cut off.
            loop: whether it is training.
            more: as of ``mlx_lm.tuner.trainer.iterate_batches``.

        Returns:
            An iterator of tokens, spans and, in training, masks.

        Raises:
            PrivacyError: A step was left out or is past the planned ones.

        Example:
            >>> import mlx.nn as nn, mlx.optimizers as optim, mlx_bulwark as bw
            >>> engine = bw.PrivacyEngine(100, batch_size=100, noise_multiplier=1.0, max_grad_norm=1.0)
            >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
            >>> tuner = bw.PrivateTuner(engine, model, optim.Adam(1e-4))
            >>> tokens, spans, mask = next(tuner.iterate_batches([([1, 2, 3], 0)] * 100, 1, 64, loop=True))
            >>> int(mask.sum().item())
            100
        """
        if not loop:
            from mlx_lm.tuner.trainer import iterate_batches

            yield from iterate_batches(dataset, batch_size, max_seq_length, **more)
            return
        rows, engine = TokenRows([dataset[i] for i in range(len(dataset))], max_seq_length), self._engine
        if len(rows) != engine.dataset_size:
            raise ValueError(f"[PrivateTuner] dataset must have {engine.dataset_size} examples but has {len(rows)}")
        while True:
            books = _admit(engine)
            drawn = engine._sampler.draw(engine.steps, engine._sampling_words)
            books.charge()
            padded = np.zeros(max(8, -(-len(drawn) // 8) * 8), np.int64)  # to few shapes
            padded[: len(drawn)] = drawn
            mask = np.arange(len(padded)) < len(drawn)
            yield tuple(mx.array(a) for a in (*(array[padded] for array in rows.data), mask))
            if int(engine.state["steps"].item()) != books.steps:
                raise PrivacyError(
                    "[PrivateTuner] every batch must be followed by an update but one was not: "
                    "grad_accumulation_steps must be 1, and the optimizer that of the tuner"
                )
            engine._advance()


class _TunerOptimizer:
    """Stands for an optimizer in ``mlx_lm.tuner.train``, which compiles its step: what changes must be in ``state``."""

    def __init__(self, engine: "PrivacyEngine", model: nn.Module, optimizer: optim.Optimizer) -> None:
        self._engine, self._optimizer = engine, engine.wrap(optimizer)
        self._optimizer.init(model.trainable_parameters())
        self._plans: dict[Any, Any] = {}
        self.batch: tuple[tuple[mx.array, mx.array], mx.array] | None = None
        self.state = {"optimizer": self._optimizer.state, "engine": engine.state}

    @property
    def learning_rate(self) -> Any:
        """The wrapped optimizer's learning rate."""
        return self._optimizer.learning_rate

    def update(self, model: nn.Module, gradients: Any) -> None:
        """Update the model from the batch that the loss has kept; the gradients of mlx-lm's own are zeros."""
        batch, self.batch = self.batch, None
        if batch is None:
            raise PrivacyError("[PrivateTuner] loss must be that of the tuner but is another")
        engine = self._engine
        engine._tracing = True  # iterate_batches has charged the step
        try:
            _, clipped = _loss_and_grad(engine, model, token_loss, *batch, None, "mean", True, self._plans)
            self._optimizer.update(model, clipped)
        finally:
            engine._tracing = False
