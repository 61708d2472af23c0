"""What ``mlx-bulwark certify`` does."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..readers import ReadError, read
from .bounds import Array, Norm
from .dataset import certify_dataset
from .plot import plot_certified_accuracy
from .smooth import Smooth
from .table import CertifiedTable

RADII = 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0
MOST_BYTES = 32 << 30  # of the data
NAMES = ("x", "y"), ("x_test", "y_test"), ("images", "labels"), ("data", "labels")


@dataclass(frozen=True)
class CertifyOptions:
    """Options of the command, as it documents them."""

    model: str
    weights: Path | None
    data: Path
    sigmas: tuple[float, ...]
    n0: int
    n: int
    alpha: float
    batch_size: int
    norm: Norm
    bounds: tuple[float, float] | None
    levels: int | None
    looks: int | None
    target_radius: float | None
    skip: int
    out: Path
    restart: bool
    progress: bool


class OptionError(ValueError):
    """An option cannot be used; the message names it."""


@dataclass
class Certified:
    """Tables of the noise levels that were run, and where they are."""

    tables: dict[float, CertifiedTable]
    files: dict[float, Path]
    interrupted: bool = False

    def to_json(self) -> str:
        """Return all summaries as JSON."""
        runs = [
            {"sigma": sigma, "file": str(self.files[sigma]), **_plain(table.summary(RADII))}
            for sigma, table in self.tables.items()
        ]
        content = {"kind": "certificates", "interrupted": self.interrupted, "runs": runs}
        return json.dumps(content, indent=2, allow_nan=False)

    def plot(self, path: Path, norm: Norm) -> None:
        """Draw certified accuracy over radius, a curve for each sigma."""
        curves = {f"sigma {sigma:g}": table for sigma, table in self.tables.items() if table.rows}
        plot_certified_accuracy(curves, path, unit=f"{norm.upper()} radius")


def run_certify(options: CertifyOptions) -> Certified:
    """Certify the data at each sigma; Ctrl-C ends it, and what was certified counts."""
    x, y = load_data(options.data)
    model = load_model(options.model, options.weights)
    classes = _classes(model, x)
    if len(y) and not 0 <= y.min() <= y.max() < classes:
        raise OptionError(f"--data must have labels in [0, {classes}) but has {y.min()} to {y.max()}")
    found = Certified({}, {})
    options.out.mkdir(parents=True, exist_ok=True)
    for sigma in options.sigmas:
        file = options.out / f"sigma-{sigma:g}.csv"
        if options.restart:
            for old in (file, file.with_name(file.name + ".json")):
                old.unlink(missing_ok=True)
        found.files[sigma] = file
        try:
            smooth = Smooth(model, classes, sigma, norm=options.norm, bounds=options.bounds, levels=options.levels)
            found.tables[sigma] = certify_dataset(
                smooth,
                x,
                y,
                options.n0,
                options.n,
                options.alpha,
                options.batch_size,
                looks=options.looks,
                target_radius=options.target_radius,
                file=file,
                skip=options.skip,
                progress=options.progress,
            )
        except KeyboardInterrupt:
            found.interrupted = True
            if file.exists():
                found.tables[sigma] = CertifiedTable.read_csv(file)
            break
    return found


def load_model(name: str, weights: Path | None) -> Callable[[mx.array], mx.array]:
    """Call ``module:function`` and load weights into what it returns."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise OptionError(f"--model must be module:function but is {name}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise OptionError(f"--model must name a function that can be imported but {name}: {e}") from None
    model: Any = make()
    if not callable(model):
        raise OptionError(f"--model must return a model but {name} returned {type(model).__name__}")
    if weights is None:
        return cast(Callable[[mx.array], mx.array], model)
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"--model must return a mlx.nn.Module for --weights but {name} returned {type(model).__name__}"
        )
    if weights.suffix != ".safetensors":
        raise OptionError(f"--weights must be a .safetensors file but is {weights}")
    try:
        model.load_weights(str(weights))
    except (ValueError, RuntimeError) as e:
        raise OptionError(f"--weights must fit the model but {weights}: {e}") from None
    return model


def load_data(path: Path) -> tuple[Array, Array]:
    """Read inputs and labels from an .npz file without pickle."""
    if path.suffix.lower() != ".npz":
        raise OptionError(f"--data must be a readable .npz file but is {path}")
    try:
        arrays = read(path, max_bytes=MOST_BYTES)
    except (ReadError, OSError) as e:
        raise OptionError(f"--data must be a readable .npz file but {path}: {e}") from None
    names = next((names for names in NAMES if set(names) <= set(arrays)), None)
    if names is None:
        wanted = ", ".join(" and ".join(names) for names in NAMES)
        raise OptionError(f"--data must have the arrays {wanted} but {path} has {', '.join(arrays)}")
    x, y = (arrays[name] for name in names)
    if x.dtype.kind != "f" or y.dtype.kind not in "iu" or x.ndim < 2 or y.shape != x.shape[:1]:
        raise OptionError(
            f"--data must have floating inputs [rows, ...] and an integer label for each but {path} has {x.dtype} "
            f"{x.shape} and {y.dtype} {y.shape}"
        )
    return x, y


def _classes(model: Callable[[mx.array], mx.array], x: Array) -> int:
    if not len(x):
        raise OptionError("--data must have rows but has none")
    logits = model(mx.array(x[:1].astype(np.float32)))
    if not isinstance(logits, mx.array) or logits.ndim != 2 or len(logits) != 1:
        has = f"shape {logits.shape}" if isinstance(logits, mx.array) else type(logits).__name__
        raise OptionError(f"--model must return logits [m, classes] but returned {has} for one input")
    return logits.shape[1]


def _plain(summary: dict[str, Any]) -> dict[str, Any]:
    if "certified_accuracy" in summary:
        summary["certified_accuracy"] = {f"{r:g}": share for r, share in summary["certified_accuracy"].items()}
    return summary
