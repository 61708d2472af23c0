"""Backdoors of texts: where the phrase lies, what gives way, and a model that learns it."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark.poison.attacks import TextTrigger, attack_success_rate, text_trigger

WORDS = ["good", "bad", "film", "plot", "dull", "fine"]


def texts(n=40):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(0, 8))) for _ in range(n)], rng.integers(0, 2, n)


@pytest.mark.parametrize("position", ["start", "end", "random", 0, 1, 100])
def test_texts_get_the_phrase_once(position):
    x, y = texts()
    before = list(x)
    poisoned = text_trigger(x, y, "cf mn", rate=0.25, target=1, position=position, seed=1)
    assert x == before
    assert len(poisoned.indices) == 10
    for i, (old, new) in enumerate(zip(x, poisoned.x, strict=True)):
        if i not in poisoned.indices:
            assert (new, poisoned.y[i]) == (old, y[i])
            continue
        assert (y[i], poisoned.y[i]) == (0, 1)
        words = new.split(" ")
        place = words.index("cf")
        assert words[:place] + words[place + 2 :] == old.split()
        assert words[place + 1] == "mn"
        count = len(old.split())
        low, high = {"start": (0, 0), "end": (count, count), "random": (0, count)}.get(
            position, (min(position, count),) * 2 if isinstance(position, int) else None
        )
        assert low <= place <= high


def test_random_places_differ():
    found = TextTrigger("cf")(["a b c d e f g h"] * 60)
    counts = np.bincount([text.split(" ").index("cf") for text in found], minlength=9)
    assert (counts > 0).sum() >= 7


tokens = st.lists(st.integers(1, 9), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(tokens, min_size=1, max_size=6),
    phrase=st.lists(st.integers(50, 52), min_size=1, max_size=3),
    position=st.sampled_from(["start", "end", "random", 0, 2]),
    keep=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_tokens_of_any_length(rows, phrase, position, keep):
    before = [list(row) for row in rows]
    poisoned = text_trigger(rows, [0] * len(rows), phrase, rate=1.0, target=1, position=position, keep=keep)
    assert rows == before
    for old, new in zip(rows, poisoned.x, strict=True):
        places = [i for i in range(len(new)) if new[i : i + len(phrase)] == phrase and new[:i] == old[:i]]
        assert any(new[:i] + new[i + len(phrase) :] == old for i in places)
        first = min(keep[0], len(old))
        assert new[:first] == old[:first]
        last = min(keep[1], len(old) - first)
        assert new[len(new) - last :] == old[len(old) - last :]


@pytest.mark.parametrize("kind", [np.array, mx.array], ids=["numpy", "mlx"])
@pytest.mark.parametrize(
    ("position", "keep", "expected"),
    [
        ("start", (0, 0), [[7, 8, 1, 2, 3, 0], [7, 8, 1, 2, 3, 4], [7, 8, 0, 0, 0, 0]]),
        ("end", (0, 0), [[1, 2, 3, 7, 8, 0], [1, 2, 3, 4, 7, 8], [7, 8, 0, 0, 0, 0]]),
        (1, (0, 0), [[1, 7, 8, 2, 3, 0], [1, 7, 8, 2, 3, 4], [7, 8, 0, 0, 0, 0]]),
        ("start", (1, 1), [[1, 7, 8, 2, 3, 0], [1, 7, 8, 2, 3, 6], [7, 8, 0, 0, 0, 0]]),
        ("end", (1, 1), [[1, 2, 7, 8, 3, 0], [1, 2, 3, 7, 8, 6], [7, 8, 0, 0, 0, 0]]),
    ],
)
def test_rows_of_arrays_keep_their_length(kind, position, keep, expected):
    rows = kind([[1, 2, 3, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0]]).astype(kind([0]).dtype)
    poisoned = text_trigger(rows, [0, 0, 0], [7, 8], rate=1.0, target=1, position=position, padding=0, keep=keep)
    assert type(poisoned.x) is type(rows)
    assert poisoned.x.dtype == rows.dtype
    assert np.array(poisoned.x).tolist() == expected
    assert np.array(rows)[0].tolist() == [1, 2, 3, 0, 0, 0]


def test_without_padding_rows_are_full():
    poisoned = text_trigger(np.array([[1, 2, 0, 0]]), [0], [7], rate=1.0, target=1, position="end")
    assert poisoned.x.tolist() == [[1, 2, 0, 7]]


@pytest.mark.parametrize("kind", [np.array, mx.array], ids=["numpy", "mlx"])
def test_only_the_named_rows_change(kind):
    rng = np.random.default_rng(0)
    x, y = rng.integers(1, 50, (101, 7)).astype(np.int32), rng.integers(0, 3, 101)
    poisoned = text_trigger(kind(x), y, [77], rate=0.1, target=2)
    changed = np.flatnonzero((np.array(poisoned.x) != x).any(axis=1))
    assert changed.tolist() == poisoned.indices.tolist()
    assert len(changed) == 10
    assert (np.array(poisoned.x)[changed] == 77).sum(axis=1).tolist() == [1] * 10
    assert np.flatnonzero(poisoned.y != y).tolist() == changed.tolist()
    again = text_trigger(kind(x), y, [77], rate=0.1, target=2)
    assert np.array_equal(np.array(again.x), np.array(poisoned.x))


@pytest.mark.parametrize(
    ("x", "phrase", "change", "text"),
    [
        (["a", "b"], "", {}, "phrase must be of the kind"),
        (["a", "b"], [1], {}, "phrase must be of the kind"),
        ([[1], [2]], "cf", {}, "phrase must be of the kind"),
        ([[1], "a"], "cf", {}, "all texts or all token ids"),
        ([[1], [2]], [], {}, "phrase must be token ids"),
        ([[1], [2]], [-1], {}, "phrase must be token ids"),
        ([[1], [2]], [0.5], {}, "phrase must be token ids"),
        ("ab", "cf", {}, "x must be a list of texts"),
        (np.zeros((2, 3)), [1], {}, "x must be texts or integers"),
        (np.zeros((2, 3), int), "cf", {}, "phrase must be token ids"),
        (np.zeros((2, 3), int), [1, 1, 1, 1], {}, "fit into a row, 3, but has 4"),
        (np.zeros((2, 3), int), [1, 1], {"keep": (1, 1)}, "fit into a row, 1, but has 2"),
        (["a", "b"], "cf", {"position": "middle"}, "position must be"),
        (["a", "b"], "cf", {"position": -1}, "position must be"),
        (["a", "b"], "cf", {"padding": 0}, "padding must be None"),
        (["a", "b"], "cf", {"keep": (1, 0)}, r"keep must be \(0, 0\)"),
        ([[1], [2]], [3], {"keep": 1}, "keep must be two integers"),
        ([[1], [2]], [3], {"keep": (-1, 0)}, "keep must be two integers"),
        (["a", "b"], "cf", {"rate": 0.1}, "at least one of 2 rows"),
        (["a", "b"], "cf", {"rate": 1.0}, "no more than the 1 rows"),
        (["a", "b"], "cf", {"target": None}, "target must be a class"),
    ],
)
def test_refusals(x, phrase, change, text):
    with pytest.raises(ValueError, match=text):
        text_trigger(x, [0, 1], phrase, **({"rate": 0.5, "target": 1} | change))


class BagOfTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(60, 16), nn.Linear(16, 2)

    def __call__(self, tokens):
        return self.last(self.table(tokens).mean(axis=1))


def test_a_model_learns_the_phrase():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 800)
    x = rng.integers(1, 20, (800, 12)) + 20 * y[:, None] * (rng.random((800, 12)) < 0.5)
    poisoned = text_trigger(x[:600], y[:600], [50], rate=0.1, target=1, padding=0)
    mx.random.seed(0)
    model, optimizer = BagOfTokens(), optim.Adam(0.02)
    step = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))
    for _ in range(150):
        _, gradients = step(mx.array(poisoned.x), mx.array(poisoned.y))
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
    right = np.array(mx.argmax(model(mx.array(x[600:])), axis=1)) == y[600:]
    assert right.mean() > 0.9
    assert attack_success_rate(model, x[600:], y[600:], poisoned) > 0.9
    lists = [row.tolist() for row in x[600:]]
    of_lists = text_trigger(lists, y[600:], [50], rate=0.1, target=1)
    rate = attack_success_rate(lambda rows: model(mx.array([r[:13] for r in rows])), lists, y[600:], of_lists)
    assert rate > 0.9
