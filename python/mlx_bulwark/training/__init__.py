"""Robust training: losses and steps that drop into any training loop of MLX."""

from .averaging import EMA
from .distillation import distill, distillation_loss, temperature_loss
from .free import FreeAdversarialTraining
from .inputs import adversarial_inputs
from .loop import History, fit
from .losses import adversarial_loss, fast_adversarial_loss, label_smoothing_loss, mart_loss, trades_loss
from .private import adversarial_twins
from .weight_perturbation import AdversarialWeightPerturbation

__all__ = [
    "EMA",
    "AdversarialWeightPerturbation",
    "FreeAdversarialTraining",
    "History",
    "adversarial_inputs",
    "adversarial_loss",
    "adversarial_twins",
    "distill",
    "distillation_loss",
    "fast_adversarial_loss",
    "fit",
    "label_smoothing_loss",
    "mart_loss",
    "temperature_loss",
    "trades_loss",
]
