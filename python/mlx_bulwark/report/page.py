"""The report: sections in, one HTML file and its JSON out."""

import base64
import hashlib
import json
import math
import os
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from . import of_data, of_models, of_privacy, of_records  # noqa: F401  # registers adapters
from .adapting import section_of
from .glossary import explained
from .parts import Section, Status

VERSION = 1
POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
ORDER: tuple[Status, ...] = ("problem", "attention", "good", "info")


class Report:
    """A report that a person reads: one HTML file that asks for nothing from outside, and JSON beside it.

    Args:
        title: Heading of the page.
        created: When; by default now. It is shown in UTC.
        headline: What was found, in a sentence or two, in place of the number of problems.

    Example:
        >>> from mlx_bulwark.report import Report
        >>> found = {"kind": "audit_log", "ok": True, "verdict": "whole", "count": 3, "chain": "ab", "findings": []}
        >>> report = Report("Weekly assessment").add(found)
        >>> report.status, report.sections[0].title
        ('good', 'Audit log')
        >>> report.html().startswith("<!doctype html>")
        True
    """

    def __init__(self, title: str, created: datetime | None = None, headline: str | None = None) -> None:
        created = created or datetime.now(timezone.utc)
        self.title, self.headline = title, headline
        self.created = (created if created.tzinfo else created.astimezone()).astimezone(timezone.utc)
        self.sections: list[Section] = []

    def add(
        self,
        found: Any,
        *,
        title: str | None = None,
        samples: Any = None,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> "Report":
        """Add a section.

        Args:
            found: A report object of this package, what its ``to_json`` or a command's ``--json`` gave, as text or
                dict, or a ``Section``. Data are recognised by their key ``kind``; others are shown as a plain table.
            title: Heading in place of the kind's own.
            samples: The data that row numbers in ``found`` mean, ``[n, ...]``: the worst rows are shown, as pictures
                where they are images ``[n, H, W]`` or ``[n, H, W, C]``.
            bounds: Of the values of images.

        Returns:
            Report: Itself, so that calls can be chained.

        Raises:
            ValueError: ``found`` cannot be read as a JSON object.

        Example:
            >>> from mlx_bulwark.report import Report
            >>> Report("Assessment").add({"kind": "of my own", "answer": 42}).sections[0].title
            'Of my own'
        """
        if isinstance(found, Section):
            section = found
        else:
            section = section_of(as_data(found), None if samples is None else np.asarray(samples), bounds)
        if title is not None:
            section.title = title
        self.sections.append(section)
        return self

    @property
    def status(self) -> Status:
        """The worst status of the sections."""
        return min((s.status for s in self.sections), key=ORDER.index, default="info")

    @property
    def verdict(self) -> str:
        """What was found, in a sentence."""
        if self.headline is not None:
            return self.headline
        bad, look = (sum(s.status == kind for s in self.sections) for kind in ("problem", "attention"))
        if bad:
            more = f", and {_count(look, 'further matter')} to look at" if look else ""
            return f"{_count(bad, 'problem').capitalize()} found{more}."
        if look:
            return f"No problem found, but {_count(look, 'matter')} to look at."
        return "No problem found." if self.sections else "Nothing was looked at."

    def to_dict(self) -> dict[str, Any]:
        """Return verdicts and the data of all sections as what JSON knows."""
        names = ("kind", "title", "status", "verdict", "sure", "advice", "data")
        return {
            "kind": "report",
            "version": VERSION,
            "title": self.title,
            "created": self.created.isoformat(timespec="seconds"),
            "mlx_bulwark": __version__,
            "status": self.status,
            "verdict": self.verdict,
            "sections": [{n: getattr(s, n) for n in names} for s in self.sections],
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def html(self) -> str:
        """Return the page.

        Raises:
            ImportError: jinja2 is missing.
        """
        try:
            from jinja2 import Environment, StrictUndefined
        except ImportError as e:
            raise ImportError('[Report] jinja2 is missing; pip install "mlx-bulwark[report]" brings it') from e
        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_unbroken
        )
        style = _shipped("style.css")
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        return environment.from_string(_shipped("page.html")).render(
            report=self,
            words=explained(self.sections),
            style=style,
            policy=f"{POLICY}; style-src 'sha256-{digest}'",
            created=self.created.strftime("%Y-%m-%d %H:%M UTC"),
            version=__version__,
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, and the JSON beside it under the same name with ``.json``.

        Args:
            path: The HTML file; an older one is replaced.

        Returns:
            Path: The JSON file.

        Raises:
            ImportError: jinja2 is missing.
            OSError: A file cannot be written.
            ValueError: The name ends in ``.json``.

        Example:
            >>> import pathlib, tempfile
            >>> from mlx_bulwark.report import Report
            >>> folder = pathlib.Path(tempfile.mkdtemp())
            >>> Report("Assessment").write(folder / "report.html").name
            'report.json'
        """
        page = Path(path)
        beside = page.with_suffix(".json")
        if beside == page:
            raise ValueError(f"[Report.write] path must be of an HTML file but is {page}")
        text, content = self.html(), self.to_json() + "\n"
        page.write_text(text, encoding="utf-8")
        beside.write_text(content, encoding="utf-8")
        return beside


def as_data(found: Any) -> dict[str, Any]:
    """A report object, JSON text or dict as a dict of JSON values; numbers that JSON lacks become words."""
    for name in ("to_dict", "figures", "to_json"):
        if not isinstance(found, (dict, str)) and callable(getattr(found, name, None)):
            found = getattr(found, name)()
    if isinstance(found, (str, bytes)):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"[Report.add] found must be a JSON object but is not: {e}") from None
    if is_dataclass(found) and not isinstance(found, type):
        found = {"kind": type(found).__name__, **asdict(found)}
    if not isinstance(found, dict):
        raise ValueError(f"[Report.add] found must be a report or a JSON object but has {type(found).__name__}")
    plain: dict[str, Any] = _plain(found)
    return plain


def _unbroken(value: Any) -> Any:
    """No line ends between a number and its per cent."""
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def _count(n: int, thing: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return f"{words[n] if n < len(words) else n} {thing}{'' if n == 1 else 's'}"


@cache
def _shipped(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
