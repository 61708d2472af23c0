"""Launches kernels of a built library on numpy arrays, and reads what the simulator found."""

import ctypes
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .build import HERE, Built, build
from .toolchain import SYMBOLIZER
from .translate import POSITIONS

SCALARS = {
    "bool": ctypes.c_bool,
    "char": ctypes.c_int8,
    "uchar": ctypes.c_uint8,
    "short": ctypes.c_int16,
    "ushort": ctypes.c_uint16,
    "int": ctypes.c_int32,
    "uint": ctypes.c_uint32,
    "float": ctypes.c_float,
}


@dataclass(frozen=True)
class Output:
    """A buffer that holds nothing before the kernel writes it."""

    shape: tuple[int, ...]
    dtype: Any = np.float32


@dataclass(frozen=True)
class Result:
    """The buffers after a launch, what was reported, and the traffic of each buffer by its name."""

    arrays: dict[str, np.ndarray]
    reports: list[str]
    buffers: dict[str, dict[str, Any]]
    seconds: float


class Library:
    """The kernels of one file."""

    def __init__(self, source: str | Path, **options: Any) -> None:
        self.source = Path(source)
        self.built: Built = build(source, **options)
        self.functions = ctypes.CDLL(str(self.built.path))
        self.functions.msl_buffer.restype = ctypes.c_void_p
        self.functions.msl_reached.restype = ctypes.c_void_p
        self.functions.msl_threadgroup_buffer.restype = ctypes.c_void_p
        self.functions.msl_error.restype = ctypes.c_char_p
        self.functions.msl_result.restype = ctypes.c_char_p
        self.kernels = {kernel.name: kernel for kernel in self.built.translation.kernels}

    def launch(
        self,
        name: str,
        arguments: Mapping[str, Any],
        *,
        grid: Sequence[int],
        group: Sequence[int],
        constants: Mapping[str, Any] | None = None,
        threadgroup: Sequence[int] = (),
        **options: int,
    ) -> Result:
        """Run a kernel on copies of the arrays.

        Args:
            name: The kernel's host name.
            arguments: By parameter name: an array or scalar of the kernel's own type, an `Output`, or a list of arrays
                of which the kernel gets the addresses.
            grid: Threads in the grid, three numbers.
            group: Threads in a threadgroup, three numbers.
            constants: Function constants by name.
            threadgroup: Bytes of each threadgroup parameter.
            options: Of the simulator: order (0 forward, 1 reverse, 2 random), seed, races, lines, most_reports.
        """
        f = self.functions
        for option, value in ({"order": 0, "seed": 1, "races": 1, "lines": 1, "most_reports": 20} | options).items():
            self._accepted(f.msl_option(option.encode(), int(value)))
        self._accepted(f.msl_begin(name.encode()))
        for constant in self.built.translation.constants:
            if constants and constant.name in constants:
                value = SCALARS[constant.type](constants[constant.name])
                is_bool = constant.type == "bool"
                size = ctypes.c_size_t(ctypes.sizeof(value))
                self._accepted(f.msl_constant(constant.index, is_bool, ctypes.byref(value), size))
        memory = {}
        for parameter in self.kernels[name].definition.parameters:
            if parameter.slot == "threadgroup":
                f.msl_threadgroup_buffer(parameter.index, ctypes.c_size_t(threadgroup[parameter.index]))
            elif parameter.slot not in POSITIONS and parameter.name in arguments:
                given = arguments[parameter.name]
                if isinstance(given, list):
                    given = np.array([self._reached(parameter.index, i, x) for i, x in enumerate(given)], np.uint64)
                output = isinstance(given, Output)
                array = np.empty(given.shape, given.dtype) if output else np.array(given, order="C")
                address = f.msl_buffer(parameter.index, ctypes.c_size_t(array.nbytes), int(output))
                self._accepted(-1 if address is None else 0)
                if not output:
                    ctypes.memmove(address, array.ctypes.data, array.nbytes)
                memory[parameter.name] = address, array
        three = ctypes.c_uint32 * 3
        start = time.perf_counter()
        self._accepted(f.msl_launch(three(*grid), three(*group)))
        seconds = time.perf_counter() - start
        for address, array in memory.values():
            ctypes.memmove(array.ctypes.data, address, array.nbytes)
        result = json.loads(f.msl_result())
        return Result(
            {name: array for name, (_, array) in memory.items()},
            readable_reports(result),
            {buffer["name"]: buffer for buffer in result["buffers"]},
            seconds,
        )

    def _reached(self, index: int, number: int, array: np.ndarray) -> int:
        address = self.functions.msl_reached(index, number, ctypes.c_size_t(array.nbytes))
        ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return address

    def _accepted(self, status: int) -> None:
        if status < 0:
            raise ValueError(self.functions.msl_error().decode())


def readable_reports(result: Mapping[str, Any]) -> list[str]:
    """Write a launch's reports as text, each with file and line."""
    texts = []
    for r in result["reports"]:
        where = r["where"] or source_line(result["library"], r["pc"])
        place = where.rpartition("/")[2]
        threadgroup, thread = (",".join(map(str, r[key])) for key in ("threadgroup", "thread"))
        detail = f": {r['detail']}" if r["detail"] else ""
        texts.append(f"{place}: {r['what']}{detail} [thread ({thread}) of threadgroup ({threadgroup})]")
    return texts


@cache
def source_line(library: str, return_address: int) -> str:
    """Look an instruction up in the debug information: the innermost place that is not the simulator's own."""
    command = [SYMBOLIZER, "-e", library, "--functions=none", hex(return_address - 1)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    own = (str(HERE / "shim"), str(HERE / "runtime"))
    places = [line for line in lines if not os.path.abspath(line).startswith(own)]
    return places[0] if places else "?"
