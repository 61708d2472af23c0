"""Poison in training data and backdoors in models: planted to test, found, and taken out."""

from . import attacks
from .features import Features, features_and_logits, penultimate_features

__all__ = ["Features", "attacks", "features_and_logits", "penultimate_features"]
