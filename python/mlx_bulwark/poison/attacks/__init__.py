"""Makers of poisoned training sets, for tests of defences and for red teams."""

from .backdoor import badnets, blended
from .base import Poisoned, attack_success_rate
from .clean_label import clean_label
from .gradient_matching import gradient_matching
from .labels import label_flip
from .text import TextTrigger, text_trigger
from .triggers import Blend, Patch

__all__ = [
    "Blend",
    "Patch",
    "Poisoned",
    "TextTrigger",
    "attack_success_rate",
    "badnets",
    "blended",
    "clean_label",
    "gradient_matching",
    "label_flip",
    "text_trigger",
]
