"""What ``mlx-bulwark attack`` does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.step import Norm
from ..smoothing.command import OptionError, load_data, load_model
from .apgd import APGD
from .base import Attack
from .carlini_wagner import CarliniWagnerL2
from .deepfool import DeepFool
from .ensemble import AutoAttack
from .evaluate import EpsSweep, accuracy_over_eps
from .fab import FAB
from .fgsm import FGSM
from .hop_skip_jump import HopSkipJump
from .pgd import PGD
from .square import Square

Array = np.ndarray[Any, np.dtype[Any]]

ATTACKS: dict[str, tuple[Callable[..., Attack], dict[str, Any], tuple[str, ...]]] = {
    # what makes it, its own settings, and the options that it takes beside eps and bounds
    "fgsm": (FGSM, {}, ("norm", "seed")),
    "pgd": (PGD, {}, ("norm", "seed", "steps", "restarts")),
    "apgd": (APGD, {}, ("norm", "seed", "steps", "restarts")),
    "apgd-dlr": (APGD, {"loss": "dlr"}, ("norm", "seed", "steps", "restarts")),
    "apgd-t": (APGD, {"target_classes": 9}, ("norm", "seed", "steps", "restarts")),
    "cw": (CarliniWagnerL2, {}, ("steps",)),
    "deepfool": (DeepFool, {}, ("norm", "steps")),
    "fab": (FAB, {}, ("norm", "seed", "steps", "restarts")),
    "square": (Square, {}, ("norm", "seed", "queries")),
    "hopskipjump": (HopSkipJump, {}, ("norm", "seed", "queries")),
    "autoattack": (AutoAttack, {}, ("norm", "seed")),
}


@dataclass(frozen=True)
class AttackOptions:
    """Options of the command, as it documents them."""

    model: str
    weights: Path | None
    data: Path
    eps: tuple[float, ...]
    norm: Norm
    attacks: tuple[str, ...]
    bounds: tuple[float, float]
    steps: int | None
    restarts: int | None
    queries: int | None
    inputs: int | None
    batch_size: int
    seed: int
    checks: bool
    progress: bool


def run_attack(options: AttackOptions) -> EpsSweep:
    """Attack the data at each radius."""
    x, y = load_data(options.data)
    if options.inputs is not None:
        if options.inputs < 1:
            raise OptionError(f"--inputs must be >= 1 but is {options.inputs}")
        x, y = x[: options.inputs], y[: options.inputs]
    model = load_model(options.model, options.weights)
    if hasattr(model, "eval"):
        model.eval()
    return attack_model(options, model, x, y)


def attack_model(options: AttackOptions, model: Any, x: Array, y: Array) -> EpsSweep:
    """Attack a model that is loaded at each radius."""
    make_attacks(options, options.eps[0])
    data = mx.array(x.astype(np.float32)), mx.array(y.astype(np.int32))
    return accuracy_over_eps(
        model,
        data,
        lambda eps: make_attacks(options, eps),
        options.eps,
        batch_size=options.batch_size,
        checks=options.checks,
        progress=options.progress,
    )


def make_attacks(options: AttackOptions, eps: float) -> dict[str, Attack]:
    """The attacks of the options at one radius; an option that none of them takes is refused."""
    given = {name: getattr(options, name) for name in ("norm", "seed", "steps", "restarts", "queries")}
    made, used = {}, {"norm", "seed"}
    for name in options.attacks:
        if name not in ATTACKS:
            raise OptionError(f"--attack must be {', '.join(ATTACKS)} but is {name}")
        make, own, takes = ATTACKS[name]
        used |= set(takes)
        if "norm" not in takes and options.norm != "l2":
            raise OptionError(f"--norm must be l2 for --attack {name} but is {options.norm}")
        chosen = {option: given[option] for option in takes if given[option] is not None}
        made[name] = make(eps, bounds=options.bounds, **own, **chosen)
    if unused := [name for name in given if given[name] is not None and name not in used]:
        raise OptionError(f"--{unused[0]} must be an option of an --attack but none of {', '.join(made)} takes it")
    return made
