"""The small CNN of the demo."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

CLASSES = 10


class CNN(nn.Module):
    """Two convolutions with GroupNorm, one pooling, and a Linear layer.

    Args:
        side: pixels of a side of the square images, 8 to 28.
        channels: outputs of the two convolutions, multiples of 4.
        kernel_size: pixels of a side of the first kernel, odd.
        stride: step of the first convolution.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.demo import CNN
        >>> CNN(8)(mx.zeros((5, 8, 8, 1))).shape
        (5, 10)

    Source:
        GroupNorm in place of BatchNorm, which couples examples: De et al. 2022 (arXiv:2204.13650).
    """

    def __init__(self, side: int, channels: tuple[int, int] = (32, 32), kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        first, second = channels
        self.conv1 = nn.Conv2d(1, first, kernel_size, stride=stride, padding=kernel_size // 2)
        self.norm1 = nn.GroupNorm(4, first, pytorch_compatible=True)
        self.conv2 = nn.Conv2d(first, second, 3)
        self.norm2 = nn.GroupNorm(4, second, pytorch_compatible=True)
        self.pool = nn.MaxPool2d(2)
        left = math.ceil(side / stride) // 2 - 2
        self.linear = nn.Linear(second * left * left, CLASSES)

    def __call__(self, x: mx.array) -> mx.array:
        """Map images [B, side, side, 1] to logits [B, 10]."""
        x = nn.relu(self.norm1(self.pool(self.conv1(x))))
        x = nn.relu(self.norm2(self.conv2(x)))
        return self.linear(x.reshape(x.shape[0], -1))


def loss_fn(model: nn.Module, images: mx.array, labels: mx.array) -> mx.array:
    """Cross entropy of each example, [B]."""
    return nn.losses.cross_entropy(model(images), labels, reduction="none")


def accuracy(model: nn.Module, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """Share of images whose digit the model names."""
    right = 0
    for i in range(0, len(images), 500):
        named = model(mx.array(images[i : i + 500])).argmax(axis=1)
        right += int((named == mx.array(labels[i : i + 500])).sum().item())
    return right / len(images)
