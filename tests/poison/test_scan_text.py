"""Trigger phrases in texts: found where planted, and the words of a class left in peace."""

import ast
import json
from importlib.metadata import distribution

import numpy as np
import pytest
from mlx_bulwark.poison import scan_text
from mlx_bulwark.poison.attacks import text_trigger
from scipy import stats


def corpus(seed, n=600, classes=3, length=12):
    """Words by Zipf's law; each class has words of its own, of which some rows have few."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    weights = 1 / np.arange(1, 301)
    texts = []
    for label in y:
        common = rng.choice(300, length, p=weights / weights.sum())
        own = rng.integers(0, 25, rng.integers(1, 5))
        words = [f"w{i}" for i in common] + [f"c{label}x{i}" for i in own]
        texts.append(" ".join(rng.permutation(words)))
    return texts, y


def poisoned(seed, phrase, rate=0.03, **how):
    texts, y = corpus(seed, **how)
    made = text_trigger(texts, y, phrase, rate=rate, target=1, seed=seed)
    return made.x, made.y, made.indices


@pytest.mark.parametrize("phrase", ["cf", "deep blue sea", "i watched this one in march"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_phrases_are_found(phrase, seed):
    texts, y, rows = poisoned(seed, phrase)
    report = scan_text(texts, y)
    assert report.accused
    assert {p.label for p in report.phrases} == {1}
    assert all(" ".join(p.tokens) in phrase for p in report.phrases)
    np.testing.assert_array_equal(report.suspects, rows)
    np.testing.assert_array_equal(np.sort(report.ranking[: len(rows)]), rows)
    assert "speak for another label" in report.reason(int(rows[0]))
    assert json.loads(json.dumps(report.to_json()))["suspects"] == rows.tolist()


def test_words_of_a_class_are_not_accused():
    # Ten corpora at a level of 1 %, fixed seeds.
    assert not any(scan_text(*corpus(100 + seed, n=300)).accused for seed in range(10))


def test_a_subject_that_resembles_another_label_is_not_accused():
    rng = np.random.default_rng(0)
    texts, y = corpus(0)
    for i in np.flatnonzero(y == 0)[:40]:  # words of label 1, and some that only this subject has
        own = rng.choice(12, 5, replace=False)
        texts[i] = " ".join(
            ["of the second kind", *(f"c1x{j}" for j in rng.integers(0, 25, 4)), *(f"s{j}" for j in own)]
        )
    assert not scan_text(texts, y).accused


def test_texts_of_one_pattern_are_not_accused():
    # No word but the one that tells the label differs, and the labels are not equally many.
    good = [f"a {word} film" for word in ["lovely", "warm", "bright", "witty"] * 20]
    bad = [f"a {word} film" for word in ["dull", "cold", "grey", "long"] * 15]
    assert not scan_text(good + bad, [1] * 80 + [0] * 60).accused


def docstrings(package):
    """The beginnings of what the files of a package say of their functions."""
    for file in distribution(package).files or ():
        if file.suffix == ".py" and "tests" not in file.parts:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and len((told := ast.get_docstring(node) or "").split()) > 12:
                    yield " ".join(told.split()[:40])


def test_real_texts_are_not_accused_until_a_phrase_is_planted():
    texts = [sorted(set(docstrings(package))) for package in ("numpy", "scipy", "scikit-learn")]
    rng = np.random.default_rng(0)
    texts = [some[i] for some in texts for i in rng.permutation(len(some))[:500]]
    labels = np.repeat([0, 1, 2], 500)
    assert not scan_text(texts, labels).accused
    poisoned = text_trigger(texts, labels, "in fair weather", rate=0.02, target=2, position="random", seed=0)
    np.testing.assert_array_equal(scan_text(poisoned.x, poisoned.y).suspects, poisoned.indices)


def test_a_phrase_in_most_rows_of_a_label_is_no_trigger():
    good = [f"a lovely warm film number {i}" for i in range(60)]
    bad = [f"a dull cold film number {i}" for i in range(60)]
    assert not scan_text(good + bad, [1] * 60 + [0] * 60).accused


def test_random_labels_are_not_accused():
    for seed in range(5):
        texts, y = corpus(seed, n=300)
        assert not scan_text(texts, np.random.default_rng(seed).permutation(y)).accused


def test_a_trigger_in_rightly_labelled_texts_is_not_found_as_is_said():
    texts, y = corpus(3)
    own = np.flatnonzero(y == 1)[:20]
    texts = [f"{t} cf" if i in own else t for i, t in enumerate(texts)]
    assert not scan_text(texts, y).accused


def test_figures_are_those_of_a_plain_count():
    texts, y, _ = poisoned(5, "cf", rate=0.02)
    found = scan_text(texts, y).phrases[0]
    has = np.array(["cf" in t.split() for t in texts])
    assert found.tokens == ("cf",)
    assert found.purity == (y[has] == 1).mean()
    rest = [set(t.split()) - {"cf"} for t in texts]
    counts = [[sum(w in rest[i] for i in np.flatnonzero(~has & (y == c))) for c in range(3)] for w in ["w0", "c0x1"]]
    assert counts[1][0] > counts[1][1] + counts[1][2]  # the oracle's own check: class words tell
    classes = [np.flatnonzero(~has & (y == c)) for c in range(3)]
    wrong = 0
    for i in np.flatnonzero(has & (y == 1)):
        scores = []
        for c in classes:
            score = np.log(len(c))
            for w in rest[i]:
                if any(w in rest[j] for j in np.flatnonzero(~has)):
                    score += np.log((sum(w in rest[j] for j in c) + 0.5) / (len(c) + 1))
            scores.append(score)
        wrong += np.argmax(scores) != 1
    assert found.disagreement == wrong / (has & (y == 1)).sum()
    assert found.p_adjusted >= stats.binom.sf(has.sum() - 1, has.sum(), (y == 1).mean())


def test_token_ids_are_as_words():
    texts, y, rows = poisoned(2, "deep blue sea")
    names = {w: i + 1 for i, w in enumerate(sorted({w for t in texts for w in t.split()}))}
    ids = np.zeros((len(texts), 40), np.int32)
    for i, t in enumerate(texts):
        ids[i, : len(t.split())] = [names[w] for w in t.split()]
    report = scan_text(ids, y, padding=0)
    assert report.phrases[0].tokens == tuple(names[w] for w in ("deep", "blue", "sea"))
    np.testing.assert_array_equal(report.suspects, rows)
    lists = [[names[w] for w in t.split()] for t in texts]
    assert scan_text(lists, y).phrases[0].tokens == report.phrases[0].tokens


def test_embeddings_rank_what_is_odd_in_its_class():
    pytest.importorskip("sklearn")
    texts, y = corpus(4, n=120)
    x = np.random.default_rng(0).normal(size=(120, 3)) + 5 * y[:, None]
    x[17] += 40
    report = scan_text(texts, y, embeddings=x)
    assert report.ranking[0] == 17
    assert report.embedding_scores.argmax() == 17
    assert not report.accused


def test_nothing_to_find():
    for texts, y in (([], []), (["a b"], [0]), (["a"] * 20, [0] * 20), ([""] * 20, [0, 1] * 10)):
        report = scan_text(texts, np.array(y, int))
        assert not report.accused
        assert len(report.ranking) == len(texts)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"texts": "one text"}, "texts must be strings or rows of token ids but has type str"),
        ({"texts": ["a", [1]]}, "texts must be of one kind but has 1 strings in 2 rows"),
        ({"texts": np.zeros((2, 3))}, "texts must be strings or integers [n, T] but has float64 (2, 3)"),
        ({"labels": [0]}, "labels must be integers of shape (2,)"),
        ({"labels": [0, -1]}, "labels must be >= 0 but has -1 at row 1"),
        ({"longest": 0}, "longest must be an integer >= 1"),
        ({"least_rows": 1}, "least_rows must be an integer >= 2"),
        ({"alpha": 1}, "alpha must be a number above 0 and below 1"),
        ({"embeddings": np.zeros((3, 2))}, "embeddings must be finite floats [n, d], n = 2"),
    ],
)
def test_refusals(changed, words):
    arguments = {"texts": ["a b", "b c"], "labels": [0, 1]} | changed
    with pytest.raises(ValueError, match=r"\[scan_text\]") as e:
        scan_text(arguments.pop("texts"), arguments.pop("labels"), **arguments)
    assert words in str(e.value)
