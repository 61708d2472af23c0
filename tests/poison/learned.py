"""Digits, and a small model that learns them within half a second."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def digits():
    """Training and test images [n, 8, 8, 1] in [0, 1] with their labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = (images[order].reshape(-1, 8, 8, 1) / 16).astype(np.float32), labels[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


class Perceptron(nn.Module):
    def __init__(self, inputs, hidden=64, classes=10):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)

    def __call__(self, x):
        return self.last(nn.relu(self.first(x.reshape(len(x), -1))))


def trained(x, y, epochs=15, classes=10):
    mx.random.seed(0)
    x = np.asarray(x, np.float32)
    model, optimizer = Perceptron(int(np.prod(x.shape[1:])), classes=classes), optim.Adam(3e-3)
    step = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(x)), len(x) // 50):
            _, gradients = step(mx.array(x[rows]), mx.array(y[rows]))
            optimizer.update(model, gradients)
            mx.eval(model.state, optimizer.state)
    return model


def accuracy(model, x, y):
    return float((np.array(mx.argmax(model(mx.array(x)), axis=1)) == y).mean())
