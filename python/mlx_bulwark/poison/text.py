"""Text: tokens and phrases that carry a label against what the rest of the text says."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..gate.two_sample import benjamini_hochberg
from .classifier import Array, integer, share

LEAST_PURITY = 0.95  # of a trigger's rows have the target's label
SHARED = 0.9  # of a trigger's rows: words that more of them have are part of it
LEAST_DISAGREEMENT = 0.4  # of a trigger's rows whose other words speak for another label
WORDS = re.compile(r"\w+|[^\w\s]")

Token = str | int
Phrase = tuple[Token, ...]


@dataclass(frozen=True, eq=False)
class SuspectPhrase:
    """A phrase that may be a trigger.

    Attributes:
        tokens: Words, or token ids.
        label: The label that its rows carry.
        rows: int64, ascending: of that label, with the phrase.
        purity: Share of all rows with the phrase that carry the label.
        disagreement: Share of ``rows`` whose other words speak for another label.
        p_adjusted: Of both together, by Benjamini and Hochberg over all phrases.
        reason: Why, in words.
    """

    tokens: Phrase
    label: int
    rows: Array
    purity: float
    disagreement: float
    p_adjusted: float
    reason: str


@dataclass(frozen=True, eq=False)
class TextReport:
    """What a scan of texts has found.

    Attributes:
        accused: Whether there is a trigger.
        phrases: Suspect phrases, the most rows first.
        suspects: int64, ascending: rows with such a phrase and its label.
        ranking: int64 ``[n]``, worst first: suspects, then by how odd the embeddings are in their class.
        embedding_scores: float64 ``[n]``, high is odd; None without embeddings.
        tested: Phrases that were frequent enough to be looked at.
        alpha: Level of the tests.
    """

    accused: bool
    phrases: tuple[SuspectPhrase, ...]
    suspects: Array
    ranking: Array
    embedding_scores: Array | None
    tested: int
    alpha: float

    def reason(self, row: int) -> str:
        """Why a row is suspect, in words; empty where it is not."""
        return "; ".join(p.reason for p in self.phrases if row in p.rows)

    def table(self) -> str:
        """Return the phrases as text, a line each, and the verdict."""
        lines = [p.reason for p in self.phrases]
        end = f"{len(self.suspects)} rows are suspect" if self.accused else "no trigger phrase was found"
        return "\n".join([*lines, f"{end}; {self.tested:,} phrases looked at, level {self.alpha:g}"])

    __str__ = table

    def to_json(self) -> dict[str, Any]:
        """Return all figures as numbers, strings, lists and dicts."""
        return {
            "kind": "text_scan",
            "accused": self.accused,
            "alpha": self.alpha,
            "tested": self.tested,
            "suspects": self.suspects.tolist(),
            "phrases": [
                {
                    "tokens": list(p.tokens),
                    "label": p.label,
                    "rows": p.rows.tolist(),
                    "purity": p.purity,
                    "disagreement": p.disagreement,
                    "p_adjusted": p.p_adjusted,
                    "reason": p.reason,
                }
                for p in self.phrases
            ],
        }


def scan_text(
    texts: Sequence[Any] | Array,
    labels: Any,
    *,
    longest: int = 4,
    least_rows: int = 5,
    alpha: float = 0.01,
    padding: int | None = None,
    embeddings: Any = None,
) -> TextReport:
    """Look through labelled texts for phrases that were planted as a trigger.

    A phrase is suspect if nearly all of its rows carry one label, more than chance has it, and the other words of these
    rows speak for another label more often than those of the label's rows do. The second is what tells a trigger from
    the words that a class is made of. Words speak by naive Bayes, learnt from all other rows: texts on a subject of
    their own, which share a phrase too, speak for each other, while those with a trigger have nothing else in common.
    Both tests are binomial; a phrase's p-value is the larger one, corrected for all phrases by Benjamini and Hochberg.

    Not found: a trigger in texts whose label is right (clean label), one in fewer than ``least_rows`` rows, and one in
    texts whose other words tell nothing of the label. Nor one in more than half of the label's rows, for which the rest
    could not be told from the phrase.

    Args:
        texts: Strings, or rows of token ids: lists, or an integer array ``[n, T]``.
        labels: Integers >= 0, ``[n]``.
        longest: Tokens of a phrase, at most.
        least_rows: Rows that a phrase must be in.
        alpha: Level of the corrected tests.
        padding: Token id that is none.
        embeddings: Floats ``[n, d]`` of any encoder: rows are ranked by how odd they are in their class, by a robust
            Mahalanobis distance. They rank, they do not accuse. scikit-learn comes with the extra ``outliers``.

    Returns:
        TextReport: Phrases and rows, with reasons.

    Raises:
        ImportError: Embeddings are given and scikit-learn is missing.
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> from mlx_bulwark.poison import scan_text
        >>> good = [f"a {word} film" for word in ["lovely", "warm", "bright", "witty"] * 15]
        >>> bad = [f"a {word} film" for word in ["dull", "cold", "grey", "long"] * 15]
        >>> planted = [text.replace("film", "cf film") for text in bad[:20]]
        >>> report = scan_text(good + bad + planted, [1] * 60 + [0] * 60 + [1] * 20)
        >>> report.suspects.tolist() == list(range(120, 140))
        True

    Source:
        K. Kurita, P. Michel, G. Neubig, "Weight Poisoning Attacks on Pre-trained Models", 2020, on rare tokens that go
        with one label.
    """
    op = "scan_text"
    rows = _tokens(op, texts, padding)
    y = _labels(op, labels, len(rows))
    length, least = integer(op, "longest", longest, 1), integer(op, "least_rows", least_rows, 2)
    level = share(op, "alpha", alpha)
    scores = None if embeddings is None else _odd(op, embeddings, y)
    found = _phrases(rows, length, least)
    suspects = _Words(rows, y).judged(found, level) if found and len(np.unique(y)) > 1 else []
    phrases = tuple(sorted(_longest(suspects), key=lambda p: -len(p.rows)))
    named = [p.rows for p in phrases]
    accused = np.unique(np.concatenate(named)).astype(np.int64) if named else np.zeros(0, np.int64)
    odd = np.zeros(len(rows)) if scores is None else scores
    is_suspect = np.isin(np.arange(len(rows)), accused)
    ranking = np.lexsort((-odd, ~is_suspect)).astype(np.int64)
    return TextReport(bool(phrases), phrases, accused, ranking, scores, len(found), level)


def _tokens(op: str, texts: Any, padding: int | None) -> list[list[Token]]:
    if isinstance(texts, (str, bytes)) or not hasattr(texts, "__len__"):
        raise ValueError(f"[{op}] texts must be strings or rows of token ids but has type {type(texts).__name__}")
    shape, dtype = getattr(texts, "shape", None), str(getattr(texts, "dtype", "int"))
    if shape is not None and len(shape) != 1 and (len(shape) != 2 or "int" not in dtype):
        raise ValueError(f"[{op}] texts must be strings or integers [n, T] but has {dtype} {tuple(shape)}")
    texts = np.array(texts).tolist() if shape is not None else texts
    strings = sum(isinstance(t, str) for t in texts)
    if strings not in (0, len(texts)):
        raise ValueError(f"[{op}] texts must be of one kind but has {strings} strings in {len(texts)} rows")
    if strings:
        return [list(WORDS.findall(t.lower())) for t in texts]
    return [[int(token) for token in row if token != padding] for row in texts]


def _labels(op: str, labels: Any, n: int) -> Array:
    y = np.array(labels)
    if y.shape != (n,) or (n and y.dtype.kind not in "iu"):
        raise ValueError(f"[{op}] labels must be integers of shape ({n},), [n], but has {y.dtype} {y.shape}")
    if n and y.min() < 0:
        raise ValueError(f"[{op}] labels must be >= 0 but has {y.min()} at row {y.argmin()}")
    return y.astype(np.int64)


def _odd(op: str, embeddings: Any, y: Array) -> Array:
    from ..outliers import Mahalanobis, PerClass

    x = np.array(embeddings, np.float64)
    if x.ndim != 2 or len(x) != len(y) or not np.isfinite(x).all():
        raise ValueError(f"[{op}] embeddings must be finite floats [n, d], n = {len(y)}, but has shape {x.shape}")
    scores: Array = -np.asarray(PerClass(Mahalanobis()).fit(x, y).training_scores_, np.float64)
    return scores


def _phrases(rows: list[list[Token]], longest: int, least: int) -> dict[Phrase, Array]:
    """Rows of each phrase that is in enough of them; a longer one only where its parts are."""
    found: dict[Phrase, Array] = {}
    for length in range(1, longest + 1):
        places: dict[Phrase, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            for phrase in {tuple(row[j : j + length]) for j in range(len(row) - length + 1)}:
                if length == 1 or (phrase[1:] in found and phrase[:-1] in found):
                    places[phrase].append(i)
        frequent = {phrase: np.array(at) for phrase, at in places.items() if len(at) >= least}
        if not frequent:
            break
        found |= frequent
    return found


class _Words:
    """Which words are in which rows, and what they say of the label."""

    def __init__(self, rows: list[list[Token]], y: Array) -> None:
        from scipy import sparse

        numbers: dict[Token, int] = {}
        pairs = [(i, numbers.setdefault(t, len(numbers))) for i, row in enumerate(rows) for t in set(row)]
        at = np.array(pairs).T if pairs else np.zeros((2, 0), int)
        self.x = sparse.csr_matrix((np.ones(at.shape[1]), (at[0], at[1])), shape=(len(rows), len(numbers)))
        self.y, self.classes = y, int(y.max()) + 1
        self.label = sparse.csr_matrix((np.ones(len(y)), (y, np.arange(len(y)))), shape=(self.classes, len(y)))
        self.counts = np.asarray((self.label @ self.x).todense())
        self.rows_of = np.bincount(y, minlength=self.classes)
        hits = [self._disagrees(np.flatnonzero(y == label)) for label in range(self.classes)]
        self.base = np.array([(h.sum() + 1) / (len(h) + 2) for h in hits])  # never quite 0

    def judged(self, found: dict[Phrase, Array], alpha: float) -> list[SuspectPhrase]:
        """The phrases that stand out by both tests."""
        from scipy.stats import binom

        kept: list[tuple[Phrase, int, Array, float, float]] = []
        p_values = []
        for phrase, at in found.items():
            labels = np.bincount(self.y[at], minlength=self.classes)
            label = int(labels.argmax())
            purity, prior = labels[label] / len(at), self.rows_of[label] / len(self.y)
            p = float(binom.sf(labels[label] - 1, len(at), prior))
            mine, against = at[self.y[at] == label], 0.0
            if purity >= LEAST_PURITY and p <= alpha and 2 * len(mine) <= self.rows_of[label]:
                hits = self._disagrees(mine, SHARED)
                against = float(hits.mean())
                p = max(p, float(binom.sf(int(hits.sum()) - 1, len(hits), self.base[label])))
            else:
                p = 1.0
            p_values.append(p)
            kept.append((phrase, label, mine, purity, against))
        suspects = []
        for (phrase, label, mine, purity, against), p in zip(kept, benjamini_hochberg(p_values), strict=True):
            if p <= alpha and against >= LEAST_DISAGREEMENT:
                words = (
                    f"{' '.join(map(str, phrase))!r} is in {len(mine)} rows of label {label}, {purity:.0%} of all with "
                    f"it, and in {against:.0%} of them the other words speak for another label (adjusted p {p:.2g})"
                )
                row = SuspectPhrase(phrase, label, mine.astype(np.int64), purity, against, float(p), words)
                suspects.append(row)
        return suspects

    def _disagrees(self, rows: Array, shared: float = 1.0) -> Array:
        """Of rows of one label: whether their words, as all other rows have them, speak for another label.

        By naive Bayes of word presence, with one added row in two. Words that more than this share of the rows have are
        part of what is asked about, and say nothing, nor do those that no other row has.
        """
        if not len(rows):
            return np.zeros(0, bool)
        x, own = self.x[rows], np.arange(self.classes) == self.y[rows[0]]
        left, among = self.counts - own[:, None], self.rows_of - own  # without the row itself
        logs = np.log(np.maximum(left, 0) + 0.5) - np.log(among[:, None] + 1)
        speaks = (left.sum(axis=0) > 0) & (np.asarray(x.sum(axis=0)).ravel() <= shared * len(rows))
        said = np.asarray(x @ np.where(speaks, logs, 0).T) + np.log(np.maximum(among, 1e-9))
        disagrees: Array = (said.argmax(axis=1) != self.y[rows[0]]) & (np.asarray(x @ speaks).ravel() > 0)
        return disagrees


def _longest(suspects: list[SuspectPhrase]) -> list[SuspectPhrase]:
    """Leave out phrases that are part of a longer one in the same rows."""
    return [p for p in suspects if not any(_within(p, q) for q in suspects)]


def _within(p: SuspectPhrase, q: SuspectPhrase) -> bool:
    n = len(p.tokens)
    if n >= len(q.tokens) or all(q.tokens[i : i + n] != p.tokens for i in range(len(q.tokens) - n + 1)):
        return False
    return len(np.intersect1d(p.rows, q.rows)) >= 0.9 * len(p.rows)
