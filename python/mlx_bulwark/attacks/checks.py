"""Checks of a robustness evaluation: signs that attacks failed where the model did not resist."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..ops.step import usable
from .base import Array, Attack, Model
from .fgsm import FGSM
from .gradients import with_gradient
from .hop_skip_jump import HopSkipJump
from .losses import cross_entropy
from .pgd import PGD
from .square import Square
from .transfer import Transfer

FEW, MANY = 5, 50  # steps that are compared
QUERIES = 200  # of the black-box attack that is compared with them
TOLERANCE = 0.02  # share of the inputs by which a weaker attack may be ahead by chance
UNUSED = 0.1  # share of the bounds that data must use
BLACK_BOX: tuple[type[Attack], ...] = (HopSkipJump, Square, Transfer)


@dataclass(frozen=True)
class Flag:
    """A reason not to believe a robust accuracy."""

    name: str
    """``"randomized"``, ``"probabilities"``, ``"bounds"``, ``"no_gradients"``, ``"zero_gradients"``,
    ``"black_box_stronger"``, ``"more_steps_weaker"`` or ``"unbounded_fails"``."""
    reason: str


def check_model_outputs(model: Model, x: mx.array, attacks: Iterable[Attack]) -> list[Flag]:
    """Look at what the model returns, and at the inputs."""
    flags = []
    one, two = (model(x).astype(mx.float32) for _ in range(2))
    rows = int(np.array((one != two).any(axis=1)).sum())
    if rows and not mx.isnan(one).any().item():
        text = f"two calls differ on {rows} of {len(x)} inputs: attack the expectation over the randomness (EOT)"
        flags.append(Flag("randomized", text))
    total = one.sum(axis=1)
    if mx.logical_and((one >= 0).all(), (mx.abs(total - 1) < 1e-3).all()).item():
        flags.append(Flag("probabilities", "outputs are >= 0 and sum to 1: give logits, whose gradients do not vanish"))
    low, high = (float(np.array(a.astype(mx.float32))) for a in (x.min(), x.max()))
    for bounds in {a.bounds for a in attacks}:
        if high - low < UNUSED * (bounds[1] - bounds[0]):
            text = f"inputs lie in [{low:g}, {high:g}] of the bounds {bounds}: radius or bounds may have another unit"
            flags.append(Flag("bounds", text))
    return flags


def check_results(attacks: Mapping[str, Attack], fooled: Array, correct: Array) -> list[Flag]:
    """Compare the attacks that were made: those without gradients must not find what those with gradients miss."""
    kinds = {name: isinstance(attack, BLACK_BOX) for name, attack in attacks.items()}
    flags = []
    for place, (name, attack) in enumerate(attacks.items()):
        rivals = [i for i, (n, a) in enumerate(attacks.items()) if not kinds[n] and _same_ball(a, attack)]
        if not kinds[name] or not rivals:
            continue
        ahead = int((fooled[place] & ~fooled[rivals].any(axis=0)).sum())
        if ahead > TOLERANCE * correct.sum():
            text = f"{name} fools {ahead} of {int(correct.sum())} inputs that no attack by gradients fools"
            flags.append(Flag("black_box_stronger", f"{text}: gradients are masked"))
    return flags


def probe(model: Model, x: mx.array, y: mx.array, attacks: list[Attack]) -> list[Flag]:
    """Attack some correctly classified inputs, in the ball of the first attack that has one."""
    attack = next((a for a in attacks if a.eps is not None and not isinstance(a.eps, mx.array)), None)
    bounds = attacks[0].bounds if attack is None else attack.bounds
    try:
        flags = _zero_gradients(model, x, y)
        flags += _unbounded(model, x, y, bounds)
        if attack is not None and attack.eps:
            flags += _compared(model, x, y, attack)
    except (ValueError, RuntimeError, NotImplementedError) as e:
        text = f"gradients cannot be computed ({e}): attacks by gradients say nothing about this model"
        return [Flag("no_gradients", text)]
    return flags


def _zero_gradients(model: Model, x: mx.array, y: mx.array) -> list[Flag]:
    grad = with_gradient(model, lambda logits, y, _: cross_entropy(logits, y))(x, y, y)[0]
    zero = int(np.array((usable(grad) == 0).reshape(len(x), -1).all(axis=1)).sum())
    if zero <= TOLERANCE * len(x):
        return []
    text = f"the gradient of the cross-entropy is 0 or not a number on {zero} of {len(x)} inputs"
    return [Flag("zero_gradients", f"{text}: use a loss that does not saturate, or attacks without gradients")]


def _unbounded(model: Model, x: mx.array, y: mx.array, bounds: tuple[float, float]) -> list[Flag]:
    attack = PGD(bounds[1] - bounds[0], steps=MANY, restarts=3, bounds=bounds, compile=False)
    standing = int((~np.array(attack(model, x, y).success)).sum())
    if not standing:
        return []
    text = f"PGD fails on {standing} of {len(x)} inputs although it may change them into any other"
    return [Flag("unbounded_fails", f"{text}: gradients do not lead it")]


def _compared(model: Model, x: mx.array, y: mx.array, attack: Attack) -> list[Flag]:
    ball = {"norm": attack.norm, "bounds": attack.bounds}

    def fooled(make: Callable[..., Attack], **settings: int) -> Array:
        return np.array(make(attack.eps, **ball, **settings, compile=False)(model, x, y).success)

    single, few, many = fooled(FGSM), fooled(PGD, steps=FEW), fooled(PGD, steps=MANY)
    without = fooled(Square, queries=QUERIES)
    flags, least = [], max(TOLERANCE * len(x), 1)
    for name, weaker in (("one step fools", single), (f"{FEW} steps fool", few)):
        if (ahead := int(weaker.sum()) - int(many.sum())) > least:
            text = f"{name} {ahead} of {len(x)} inputs more than {MANY} steps: gradients are masked"
            flags.append(Flag("more_steps_weaker", text))
            break
    if (ahead := int((without & ~many & ~few & ~single).sum())) > least:
        text = f"{QUERIES} queries of Square fool {ahead} of {len(x)} inputs that {MANY} steps of PGD do not"
        flags.append(Flag("black_box_stronger", f"{text}: gradients are masked"))
    return flags


def _same_ball(one: Attack, other: Attack) -> bool:
    if isinstance(one.eps, mx.array) or isinstance(other.eps, mx.array):
        return False
    return (one.norm, one.bounds, one.eps) == (other.norm, other.bounds, other.eps)
