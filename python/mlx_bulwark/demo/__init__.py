"""The main job on real data: train a small CNN privately, and the same one without privacy, and compare."""

from .data import DATASETS
from .figures import Figures
from .model import CNN, loss_fn
from .run import DemoOptions, OptionError, run_demo

__all__ = ["CNN", "DATASETS", "DemoOptions", "Figures", "OptionError", "loss_fn", "run_demo"]
