"""The gate and the manifest."""

from pathlib import Path

import numpy as np

from ..gate import Schema, ValidationReport
from ..provenance import Manifest
from .data import DATASETS
from .sections import checked
from .stage import Digits, Outcome, Scene

BROKEN = 3
FOLDER = "data"


def check(scene: Scene) -> Outcome:
    """Hold what arrived against a schema inferred from trusted digits, and build its manifest."""
    trusted, arrived = scene.trusted, scene.arrived
    schema = Schema.infer((trusted.x, trusted.y), name=f"{scene.options.data} digits")
    scene.tell("schema", f"inferred from {len(trusted)} trusted digits")
    report = schema.check((arrived.x, arrived.y))
    scene.tell("gate", f"{len(arrived)} digits that arrived: {gate_words(report)}")
    broken = _broken(arrived)
    found = schema.check((broken.x, broken.y))
    rows = np.flatnonzero(found.bad_rows)
    scene.tell("", f"a pixel of NaN, one of 1000, a label 12, planted in {BROKEN} rows: {len(rows)} rows refused")
    folder = write(arrived, scene.options.out / FOLDER)
    manifest = Manifest.build(folder, source=DATASETS[scene.options.data].title, audit_log=scene.log)
    manifest.save(scene.options.out / "manifest.json")
    scene.tell("manifest", f"{len(manifest.files)} files, root {manifest.root[:16]}...")
    figures = {
        "trusted_examples": len(trusted),
        "arrived_examples": len(arrived),
        "gate": report.to_dict(),
        "planted_rows": BROKEN,
        "refused_rows": rows.tolist(),
        "manifest_root": manifest.root,
    }
    caught = f"{len(set(rows) & set(range(BROKEN)))} of {BROKEN}"
    return Outcome(figures, "planted broken rows refused", "0", caught, checked(figures, len(report.results)))


def write(digits: Digits, folder: Path) -> Path:
    """Write digits as files that a manifest can name."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", digits.x)
    np.save(folder / "labels.npy", digits.y)
    return folder


def gate_words(report: ValidationReport) -> str:
    """What the gate found, in one line."""
    if report.ok:
        return f"all {len(report.results)} rules hold"
    further = f", and {len(report.findings) - 2} further findings" if len(report.findings) > 2 else ""
    return "; ".join(r.words for r in report.findings[:2]) + further


def _broken(digits: Digits) -> Digits:
    x, y = digits.x.copy(), digits.y.copy()
    x[0, 0, 0], x[1, 0, 0], y[2] = np.nan, 1000, 12
    return Digits(x, y)
