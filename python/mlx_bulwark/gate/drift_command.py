"""What ``mlx-bulwark drift`` does."""

from dataclasses import dataclass
from pathlib import Path

from ..readers import read
from .drift import Drift, DriftReport


@dataclass(frozen=True)
class DriftOptions:
    """Options of the command, as it documents them."""

    reference: Path
    new: Path
    alpha: float
    min_effect: float
    categorical: tuple[str, ...]
    joint: bool
    seed: int


def run_drift(options: DriftOptions) -> DriftReport:
    """Compare one file to another."""
    drift = Drift(
        read(options.reference),
        alpha=options.alpha,
        min_effect=options.min_effect,
        categorical=options.categorical,
        joint=("mmd", "classifier") if options.joint else (),
        seed=options.seed,
    )
    return drift.compare(read(options.new))
