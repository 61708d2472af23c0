"""Poisoned digits: how much of the poison a scan ranks worst, beside ART, and how many clean sets it accuses.

5,000 images of MNIST, 4,000 to train on and 1,000 to test, and a convolutional network that is trained on each
poisoned set, then asked for the features of that set. Each maker of poison at 1, 5 and 10 % with three seeds. Recall is
the share of the poison among the 1.5 times as many rows that are ranked worst; ART's defences judge the very same
features. Sets without poison are scanned too: none should be accused. Gradient matching aims at one test image that
clean models put into its class by two logits or more. At 10 % the clean-label attack takes all of its class.

Minutes, most of them training. With ``BULWARK_BENCH_KEEP=FOLDER`` weights, sets and results are kept there as they
come, and what is there is not made again.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx_bulwark import poison
from mlx_bulwark.poison import attacks

from benchmarks import poison_art
from benchmarks import smooth_peers as peers
from benchmarks.training import Network, fitted, plain

SECONDS = 3600.0
PERCENT, SEEDS, CLEAN_SETS = (1, 5, 10), 3, 40
EPOCHS = 8


class Split(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


class Cell(NamedTuple):
    """A set, and the model that was trained on it."""

    poisoned: attacks.Poisoned
    model: Network


def run(bench):
    if not mnist_is_here():
        return
    if bench.quick:
        return quick(bench)
    grid(bench)
    clean_sets(bench)


def quick(bench):
    """One cell of few rows: shows that it runs."""
    data = split(0, rows=600)
    poisoned = MAKERS["badnets"](data, 0.1, 0)
    model = trained(poisoned.x, poisoned.y, 0, epochs=3)
    found = judged(bench, poisoned, model)
    report(bench, "badnets_10pct", [found])


def grid(bench):
    """Every maker at every rate, means over the seeds, and the means of all cells."""
    means = {}
    for name in MAKERS:
        for percent in PERCENT:
            results = [
                remembered(f"{name}_{percent}_{seed}", functools.partial(measured, bench, name, percent, seed))
                for seed in range(SEEDS)
            ]
            report(bench, f"{name}_{percent}pct", results)
            for method in results[0]["recall"]:
                means.setdefault(method, []).append(np.mean([r["recall"][method] for r in results]))
    bench.check("all_cells", all(len(cells) == len(MAKERS) * len(PERCENT) for cells in means.values()))
    for method, cells in means.items():
        peer = "ART" if method.startswith("art") else None
        bench.row(f"all_cells/recall_{method}", 100 * np.mean(cells), "%", peer=peer, better="higher")
    if "art_activation" in means:
        best = max((m for m in means if m.startswith("art")), key=lambda m: np.mean(means[m]))
        behind = max(b - a for a, b in zip(means["combined"], means[best], strict=True))
        bench.row("all_cells/most_behind_best_art", 100 * behind, "points", peer=best, better="lower")


def measured(bench, name, percent, seed):
    cell = trained_cell(name, percent, seed)
    found = judged(bench, cell.poisoned, cell.model)
    data = split(seed)
    if name == "gradient_matching":
        found["success"] = share_of(cell.model, victim(seed), [cell.poisoned.target])
    elif cell.poisoned.trigger is not None:
        found["success"] = attacks.attack_success_rate(cell.model, data.test_x, data.test_y, cell.poisoned)
    return found | {"accuracy": share_of(cell.model, data.test_x, data.test_y)}


def judged(bench, poisoned, model):
    """Recall and precision of every ranking, and what the scan accuses."""
    truth = np.zeros(len(poisoned.y), bool)
    truth[poisoned.indices] = True
    budget = round(1.5 * truth.sum())
    scanned = poison.scan(model, poisoned.x, poisoned.y)
    rankings = {"combined": scanned.scores} | {name: m.scores for name, m in scanned.methods.items()}
    flagged = {"combined": np.isin(np.arange(len(truth)), scanned.suspects)}
    if bench.peer("art"):
        features = poison.penultimate_features(model, poisoned.x)
        theirs = poison_art.defences(features, poisoned.y, truth.mean())
        rankings |= {name: found.scores for name, found in theirs.items()}
        flagged |= {name: found.flagged for name, found in theirs.items()}
    assert sorted(scanned.ranking.tolist()) == list(range(len(truth)))
    return {
        "recall": {name: poison_art.recall(scores, truth, budget) for name, scores in rankings.items()},
        "flagged": {name: float(found.mean()) for name, found in flagged.items()},
        "precision": {name: float(truth[found].mean()) if found.any() else None for name, found in flagged.items()},
        "accused": bool(scanned.accused),
    }


def report(bench, case, results):
    bench.check(case, lambda: all(0 <= r <= 1 for found in results for r in found["recall"].values()))
    for method in results[0]["recall"]:
        recall = 100 * np.mean([found["recall"][method] for found in results])
        peer = "ART" if method.startswith("art") else None
        bench.row(f"{case}/recall_{method}", recall, "%", peer=peer, better="higher")
    for method in results[0]["precision"]:
        precisions = [found["precision"][method] for found in results if found["precision"][method] is not None]
        if precisions:
            peer = "ART" if method.startswith("art") else None
            bench.row(f"{case}/precision_{method}", 100 * np.mean(precisions), "%", peer=peer, better="higher")
    bench.row(f"{case}/accused", sum(found["accused"] for found in results), "sets", better="higher")
    if "success" in results[0]:
        success = 100 * np.mean([found["success"] for found in results])
        bench.row(f"{case}/attack_success", success, "%", better="lower")


def clean_sets(bench):
    """Sets without poison, each with a split and a network of its own."""
    results = [remembered(f"clean_{i}", functools.partial(judged_clean, bench, i)) for i in range(CLEAN_SETS)]
    accused = sum(found["accused"] for found in results)
    bench.check("clean", len(results) == CLEAN_SETS)
    bench.row("clean/accused", accused, f"of {CLEAN_SETS}", better="lower")
    for method in results[0]["flagged"]:
        flagged = 100 * np.mean([found["flagged"][method] for found in results])
        peer = "ART" if method.startswith("art") else None
        bench.row(f"clean/flagged_{method}", flagged, "%", peer=peer, better="lower")


def judged_clean(bench, i):
    data = split(1000 + i)
    model = kept_model(f"clean_{i}", lambda: trained(data.x, data.y, i))
    scanned = poison.scan(model, data.x, data.y)
    flagged = {"combined": len(scanned.suspects) / len(data.y)}
    if bench.peer("art"):
        features = poison.penultimate_features(model, data.x)
        theirs = poison_art.defences(features, data.y, 0.05)  # it must be told some rate
        flagged |= {name: float(found.flagged.mean()) for name, found in theirs.items()}
    return {"accused": bool(scanned.accused), "flagged": flagged}


# Data and models


def mnist_is_here():
    return peers.packaged_data() is not None


@functools.lru_cache(maxsize=2)
def split(seed, rows=4000):
    """Equal shares of every digit on both sides."""
    from sklearn.model_selection import train_test_split

    images, labels = peers.packaged_data().mnist_images()
    x, y = (images[..., None] / 255).astype(np.float32), labels.astype(np.int64)
    parts = train_test_split(x, y, train_size=rows, test_size=1000, stratify=y, random_state=seed)
    return Split(x=parts[0], y=parts[2], test_x=parts[1], test_y=parts[3])


def trained(x, y, seed, epochs=EPOCHS, loss=plain):
    mx.random.seed(seed)
    return fitted(Network(), loss, x, y.astype(np.int32), epochs, 2e-3)


def share_of(model, x, y):
    """Share of inputs that the model puts into these classes."""
    named = [np.array(mx.argmax(model(mx.array(x[i : i + 500])), axis=1)) for i in range(0, len(x), 500)]
    return float((np.concatenate(named) == y).mean())


@functools.lru_cache(maxsize=1)
def surrogate(seed):
    """The attacker's own model."""
    data = split(seed)
    return kept_model(f"surrogate_{seed}", lambda: trained(data.x, data.y, 100 + seed))


@functools.lru_cache(maxsize=1)
def control(seed):
    data = split(seed)
    return kept_model(f"control_{seed}", lambda: trained(data.x, data.y, seed))


def victim(seed):
    """The test image nearest to the target's class of those that two clean models know by two logits or more."""
    data, leads = split(seed), []
    for model in (surrogate(seed), control(seed)):
        logits = np.array(model(mx.array(data.test_x)))
        right = logits.argmax(axis=1) == data.test_y
        leads.append(np.where(right & (data.test_y != seed), logits.max(axis=1) - logits[:, seed], 0))
    lead = np.where(np.min(leads, axis=0) > 2, np.min(leads, axis=0), np.inf)
    return data.test_x[[lead.argmin()]]


# Poison; the target's class is that of the seed


def corners(x):
    """A bright square in every corner, as the authors of the clean-label attack lay it."""
    out = x.copy()
    for rows in (slice(0, 3), slice(25, 28)):
        for columns in (slice(0, 3), slice(25, 28)):
            out[:, rows, columns] = 1
    return out


def badnets(data, rate, seed):
    return attacks.badnets(data.x, data.y, rate=rate, target=seed, seed=seed)


def blended(data, rate, seed):
    return attacks.blended(data.x, data.y, rate=rate, target=seed, seed=seed)


def label_flip(data, rate, seed):
    return attacks.label_flip(data.x, data.y, rate=rate, seed=seed)


def label_flip_targeted(data, rate, seed):
    return attacks.label_flip(data.x, data.y, rate=rate, target=seed, seed=seed)


def clean_label(data, rate, seed):
    settings = {"eps": 3.0, "norm": "l2", "trigger": corners}
    return attacks.clean_label(surrogate(seed), data.x, data.y, rate=rate, target=seed, seed=seed, **settings)


def gradient_matching(data, rate, seed):
    settings = {"eps": 0.25, "steps": 50, "seed": seed}
    goal = victim(seed)
    return attacks.gradient_matching(surrogate(seed), data.x, data.y, goal, rate=rate, target=seed, **settings)


MAKERS = {f.__name__: f for f in (badnets, blended, label_flip, label_flip_targeted, clean_label, gradient_matching)}


def trained_cell(name, percent, seed):
    def make():
        return MAKERS[name](split(seed), percent / 100, seed)

    key = f"{name}_{percent}_{seed}"
    poisoned = kept_set(key, make) if name in ("clean_label", "gradient_matching") else make()
    return Cell(poisoned, kept_model(key, lambda: trained(poisoned.x, poisoned.y, seed)))


# What is kept of a run


def folder():
    name = os.environ.get("BULWARK_BENCH_KEEP")
    return Path(name) if name else None


def remembered(key, make):
    """A result, kept in a JSON file."""
    if folder() is None:
        return make()
    path = folder() / f"{key}.result.json"
    if not path.exists():
        result = make()
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result))
        part.replace(path)
        print(f"  {key}: {json.dumps(result)[:150]}", file=sys.stderr, flush=True)
    return json.loads(path.read_text())


def kept_model(key, make):
    """A network, whose weights are kept."""
    path = folder() and folder() / f"{key}.safetensors"
    if path and path.exists():
        model = Network()
        model.load_weights(str(path))
        model.eval()
        return model
    model = make()
    if path:
        model.save_weights(str(path))
    return model


def kept_set(key, make):
    """A poisoned set, kept but for its trigger, which is that of `corners` or none."""
    path = folder() and folder() / f"{key}.npz"
    if path and path.exists():
        with np.load(path) as kept:
            trigger = corners if key.startswith("clean_label") else None
            return attacks.Poisoned(kept["x"], kept["y"], kept["indices"], trigger, int(kept["target"]))
    poisoned = make()
    if path:
        np.savez_compressed(path, x=poisoned.x, y=poisoned.y, indices=poisoned.indices, target=poisoned.target)
    return poisoned
