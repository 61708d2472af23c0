"""What a person can choose."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from .data import DATASETS

EPSILON_LIMIT = 20.0  # e^20: beyond it the guarantee says nothing, and the accounting takes minutes
DELTA_LIMITS = (1e-12, 0.1)
SEED_LIMIT = 2**32
FULL_STEPS = 100  # with fewer, every stage does less

STAGES = ("check", "poison", "scan", "private", "certify", "attack", "monitor", "report")
NEEDS = {"scan": "poison"}


class OptionError(ValueError):
    """An option has a value that cannot be used."""


@dataclass(frozen=True)
class DemoOptions:
    """What a person can choose; the fields are the options of ``mlx-bulwark demo``."""

    epsilon: float = 3.0
    delta: float = 1e-5
    steps: int = FULL_STEPS
    batch_size: int = 256
    data: str = "digits"
    seed: int = 0
    out: Path = Path("bulwark-demo")
    json: Path | None = None
    only: tuple[str, ...] = ()
    """Stages to run, with those that they need; none: all."""
    skip: tuple[str, ...] = ()
    """Stages to leave out, with those that need them."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that run, in their order."""
        wanted = set(self.only or STAGES)
        wanted |= {NEEDS[name] for name in wanted if name in NEEDS}
        left = wanted - set(self.skip)
        return tuple(name for name in STAGES if name in left and NEEDS.get(name, name) in left)

    def reduced(self, full: int, least: int = 1) -> int:
        """A number of epochs, inputs or draws that shrinks with the steps that were asked for."""
        return max(least, round(full * min(1.0, self.steps / FULL_STEPS)))

    def check(self) -> None:
        """Refuse what cannot be used, and make the folders of the output.

        Raises:
            OptionError: a value is out of range, or a folder cannot be written.
        """
        low, high = DELTA_LIMITS
        if not 0 < self.epsilon <= EPSILON_LIMIT:
            raise OptionError(f"--epsilon must be above 0 and at most {EPSILON_LIMIT:g} but is {self.epsilon:g}")
        if not low <= self.delta <= high:
            raise OptionError(f"--delta must be from {low:g} to {high:g} but is {self.delta:g}")
        if self.steps < 1:
            raise OptionError(f"--steps must be at least 1 but is {self.steps}")
        if self.batch_size < 1:
            raise OptionError(f"--batch-size must be at least 1 but is {self.batch_size}")
        if self.data not in DATASETS:
            raise OptionError(f"--data must be one of {', '.join(DATASETS)} but is {self.data!r}")
        if not 0 <= self.seed < SEED_LIMIT:
            raise OptionError(f"--seed must be from 0 to {SEED_LIMIT - 1} but is {self.seed}")
        for option, names in (("--only", self.only), ("--skip", self.skip)):
            if unknown := [name for name in names if name not in STAGES]:
                raise OptionError(f"{option} must be one of {', '.join(STAGES)} but is {unknown[0]!r}")
        if not self.stages:
            raise OptionError("--skip must leave a stage but leaves none")
        _check_folder("--out", self.out)
        if self.json is not None:
            if self.json.is_dir():
                raise OptionError(f"--json must name a file but {self.json} is a folder")
            _check_folder("--json", self.json.parent)


def _check_folder(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise OptionError(f"{option} must be writable but {folder} is not: {e.strerror}") from e
