"""What a run of the demo found out, and how it is told."""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from .._native import backend, runs_native
from ..privacy.accounting import ADJACENCY

NOT_COVERED = (
    "loss",
    "clip_fraction",
    "refused_examples",
    "mean_batch_size",
    "norm_counts",
    "examples_per_second",
    "private_step_seconds",
    "private_over_nonprivate",
    "nonprivate_test_accuracy",
    "curve.nonprivate_test_accuracy",
    "stages",
)


CURVES = ("step", "epsilon", "test_accuracy", "nonprivate_test_accuracy")


@dataclass
class Figures:
    """All figures of one run; what an interrupted run did not reach is None."""

    dataset: str
    seed: int
    epsilon_target: float
    delta: float
    steps_planned: int
    batch_size: int
    interrupted: bool = False
    backend: str = field(default_factory=lambda: _backend()[0])
    backend_reason: str = field(default_factory=lambda: _backend()[1])
    epsilon: float = 0.0
    accountant: str = "pld"
    adjacency: str = ADJACENCY
    noise_multiplier: float | None = None
    max_grad_norm: float | None = None
    clipping: str | None = None
    sample_rate: float | None = None
    microbatch_size: int | None = None
    learning_rate: float | None = None
    nonprivate_learning_rate: float | None = None
    parameters: int | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    steps: int = 0
    test_accuracy: float | None = None
    nonprivate_test_accuracy: float | None = None
    private_step_seconds: float | None = None
    nonprivate_step_seconds: float | None = None
    private_over_nonprivate: float | None = None
    examples_per_second: float | None = None
    loss: float | None = None
    clip_fraction: float | None = None
    refused_examples: int = 0
    mean_batch_size: float | None = None
    calibration_seconds: float | None = None
    seconds: float | None = None
    norm_edges: list[float] = field(default_factory=list)  # bins of the per-sample gradient norms
    norm_counts: list[int] = field(default_factory=list)
    curve: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CURVES})
    not_covered_by_epsilon: tuple[str, ...] = NOT_COVERED
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    png: str | None = None
    report: str | None = None
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    processor: str = field(default_factory=lambda: f"{platform.machine()}, {os.cpu_count()} cores")

    def add_point(self, step: int, epsilon: float, test_accuracy: float, nonprivate_test_accuracy: float) -> None:
        """Add a point to the curves; the last one is the result."""
        self.test_accuracy, self.nonprivate_test_accuracy = test_accuracy, nonprivate_test_accuracy
        for name, value in zip(CURVES, (step, epsilon, test_accuracy, nonprivate_test_accuracy), strict=True):
            self.curve[name].append(value)

    def write_json(self, path: Path) -> None:
        """Write all figures as one JSON object; a number that is not finite becomes null."""
        content = {"kind": "private_training"} | finite(asdict(self))
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """JSON values, with null for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _backend() -> tuple[str, str]:
    name, reason = backend()
    if name == "native" and not runs_native(None):
        return "reference", f"the extension runs on the CPU, and MLX's default device is {mx.default_device()}"
    return name, reason


def _versions() -> dict[str, str]:
    packages = {p: metadata.version(p) for p in ("mlx", "dp-accounting", "numpy")}
    return {"mlx-bulwark": __version__, "python": platform.python_version(), **packages}
