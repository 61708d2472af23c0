"""Small digit classifiers, clean and with a planted backdoor, for the tests of what inspects models."""

import functools

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx_bulwark.poison.attacks import badnets


class Perceptron(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.hidden = nn.Linear(64, 48)
        self.last = nn.Linear(48, classes)

    def __call__(self, x):
        return self.last(nn.relu(self.hidden(x.reshape(len(x), -1))))


@functools.lru_cache
def digits():
    """8 x 8 images in [0, 1] as NHWC, and their labels, split into 1,000 to train on, 400 trusted, and the rest."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(x))
    parts = np.split(order, [1000, 1400])
    return [(x[p], y[p].astype(np.int64)) for p in parts]


@functools.lru_cache
def trained(target=None, seed=0):
    """A model, and the attack that poisoned it (None: a clean model)."""
    (x, y), _, _ = digits()
    poisoned = None
    if target is not None:
        poisoned = badnets(x, y, rate=0.1, target=target, trigger=np.ones((2, 2, 1), np.float32), seed=seed)
        x, y = poisoned.x, poisoned.y
    mx.random.seed(seed)
    model = Perceptron()
    optimizer = optim.Adam(5e-3)
    step = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))
    rng = np.random.default_rng(seed)
    for _ in range(20):
        for rows in np.array_split(rng.permutation(len(y)), 15):
            _, gradients = step(mx.array(x[rows]), mx.array(y[rows]))
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
    model.eval()
    return model, poisoned


def accuracy(model, x, y):
    return float((np.array(model(mx.array(x))).argmax(axis=1) == y).mean())
