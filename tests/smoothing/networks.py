"""Classifiers of these tests."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import packaged_data
from mlx_bulwark.smoothing import gaussian_augmentation_loss


class DigitCNN(nn.Module):
    """The MNIST network of ccexam; images [m, 28, 28, 1] in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 7 * 7, 128)
        self.out = nn.Linear(128, 10)
        self.pool = nn.MaxPool2d(2)

    def __call__(self, x):
        mean, deviation = (v[0] for v in packaged_data.CCEXAM_SCALING["mnist"])
        x = self.pool(nn.relu(self.first((x - mean) / deviation)))
        x = self.pool(nn.relu(self.second(x)))
        return self.out(nn.relu(self.hidden(x.reshape(len(x), -1))))


def trained_cnn():
    weights = packaged_data.ccexam_weights("mnist")
    model = DigitCNN()
    hidden = weights["classifier.0.weight"].reshape(128, 64, 7, 7).transpose(0, 2, 3, 1)  # channels come last here
    arrays = {
        "first.weight": weights["features.0.weight"].transpose(0, 2, 3, 1),
        "first.bias": weights["features.0.bias"],
        "second.weight": weights["features.3.weight"].transpose(0, 2, 3, 1),
        "second.bias": weights["features.3.bias"],
        "hidden.weight": hidden.reshape(128, -1),
        "hidden.bias": weights["classifier.0.bias"],
        "out.weight": weights["classifier.2.weight"],
        "out.bias": weights["classifier.2.bias"],
    }
    model.load_weights([(name, mx.array(a)) for name, a in arrays.items()])
    return model


def mnist(rows, seed=0):
    """Images [rows, 28, 28, 1] in [0, 1] and labels, drawn from all classes."""
    images, labels = packaged_data.mnist_images()
    chosen = np.random.default_rng(seed).permutation(len(labels))[:rows]
    return (images[chosen] / 255).astype(np.float32)[..., None], labels[chosen].astype(np.int64)


class NumpyCNN:
    """The same network in NumPy, by patches and matrix products."""

    def __init__(self):
        self.weights = packaged_data.ccexam_weights("mnist")

    def __call__(self, x):
        mean, deviation = (v[0] for v in packaged_data.CCEXAM_SCALING["mnist"])
        x = (np.array(x) - np.float32(mean)) / np.float32(deviation)
        for layer in ("features.0", "features.3"):
            x = pooled(np.maximum(self.convolved(x, layer), 0))
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        x = np.maximum(x @ self.weights["classifier.0.weight"].T + self.weights["classifier.0.bias"], 0)
        return mx.array(x @ self.weights["classifier.2.weight"].T + self.weights["classifier.2.bias"])

    def convolved(self, x, layer):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        h, w = x.shape[1:3]
        patches = np.concatenate([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1)
        kernel = self.weights[f"{layer}.weight"].transpose(2, 3, 1, 0).reshape(patches.shape[-1], -1)
        return patches @ kernel + self.weights[f"{layer}.bias"]


def pooled(x):
    m, h, w, c = x.shape
    return x.reshape(m, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def train(model, x, y, sigma, steps):
    """Gaussian augmentation, a few steps."""
    optimizer = optim.Adam(3e-3)
    loss_and_grad = nn.value_and_grad(model, gaussian_augmentation_loss)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = mx.array(rng.permutation(len(x))[:64])
        _, gradients = loss_and_grad(model, x[rows], y[rows], sigma)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
