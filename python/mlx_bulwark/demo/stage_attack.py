"""Attacks, and the training that stands them."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..attacks import APGD, PGD, robust_accuracy
from ..training import adversarial_loss
from .data import Array
from .progress import waiting
from .stage import Outcome, Scene, percent

RADII = (0.05, 0.1, 0.15)
TRAINED_AT = 0.15
EPOCHS = 24
INPUTS = 200


def attack(scene: Scene) -> Outcome:
    """Attack a plain, a private and an adversarially trained model on test digits."""
    plain = scene.plain_model()
    loss = partial(adversarial_loss, eps=TRAINED_AT, steps=5)
    models: dict[str, Callable[[mx.array], mx.array]] = {
        "plain": plain,
        "hardened": scene.trained(scene.arrived, "under attack", loss, EPOCHS),
    }
    if scene.private_model is not None:
        models["private"] = _of_unit(scene.private_model)
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
    return Outcome(figures, f"robust accuracy at L-infinity radius {RADII[1]:g}", undefended, defended)


def _curve(model: Callable[[mx.array], mx.array], data: tuple[Array, Array]) -> dict[float, float]:
    curve: dict[float, float] = {}
    for eps in RADII:
        report = robust_accuracy(model, data, [PGD(eps, steps=20), APGD(eps, steps=30)], checks=False)
        curve.setdefault(0.0, report.clean_accuracy)
        curve[eps] = report.robust_accuracy
    return curve


def _of_unit(model: nn.Module) -> Callable[[mx.array], mx.array]:
    """The private model was trained on [-1, 1]."""
    return lambda x: model(2 * x - 1)
