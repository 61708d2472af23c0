"""AutoAttack: what four different attacks together cannot do, input by input."""

from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.step import Norm
from .apgd import APGD
from .base import Array, Attack, Model, Task
from .fab import FAB
from .square import Square

VERSIONS = ("standard",)


class AutoAttack(Attack):
    """The standard ensemble without anything to tune: an input stands only if all of four attacks leave it standing.

    APGD on cross-entropy, APGD on the targeted difference of logits ratio, FAB on targets, and Square, which sees no
    gradients, one after the other, each on the inputs that still stand: the pointwise worst case, which is what a
    robust accuracy should be. In linf and l2 as published: 100 steps, 9 target classes, 5000 queries; in l1 APGD with 5
    restarts and 5 target classes. With 3 classes the untargeted ratio takes the place of the targeted one, which wants
    4; with 2 the margin does.

    Args:
        eps: Radius of the ball, in the unit of the input: a number >= 0, or float32 ``[B]``.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        version: ``"standard"``.
        bounds: Lowest and highest value of a valid input.
        seed: Of all that the attacks draw.
        compile: Compile the steps of a ``nn.Module``; None: on a GPU. A plain function is never compiled.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import AutoAttack
        >>> model = lambda x: mx.stack([x[:, 0], 1 - x[:, 0]], axis=1)
        >>> attack = AutoAttack(eps=0.2)
        >>> attack(model, mx.array([[0.6, 0.5]]), mx.array([0])).success.tolist()
        [True]
        >>> list(attack.attacks(classes=10))
        ['apgd-ce', 'apgd-t', 'fab-t', 'square']

    Source:
        F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks", 2020.
    """

    def __init__(
        self,
        eps: float | mx.array,
        *,
        norm: Norm = "linf",
        version: str = "standard",
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        compile: bool | None = None,
    ) -> None:
        super().__init__(eps=eps, norm=norm, bounds=bounds, seed=seed)
        if eps is None:
            raise self._error("eps must be a number or float32 [B] but is None")
        if version not in VERSIONS:
            raise self._error(f"version must be {' or '.join(map(repr, VERSIONS))} but is {version!r}")
        self.version, self.compile = version, compile

    def attacks(self, classes: int) -> dict[str, Attack]:
        """The attacks of the ensemble on a model of so many classes, in their order."""
        eps: Any = self.eps
        common: dict[str, Any] = {
            "norm": self.norm,
            "bounds": self.bounds,
            "seed": self.seed,
            "compile": self.compile,
        }
        sparse = self.norm == "l1"
        first = APGD(eps, restarts=5 if sparse else 1, **common)
        if classes > 3:
            second = {"apgd-t": APGD(eps, target_classes=5 if sparse else 9, **common)}
        elif classes == 3:
            second = {"apgd-dlr": APGD(eps, loss="dlr", **common)}
        else:
            second = {"apgd-margin": APGD(eps, loss="margin", **common)}
        return {"apgd-ce": first, **second, "fab-t": FAB(eps, **common), "square": Square(eps, **common)}

    def _perturb(self, model: Model, task: Task, key: mx.array) -> tuple[mx.array, Array]:
        logits = self._logits(model, task.x[:1])
        found, queries = mx.array(task.x), np.zeros(len(task), np.int32)
        standing = np.arange(len(task))
        for attack in self.attacks(logits.shape[1]).values():
            rows = mx.array(standing)
            run = task.take(rows)
            candidates, spent = attack._perturb(model, run, key)
            candidates, fooled = attack._judged(model, run, candidates)
            found[rows] = candidates
            queries[standing] += np.asarray(spent, np.int32) + 1
            standing = standing[~fooled]
            if not len(standing):
                break
        return found, queries
