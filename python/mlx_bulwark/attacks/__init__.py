"""Adversarial attacks: what a model does at the worst inputs near the ones it was tested on."""

from .apgd import APGD
from .base import Attack, AttackResult, Normalized
from .carlini_wagner import CarliniWagnerL2
from .deepfool import DeepFool
from .ensemble import AutoAttack
from .fab import FAB
from .fgsm import FGSM
from .losses import cross_entropy, dlr, dlr_targeted, margin
from .pgd import PGD
from .square import Square
from .transfer import Transfer

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "CarliniWagnerL2",
    "DeepFool",
    "Normalized",
    "Square",
    "Transfer",
    "cross_entropy",
    "dlr",
    "dlr_targeted",
    "margin",
]
