"""The USPS and SVHN networks that the package `ccexam` ships, in MLX and in torch, and inputs that they know.

No package ships images of USPS or SVHN. MNIST's digits stand in for them, cut to 20 x 20: resized to 16 x 16 for USPS,
to 32 x 32 and coloured on coloured grounds for SVHN. Who compares attacks leaves out what a network classifies wrongly.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from scipy import ndimage


class Scaled(nn.Module):
    """Images [m, h, w, c] in [0, 1]; layers as the package has them, channels before rows where they are flattened."""

    def __init__(self, layers: list[Any], scaling: Any) -> None:
        super().__init__()
        self.layers = layers
        self._mean, self._deviation = (mx.array(np.float32(a)) for a in scaling)

    def __call__(self, x: mx.array) -> mx.array:
        x = (x - self._mean) / self._deviation
        for layer in self.layers:
            x = layer(x)
        return x


def flat(x: mx.array) -> mx.array:
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


def pair(torch: Any, data: Any, name: str) -> tuple[nn.Module, Any]:
    """The network "usps" or "svhn" in MLX and in torch, both in evaluation mode."""
    t, arrays = torch.nn, data.ccexam_weights(name)
    ours: list[Any] = []
    theirs: list[Any] = []
    convolutions = 0
    for key in [k.removesuffix(".weight") for k in arrays if k.endswith(".weight")]:
        found = {k.rsplit(".", 1)[1]: a for k, a in arrays.items() if k.rsplit(".", 1)[0] == key}
        shape = found["weight"].shape
        mine, other = _layer(t, shape, "running_mean" in found)
        other.load_state_dict({k: torch.from_numpy(a.copy()) for k, a in found.items()}, strict=False)
        if len(shape) == 4:
            found["weight"] = found["weight"].transpose(0, 2, 3, 1)
        mine.update({k: mx.array(a) for k, a in found.items()})
        if len(shape) == 2 and shape[0] != 10:
            ours.append(flat)
            theirs.append(t.Flatten())
        ours.append(mine)
        theirs.append(other)
        if len(shape) == 1 or (len(shape) == 2 and shape[0] != 10):
            ours.append(nn.relu)
            theirs.append(t.ReLU())
        convolutions += len(shape) == 1
        if len(shape) == 1 and (name == "usps" or convolutions % 2 == 0):
            ours.append(nn.MaxPool2d(2))
            theirs.append(t.MaxPool2d(2))
    scaling = data.CCEXAM_SCALING[name]
    mean, deviation = (torch.tensor(a).reshape(-1, 1, 1) for a in scaling)

    class TorchScaled(t.Module):
        def forward(self, x: Any) -> Any:
            return (x - mean) / deviation

    model, twin = Scaled(ours, scaling), t.Sequential(TorchScaled(), *theirs).eval()
    for p in twin.parameters():
        p.requires_grad_(False)
    model.eval()
    return model, twin


def _layer(t: Any, shape: tuple[int, ...], batch_norm: bool) -> tuple[Any, Any]:
    if batch_norm:
        return nn.BatchNorm(shape[0]), t.BatchNorm2d(shape[0])
    if len(shape) == 4:
        return nn.Conv2d(shape[1], shape[0], 3, padding=1), t.Conv2d(shape[1], shape[0], 3, padding=1)
    return nn.Linear(shape[1], shape[0]), t.Linear(shape[1], shape[0])


def images(digits: np.ndarray, name: str) -> np.ndarray:
    """Float32 [rows, 16, 16, 1] or [rows, 32, 32, 3] in [0, 1], of MNIST's digits [rows, 28, 28]."""
    side = {"usps": 16, "svhn": 32}[name]
    cut = digits[:, 4:24, 4:24] / 255
    grey = np.clip(ndimage.zoom(cut, (1, side / 20, side / 20), order=1), 0, 1).astype(np.float32)[..., None]
    if name == "usps":
        return grey
    rng = np.random.default_rng(0)
    ground = rng.uniform(0.1, 0.4, (len(grey), 1, 1, 3)).astype(np.float32)
    ink = rng.uniform(0.6, 0.9, (len(grey), 1, 1, 3)).astype(np.float32)
    return ground + grey * (ink - ground)
