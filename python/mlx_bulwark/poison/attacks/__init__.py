"""Makers of poisoned training sets, for tests of defences and for red teams."""

from .backdoor import badnets, blended
from .base import Poisoned, attack_success_rate
from .labels import label_flip
from .triggers import Blend, Patch

__all__ = ["Blend", "Patch", "Poisoned", "attack_success_rate", "badnets", "blended", "label_flip"]
