"""Linker stubs (.tbd) for the system libraries of macOS: what an extension may import from them."""

import re
from collections import defaultdict
from pathlib import Path

import lief

LIBCXX, LIBOBJC, LIBSYSTEM = "/usr/lib/libc++.1.dylib", "/usr/lib/libobjc.A.dylib", "/usr/lib/libSystem.B.dylib"

# Their type_infos live in libc++abi since its first release, whether or not MLX imports them.
STANDARD_EXCEPTIONS = {
    *("logic_error", "domain_error", "invalid_argument", "length_error", "out_of_range"),
    *("runtime_error", "range_error", "overflow_error", "underflow_error"),
    *("exception", "bad_alloc", "bad_cast", "bad_typeid", "bad_exception"),
}

TBD = """--- !tapi-tbd
tbd-version:     4
targets:         [ arm64-macos ]
install-name:    '{library}'
current-version: 1
exports:
  - targets:         [ arm64-macos ]
    symbols:         [ {symbols} ]
...
"""


def parse(file):
    """The arm64 binary in a Mach-O file."""
    binaries = lief.MachO.parse(str(file))
    return binaries.take(lief.MachO.Header.CPU_TYPE.ARM64)


def exports(binary):
    """Names that a binary exports. (lief's iterators do not keep the binary alive: it must have a name somewhere.)"""
    return {symbol.name for symbol in binary.exported_symbols}


def imports(binary):
    """Symbols by the install name of the library that they come from; "" for those without one."""
    found = defaultdict(set)
    for symbol in binary.imported_symbols:
        if symbol.has_binding_info:
            info = symbol.binding_info
            found[info.library.name if info.has_library else ""].add(symbol.name)
    return found


def proven(binaries, minos):
    """What binaries that run on macOS ``minos`` import from libc++ and libobjc, so what these export there."""
    symbols = defaultdict(set)
    for file in binaries:
        binary = parse(file)
        if tuple(binary.build_version.minos[:2]) > minos:
            raise SystemExit(f"{file} wants macOS {binary.build_version.minos}: it proves nothing about {minos}")
        for library, names in imports(binary).items():
            symbols[library] |= names
        # operator new and delete are bound by name in any library
        symbols[LIBCXX] |= {n for n in symbols[""] if n.startswith(("__Zn", "__Zd"))}
    cxx = symbols[LIBCXX]
    cxx |= {f"__ZTISt{len(e)}{e}" for e in STANDARD_EXCEPTIONS}
    for name in list(cxx):  # constructors and destructors are exported in pairs, complete and base object
        pair = re.fullmatch(r"(__ZNK?S(?:t\d+[a-z_]+_error|t9exception|t\d+bad_[a-z_]+)[CD])([12])(E.*)", name)
        if pair:
            cxx.add(pair[1] + ("2" if pair[2] == "1" else "1") + pair[3])
    return {LIBCXX: cxx, LIBOBJC: symbols[LIBOBJC]}


def write(folder, binaries, zig, minos):
    """Write libc++.tbd and libobjc.tbd from ``binaries``, and libSystem.tbd from the one that zig ships."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for library, names in proven(binaries, minos).items():
        symbols = ",\n                       ".join(f"'{n}'" for n in sorted(names))
        name = Path(library).name.split(".")[0] + ".tbd"
        (folder / name).write_text(TBD.format(library=library, symbols=symbols))
    text = (Path(zig).parent / "lib/libc/darwin/libSystem.tbd").read_text()
    (folder / "libSystem.tbd").write_text(re.sub(r"targets:\s+\[([^\]]*)\]", _arm64_or_not, text))


def _arm64_or_not(targets):
    """Apple names its own arm64e only, and targets that ld64.lld does not know."""
    return f"targets: [ {'arm64' if 'arm64e-macos' in targets[1] else 'x86_64'}-macos ]"


def read(folder):
    """The symbols of every stub in a folder, by install name."""
    found = {}
    for file in Path(folder).glob("*.tbd"):
        text = file.read_text()
        library = re.search(r"install-name:\s+'?([^'\s]+)", text)[1]
        exports = [e for e in text.split("targets:") if "arm64-macos" in e.partition("]")[0]]
        found[library] = {n for e in exports for n in re.findall(r"[\s'\[](_[\w$.]+)", e)}
    return found
