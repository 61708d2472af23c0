"""Attacks on text classifiers: a few tokens are exchanged."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..ops.step import usable
from .base import Array, Model, check_model, checked_count, predicted
from .losses import margin


class TokenAttackResult(NamedTuple):
    """What a token attack found; one entry a text."""

    tokens: mx.array
    """``[B, T]`` in the dtype of the tokens: a text that fools the model, or the text itself."""
    success: mx.array
    """bool ``[B]``: the text was classified correctly and ``tokens`` is not; targeted: it was not classified as the
    target, and ``tokens`` is."""
    correct: mx.array
    """bool ``[B]``: the model classifies the text correctly."""
    edits: mx.array
    """int32 ``[B]``: tokens that differ from the text."""
    queries: mx.array
    """int32 ``[B]``: forward passes that were spent on the text, those of gradients included."""


class TokenSubstitution:
    """Greedy exchange of tokens, led by the gradient of the embeddings (HotFlip), each exchange checked by the model.

    In each round the gradient ranks all exchanges of one token by what they do to the margin in first order; the model
    is asked for the best of them, and the one with the largest margin stays if it is larger than before. A text is done
    when the model is fooled, when its edits are spent, or when no candidate helps. No position is changed twice.

    Args:
        max_edits: Tokens of a text that may be changed.
        allowed: bool ``[V]``, tokens that may be put in; None: all of the vocabulary.
        candidates: Exchanges a round that the model is asked for.
        targeted: Make the model predict the ``targets`` of the call.
        batch_size: Texts that the model is asked for at once.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.attacks import TokenSubstitution
        >>> table = nn.Embedding(4, 2)
        >>> table.weight = mx.array([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
        >>> model = lambda tokens: table(tokens).sum(axis=1)
        >>> found = TokenSubstitution(max_edits=1)(model, table, mx.array([[1, 1, 0]]), mx.array([0]))
        >>> found.tokens.tolist(), found.success.item(), found.edits.item()
        ([[3, 1, 0]], True, 1)

    Source:
        J. Ebrahimi et al., "HotFlip: White-Box Adversarial Examples for Text Classification", 2018.
    """

    def __init__(
        self,
        max_edits: int,
        *,
        allowed: mx.array | None = None,
        candidates: int = 32,
        targeted: bool = False,
        batch_size: int = 64,
    ) -> None:
        count = partial(checked_count, type(self).__name__)
        self.max_edits = count("max_edits", max_edits, least=0)
        self.candidates, self.batch_size = count("candidates", candidates), count("batch_size", batch_size)
        if allowed is not None and (
            not isinstance(allowed, mx.array) or allowed.dtype != mx.bool_ or allowed.ndim != 1 or not allowed.size
        ):
            raise _error(f"allowed must be bool [V] but is {allowed!r}")
        self.allowed, self.targeted = allowed, bool(targeted)

    def __call__(
        self,
        model: Model,
        embedding: nn.Module,
        tokens: mx.array,
        y: mx.array,
        *,
        protected: mx.array | None = None,
        targets: mx.array | None = None,
    ) -> TokenAttackResult:
        """Attack a batch of texts.

        Args:
            model: Takes tokens ``[m, T]`` and any m, returns logits ``[m, C]``.
            embedding: The model's own token embedding, such as a ``nn.Embedding``, which it calls with these tokens.
            tokens: Texts ``[B, T]``, integers.
            y: Classes ``[B]``, integers.
            protected: bool ``[B, T]``: places that must stay, such as padding and special tokens.
            targets: Of a targeted attack: classes ``[B]`` that differ from y.

        Returns:
            TokenAttackResult: The texts, changed where the attack succeeded, and its cost.

        Raises:
            ValueError: An argument has a wrong value, shape or dtype, or the model does not call ``embedding`` once.
            TypeError: The model cannot be called.
        """
        check_model("TokenSubstitution", model)
        table = self._checked(embedding, tokens, y, protected, targets)
        found, labels = np.array(tokens), np.array(y)
        fixed = np.zeros(found.shape, bool) if protected is None else np.array(protected)
        goals = None if targets is None else np.array(targets)
        parts = []
        for i in range(0, max(len(found), 1), self.batch_size):
            rows = slice(i, i + self.batch_size)
            parts.append(self._attacked(model, embedding, table, found[rows], labels[rows], fixed[rows], goals, rows))
        new, success, correct, queries = (np.concatenate(a) for a in zip(*parts, strict=True))
        new = np.where(success[:, None], new, found)
        edits = (new != found).sum(axis=1)
        return TokenAttackResult(
            mx.array(new).astype(tokens.dtype), *(mx.array(a) for a in (success, correct)),
            *(mx.array(a.astype(np.int32)) for a in (edits, queries)),
        )  # fmt: skip

    def _attacked(
        self, model: Model, embedding: nn.Module, table: mx.array, tokens: Array, y: Array, fixed: Array,
        goals: Array | None, rows: slice,
    ) -> tuple[Array, Array, Array, Array]:  # fmt: skip
        goal = y if goals is None else goals[rows]
        if not len(tokens):
            return tokens, np.zeros(0, bool), np.zeros(0, bool), np.zeros(0, int)
        lead, answer = self._asked(model, tokens, goal)
        correct, done = answer == y, self._reached(answer, goal)
        queries, success, current, fixed = np.ones(len(y), int), np.zeros(len(y), bool), tokens.copy(), fixed.copy()
        open_ = np.flatnonzero(~done)
        for _ in range(self.max_edits):
            if not len(open_):
                break
            gradient = self._gradient(model, embedding, current[open_], goal[open_])
            queries[open_] += 1
            owners, places, words = self._ranked(gradient, table, current[open_], fixed[open_])
            if not len(owners):
                break
            owners = open_[owners]
            tried = current[owners]
            tried[np.arange(len(owners)), places] = words
            leads, answers = self._asked(model, tried, goal[owners])
            np.add.at(queries, owners, 1)
            following = []
            for row in open_:
                mine = np.flatnonzero(owners == row)
                best = mine[leads[mine].argmax()] if len(mine) else -1
                if best < 0 or not leads[best] > lead[row]:
                    continue
                current[row], lead[row], fixed[row, places[best]] = tried[best], leads[best], True
                success[row] = self._reached(answers[best], goal[row])
                if not success[row]:
                    following.append(row)
            open_ = np.array(following, int)
        return current, success, correct, queries

    def _reached(self, answer: Array, goal: Array) -> Array:
        return np.asarray((answer == goal) if self.targeted else (answer != goal))

    def _lead(self, logits: mx.array, goal: mx.array) -> mx.array:
        """What the attack raises: the margin of the class, or that of the target with the other sign."""
        lead = margin(logits.astype(mx.float32), goal)
        return -lead if self.targeted else lead

    def _asked(self, model: Model, tokens: Array, goal: Array) -> tuple[Array, Array]:
        leads, answers = [], []
        for i in range(0, len(tokens), self.batch_size):
            rows = slice(i, i + self.batch_size)
            logits = model(mx.array(tokens[rows]))
            if not isinstance(logits, mx.array) or logits.ndim != 2 or len(logits) != len(tokens[rows]):
                has = f"shape {logits.shape}" if isinstance(logits, mx.array) else type(logits).__name__
                raise _error(f"model must return logits [m, C] but has {has}")
            if logits.shape[1] <= goal[rows].max(initial=0):
                raise _error(f"y and targets must be in [0, {logits.shape[1]}) but have {goal[rows].max()}")
            leads.append(np.array(self._lead(logits, mx.array(goal[rows]))))
            answers.append(np.array(predicted(logits)))
        # What is not a number is no class: that fools, and leads to no target.
        return np.nan_to_num(np.concatenate(leads), nan=-np.inf if self.targeted else np.inf), np.concatenate(answers)

    def _gradient(self, model: Model, embedding: nn.Module, tokens: Array, goal: Array) -> mx.array:
        """Of the embedded tokens, ``[m, T, E]``."""
        asked, classes = mx.array(tokens), mx.array(goal)
        with _moved(embedding) as move:

            def total(shift: mx.array) -> mx.array:
                move(shift)
                return self._lead(model(asked), classes).sum()

            shape = (*tokens.shape, embedding(asked[:1, :1]).shape[-1])
            grad = mx.grad(total)(mx.zeros(shape))
            mx.eval(grad)
        return usable(grad)

    def _ranked(self, gradient: mx.array, table: mx.array, tokens: Array, fixed: Array) -> tuple[Array, Array, Array]:
        """The best exchanges in first order: their rows, places and new tokens."""
        owners, places, words = [], [], []
        count = len(table)
        for row in range(len(tokens)):  # one text at a time: there are T x V exchanges of each
            gain = gradient[row] @ table.T
            gain = gain - mx.take_along_axis(gain, mx.array(tokens[row])[:, None], axis=1)
            closed = mx.logical_or(mx.array(fixed[row])[:, None], mx.arange(count) == mx.array(tokens[row])[:, None])
            if self.allowed is not None:
                closed = mx.logical_or(closed, mx.logical_not(self.allowed)[None])
            ranked = mx.where(closed, -mx.inf, gain).reshape(-1)
            best = mx.argpartition(-ranked, min(self.candidates, ranked.size) - 1)[: self.candidates]
            usable = np.sort(np.array(best)[np.isfinite(np.array(ranked[best]))])
            owners.append(np.full(len(usable), row))
            places.append(usable // count)
            words.append(usable % count)
        return np.concatenate(owners), np.concatenate(places), np.concatenate(words)

    def _checked(self, embedding: Any, tokens: Any, y: Any, protected: Any, targets: Any) -> mx.array:
        if not isinstance(embedding, nn.Module):
            raise _error(f"embedding must be a mlx.nn.Module but has type {type(embedding).__name__}")
        weight = getattr(embedding, "weight", None)
        if not isinstance(weight, mx.array) or weight.ndim != 2:
            raise _error("embedding must have a weight [V, E] but has none")
        if not isinstance(tokens, mx.array) or tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer):
            raise _error(f"tokens must be integers [B, T] but has {getattr(tokens, 'shape', type(tokens).__name__)}")
        for name, labels in (("y", y), ("targets", targets)):
            if labels is not None and (
                not isinstance(labels, mx.array)
                or labels.shape != tokens.shape[:1]
                or not mx.issubdtype(labels.dtype, mx.integer)
                or (labels.size and int(np.array(labels).min()) < 0)
            ):
                raise _error(f"{name} must be integers >= 0 of shape ({len(tokens)},), [B], but has {labels!r}")
        if self.targeted != (targets is not None):
            raise _error("targets must be given to a targeted attack, and to no other")
        if targets is not None and (targets == y).any().item():
            raise _error("targets must differ from y")
        if protected is not None and (protected.dtype != mx.bool_ or protected.shape != tokens.shape):
            raise _error(f"protected must be bool of shape {tokens.shape} but has {protected.dtype} {protected.shape}")
        values = np.array(tokens)
        if values.size and not 0 <= values.min() <= values.max() < len(weight):
            raise _error(f"tokens must be in [0, {len(weight)}) but has {values.min()} to {values.max()}")
        if self.allowed is not None and len(self.allowed) != len(weight):
            raise _error(f"allowed must have {len(weight)} entries, one a token, but has {len(self.allowed)}")
        table: mx.array = embedding(mx.arange(len(weight)))
        return table.astype(mx.float32)


@contextmanager
def _moved(embedding: nn.Module) -> Iterator[Callable[[mx.array], None]]:
    """Let the embedding add a shift to what it gives next, for the gradient of the embedded tokens."""
    kind = type(embedding)
    waiting: list[mx.array] = []

    class Moved(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: mx.array) -> mx.array:
            embedded: mx.array = kind.__call__(self, x)
            if waiting and embedded.shape == waiting[0].shape:
                embedded = embedded + waiting.pop().astype(embedded.dtype)
            return embedded

    embedding.__class__ = Moved
    try:
        yield waiting.append
        if waiting:
            raise _error("embedding must be called by the model, with its tokens, but was not")
    finally:
        embedding.__class__ = kind


def _error(text: str) -> ValueError:
    return ValueError(f"[TokenSubstitution] {text}")
