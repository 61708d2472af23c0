"""Certified randomized smoothing: provable radii for any classifier, and training that makes them large."""

from .bounds import ABSTAIN, certified_radius, draws_for_radius, lower_confidence_bound
from .dataset import certify_dataset
from .defence import SmoothedModel, perturb
from .label_flips import LabelFlipCertificates, certify_label_flips, label_flip_radius
from .losses import (
    DenoisedClassifier,
    consistency_loss,
    denoising_loss,
    gaussian_augmentation_loss,
    macer_loss,
    smooth_adv_loss,
)
from .plot import plot_certified_accuracy
from .smooth import Certificate, Certificates, Smooth
from .table import CertifiedTable, Row

__all__ = [
    "ABSTAIN",
    "Certificate",
    "Certificates",
    "CertifiedTable",
    "DenoisedClassifier",
    "LabelFlipCertificates",
    "Row",
    "Smooth",
    "SmoothedModel",
    "certified_radius",
    "certify_dataset",
    "certify_label_flips",
    "consistency_loss",
    "denoising_loss",
    "draws_for_radius",
    "gaussian_augmentation_loss",
    "label_flip_radius",
    "lower_confidence_bound",
    "macer_loss",
    "perturb",
    "plot_certified_accuracy",
    "smooth_adv_loss",
]
