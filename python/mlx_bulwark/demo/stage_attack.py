"""Attacks, and the training that stands them."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..attacks import APGD, PGD, robust_accuracy
from ..training import adversarial_loss
from .data import Array
from .progress import waiting
from .sections import attacked
from .stage import Outcome, Scene, percent

RADII = (0.05, 0.1, 0.15)
TRAINED_AT = 0.15
EPOCHS = 24
INPUTS = 200


def attack(scene: Scene) -> Outcome:
    """Attack a plain, a private and an adversarially trained model on test digits."""
    plain = scene.plain_model()
    loss = partial(adversarial_loss, eps=TRAINED_AT, steps=5)
    models: dict[str, nn.Module] = {
        "plain": plain,
        "hardened": scene.trained(scene.arrived, "under attack", loss, EPOCHS),
    }
    if scene.private_model is not None:
        models["private"] = _OfUnit(scene.private_model).eval()
    inputs = scene.options.reduced(INPUTS, least=20)
    data = scene.test.x[:inputs], scene.test.y[:inputs]
    curves: dict[str, dict[float, float]] = {}
    for name, model in models.items():
        with waiting(f"Attacking the {name} model"):
            curves[name] = _curve(model, data)
        scene.stop.check()
        shares = ", ".join(
            f"{percent(share)} at {eps:g}" if eps else percent(share) for eps, share in curves[name].items()
        )
        scene.tell(name, shares)
    scene.tell("", f"of {inputs} test digits, by L-infinity radius in parts of white; hardened: trained under attack")
    figures = {"inputs": inputs, "norm": "linf", "trained_at": TRAINED_AT, "robust_accuracy": curves}
    undefended, defended = (percent(curves[name][RADII[1]]) for name in ("plain", "hardened"))
    what = f"robust accuracy at L-infinity radius {RADII[1]:g}"
    return Outcome(figures, what, undefended, defended, attacked(figures))


def _curve(model: nn.Module, data: tuple[Array, Array]) -> dict[float, float]:
    curve: dict[float, float] = {}
    for eps in RADII:
        report = robust_accuracy(model, data, [PGD(eps, steps=20), APGD(eps, steps=30)], checks=False)
        curve.setdefault(0.0, report.clean_accuracy)
        curve[eps] = report.robust_accuracy
    return curve


class _OfUnit(nn.Module):
    """The private model, which was trained on [-1, 1], for images in [0, 1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model

    def __call__(self, x: mx.array) -> mx.array:
        logits: mx.array = self.model(2 * x - 1)
        return logits
