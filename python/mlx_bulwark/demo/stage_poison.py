"""Poison, planted."""

from ..gate import Schema
from ..poison.attacks import attack_success_rate, badnets
from ..provenance import Manifest
from .sections import poisoned as describe
from .stage import Digits, Outcome, Scene, percent
from .stage_check import gate_words, write

RATE = 0.05
TARGET = 0
POSITION = (0, 0)
SHOWN = 6


def poison(scene: Scene) -> Outcome:
    """Put a patch on some of the digits that arrived, call them zeros, and train on them."""
    arrived = scene.arrived
    poisoned = badnets(arrived.x, arrived.y, rate=RATE, target=TARGET, position=POSITION, seed=scene.options.seed)
    scene.poisoned = poisoned
    scene.tell("poison", f"{len(poisoned.indices)} of {len(arrived)} digits get a white patch and the label {TARGET}")
    data = Digits(poisoned.x, poisoned.y.astype(arrived.y.dtype))
    gate = Schema.infer((scene.trusted.x, scene.trusted.y)).check((data.x, data.y))
    scene.tell("gate", gate_words(gate))
    figures = {"rate": RATE, "target": TARGET, "poisoned_examples": len(poisoned.indices), "gate": gate.to_dict()}
    if "check" in scene.figures.stages:
        manifest = Manifest.load(scene.options.out / "manifest.json")
        changed = [f.path for f in manifest.verify(write(data, scene.options.out / "poisoned")).findings]
        scene.tell("manifest", f"against the one of before: {', '.join(changed)} changed")
        figures["changed_files"] = changed
    model = scene.poisoned_model = scene.trained(data, "on the poisoned digits")
    right, success = scene.accuracy(model), attack_success_rate(model, scene.test.x, scene.test.y, poisoned)
    scene.tell("model", f"{percent(right)} of the test digits are named right: nothing looks wrong")
    scene.tell("backdoor", f"{percent(success)} of the other test digits become a {TARGET} by the patch")
    figures |= {"test_accuracy": right, "attack_success_rate": success}
    shown = poisoned.indices[:SHOWN]
    section = describe(figures, arrived.x[shown], poisoned.x[shown])
    return Outcome(figures, "attack success of the patch", percent(success), "", section)
