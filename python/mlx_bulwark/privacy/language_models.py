"""Token sequences as private training wants them: one loss an example, rows of any length, batches of any draw.

mlx-lm's own loss divides by the number of tokens in the batch, which couples its examples, and its batches have the
same members in every epoch. What stands here fits `PrivacyEngine`; `mlx_bulwark.lora` is the command made of it.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

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
