"""Runs Metal kernels on the CPU and checks what they do. README.md tells how."""

from .build import build, check
from .library import Library, Output, Result
from .toolchain import CompileError, missing

__all__ = ["CompileError", "Library", "Output", "Result", "build", "check", "missing"]
