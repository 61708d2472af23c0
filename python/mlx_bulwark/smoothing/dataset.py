"""Certificates of a whole data set, one line each, by one process or several."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .bounds import Array, check_count
from .smooth import Smooth
from .table import COLUMNS, CertifiedTable, Row, header

StrPath = str | os.PathLike[str]


def certify_dataset(
    smooth: Smooth,
    x: Any,
    labels: Any,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch_size: int = 1000,
    *,
    looks: int | Sequence[int] | None = None,
    target_radius: float | None = None,
    file: StrPath | None = None,
    skip: int = 1,
    group: mx.distributed.Group | None = None,
    progress: bool = True,
) -> CertifiedTable:
    """Certify the inputs of a data set, and write each line to the disk as soon as it stands.

    A run that ended early goes on where it stopped when it is called again with the same file: its lines are kept,
    and the rest is certified under a fresh key, so no noise is ever drawn twice. What was certified and how stands in
    ``<file>.json`` beside the table; a file of other settings or data is refused.

    With several ranks each takes a part of what is left, and writes ``<stem>.rank<r><suffix>``; when all are done, each
    rank returns the whole table and rank 0 writes it to ``file``. Parts of an interrupted run count, whatever the
    number of ranks, where rank 0 or their own rank finds them in the folder.

    Args:
        smooth: The smoothed classifier.
        x: Inputs ``[rows, *shape]``, floats of NumPy or MLX; the same on every rank.
        labels: Integers ``[rows]``.
        n0: As of ``Smooth.certify``, and so are the others to ``target_radius``.
        n: Number of draws for the bound.
        alpha: Probability that a certificate is wrong, an input.
        batch_size: Draws that the model sees at once.
        looks: Numbers of draws after which the votes are looked at, or how many.
        target_radius: A radius that is enough.
        file: CSV file; None: nothing is written.
        skip: Certify every ``skip``-th input, from the first.
        group: Ranks that share the work, from ``mx.distributed.init()``.
        progress: Show a bar on standard error, on rank 0.

    Returns:
        CertifiedTable: One row for each input that was certified, in the order of the index.

    Raises:
        ValueError: An argument has a wrong value or shape, or ``file`` belongs to another run.
        OSError: A file cannot be written.
        KeyboardInterrupt: As pressed; the lines so far are on the disk.

    Example:
        >>> import numpy as np, mlx.core as mx
        >>> from mlx_bulwark.smoothing import Smooth, certify_dataset
        >>> smooth = Smooth(lambda x: mx.concatenate([x, -x], axis=1), num_classes=2, sigma=0.5)
        >>> table = certify_dataset(smooth, np.array([[1.0], [-1.0]]), [0, 1], n=1000, progress=False)
        >>> table.certified_accuracy(0.25)
        np.float64(1.0)

    Source:
        J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019.
    """
    inputs, targets = _data(x, labels)
    check_count("certify_dataset", "skip", skip)
    arguments = n0, n, alpha, batch_size
    options: dict[str, Any] = {"looks": looks, "target_radius": target_radius}
    smooth.certify(inputs[:0], *arguments, **options)  # a wrong argument is refused before anything is written
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    target = None if file is None else Path(file)
    settings = _settings(smooth, inputs, targets, {"n0": n0, "n": n, "alpha": alpha, **options})
    own = target if target is None or size == 1 else target.with_name(f"{target.stem}.rank{rank}{target.suffix}")
    done = _found(target, settings) if target is not None else []
    if size > 1:
        done = _exchanged(done, group)
    known = {row.index for row in done}
    left = [i for i in range(0, len(targets), skip) if i not in known][rank::size]
    rows = _certified(smooth, inputs, targets, left, arguments, options, own, settings, progress and rank == 0)
    if size == 1:
        return _selected(done + rows, skip)
    table = _selected(_exchanged(done + rows, group), skip)
    if target is not None and rank == 0:
        _write_settings(target, settings)
        table.write_csv(target)
    mx.eval(mx.distributed.all_sum(mx.zeros(1), group=group))  # the whole table is on the disk before parts go
    if own is not None:
        for part in (own, _settings_file(own)):
            part.unlink(missing_ok=True)
    return table


def _data(x: Any, labels: Any) -> tuple[mx.array, Array]:
    inputs = x if isinstance(x, mx.array) else mx.array(np.asarray(x))
    if inputs.dtype == mx.float64:
        inputs = inputs.astype(mx.float32)
    targets = np.asarray(labels)
    if inputs.ndim < 2:
        raise ValueError(f"[certify_dataset] x must be [rows, *shape] but has shape {inputs.shape}")
    if targets.shape != (len(inputs),) or targets.dtype.kind not in "iu":
        raise ValueError(
            f"[certify_dataset] labels must be {len(inputs)} integers, one for each row of x, but has "
            f"{targets.dtype} of shape {targets.shape}"
        )
    return inputs, targets.astype(np.int64)


def _certified(
    smooth: Smooth,
    x: mx.array,
    labels: Array,
    left: list[int],
    arguments: tuple[int, int, float, int],
    options: dict[str, Any],
    own: Path | None,
    settings: dict[str, Any],
    progress: bool,
) -> list[Row]:
    from tqdm import tqdm

    rows: list[Row] = []
    if not left:
        return rows
    found = smooth.certify_each(x[mx.array(left)], *arguments, **options)
    stream = None if own is None else _opened(own, settings)
    began = time.perf_counter()
    try:
        for i in tqdm(left, desc="Certify", unit="input", disable=not progress, file=sys.stderr):
            certificate = next(found)
            now = time.perf_counter()
            label = int(labels[i])
            right = certificate.prediction == label
            rows.append(Row(i, label, certificate.prediction, certificate.radius, right, round(now - began, 6)))
            began = now
            if stream is not None:
                stream.write(rows[-1].line())
                stream.flush()
    finally:
        found.close()  # the model gets its mode back
        if stream is not None:
            stream.close()
    return rows


def _selected(rows: list[Row], skip: int) -> CertifiedTable:
    return CertifiedTable.of(row for row in rows if row.index % skip == 0)


# Files


def _settings(smooth: Smooth, x: mx.array, labels: Array, options: dict[str, Any]) -> dict[str, Any]:
    looks = options["looks"]
    data = hashlib.sha256(np.array(x.astype(mx.float32)).tobytes() + labels.tobytes()).hexdigest()
    return {
        "sigma": smooth.sigma,
        "norm": smooth.norm,
        "bounds": None if smooth.bounds is None else list(smooth.bounds),
        "levels": smooth.levels,
        **options,
        "looks": looks if looks is None or isinstance(looks, int) else [int(look) for look in looks],
        "data": data,
    }


def _settings_file(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def _write_settings(file: Path, settings: dict[str, Any]) -> None:
    _settings_file(file).write_text(json.dumps(settings, indent=2) + "\n")


def _found(target: Path, settings: dict[str, Any]) -> list[Row]:
    """Rows of earlier runs: of the table itself and of parts that ranks have left."""
    rows: list[Row] = []
    for file in [target, *sorted(target.parent.glob(f"{target.stem}.rank*{target.suffix}"))]:
        if not file.exists():
            continue
        try:
            before = json.loads(_settings_file(file).read_text())
        except (OSError, ValueError):
            before = None
        if before != settings:
            different = [k for k, v in settings.items() if before is not None and before.get(k) != v]
            has = f"other {', '.join(different)}" if different else f"no readable {_settings_file(file).name} beside it"
            raise ValueError(
                f"[certify_dataset] file must be new, or of a run with the same settings, but {file} has {has}; "
                "nothing was changed"
            )
        rows += CertifiedTable.read_csv(file).rows
    return rows


def _opened(own: Path, settings: dict[str, Any]) -> Any:
    """The file, ready for further lines. A line that was torn when the process died goes, its input is done again."""
    own.parent.mkdir(parents=True, exist_ok=True)
    _write_settings(own, settings)
    whole = own.read_bytes() if own.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    stream = open(own, "a", encoding="utf-8")  # noqa: SIM115
    stream.truncate(len(whole))
    if not whole:
        stream.write(header())
    return stream


# Ranks


def _exchanged(rows: list[Row], group: mx.distributed.Group | None) -> list[Row]:
    """Rows of all ranks, as bits: a collective operation may not know float64."""
    mine = np.array([astuple(row) for row in rows], np.float64).reshape(-1, len(COLUMNS))
    counts = np.array(mx.distributed.all_gather(mx.array([len(mine)], mx.int32), group=group))
    padded = np.zeros((int(counts.max()), len(COLUMNS)))
    padded[: len(mine)] = mine
    everyone = mx.distributed.all_gather(mx.array(padded.view(np.uint32))[None], group=group)
    parts = np.array(everyone).view(np.float64)
    return [
        Row(int(i), int(label), int(predict), float(radius), bool(correct), float(seconds))
        for part, count in zip(parts, counts.tolist(), strict=True)
        for i, label, predict, radius, correct, seconds in part[:count]
    ]
