"""The compiler and its tools, of one version: the hooks and flags that the simulator uses change between versions."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

CLANG = "clang++-19"
SYMBOLIZER = "llvm-symbolizer-19"
INSTALL = "apt-get install clang-19 llvm-19 libclang-rt-19-dev"
CACHE = Path(
    os.environ.get("BULWARK_MSL_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-bulwark" / "msl"
)


class CompileError(Exception):
    """What the compiler or the lint refused; the message holds file and line."""


def missing() -> str | None:
    """Say why the simulator cannot run on this machine, or None where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the Metal simulator runs on Linux x86-64 only"
    absent = [tool for tool in (CLANG, SYMBOLIZER) if not shutil.which(tool)]
    return f"the Metal simulator needs {' and '.join(absent)}: {INSTALL}" if absent else None


def run(*command: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{done.stderr}\n{' '.join(words)}")
    return done.stdout
