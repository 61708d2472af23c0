"""Adversarial attacks: what a model does at the worst inputs near the ones it was tested on."""

from .base import Attack, AttackResult, Normalized
from .fgsm import FGSM
from .losses import cross_entropy, dlr, dlr_targeted, margin
from .pgd import PGD

__all__ = [
    "FGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "Normalized",
    "cross_entropy",
    "dlr",
    "dlr_targeted",
    "margin",
]
