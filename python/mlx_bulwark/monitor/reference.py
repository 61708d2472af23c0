"""What a model does on trusted data: the baseline that a monitor holds it against."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import __version__
from ..attacks.base import check_model
from .observation import (
    Array,
    Outputs,
    are_tokens,
    check_output,
    drawn,
    numbers,
    observe,
    projection,
    run_listening,
    summary,
)

FORMAT = 1
WINDOWS = ("inputs", "embeddings", "confidences", "predictions", "outliers")
LEAST_ROWS = 50
MOST_CLASSES = 1000  # whose predictions are counted


class Detector(Protocol):
    """Gives rows a score, such as a fitted detector of ``mlx_bulwark.outliers``."""

    def score_samples(self, X: Any, /) -> Any:
        """Return a score for each row, ``[n]``."""


@dataclass(frozen=True)
class Baseline:
    """What a model does on trusted data.

    Attributes:
        facts: Counts, means, and settings, as JSON values.
        arrays: References of the windows, and the directions that inputs and embeddings are looked at along.
    """

    facts: dict[str, Any]
    arrays: dict[str, Array]

    @classmethod
    def from_data(
        cls,
        model: Callable[..., Any],
        x: Any,
        y: Any = None,
        *,
        outputs: Outputs = "logits",
        scores: Callable[[Any], mx.array] | None = None,
        detector: Detector | None = None,
        embeddings: bool = True,
        layer: str | None = None,
        dimensions: int = 8,
        most_rows: int = 2000,
        batch_size: int = 256,
        seed: int = 0,
    ) -> "Baseline":
        """Run a model over trusted data and keep what a monitor needs. They must not be what it was trained on.

        Args:
            model: From ``[b, ...]`` to ``[b, ..., classes]``, in evaluation mode.
            x: Inputs ``[n, ...]``, NumPy or MLX, 50 or more; the more, the smaller the changes that are found.
            y: Classes ``[n]``, or ``[n, ...]`` as the output without its last axis; None where there are none, and
                accuracy is not watched.
            outputs: What the model returns, ``"logits"`` or ``"probabilities"``.
            scores: Takes the model's output and returns logits or probabilities, where they are not the output itself.
            detector: Scores inputs, flattened to rows; give the same one to the monitor.
            embeddings: Keep what the model's last layer is given; only of an ``nn.Module``.
            layer: Name of another layer whose input is kept, as in ``model.named_modules()``.
            dimensions: Random directions along which wide inputs and embeddings are looked at.
            most_rows: Rows that references keep, drawn at random.
            batch_size: Rows of a forward pass.
            seed: Of directions and of what is drawn.

        Returns:
            Baseline: With what was found.

        Raises:
            ValueError: Data are too few, of other shapes than the model's, or the model's output is not finite on them.

        Example:
            >>> import mlx.core as mx, mlx.nn as nn
            >>> from mlx_bulwark.monitor import Baseline
            >>> x = mx.random.normal((200, 4), key=mx.random.key(0))
            >>> baseline = Baseline.from_data(nn.Linear(4, 3), x, mx.zeros(200, mx.int32))
            >>> baseline.windows
            ('inputs', 'embeddings', 'confidences', 'predictions')
        """
        where = "Baseline.from_data"
        check_model(where, model)
        x = x if isinstance(x, mx.array) else np.asarray(x)
        if x.dtype == np.float64:
            x = x.astype(np.float32)
        if x.ndim < 1 or len(x) < LEAST_ROWS:
            raise ValueError(f"[{where}] x must have {LEAST_ROWS} rows or more but has shape {list(x.shape)}")
        if outputs not in ("logits", "probabilities"):
            raise ValueError(f"[{where}] outputs must be logits or probabilities but is {outputs!r}")
        listening = embeddings and isinstance(model, nn.Module)
        seen, rows = _run(where, model, x, outputs, scores, listening, layer, batch_size), len(x)
        classes, confidences, valid = seen["classes"], seen["confidences"], seen["valid"]
        if not valid.all():
            raise ValueError(
                f"[{where}] output must be finite but is not in {int((~valid).sum())} of {valid.size} rows"
            )
        at = drawn(rows, most_rows, seed)
        per_row = confidences.reshape(rows, -1).mean(axis=1, dtype=np.float64)
        arrays: dict[str, Array] = {"confidences": per_row[at].astype(np.float32)}
        number = seen["number"]
        facts: dict[str, Any] = {
            "format": FORMAT,
            "version": __version__,
            "rows": rows,
            "classes": number,
            "outputs": outputs,
            "plain": classes.ndim == 1,
            "layer": seen["layer"],
            "confidence": _moments(per_row),
            "seed": seed,
        }
        if classes.ndim == 1 and number <= MOST_CLASSES:
            arrays["predictions"] = classes[at]
        if not are_tokens(x):
            flat = numbers(x[mx.array(at)] if isinstance(x, mx.array) else x[at])
            directions = projection(flat.shape[1], dimensions, seed)
            _keep(where, arrays, "inputs", flat, directions)
        if seen["embeddings"] is not None:
            embedded = seen["embeddings"][at]
            _keep(where, arrays, "embeddings", embedded, projection(embedded.shape[1], dimensions, seed + 1))
        if detector is not None:
            flat = numbers(x[mx.array(at)] if isinstance(x, mx.array) else x[at])
            arrays["outliers"] = np.asarray(detector.score_samples(flat), np.float32).reshape(-1)
        if y is not None:
            _label(where, facts, arrays, classes, np.asarray(y))
        return cls(facts, arrays)

    @property
    def windows(self) -> tuple[str, ...]:
        """Names of the windows that there are references for."""
        return tuple(name for name in WINDOWS if name in self.arrays)

    @property
    def fingerprint(self) -> str:
        """Hash of all that the baseline is."""
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        for name, a in sorted(self.arrays.items()):
            digest.update(f"{name} {a.dtype.str} {a.shape}".encode() + np.ascontiguousarray(a).tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the baseline: a safetensors file with JSON in its header. An older file is replaced by a whole one.

        Args:
            path: File, ``.safetensors``.

        Raises:
            ValueError: The name ends otherwise.
            OSError: It cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"[Baseline.save] path must end in .safetensors but is {path}")
        part = path.with_name(path.stem + ".part.safetensors")
        arrays = {name: mx.array(a) for name, a in self.arrays.items()}
        content = {"facts": self.facts, "fingerprint": self.fingerprint}
        mx.save_safetensors(str(part), arrays, {"mlx_bulwark_baseline": json.dumps(content)})
        part.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Baseline":
        """Read what ``save`` has written.

        Args:
            path: File.

        Raises:
            OSError: It cannot be read.
            ValueError: It is not such a file, not whole, or of a newer format.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(2, "No such baseline", str(path))
        try:
            loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
            arrays, header = loaded
            content = json.loads(header["mlx_bulwark_baseline"])
            baseline = cls(content["facts"], {name: np.array(a) for name, a in arrays.items()})
            if baseline.facts["format"] != FORMAT or baseline.fingerprint != content["fingerprint"]:
                raise ValueError("it is of another format, or not whole")
        except (RuntimeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"[Baseline.load] path must be a baseline but {path} is not: {e}") from None
        return baseline


def _run(
    where: str,
    model: Callable[..., Any],
    x: Any,
    outputs: Outputs,
    scores: Callable[[Any], mx.array] | None,
    listening: bool,
    layer: str | None,
    batch_size: int,
) -> dict[str, Any]:
    found: dict[str, list[Array]] = {"classes": [], "confidences": [], "valid": []}
    embedded: list[Array] = []
    name, number = "", None
    for start in range(0, len(x), batch_size):
        batch = mx.array(x[start : start + batch_size])
        given = None
        if listening:
            output, name, given = run_listening(model, layer, batch)
        else:
            output = model(batch)
        output = check_output(where, scores(output) if scores else output, number)
        if output.shape[0] != len(batch):
            raise ValueError(f"[{where}] output must have a row an input but has shape {list(output.shape)}")
        number = output.shape[-1]
        for key, value in observe(output, outputs)._asdict().items():
            found[key].append(value.reshape(output.shape[:-1]))
        if given is not None:
            embedded.append(np.array(given))
    if len({a.shape[1:] for a in found["classes"]}) > 1:
        raise ValueError(f"[{where}] output must have the same shape for all inputs but has not")
    merged: dict[str, Any] = {key: np.concatenate(values) for key, values in found.items()}
    together = np.concatenate(embedded) if embedded else None
    return merged | {"embeddings": together, "layer": name or None, "number": number}


def _keep(where: str, arrays: dict[str, Array], name: str, rows: Array, directions: Array | None) -> None:
    if not np.isfinite(rows).all():
        raise ValueError(f"[{where}] {name} must be finite but have NaN or infinite values")
    arrays[name] = np.array(summary(mx.array(rows), None if directions is None else mx.array(directions)))
    if directions is not None:
        arrays[f"{name}_directions"] = directions


def _label(where: str, facts: dict[str, Any], arrays: dict[str, Array], classes: Array, y: Array) -> None:
    check_labels(where, y, classes.shape, facts["classes"])
    right = (classes == y).reshape(len(y), -1).mean(axis=1, dtype=np.float64)
    facts["accuracy"] = _moments(right)
    if classes.ndim == 1 and facts["classes"] <= MOST_CLASSES:
        confusion = np.zeros((facts["classes"], facts["classes"]), np.int64)
        np.add.at(confusion, (y.astype(np.int64), classes), 1)
        arrays["confusion"] = confusion


def check_labels(where: str, y: Array, shape: tuple[int, ...], classes: int) -> None:
    """Refuse labels that are not one class a prediction."""
    if y.shape != shape or y.dtype.kind not in "iu":
        raise ValueError(f"[{where}] y must be classes {list(shape)} but is {y.dtype} of shape {list(y.shape)}")
    if y.size and not 0 <= y.min() <= y.max() < classes:
        raise ValueError(f"[{where}] y must be from 0 to {classes - 1} but is from {y.min()} to {y.max()}")


def _moments(values: Array) -> dict[str, float]:
    return {"mean": float(values.mean()), "sd": float(values.std(ddof=1)), "rows": len(values)}
