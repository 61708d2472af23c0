"""A trained CNN on MNIST: what is certified, and an attack on the smoothed classifier itself."""

import mlx.core as mx
import mlx.nn as nn
import networks
import numpy as np
import pytest
from mlx_bulwark import key_from_seed
from mlx_bulwark.smoothing import ABSTAIN, Smooth, SmoothedModel, certify_dataset, smooth

EXPECTED = {0.0: 0.98, 0.25: 0.80, 0.5: 0.42}  # measured with the published algorithm on 60 other images


def test_the_network_is_read_right():
    x, y = networks.mnist(100)
    model = networks.trained_cnn()
    assert (np.array(mx.argmax(model(mx.array(x)), axis=1)) == y).mean() >= 0.98
    logits = np.array(networks.NumpyCNN()(mx.array(x[:5])))
    np.testing.assert_allclose(logits, np.array(model(mx.array(x[:5]))), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_certified_accuracy_of_the_trained_network(monkeypatch):
    """40 images, sigma = .25, n = 1000: within 3 deviations of what 40 and 60 images of one population may differ.

    The network runs in NumPy, whose matrix product is fast everywhere: any callable is certified.
    """
    monkeypatch.setattr(smooth, "random_key", lambda: key_from_seed(0))
    x, y = networks.mnist(40)
    table = certify_dataset(Smooth(networks.NumpyCNN(), 10, 0.25), x, y, n=1000, batch_size=250, progress=False)
    for radius, expected in EXPECTED.items():
        found = table.certified_accuracy(radius)
        together = (40 * found + 60 * expected) / 100
        assert abs(found - expected) <= 3 * np.sqrt(together * (1 - together) * (1 / 40 + 1 / 60)), radius


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
