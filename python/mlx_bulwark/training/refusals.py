"""Methods of training that have no private form, and why."""

from typing import Any

from ..privacy.engine import PrivacyEngine
from ..privacy.optimizer import PrivateOptimizer
from ..privacy.taps import PrivacyError

REASONS = {
    "FreeAdversarialTraining": "it carries the perturbation of one batch to the next, so that an example changes the "
    "rows of others, and its replays use a batch for several updates of which one would be accounted",
    "AdversarialWeightPerturbation": "its perturbation of the weights is made from the whole batch without noise, so "
    "that the gradient of every example depends on the others",
    "fit": "it draws batches and sums gradients by itself; private training draws them by engine.batches and takes its "
    "steps by engine.value_and_grad",
}


def refuse_private(method: str, optimizer: Any) -> None:
    """Refuse a method under the privacy engine, known by the engine itself or by the optimizer that it wraps."""
    if isinstance(optimizer, PrivacyEngine | PrivateOptimizer):
        raise PrivacyError(
            f"[{method}] optimizer must not be under a PrivacyEngine but is: {REASONS[method]}; take an example and "
            "its adversarial twin as one unit (adversarial_twins)"
        )
