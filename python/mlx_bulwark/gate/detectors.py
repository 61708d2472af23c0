"""Detectors of ``outliers`` as rules: a schema names a fitted one by file and hash, and the file lies beside it."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from .batch import Batch
from .report import Mask
from .rules import Outliers, SchemaError
from .statistics import Array

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .check import Check

MAX_BYTES = 1 << 30  # of a detector's file
_FAR = 2.0  # times the largest score of a trusted row
_PIECE = 65536  # rows
_LEAST_ROWS = 20  # half of them fit, half of them calibrate
_SEED = 0
_FITTED: dict[str, Any] = {}


def load_beside(rules: Iterable[Outliers], folder: Path) -> None:
    """Read the detectors that rules name from the folder of their schema."""
    for rule in rules:
        path = folder / _plain_name(rule.detector)
        if path.is_symlink() or not path.is_file():
            raise SchemaError(f"[Schema] detector {path} must be a file but is not there, or is none")
        if path.stat().st_size > MAX_BYTES:
            raise SchemaError(f"[Schema] detector {path} must have at most {MAX_BYTES} bytes but has more")
        _outliers()
        from ..outliers import load

        try:
            found = register(load(path))
        except ValueError as e:
            raise SchemaError(f"[Schema] {e}") from None
        if found != rule.hash:
            raise SchemaError(f"[Schema] detector {path} must have the hash {rule.hash} but has {found}")


def save_beside(rules: Iterable[Outliers], folder: Path) -> None:
    """Write the detectors that rules name to the folder of their schema."""
    for rule in rules:
        _fitted(rule).save(folder / _plain_name(rule.detector))


def register(detector: Any) -> str:
    """Make a fitted detector known to the schemas of this process.

    Args:
        detector: A fitted detector of ``outliers`` that scores new rows.

    Returns:
        Its hash, by which ``gate.Outliers`` names it.

    Raises:
        ValueError: It is none.

    Example:
        >>> import numpy as np
        >>> from mlx_bulwark import gate
        >>> from mlx_bulwark.outliers import Mahalanobis
        >>> x = np.random.default_rng(0).normal(size=(200, 3))
        >>> name = gate.register_detector(Mahalanobis().fit(x))
        >>> rule = gate.Outliers(detector="m.safetensors", hash=name, fields=("x",), limit=100.0)
        >>> gate.Schema(outliers=(rule,)).check(np.r_[x, [[30.0, -30.0, 30.0]]]).counts["outliers"]
        1
    """
    _outliers()
    from ..outliers import OutlierDetector
    from ..outliers.storage import fingerprint

    if not isinstance(detector, OutlierDetector) or not hasattr(detector, "offset_"):
        raise ValueError(f"[register_detector] detector must be a fitted one of outliers but is {detector!r:.80}")
    if not hasattr(detector, "score_samples"):
        raise ValueError("[register_detector] detector must score new rows but has novelty=False")
    digest = fingerprint(detector)
    if digest not in _FITTED:
        _FITTED[digest] = copy.deepcopy(detector)  # the caller's may be fitted again
    return digest


def infer_outliers(batch: Batch, label: str, unfitted: Any, quantile: float) -> tuple[Outliers, ...]:
    """Fit a detector to one half of trusted rows and take its limits from the scores of the other half."""
    names = tuple(n for n, a in batch.arrays.items() if a.dtype.kind == "f" and n != label)
    if not names:
        raise ValueError("[Schema.infer] data must have floating fields for a detector but have none")
    n = batch.rows
    x = _table([batch.arrays[k][:n] for k in names])
    x = x[np.isfinite(x).all(axis=1)]
    if len(x) < _LEAST_ROWS:
        raise ValueError(f"[Schema.infer] data must have {_LEAST_ROWS} finite rows for a detector but have {len(x)}")
    order = np.random.default_rng(_SEED).permutation(len(x))
    half = len(x) // 2
    detector = _clone(unfitted).fit(x[order[:half]])
    digest = register(detector)
    scores = np.sort(_scores(detector, x[order[half:]]))
    rows = len(scores)
    at = min(rows, math.ceil(quantile * rows) + 1)
    file = f"outliers-{digest[:16]}.safetensors"
    top = _FAR * max(float(scores[-1]), 0.0)
    return (
        Outliers(detector=file, hash=digest, fields=names, limit=top),
        Outliers(detector=file, hash=digest, fields=names, limit=float(scores[at - 1]), trusted=(rows, rows - at + 1)),
    )


def check_outliers(check: Check, rule: Outliers) -> None:
    """Hold one rule; rows with values that are not finite have rules of their own."""
    arrays = check.batch.arrays
    if not all(name in arrays for name in rule.fields):
        return
    where = " ".join(rule.fields)
    detector, n = _fitted(rule), check.batch.rows
    columns = [arrays[name][:n] for name in rule.fields]
    if not all(a.dtype.kind in "fiub" for a in columns):
        check.data("outliers", where, 1, "be numbers for its detector", "is not")
        return
    width = sum(a.size // max(1, n) for a in columns)
    if n and width != detector.n_features_in_:
        check.data("outliers", where, 1, f"have the {detector.n_features_in_} columns of its detector", f"has {width}")
        return
    bad, scored = np.zeros(n, bool), 0
    for start in range(0, n, _PIECE):
        x = _table([a[start : start + _PIECE] for a in columns])
        good = np.isfinite(x).all(axis=1)
        scored += int(good.sum())
        if good.any():
            bad[start : start + _PIECE][good] = ~(_scores(detector, x[good]) <= rule.limit)
    _judge(check, rule, where, bad, scored)


def _judge(check: Check, rule: Outliers, where: str, bad: Mask, scored: int) -> None:
    count = int(bad.sum())
    if rule.trusted is not None:
        rows, beyond = rule.trusted
        p = float(stats.betabinom.sf(count - 1, max(scored, 1), max(beyond, 1), rows + 1 - beyond))
        limit = f"have as many rows scored above {rule.limit:g} as trusted data, {beyond} of {rows}"
        check.data("trusted_outliers", where, count if p < check.alpha and scored else 0, limit, f"has {count}")
        return
    limit = f"be scored at most {rule.limit:g} by its detector"
    if count <= rule.share * scored:
        check.holds("outliers", where, limit)
    else:
        check.rows("outliers", where, bad, limit, "{} rows are not")


def _table(columns: list[Array]) -> Array:
    kind = np.float32 if all(a.dtype in (np.float32, np.float16) for a in columns) else np.float64
    return np.concatenate([a.reshape(len(a), -1).astype(kind, copy=False) for a in columns], axis=1)


def _scores(detector: Any, x: Array) -> Any:
    with warnings.catch_warnings():  # fields were told apart by their names before
        warnings.filterwarnings("ignore", "X does not have valid feature names")
        return np.asarray(-detector.score_samples(x))


def _fitted(rule: Outliers) -> Any:
    if rule.hash not in _FITTED:
        raise SchemaError(
            f"[Schema] detector {rule.detector!r} must be known but is not: Schema.load reads it from beside the "
            "schema, gate.register_detector makes one known"
        )
    return _FITTED[rule.hash]


def _plain_name(name: str) -> str:
    if not name.endswith(".safetensors") or any(c in name for c in "/\\:\0") or name.startswith("."):
        raise SchemaError(f"[Schema] detector must be the name of a .safetensors file but is {name!r:.80}")
    return name


def _clone(detector: Any) -> Any:
    _outliers()
    from sklearn.base import clone

    return clone(detector)


def _outliers() -> None:
    try:
        import sklearn as _  # noqa: F401
    except ImportError as e:
        raise ImportError('[gate] rules of detectors need scikit-learn; pip install "mlx-bulwark[outliers]"') from e
