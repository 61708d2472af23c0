"""Certificates by randomized smoothing."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..smoothing import ABSTAIN, Smooth
from .progress import waiting
from .sections import certified
from .stage import Outcome, Scene, percent, plain_loss

SIGMA = 0.25
RADII = (0.0, 0.1, 0.25, 0.4, 0.55)
INPUTS = 60
DRAWS = 5000
EPOCHS = 20
ALPHA = 0.001


def certify(scene: Scene) -> Outcome:
    """Train on noisy digits, and certify test digits under the same noise."""
    model = scene.trained(scene.arrived, "under noise", noisy_loss, EPOCHS)
    inputs, draws = scene.options.reduced(INPUTS, least=5), scene.options.reduced(DRAWS, least=500)
    smooth = Smooth(model, num_classes=10, sigma=SIGMA)
    x, y = scene.test.x[:inputs], scene.test.y[:inputs]
    with waiting(f"Certifying {inputs} test digits with {draws} draws each"):
        found = smooth.certify(x, n0=100, n=draws, alpha=ALPHA)
    scene.stop.check()
    right = found.prediction == y
    shares = {radius: float((right & (found.radius >= radius)).mean()) for radius in RADII}
    abstained = float((found.prediction == ABSTAIN).mean())
    scene.tell("noise", f"sigma {SIGMA:g} of white, {draws} draws a digit; wrong with probability {ALPHA:g} a digit")
    curve = ", ".join(f"{percent(share)} to {radius:g}" for radius, share in shares.items() if radius)
    scene.tell("certified", f"of {inputs} test digits, to an L2 radius: {curve}; {percent(abstained)} abstained")
    figures = {
        "sigma": SIGMA,
        "norm": "l2",
        "inputs": inputs,
        "draws": draws,
        "alpha": ALPHA,
        "abstained": abstained,
        "certified_accuracy": shares,
        "average_certified_radius": float(np.where(right, found.radius, 0).mean()),
    }
    section = certified(figures, found.radius, right)
    return Outcome(figures, f"certified accuracy at L2 radius {RADII[2]:g}", "none", percent(shares[RADII[2]]), section)


def noisy_loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    """Cross entropy under the noise of the certificate."""
    return plain_loss(model, x + mx.random.normal(x.shape, scale=SIGMA), y)
