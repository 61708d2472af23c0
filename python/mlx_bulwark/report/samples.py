"""The worst samples of a section: as pictures where they are images, as rows elsewhere."""

from typing import Any

import numpy as np

from ..readers import is_image
from .parts import Gallery, Picture, Section, Table, number
from .png import data_uri

MOST = 12
MOST_COLUMNS = 12


def show_worst(section: Section, samples: Any, bounds: tuple[float, float]) -> None:
    """Add the rows that the data call the worst, and keep their pictures with the data for a later report."""
    worst = section.data.get("worst")
    if not isinstance(worst, list) or not all(isinstance(w, dict) and isinstance(w.get("row"), int) for w in worst):
        return
    worst = worst[:MOST]
    if samples is not None:
        rows = [w["row"] for w in worst]
        if any(not 0 <= row < len(samples) for row in rows):
            raise ValueError(f"[Report.add] samples must have the rows {rows} but has {len(samples)}")
        if is_image(samples):
            pictures = [{"row": row, "png": data_uri(samples[row], bounds)} for row in rows]
            section.data = section.data | {"pictures": pictures}
        elif samples.ndim == 2:
            section.tables.append(_rows(samples, rows))
    _show_pictures(section, worst)


def _show_pictures(section: Section, worst: list[dict[str, Any]]) -> None:
    kept = {p["row"]: p["png"] for p in section.data.get("pictures", []) if is_png(p.get("png"))}
    pictures = []
    for w in worst:
        if w["row"] in kept:
            label = f", label {w['label']}" if "label" in w else ""
            words = f"row {w['row']}{label}"
            pictures.append(Picture(kept[w["row"]], words, f"Sample in {words}"))
    if pictures:
        section.galleries.append(Gallery("The worst samples, the worst first", pictures))


def is_png(source: Any) -> bool:
    """Whether a text is a PNG data URI and nothing else."""
    return isinstance(source, str) and source.startswith("data:image/png;base64,") and not set(source) & set("\"'<> ")


def _rows(samples: Any, rows: list[int]) -> Table:
    width = min(samples.shape[1], MOST_COLUMNS)
    content = [(str(row), *(number(np.asarray(v).item()) for v in samples[row, :width])) for row in rows]
    more = f", the first {width} of {samples.shape[1]} columns" if samples.shape[1] > width else ""
    columns = ("row", *(f"column {j}" for j in range(width)))
    return Table(f"The worst rows{more}", columns, content, frozenset(range(width + 1)))
