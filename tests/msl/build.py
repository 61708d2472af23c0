"""Builds a library for the simulator from Metal text, and checks text as strictly as clang can without being Metal."""

import contextlib
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .lint import check_characters, check_recursion, lint
from .toolchain import CACHE, CLANG, CompileError, run
from .translate import POSITIONS, Kernel, Translation, translate

HERE = Path(__file__).parent
RUNTIME = sorted((HERE / "runtime").glob("*.cpp"))
SYSTEM_HEADERS = (
    *("array", "atomic", "common", "compute", "geometric", "integer", "limits", "logging", "math", "matrix"),
    *("numeric", "pack", "quadgroup", "relational", "simdgroup", "simdgroup_matrix", "stdlib", "type_traits"),
)
CXX = ("-x", "c++", "-std=c++17")
LANGUAGE = (
    *(*CXX, f"-I{HERE / 'shim'}", f"-I{HERE / 'runtime'}", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"),
    *("-Xclang", "-cl-single-precision-constant"),  # 1.0 is a float
    *("-ffp-contract=on", "-Wno-everything", "-ferror-limit=30"),
)
# SYCL's device mode keeps address spaces in the types and lets them convert to the default one.
SYCL = ("-Xclang", "-fsycl-is-device", "-Xclang", "-aux-triple", "-Xclang", "x86_64-pc-linux-gnu")
# The hooks are this library's own, even where the process has those of a sanitizer.
LINK = ("-Wl,-Bsymbolic", "-Wl,-z,now", "-Wl,-z,defs")
# Address spaces are disjoint. What was added to C++14, and conversions that Metal does not make by itself, are errors.
STRICT = (
    "-DMSL_STRICT",
    "-Werror=pre-c++17-compat",
    "-Werror=c++20-extensions",
    "-Werror=implicit-float-conversion",
    "-Wno-implicit-int-float-conversion",
)
INSTRUMENTATION = (
    "-fsanitize=thread,bounds,shift,integer-divide-by-zero,null,alignment,float-cast-overflow,signed-integer-overflow,"
    "return,unreachable",
    *("-mllvm", "-tsan-instrument-read-before-write=1", "-mllvm", "-tsan-instrument-func-entry-exit=0"),
)
CODE = (
    *("-O1", "-g1", "-fPIC", "-mf16c", "-mfma"),
    *("-fno-vectorize", "-fno-slp-vectorize"),  # they would merge what the kernel asks for
    "-fno-optimize-sibling-calls",  # a barrier's return address must lie in the kernel
)


@dataclass(frozen=True)
class Built:
    """A shared library and what it was translated from."""

    path: Path
    translation: Translation


def build(
    source: str | Path,
    *,
    flags: Sequence[str] = (),
    include: Sequence[str | Path] = (),
    only: Callable[[str], bool] = lambda kernel: True,
) -> Built:
    """Compile the kernels of a file, or those whose names `only` accepts. Unchanged text is not compiled again."""
    translation = translate(preprocess(source, flags, include))
    translation.kernels = [k for k in translation.kernels if only(k.name)]
    code, tables = with_entries(translation), host_tables(translation)
    library = CACHE / f"{fingerprint(code, tables)}.so"
    if library.exists():
        library.touch()
    else:
        forget_unused()
        runtime = build_runtime()
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            folder = Path(name)
            (folder / "kernels.cpp").write_text(code)
            (folder / "tables.cpp").write_text(tables)
            objects = folder / "kernels.o", folder / "tables.o"
            run(CLANG, *LANGUAGE, *SYCL, *CODE, *INSTRUMENTATION, "-c", folder / "kernels.cpp", "-o", objects[0])
            run(CLANG, *CXX, f"-I{HERE / 'runtime'}", "-fPIC", "-c", folder / "tables.cpp", "-o", objects[1])
            run(CLANG, "-shared", "-o", folder / "library.so", *objects, runtime, *LINK)
            os.replace(folder / "library.so", library)
    return Built(library, translation)


def check(source: str | Path) -> None:
    """Raise CompileError where a file does what Metal refuses or should not be asked to accept.

    The executing build lets address spaces mix, takes C++17, and knows more types than Metal has.
    """
    problems = list(check_characters(Path(source)))
    if not problems:
        text = preprocess(source)
        problems += lint(text)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernels.cpp"
            path.write_text(with_entries(translate(text)))
            try:
                ir = run(CLANG, *LANGUAGE, *STRICT, "-S", "-emit-llvm", "-O0", "-g1", path, "-o", "-")
                problems += check_recursion(ir)
            except CompileError as error:
                problems.append(str(error))
    if problems:
        raise CompileError("\n".join(problems))


def preprocess(source: str | Path, flags: Sequence[str] = (), include: Sequence[str | Path] = ()) -> str:
    """Expand macros and includes. Metal's own headers are empty here: the shim comes before the text."""
    headers = CACHE / "headers"
    headers.mkdir(parents=True, exist_ok=True)
    for name in SYSTEM_HEADERS:
        (headers / f"metal_{name}").touch()
    metal = ("-nostdinc", "-D__METAL__=1", "-D__METAL_VERSION__=320", f"-I{headers}")
    return run(CLANG, "-E", *CXX, *metal, *(f"-I{folder}" for folder in include), *flags, source)


def with_entries(translation: Translation) -> str:
    """Put the shim before the translated text, and behind it a function for each kernel that passes its arguments."""
    entries = []
    for number, kernel in enumerate(translation.kernels):
        parameters = f"msl::Parameters<decltype(&{kernel.function})>"
        arguments = []
        for i, p in enumerate(kernel.definition.parameters):
            kind = f"{parameters}::type<{i}>"
            if p.slot in POSITIONS:
                arguments.append(f"msl::position<{kind}>(t.{p.slot})")
            else:
                memory = "threadgroup_buffer" if p.slot == "threadgroup" else "buffer"
                arguments.append(f"msl::Pointer<{kind}>::of(t.{memory}[{p.index}])")
        entries.append(
            'extern "C" [[clang::sycl_external]] __attribute__((no_sanitize("null"))) '
            f"void msl_entry_{number}(const msl::Thread& t) {{ {kernel.function}({', '.join(arguments)}); }}"
        )
    front = '#include <tuple>\n#include "kernel.h"\n#include "msl.h"\n'
    back = '#include "msl/entries.h"\n#line 1 "entries"\n'
    return front + translation.code + "\n" + back + "\n".join(entries) + "\n"


def host_tables(translation: Translation) -> str:
    """Write what runtime/launch.cpp looks kernels, parameters and function constants up in."""
    lines = ['#include "kernel.h"', "using namespace msl;"]
    lines += [f'extern "C" void msl_entry_{i}(const Thread&);' for i in range(len(translation.kernels))]
    lines += [f'extern "C" char {c.name}[];' for c in translation.constants]
    for number, kernel in enumerate(translation.kernels):
        rows = [parameter_row(p) for p in kernel.definition.parameters if p.slot not in POSITIONS]
        lines.append(f"static const Parameter parameters_{number}[] = {{{', '.join(rows) or '{}'}}};")
    kernels = [kernel_row(number, kernel) for number, kernel in enumerate(translation.kernels)]
    constants = [
        f'{{{c.index}, "{c.name}", {str(c.type == "bool").lower()}, {c.name}, {size_of(c.type)}}}'
        for c in translation.constants
    ]
    for kind, name, count, rows in (
        ("Kernel", "msl_kernels", "msl_kernel_count", kernels),
        ("FunctionConstant", "msl_function_constants", "msl_function_constant_count", constants),
    ):
        lines.append(f"extern const {kind} {name}[];\nconst {kind} {name}[] = {{{', '.join(rows) or '{}'}}};")
        lines.append(f"extern const int {count};\nconst int {count} = {len(rows)};")
    return "\n".join(lines) + "\n"


def parameter_row(parameter) -> str:
    optional = str(parameter.optional).lower()
    return f'{{Slot::{parameter.slot}, {parameter.index}, "{parameter.name}", {optional}}}'


def kernel_row(number: int, kernel: Kernel) -> str:
    d = kernel.definition
    count = sum(p.slot not in POSITIONS for p in d.parameters)
    return f'{{"{kernel.name}", "{d.defined_at}", {d.most_threads}, msl_entry_{number}, parameters_{number}, {count}}}'


def size_of(scalar: str) -> int:
    return {"bool": 1, "char": 1, "uchar": 1, "short": 2, "ushort": 2, "half": 2}.get(scalar, 4)


def build_runtime() -> Path:
    """Compile the runtime once; it is linked into every library, so that each is a machine of its own."""
    merged = CACHE / f"{fingerprint('runtime')}.o"
    if not merged.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            objects = [Path(name) / f"{source.stem}.o" for source in RUNTIME]
            for source, compiled in zip(RUNTIME, objects, strict=True):
                run(CLANG, "-std=c++17", "-O2", "-fPIC", "-c", source, "-o", compiled)
            run(CLANG, "-r", "-nostdlib", "-o", Path(name) / "runtime.o", *objects)
            os.replace(Path(name) / "runtime.o", merged)
    return merged


def forget_unused(days: int = 7) -> None:
    """Delete what was built and not used for some days."""
    for path in (*CACHE.glob("*.so"), *CACHE.glob("sources/*/*.metal")):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if time.time() - path.stat().st_mtime > days * 86400:
                path.unlink()


@functools.cache
def own_text() -> bytes:
    """Everything that goes into a build, but for the kernels."""
    own = (Path(__file__), *sorted(HERE.glob("runtime/*")), *sorted(HERE.glob("shim/**/*.h")))
    return run(CLANG, "--version").encode() + b"".join(path.read_bytes() for path in own)


def fingerprint(*texts: str) -> str:
    """Hash texts with everything else that goes into a build of them."""
    digest = hashlib.sha256(own_text())
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()[:20]
