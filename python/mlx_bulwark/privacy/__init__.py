"""Differentially private training."""

from . import schedules
from .accounting import compute_epsilon, find_noise_multiplier, find_steps
from .audit import AttackPoint, AuditReport, MembershipAttack, audit_engine, audit_privacy
from .batches import Batch, Batches
from .check import CheckReport
from .clipping import AdaptiveClipping, Sensitivity
from .engine import PrivacyEngine
from .language_models import PrivateTuner, TokenRows, token_loss
from .ledger import ledger_epsilon
from .one_run import GuessBound, one_run_epsilon
from .optimizer import ClippedGradients, PrivateOptimizer
from .taps import PrivacyError
from .validate import Fix, LayerReport, ValidationReport

__all__ = [
    "AdaptiveClipping",
    "AttackPoint",
    "AuditReport",
    "Batch",
    "Batches",
    "CheckReport",
    "ClippedGradients",
    "Fix",
    "GuessBound",
    "LayerReport",
    "MembershipAttack",
    "PrivacyEngine",
    "PrivacyError",
    "PrivateOptimizer",
    "PrivateTuner",
    "Sensitivity",
    "TokenRows",
    "ValidationReport",
    "audit_engine",
    "audit_privacy",
    "compute_epsilon",
    "find_noise_multiplier",
    "find_steps",
    "ledger_epsilon",
    "one_run_epsilon",
    "schedules",
    "token_loss",
]
