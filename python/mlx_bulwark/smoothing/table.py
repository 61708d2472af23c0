"""The usual table of certificates: index, label, predict, radius, correct, time."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bounds import ABSTAIN, Array

COLUMNS = ("index", "label", "predict", "radius", "correct", "time")


@dataclass(frozen=True)
class Row:
    """Certificate of one input of a data set."""

    index: int
    label: int
    predict: int
    radius: float
    correct: bool
    time: float  # seconds

    def line(self) -> str:
        """Line of the CSV file."""
        return f"{self.index},{self.label},{self.predict},{self.radius!r},{int(self.correct)},{self.time:.6f}\n"


@dataclass(frozen=True)
class CertifiedTable:
    """Certificates of a data set, one row for each input, in the order of its index."""

    rows: tuple[Row, ...]

    def column(self, name: str) -> Array:
        """Return a column.

        Args:
            name: ``"index"``, ``"label"``, ``"predict"``, ``"radius"``, ``"correct"`` or ``"time"``.

        Returns:
            array: NumPy ``[rows]``: int64, float64 (radius, time) or bool (correct).

        Raises:
            ValueError: There is no such column.

        Example:
            >>> from mlx_bulwark.smoothing import CertifiedTable, Row
            >>> CertifiedTable((Row(0, 7, 7, 0.5, True, 1.0),)).column("radius").tolist()
            [0.5]

        Source:
            The logs of J. Cohen et al., "Certified Adversarial Robustness via Randomized Smoothing", 2019.
        """
        if name not in COLUMNS:
            raise ValueError(f"[CertifiedTable] name must be one of {', '.join(COLUMNS)} but is {name!r}")
        kind: Any = {"radius": np.float64, "time": np.float64, "correct": np.bool_}.get(name, np.int64)
        return np.array([getattr(row, name) for row in self.rows], kind)

    def certified_accuracy(self, radii: Any) -> Any:
        """Tell which share of the inputs is classified correctly and certified to a radius.

        Args:
            radii: A radius or an array of them, in the unit of the inputs.

        Returns:
            float64: The share, as ``radii``; NaN where the table is empty. An abstention counts as wrong.

        Example:
            >>> from mlx_bulwark.smoothing import CertifiedTable, Row
            >>> table = CertifiedTable((Row(0, 7, 7, 0.5, True, 1.0), Row(1, 2, -1, 0.0, False, 1.0)))
            >>> table.certified_accuracy([0.0, 0.5, 0.6]).tolist()
            [0.5, 0.5, 0.0]

        Source:
            J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019.
        """
        radius, correct = self.column("radius"), self.column("correct")
        if not self.rows:
            return np.full(np.shape(radii), np.nan)[()]
        return (correct & (radius >= np.asarray(radii, np.float64)[..., None])).mean(-1)

    def summary(self, radii: Sequence[float] = (0.0, 0.25, 0.5, 1.0)) -> dict[str, Any]:
        """Sum the table up.

        Args:
            radii: Radii at which the certified accuracy is told.

        Returns:
            dict: ``inputs``, ``abstained`` (share), ``certified_accuracy`` (radius -> share),
            ``average_certified_radius`` (wrong and abstained inputs count 0) and ``seconds`` an input.

        Example:
            >>> from mlx_bulwark.smoothing import CertifiedTable, Row
            >>> CertifiedTable((Row(0, 7, 7, 0.5, True, 1.0),)).summary((0.25,))["certified_accuracy"]
            {0.25: 1.0}

        Source:
            R. Zhai et al., "MACER: Attack-free and Scalable Robust Training via Maximizing Certified Radius", 2020.
        """
        if not self.rows:
            return {"inputs": 0}
        return {
            "inputs": len(self.rows),
            "abstained": float((self.column("predict") == ABSTAIN).mean()),
            "certified_accuracy": {float(r): float(self.certified_accuracy(r)) for r in radii},
            "average_certified_radius": float((self.column("radius") * self.column("correct")).mean()),
            "seconds": float(self.column("time").mean()),
        }

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a CSV file; an older file is replaced at once and whole.

        Args:
            path: The file.

        Raises:
            OSError: It cannot be written.

        Example:
            >>> import tempfile, pathlib
            >>> from mlx_bulwark.smoothing import CertifiedTable, Row
            >>> file = pathlib.Path(tempfile.mkdtemp()) / "certified.csv"
            >>> CertifiedTable((Row(0, 7, 7, 0.5, True, 1.0),)).write_csv(file)
            >>> print(file.read_text(), end="")
            index,label,predict,radius,correct,time
            0,7,7,0.5,1,1.000000
        """
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(header() + "".join(row.line() for row in self.rows))
        os.replace(part, target)

    @classmethod
    def read_csv(cls, path: str | os.PathLike[str]) -> "CertifiedTable":
        """Read a table that ``write_csv`` or ``certify_dataset`` wrote; a torn last line is left out.

        Args:
            path: The file.

        Returns:
            CertifiedTable: Its rows in the order of their index.

        Raises:
            OSError: It cannot be read.
            ValueError: It is no such table; the message names the line.

        Example:
            >>> import tempfile, pathlib
            >>> from mlx_bulwark.smoothing import CertifiedTable, Row
            >>> file = pathlib.Path(tempfile.mkdtemp()) / "certified.csv"
            >>> CertifiedTable((Row(0, 7, 7, 0.5, True, 1.0),)).write_csv(file)
            >>> CertifiedTable.read_csv(file).rows[0].radius
            0.5
        """
        text = Path(path).read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()
        if not lines or lines[0] + "\n" != header():
            raise ValueError(f"[CertifiedTable] {path} must begin with the line {header().strip()}")
        rows = []
        for number, fields in enumerate(csv.reader(lines[1:]), 2):
            try:
                index, label, predict, radius, correct, time = fields
                rows.append(Row(int(index), int(label), int(predict), float(radius), correct == "1", float(time)))
            except ValueError as e:
                raise ValueError(f"[CertifiedTable] {path} must be a table but has in line {number}: {e}") from None
        return cls.of(rows)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "CertifiedTable":
        """Make a table of rows in any order; of several with one index the first counts.

        Args:
            rows: The rows.

        Returns:
            CertifiedTable: The rows in the order of their index.

        Example:
            >>> from mlx_bulwark.smoothing import CertifiedTable, Row
            >>> rows = [Row(1, 0, 0, 0.5, True, 1.0), Row(0, 2, 2, 0.1, True, 1.0)]
            >>> CertifiedTable.of(rows).column("index").tolist()
            [0, 1]
        """
        first: dict[int, Row] = {}
        for row in rows:
            first.setdefault(row.index, row)
        return cls(tuple(first[index] for index in sorted(first)))


def header() -> str:
    """First line of the CSV file."""
    return ",".join(COLUMNS) + "\n"
