"""The run: one stage of the defence after the other."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..provenance import AuditLog
from ..provenance.audit_log import lines
from ..report import Report
from .data import DATASETS, Split, load
from .figures import Figures
from .options import DemoOptions, OptionError
from .progress import stoppable, waiting
from .sections import headline, layers, removed
from .stage import Outcome, Scene
from .stage_attack import attack
from .stage_certify import certify
from .stage_check import check
from .stage_monitor import monitor
from .stage_poison import poison
from .stage_private import private
from .stage_scan import scan


class Stage(NamedTuple):
    """One layer of the defence."""

    title: str
    reason: str
    run: Callable[[Scene], Outcome]


STAGES = {
    "check": Stage(
        "Check the data, and write down what they are",
        "what trains a model decides what it does: broken rows are refused, changed files are known by their digest",
        check,
    ),
    "poison": Stage(
        "Poison them, as an attacker would",
        "a backdoor hides where tests do not look: all is well, until an image bears the attacker's patch",
        poison,
    ),
    "scan": Stage(
        "Find the poison, remove it, train again",
        "poison within all rules shows in what the model made of it: rows that bear a label but not its features",
        scan,
    ),
    "private": Stage(
        "Train privately",
        "a model remembers what it was trained on: noise bounds what any one image can have left in it",
        private,
    ),
    "certify": Stage(
        "Certify answers",
        "a proof and no trial: no change of the image within the radius, by any attack, changes the answer",
        certify,
    ),
    "attack": Stage(
        "Attack the models",
        "robustness that nobody attacked is a guess: gradients look for the worst image near each test image",
        attack,
    ),
    "monitor": Stage(
        "Watch the model at work",
        "a model that was good yesterday meets other inputs today: charts and drift tests say when that began",
        monitor,
    ),
}


def run_demo(options: DemoOptions, say: Callable[[str], None]) -> Figures:
    """Defend a small network for handwritten digits, layer by layer, and attack it beside.

    Args:
        options: what to run.
        say: called with each line that a person should read.

    Returns:
        The figures. Ctrl-C ends the run early; ``interrupted`` tells so.

    Raises:
        OptionError: an option cannot be used; nothing was trained then.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from mlx_bulwark.demo import DemoOptions, run_demo
        >>> options = DemoOptions(steps=2, out=Path(tempfile.mkdtemp()), only=("private",))
        >>> figures = run_demo(options, say=lambda line: None)
        >>> figures.steps, figures.epsilon <= 3.0
        (2, True)

    Source:
        Abadi et al. 2016 (arXiv:1607.00133); the other stages' sources stand with the functions that they call.
    """
    options.check()
    began = time.perf_counter()
    figures = Figures(
        dataset=options.data,
        seed=options.seed,
        epsilon_target=options.epsilon,
        delta=options.delta,
        steps_planned=options.steps,
        batch_size=options.batch_size,
    )
    try:
        with stoppable() as stop:
            split = _load(options, figures, say)
            stop.check()
            scene = Scene(options, split, figures, stop, say, _new_log(options.out / "demo-audit.jsonl"))
            _run_stages(scene)
    except KeyboardInterrupt:
        figures.interrupted = True
    figures.seconds = time.perf_counter() - began
    return figures


def _run_stages(scene: Scene) -> None:
    figures, names = scene.figures, scene.options.stages
    stages = [name for name in names if name != "report"]
    try:
        for number, name in enumerate(stages, 1):
            _run_stage(name, f"[{number}/{len(names)}]", scene)
    except KeyboardInterrupt:
        figures.interrupted = True  # what was found is written all the same; a second Ctrl-C ends that too
        scene.stop.pressed = False
    if "report" in names and figures.stages:
        scene.stop.held = True
        scene.say(f"\n[{len(names)}/{len(names)}] Write the report")
        scene.tell("why", "what was found helps only whom it is told: one page for a person, and its JSON for machines")
        page = scene.options.out / "report.html"
        report = Report("mlx-bulwark demo", headline=headline(figures)).add(layers(figures))
        for section in scene.sections:
            if section.kind == "demo_poison" and removed(figures):
                section.status = "info"  # planted on purpose, and gone
            report.add(section)
        report.add(_logged(scene.log))
        report.write(page)
        figures.report = str(page)
        scene.tell("report", str(page))
        scene.stop.check()


def _run_stage(name: str, number: str, scene: Scene) -> None:
    stage, began = STAGES[name], time.perf_counter()
    scene.say(f"\n{number} {stage.title}")
    scene.tell("why", stage.reason)
    outcome = stage.run(scene)
    scene.stop.held = False
    scene.stop.check()
    seconds = time.perf_counter() - began
    summary = {"what": outcome.what, "without": outcome.without, "defended": outcome.defended}
    told = {"title": stage.title, "reason": stage.reason, "seconds": seconds, **summary}
    scene.figures.stages[name] = told | {"figures": outcome.figures}
    scene.log.append("demo.stage", stage=name, **{k: v for k, v in summary.items() if v})
    if outcome.section is not None:
        scene.sections.append(outcome.section)
    scene.tell("seconds", f"{seconds:.1f}")


def _new_log(path: Path) -> AuditLog:
    path.unlink(missing_ok=True)
    return AuditLog(path)


def _logged(log: AuditLog) -> dict[str, Any]:
    """The audit log, verified, and its lines."""
    told = [line for line in lines(log.path) if "kind" in line]
    return AuditLog.verify(log.path).to_json() | {"lines": told}


def _load(options: DemoOptions, figures: Figures, say: Callable[[str], None]) -> Split:
    say(f"backend    {figures.backend} ({figures.backend_reason})")
    title = DATASETS[options.data].title
    with waiting(f"Loading {title}"):
        split = load(options.data, options.seed)
    N, held_out = len(split.images), len(split.test_images)
    if options.batch_size > N:
        raise OptionError(f"--batch-size must be at most the {N} training images but is {options.batch_size}")
    figures.train_examples, figures.test_examples = N, held_out
    say(f"data       {title}: {N} images to train on, {held_out} held out for testing")
    if options.delta >= 1 / N:
        say(f"warning    delta {options.delta:g} is not below 1/{N}: publishing one image whole would satisfy it")
    return split
