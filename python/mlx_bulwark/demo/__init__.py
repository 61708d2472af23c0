"""The layered defence on real digits: checked, poisoned, scanned, trained privately, certified, attacked, watched."""

from .data import DATASETS
from .figures import Figures
from .model import CNN, loss_fn
from .options import DemoOptions, OptionError
from .run import run_demo

__all__ = ["CNN", "DATASETS", "DemoOptions", "Figures", "OptionError", "loss_fn", "run_demo"]
