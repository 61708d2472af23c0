"""Certified randomized smoothing: provable radii for any classifier, and training that makes them large."""

from .bounds import ABSTAIN, certified_radius, draws_for_radius, lower_confidence_bound
from .dataset import certify_dataset
from .label_flips import LabelFlipCertificates, certify_label_flips, label_flip_radius
from .plot import plot_certified_accuracy
from .smooth import Certificate, Certificates, Smooth
from .table import CertifiedTable, Row

__all__ = [
    "ABSTAIN",
    "Certificate",
    "Certificates",
    "CertifiedTable",
    "LabelFlipCertificates",
    "Row",
    "Smooth",
    "certified_radius",
    "certify_dataset",
    "certify_label_flips",
    "draws_for_radius",
    "label_flip_radius",
    "lower_confidence_bound",
    "plot_certified_accuracy",
]
