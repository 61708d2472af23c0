"""Poison in training data and backdoors in models: planted to test, found, and taken out."""

from . import attacks
from .activation_range import ActivationRange
from .classes import Detection
from .clustering import Clusters, activation_clustering
from .features import Features, features_and_logits, penultimate_features
from .influence import self_influence
from .inspect import InspectReport, InspectResult, inspect
from .label_noise import LabelNoise, cross_fitted, label_noise
from .mixture import Mixture, class_mixture
from .neighbors import deep_knn
from .neural_cleanse import NeuralCleanse, ReversedTrigger, neural_cleanse
from .pruning import FinePruned, PruningCheck, fine_prune, pruning_check
from .repair import Kept, remove, retrain, unlearn
from .scan import METHODS, MethodResult, ScanReport, scan, scan_features
from .spectral import spectral_signatures
from .spectre import spectre
from .strip import STRIP
from .text import SuspectPhrase, TextReport, scan_text
from .values import telling_values

__all__ = [
    "METHODS",
    "STRIP",
    "ActivationRange",
    "Clusters",
    "Detection",
    "Features",
    "FinePruned",
    "InspectReport",
    "InspectResult",
    "Kept",
    "LabelNoise",
    "MethodResult",
    "Mixture",
    "NeuralCleanse",
    "PruningCheck",
    "ReversedTrigger",
    "ScanReport",
    "SuspectPhrase",
    "TextReport",
    "activation_clustering",
    "attacks",
    "class_mixture",
    "cross_fitted",
    "deep_knn",
    "features_and_logits",
    "fine_prune",
    "inspect",
    "label_noise",
    "neural_cleanse",
    "penultimate_features",
    "pruning_check",
    "remove",
    "retrain",
    "scan",
    "scan_features",
    "scan_text",
    "self_influence",
    "spectral_signatures",
    "spectre",
    "telling_values",
    "unlearn",
]
