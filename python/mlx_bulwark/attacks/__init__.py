"""Adversarial attacks: what a model does at the worst inputs near the ones it was tested on."""

from .apgd import APGD
from .base import Attack, AttackResult, Normalized
from .carlini_wagner import CarliniWagnerL2
from .checks import Flag
from .deepfool import DeepFool
from .ensemble import AutoAttack
from .evaluate import AttackSummary, EpsSweep, RobustReport, accuracy_over_eps, robust_accuracy
from .fab import FAB
from .fgsm import FGSM
from .hop_skip_jump import HopSkipJump
from .losses import cross_entropy, dlr, dlr_targeted, margin
from .patch import PatchResult, UniversalPatch
from .pgd import PGD
from .plot import plot_robust_accuracy
from .square import Square
from .tokens import TokenAttackResult, TokenSubstitution
from .transfer import Transfer

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "AttackSummary",
    "AutoAttack",
    "CarliniWagnerL2",
    "DeepFool",
    "EpsSweep",
    "Flag",
    "HopSkipJump",
    "Normalized",
    "PatchResult",
    "RobustReport",
    "Square",
    "TokenAttackResult",
    "TokenSubstitution",
    "Transfer",
    "UniversalPatch",
    "accuracy_over_eps",
    "cross_entropy",
    "dlr",
    "dlr_targeted",
    "margin",
    "plot_robust_accuracy",
    "robust_accuracy",
]
