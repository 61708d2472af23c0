"""A trained CNN on MNIST: what is certified, and an attack on the smoothed classifier itself."""

import mlx.core as mx
import mlx.nn as nn
import networks
import numpy as np
import pytest
from mlx_bulwark import key_from_seed
from mlx_bulwark.smoothing import ABSTAIN, Smooth, SmoothedModel, smooth

ALL = {0.0: 0.92, 0.25: 0.73, 0.5: 0.38}  # of all 5000 images, by the published algorithm on torch
PUBLISHED = {0.0: 0.98, 0.25: 0.80, 0.5: 0.42}  # of 60 images that are not named
# For each of 40 images the class and its votes of 1000, by the published algorithm on torch.
TORCH = """
9 602, 2 997, 0 1000, 9 927, 6 998, 6 985, 2 405, 1 944, 2 922, 0 1000, 8 857, 1 965, 1 966, 4 964, 3 906, 9 1000,
1 958, 9 976, 6 992, 8 921, 3 1000, 6 640, 8 998, 4 935, 9 935, 4 999, 0 1000, 0 287, 6 867, 1 607, 3 902, 2 778,
6 986, 7 1000, 8 994, 9 603, 9 752, 9 997, 2 748, 2 411
"""


def test_the_network_is_read_right():
    x, y = networks.mnist(100)
    model = networks.trained_cnn()
    assert (np.array(mx.argmax(model(mx.array(x)), axis=1)) == y).mean() >= 0.98
    logits = np.array(networks.NumpyCNN()(mx.array(x[:5])))
    np.testing.assert_allclose(logits, np.array(model(mx.array(x[:5]))), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_certified_accuracy_of_the_trained_network(monkeypatch):
    """40 random images, sigma = .25, n = 1000: torch's votes, image by image, and what is certified of a population.

    The network runs in NumPy, whose matrix product is fast everywhere: any callable is certified.
    """
    monkeypatch.setattr(smooth, "random_key", lambda: key_from_seed(0))
    x, y = networks.mnist(40)
    found = Smooth(networks.NumpyCNN(), 10, 0.25).certify(x, n=1000, batch_size=250)
    guess, votes = np.array([pair.split() for pair in TORCH.split(",")], int).T
    sure = votes > 700  # below, 100 draws may name another class
    p = (found.votes + votes)[sure] / 2000
    assert (np.abs(found.votes - votes)[sure] <= 5 * np.sqrt(2000 * p * (1 - p)) + 1).all()
    assert (found.prediction == guess)[sure].all()
    for radius in ALL:
        certified = float(((found.prediction == y) & (found.radius > 0) & (found.radius >= radius)).mean())
        assert abs(certified - ALL[radius]) <= 3 * np.sqrt(ALL[radius] * (1 - ALL[radius]) / 40), radius
        together = (40 * certified + 60 * PUBLISHED[radius]) / 100
        deviation = np.sqrt(together * (1 - together) * (1 / 40 + 1 / 60))
        assert abs(certified - PUBLISHED[radius]) <= 3 * deviation, radius


def eot_pgd(model, x, y, epsilon, steps):
    """L2 ascent on the smoothed classifier: each step averages the gradient over the draws of a SmoothedModel."""
    gradient = mx.grad(lambda z: nn.losses.cross_entropy(model(z), y, reduction="sum"))

    def length(v):
        return mx.sqrt(mx.square(v).sum(axis=1, keepdims=True))

    z = x
    for _ in range(steps):
        g = gradient(z)
        z = z + 2.5 * epsilon / steps * g / mx.maximum(length(g), 1e-12)
        shift = z - x
        z = x + shift * mx.minimum(1, 0.999 * epsilon / mx.maximum(length(shift), 1e-12))
        mx.eval(z)
    return z


def test_eot_pgd_finds_nothing_inside_a_radius_and_much_outside():
    """20 images through a small network; judged by predict, whose own errors are 20 in 1000 at most by alpha."""
    images, labels = networks.mnist(420)
    x = mx.array(images.reshape(420, 28, 28)[:, ::2, ::2].reshape(420, 196))
    y = mx.array(labels.astype(np.int32))
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, 10))
    networks.train(model, x[20:], y[20:], sigma=0.25, steps=150)
    smoothed = Smooth(model, 10, 0.25)
    found = smoothed.certify(x[:20], n=2000)
    certified = np.flatnonzero(found.prediction == labels[:20])
    assert len(certified) >= 12
    rows = mx.array(certified)
    radius = mx.array(found.radius[certified].astype(np.float32))[:, None]
    attacked = SmoothedModel(model, 0.25, copies=16)
    for scale, broken in ((1.0, False), (6.0, True)):
        z = eot_pgd(attacked, x[rows], y[rows], scale * radius, steps=20)
        judged = smoothed.predict(z, n=2000)
        changed = (judged != labels[:20][certified]) & (judged != ABSTAIN)
        assert changed.sum() == 0 if not broken else changed.mean() > 0.3
