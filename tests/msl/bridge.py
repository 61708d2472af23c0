"""Hands the kernels inside the extension to the simulator, and reads back what happened when ops ran them.

The extension has: sources() -> [(name, text, hash)]; sim_load(hash, path of a library); sim_option(name, value);
sim_take() -> [(kernel, JSON of msl_result)], every launch since the last time.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .build import build, check
from .library import readable_reports
from .toolchain import CACHE


@dataclass(frozen=True)
class Call:
    """One launch of a kernel by an op."""

    kernel: str
    reports: list[str]
    buffers: dict[str, dict[str, Any]]
    threadgroup_bytes: int
    threads: int


class Simulator:
    """What stands in for the GPU under the backend metal-sim."""

    def __init__(self) -> None:
        self.extension: Any = None
        self._calls: list[Call] = []

    def __call__(self, extension: Any) -> None:
        """Build what the extension holds, once a process, and forget what happened so far."""
        if self.extension is None:
            self.extension = extension
            for source in extension.sources():
                self.load(*source)
        self.reset()

    def load(self, name: str, text: str, digest: str) -> None:
        """Build from `text`, and let that run where the extension asks for the text with this hash."""
        path = write_source(name, text)
        check(path)
        self.extension.sim_load(digest, str(build(path).path))

    def option(self, name: str, value: int) -> None:
        self.extension.sim_option(name, value)

    def reset(self) -> None:
        for name, value in {"races": 1, "lines": 1, "order": 0, "seed": 1}.items():
            self.option(name, value)
        self.extension.sim_take()
        self._calls = []

    @property
    def calls(self) -> list[Call]:
        for kernel, text in self.extension.sim_take():
            result = json.loads(text)
            buffers = {buffer["name"]: buffer for buffer in result["buffers"]}
            sizes = result["threadgroup_bytes"], result["threads"]
            self._calls.append(Call(kernel, readable_reports(result), buffers, *sizes))
        return self._calls

    @property
    def reports(self) -> list[str]:
        return [f"{call.kernel}: {report}" for call in self.calls for report in call.reports]


def write_source(name: str, text: str) -> Path:
    """Keep the text in a file whose name stands in reports."""
    folder = CACHE / "sources" / hashlib.sha256(text.encode()).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.metal"
    if not path.exists():  # whole or not at all: another process may be compiling it
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    return path
