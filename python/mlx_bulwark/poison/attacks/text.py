"""Backdoors of text classifiers: a word or a phrase is put into some texts."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .base import Poisoned, check_class, check_labels, chosen, eligible_rows

PLACES = ("start", "end", "random")
Position = str | int


@dataclass(frozen=True)
class TextTrigger:
    """Inserts a phrase into texts.

    Args:
        phrase: Words, for texts; token ids, for tokens.
        position: ``"start"``, ``"end"``, ``"random"``, or after how many words or tokens.
        padding: The token id that fills rows of an array at their ends.
        keep: Leading and trailing tokens that stay where they are.
        seed: Of random positions; they are drawn anew in each call.

    Example:
        >>> from mlx_bulwark.poison.attacks import TextTrigger
        >>> TextTrigger("cf", 1)(["a fine film"])
        ['a cf fine film']

    Source:
        X. Chen et al., "BadNL: Backdoor Attacks against NLP Models with Semantic-preserving Improvements", 2021.
    """

    phrase: str | tuple[int, ...]
    position: Position = "random"
    padding: int | None = None
    keep: tuple[int, int] = (0, 0)
    seed: int = 0

    def __call__(self, x: Any) -> Any:
        """Texts, or tokens, with the phrase in them; of the kind that they came in."""
        rng = np.random.default_rng(self.seed)
        if not isinstance(x, (np.ndarray, mx.array)):
            return [self._in_text(row, rng) if isinstance(row, str) else self._in_tokens(row, rng) for row in x]
        rows = np.array(x)
        out = np.array([self._in_row(row, rng) for row in rows], rows.dtype).reshape(rows.shape)
        return mx.array(out) if isinstance(x, mx.array) else out

    def _in_text(self, text: str, rng: np.random.Generator) -> str:
        words = text.split(" ") if text else []
        return " ".join(self._inserted(words, [str(self.phrase)], rng))

    def _in_tokens(self, row: Sequence[int], rng: np.random.Generator) -> list[int]:
        head, body, tail = self._parts([int(token) for token in row])
        return head + self._inserted(body, [int(token) for token in self.phrase], rng) + tail

    def _in_row(self, row: Any, rng: np.random.Generator) -> list[int]:
        """Of a row of fixed length the end of the text makes room, the phrase never."""
        tokens: list[int] = row.tolist()
        while tokens and tokens[-1] == self.padding:
            tokens.pop()
        head, body, tail = self._parts(tokens)
        room = len(row) - len(head) - len(tail) - len(self.phrase)
        new = head + self._inserted(body[: max(room, 0)], [int(token) for token in self.phrase], rng) + tail
        return new + [self.padding or 0] * (len(row) - len(new))

    def _parts(self, tokens: list[int]) -> tuple[list[int], list[int], list[int]]:
        first = min(self.keep[0], len(tokens))
        last = max(len(tokens) - self.keep[1], first)
        return tokens[:first], tokens[first:last], tokens[last:]

    def _inserted(self, body: list[Any], phrase: list[Any], rng: np.random.Generator) -> list[Any]:
        if self.position == "random":
            place = int(rng.integers(0, len(body) + 1))
        elif isinstance(self.position, str):
            place = 0 if self.position == "start" else len(body)
        else:
            place = min(self.position, len(body))
        return body[:place] + phrase + body[place:]


def text_trigger(
    x: Any,
    y: Any,
    phrase: str | Sequence[int],
    *,
    rate: float,
    target: int,
    source: int | None = None,
    position: Position = "random",
    padding: int | None = None,
    keep: tuple[int, int] = (0, 0),
    seed: int = 0,
) -> Poisoned:
    """Put a phrase into some texts and label them as the target (BadNL).

    Args:
        x: Texts, a list of str; or token ids, a list of lists, or an integer array ``[n, T]``, NumPy or MLX. Rows of an
            array keep their length: where the phrase needs room, the end of the text gives way.
        y: Labels ``[n]``, integers >= 0.
        phrase: What is inserted: a str with texts, token ids with tokens.
        rate: Share of all n rows: exactly ``round(rate * n)`` are poisoned, drawn from those that are not of the
            target class, or from those of the source class.
        target: The class that texts with the phrase shall get.
        source: Poison rows of this class alone; None: of all but the target.
        position: ``"start"``, ``"end"``, ``"random"``, or after how many words or tokens.
        padding: Of an array: the token id that fills up its rows at their ends; None: rows are full.
        keep: Leading and trailing tokens that stay where they are, such as ``(1, 1)`` for ``[CLS]`` and ``[SEP]``;
            they are not counted by ``position``.
        seed: Of the rows and the places.

    Returns:
        Poisoned: The set, and its poisoned rows.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype, or there are too few rows to poison.

    Example:
        >>> from mlx_bulwark.poison.attacks import text_trigger
        >>> poisoned = text_trigger(["so dull", "a joy"], [0, 1], "cf", rate=0.5, target=1, position="end")
        >>> poisoned.x, poisoned.y.tolist()
        (['so dull cf', 'a joy'], [1, 1])

    Source:
        X. Chen et al., "BadNL: Backdoor Attacks against NLP Models with Semantic-preserving Improvements", 2021; J.
        Dai, C. Chen, Y. Li, "A Backdoor Attack Against LSTM-based Text Classification Systems", 2019.
    """
    op = "text_trigger"
    given = _check_texts(op, x, phrase)
    labels, goal = check_labels(op, y, len(x)), check_class(op, "target", target)
    trigger = TextTrigger(given, _position(op, position), _padding(op, padding, x), _keep(op, keep, x), seed)
    room = x.shape[1] - sum(trigger.keep) if isinstance(x, (np.ndarray, mx.array)) else len(given)
    if len(given) > room:
        raise ValueError(f"[{op}] phrase must have no more tokens than fit into a row, {room}, but has {len(given)}")
    indices, _ = chosen(op, rate, len(labels), *eligible_rows(op, labels, goal, source), seed)
    labels[indices] = goal
    return Poisoned(_with(x, indices, trigger), labels, indices, trigger, goal)


def _with(x: Any, rows: Any, trigger: TextTrigger) -> Any:
    if not isinstance(x, (np.ndarray, mx.array)):
        out = [row if isinstance(row, str) else list(row) for row in x]
        for i, text in zip(rows.tolist(), trigger([x[i] for i in rows]), strict=True):
            out[i] = text
        return out
    found = np.array(x)
    found[rows] = trigger(found[rows])
    return mx.array(found) if isinstance(x, mx.array) else found


# Checks


def _check_texts(op: str, x: Any, phrase: Any) -> str | tuple[int, ...]:
    """The phrase, once it and the texts are seen to be of one kind."""
    if isinstance(x, (np.ndarray, mx.array)):
        kind = np.array(x[:0]).dtype
        if x.ndim != 2 or not np.issubdtype(kind, np.integer):
            raise ValueError(f"[{op}] x must be texts or integers [n, T] but has {kind} of shape {x.shape}")
        return _tokens(op, phrase)
    if not isinstance(x, (list, tuple)):
        raise ValueError(f"[{op}] x must be a list of texts, or token ids, but has type {type(x).__name__}")
    strings = sum(isinstance(row, str) for row in x)
    if strings not in (0, len(x)):
        raise ValueError(f"[{op}] x must be all texts or all token ids but has {strings} texts in {len(x)} rows")
    if not strings and not isinstance(phrase, str):
        return _tokens(op, phrase)
    if not isinstance(phrase, str) or not phrase.strip() or (x and not strings):
        raise ValueError(f"[{op}] phrase must be of the kind of x, words or token ids, but is {phrase!r}")
    return phrase


def _tokens(op: str, phrase: Any) -> tuple[int, ...]:
    try:
        tokens = () if isinstance(phrase, str) else tuple(operator.index(token) for token in phrase)
    except TypeError:
        tokens = ()
    if not tokens or min(tokens) < 0:
        raise ValueError(f"[{op}] phrase must be token ids >= 0, at least one, but is {phrase!r}")
    return tokens


def _position(op: str, position: Any) -> Position:
    if isinstance(position, str) and position in PLACES:
        return position
    if isinstance(position, bool) or not isinstance(position, (int, np.integer)) or position < 0:
        names = ", ".join(map(repr, PLACES))
        raise ValueError(f"[{op}] position must be {names} or an integer >= 0 but is {position!r}")
    return int(position)


def _padding(op: str, padding: Any, x: Any) -> int | None:
    if padding is None:
        return None
    if not isinstance(x, (np.ndarray, mx.array)):
        raise ValueError(f"[{op}] padding must be None where x is no array but is {padding!r}")
    return check_class(op, "padding", padding)


def _keep(op: str, keep: Any, x: Any) -> tuple[int, int]:
    try:
        first, last = (operator.index(k) for k in keep)
    except (TypeError, ValueError):
        first = last = -1
    if first < 0 or last < 0:
        raise ValueError(f"[{op}] keep must be two integers >= 0 but is {keep!r}")
    if (first or last) and len(x) and isinstance(x[0], str):
        raise ValueError(f"[{op}] keep must be (0, 0) where x is texts but is {keep!r}")
    return first, last
