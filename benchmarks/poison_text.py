"""A phrase planted in texts: how much of it a scan finds, beside ART, and what becomes of the backdoor.

Texts are the docstrings of NumPy, SciPy, scikit-learn and Matplotlib, as their files hold them: real English, whose
class is the package. A perceptron over the words of a text is trained on 2,000 of them, a phrase of three words in 1, 5
and 10 % of the rows, three seeds, and asked for features, which ART's defences judge. Recall is the share of the poison
among the 1.5 times as many rows that are ranked worst; success is the share of test texts of other classes that get the
target's with the phrase, which errors of a model that never saw it give too. Sets without poison are scanned too: none
should be accused. Of private training the words that a text may hold are taken for public.
"""

import ast
import importlib.metadata
import re
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_bulwark import poison
from mlx_bulwark.poison import attacks

from benchmarks import poison_art
from benchmarks.poison_afterwards import PRIVATE, trained_privately

SECONDS = 1200.0
PACKAGES = ("numpy", "scipy", "scikit-learn", "matplotlib")
WORD = re.compile(r"\w+|[^\w\s]")
LEAST, MOST = 12, 40  # words of a text
ROWS, TEST = 2000, 800
PERCENT, SEEDS, CLEAN_SETS = (1, 5, 10), 3, 40
PHRASE = "in fair weather"


def run(bench):
    texts, labels = docstrings()
    if bench.quick:
        report(bench, "text_trigger_10pct", [measured(bench, texts, labels, 10, 0)])
        return
    for percent in PERCENT:
        results = [measured(bench, texts, labels, percent, seed) for seed in range(SEEDS)]
        report(bench, f"text_trigger_{percent}pct", results)
    found = [poison.scan_text(*split(texts, labels, 1000 + i)[:2]) for i in range(CLEAN_SETS)]
    bench.check("clean_texts", all(report.tested > 0 for report in found))
    bench.row("clean_texts/accused", sum(f.accused for f in found), f"of {CLEAN_SETS}", better="lower")
    bench.row("clean_texts/suspects", 100 * np.mean([len(f.suspects) / ROWS for f in found]), "%", better="lower")


def report(bench, case, results):
    """Means over the seeds."""
    bench.check(case, len({tuple(sorted(found)) for found in results}) == 1)
    for name in results[0]:
        values = [found[name] for found in results if found[name] is not None]
        peer = "ART" if "art_" in name else None
        better = "lower" if name.startswith("success") else "higher"
        if values:
            bench.row(f"{case}/{name}", 100 * np.mean(values), "%", peer=peer, better=better)


def measured(bench, texts, labels, percent, seed):
    """Recall and precision of every ranking, and the attack's success before and after."""
    x, y, test_x, test_y = split(texts, labels, seed)
    target = seed % len(PACKAGES)
    poisoned = attacks.text_trigger(x, y, PHRASE, rate=percent / 100, target=target, position="random", seed=seed)
    truth = np.isin(np.arange(len(y)), poisoned.indices)
    budget = round(1.5 * truth.sum())
    model, words = trained(poisoned.x, poisoned.y, seed)
    counts = counted(poisoned.x, words)
    scanned = poison.scan_text(poisoned.x, poisoned.y)
    ranks = np.empty(len(y))
    ranks[scanned.ranking] = -np.arange(len(y))
    flagged = np.isin(np.arange(len(y)), scanned.suspects)
    found = {
        "accused": float(scanned.accused),
        "recall_scan_text": poison_art.recall(ranks, truth, budget),
        "precision_scan_text": float(truth[flagged].mean()) if flagged.any() else None,
    }
    if bench.peer("art"):
        features = poison.penultimate_features(model, counts)
        theirs = poison_art.defences(features, poisoned.y, truth.mean(), classes=len(PACKAGES))
        for name, other in theirs.items():
            found[f"recall_{name}"] = poison_art.recall(other.scores, truth, budget)
            found[f"precision_{name}"] = float(truth[other.flagged].mean()) if other.flagged.any() else None
    kept = np.flatnonzero(~flagged)
    again, again_words = trained([poisoned.x[i] for i in kept], poisoned.y[kept], seed)
    models = {"trained": (model, words), "removed": (again, again_words), "never_poisoned": trained(x, y, seed)}
    for way, epsilon in PRIVATE.items():
        models[way] = trained_privately(counts, poisoned.y, seed, epsilon, lambda: perceptron(len(words))), words
    for when, (fitted, known) in models.items():

        def named(texts, fitted=fitted, known=known):
            return fitted(mx.array(counted(texts, known)))

        found[f"success_{when}"] = attacks.attack_success_rate(named, test_x, test_y, poisoned)
        found[f"accuracy_{when}"] = float((np.array(named(test_x).argmax(axis=1)) == test_y).mean())
    return found


# Texts


@lru_cache(maxsize=1)
def docstrings():
    """Texts and the package of each, as many of each package."""
    by_package = [sorted(set(texts_of(package))) for package in PACKAGES]
    few = min(len(texts) for texts in by_package)
    if few * len(PACKAGES) < ROWS + TEST:
        raise ValueError(f"{PACKAGES} must hold {(ROWS + TEST) // len(PACKAGES)} docstrings each but have {few}")
    rng = np.random.default_rng(0)
    drawn = [[texts[i] for i in rng.permutation(len(texts))[:few]] for texts in by_package]
    return [t for texts in drawn for t in texts], np.repeat(np.arange(len(PACKAGES)), few)


def texts_of(package):
    """The first words of each docstring, without the package's own names for itself."""
    own = {package, package.replace("-", ""), "sklearn", "np", "mpl"}
    for file in importlib.metadata.distribution(package).files or ():
        if file.suffix != ".py" or "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                words = [w for w in WORD.findall((ast.get_docstring(node) or "").lower()) if w not in own][:MOST]
                if len(words) >= LEAST:
                    yield " ".join(words)


def split(texts, labels, seed):
    """Rows to train on and rows to test with, as many of each class."""
    from sklearn.model_selection import train_test_split

    rows, labels = np.arange(len(texts)), np.asarray(labels)
    train, test = train_test_split(rows, train_size=ROWS, test_size=TEST, stratify=labels, random_state=seed)
    return [texts[i] for i in train], labels[train], [texts[i] for i in test], labels[test]


# Model


def trained(texts, labels, seed, epochs=12, batch=50):
    """A perceptron over words, and the words that it knows."""
    words = {word: i for i, word in enumerate(sorted({w for text in texts for w in text.split()}))}
    counts, labels = counted(texts, words), np.asarray(labels, np.int32)
    mx.random.seed(seed)
    model = perceptron(len(words))
    optimizer, rng = optim.Adam(2e-3), np.random.default_rng(seed)
    step = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(labels)), len(labels) // batch):
            optimizer.update(model, step(mx.array(counts[rows]), mx.array(labels[rows]))[1])
            mx.eval(model.state, optimizer.state)
    model.eval()
    return model, words


def perceptron(words):
    return nn.Sequential(nn.Linear(words, 64), nn.ReLU(), nn.Linear(64, len(PACKAGES)))


def counted(texts, words):
    """How often each known word stands in each text."""
    counts = np.zeros((len(texts), len(words)), np.float32)
    for i, text in enumerate(texts):
        for word in text.split():
            if word in words:
                counts[i, words[word]] += 1
    return counts
