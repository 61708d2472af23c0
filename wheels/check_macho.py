"""Check a macOS arm64 wheel on any machine: ``check_macho.py WHEEL --mlx DIR --stubs DIR [--python PYTHON]``."""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import lief
import stubs

MINOS = (14, 0)
LIBMLX = "@rpath/libmlx.dylib"
RPATH = "@loader_path/../mlx/lib"
COMMAND = lief.MachO.LoadCommand.TYPE

HAS = "import ctypes, sys; print(*[n for n in sys.argv[1:] if not hasattr(ctypes.pythonapi, n)])"


def nanobind_key(file):
    """The key under which nanobind shares types between extensions (nb_abi.h), as it stands in a binary."""
    found = re.search(rb"nanobind_[a-z]+_libcpp_[a-z0-9_]+", Path(file).read_bytes())
    return found[0].decode() if found else None


def check(extension, mlx, stub_folder, python=None):
    """What would keep macOS 14 from loading an extension beside this MLX, a line each.

    Args:
        extension: the ``_ext.*.so``.
        mlx: folder ``mlx`` of the macOS wheels mlx (of the same CPython) and mlx-metal.
        stub_folder: what ``stubs.write`` wrote.
        python: interpreter of the extension's version, whose own symbols are those that the extension may leave open.
    """
    binary = stubs.parse(extension)
    if binary is None:
        return ["there is no arm64 code in it"]
    faults = []
    if tuple(binary.build_version.minos[:2]) != MINOS:
        faults.append(f"it wants macOS {binary.build_version.minos}, not {MINOS}")
    if not any(c.command == COMMAND.CODE_SIGNATURE for c in binary.commands):
        faults.append("it has no (ad-hoc) signature: macOS kills it on arm64")
    rpaths = [c.path for c in binary.commands if c.command == COMMAND.RPATH]
    if rpaths != [RPATH]:
        faults.append(f"its rpath is {rpaths}, not {RPATH}")
    entry = f"_PyInit_{Path(extension).name.partition('.')[0]}"
    if entry not in stubs.exports(binary):
        faults.append(f"it does not export {entry}")
    (core,) = Path(mlx).glob("core.*.so")
    if nanobind_key(extension) != nanobind_key(core):
        faults.append(f"its nanobind key is {nanobind_key(extension)}, that of mlx {nanobind_key(core)}")
    return faults + _unresolved(binary, mlx, stub_folder, python)


def _unresolved(binary, mlx, stub_folder, python):
    libraries = stubs.read(stub_folder)
    libraries[LIBMLX] = stubs.exports(stubs.parse(Path(mlx) / "lib/libmlx.dylib"))
    linked = {c.name for c in binary.libraries if c.command != COMMAND.ID_DYLIB}
    faults = [f"it is linked to {name}" for name in sorted(linked - libraries.keys())]
    # A static libc++ would be a second one: exceptions and type_infos of libmlx would not be ours.
    faults += [f"it is not linked to {name}" for name in sorted({LIBMLX, stubs.LIBCXX} - linked)]
    found = stubs.imports(binary)
    open_names = found.pop("", set())
    for library, names in found.items():
        lacking = sorted(names - libraries.get(library, set()))
        faults += [f"{library} of macOS {MINOS[0]} is not known to export {name}" for name in lacking]
    foreign = {n for n in open_names if not n.startswith(("_Py", "__Py"))}
    faults += [f"nothing exports {name}" for name in sorted(foreign)]
    if python:
        names = [n[1:] for n in sorted(open_names - foreign)]
        missing = subprocess.run([python, "-c", HAS, *names], check=True, capture_output=True, text=True).stdout.split()
        faults += [f"{python} does not export {name}" for name in missing]
    return faults


def check_wheel(wheel, mlx, stub_folder, python=None):
    """What is wrong with a wheel and the extension in it, a line each."""
    name = re.fullmatch(r"mlx_bulwark-[\d.]+-(cp3\d+)-\1-macosx_14_0_arm64\.whl", Path(wheel).name)
    if not name:
        return [f"{Path(wheel).name} is not the name of a macOS 14 arm64 wheel"]
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        (extension,) = Path(folder).glob("mlx_bulwark/_ext*.so")
        (tags,) = Path(folder).glob("*.dist-info/WHEEL")
        faults = check(extension, mlx, stub_folder, python)
        suffix = f".cpython-{name[1][2:]}-darwin.so"
        if extension.name != "_ext" + suffix:
            faults.append(f"CPython does not look for {extension.name} but for _ext{suffix}")
        if f"Tag: {name[1]}-{name[1]}-macosx_14_0_arm64" not in tags.read_text().splitlines():
            faults.append("its WHEEL file names another tag")
    return faults


def main():
    """Check one wheel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel")
    parser.add_argument(
        "--mlx", required=True, help="folder mlx of the macOS wheels mlx and mlx-metal, unpacked into one"
    )
    parser.add_argument("--stubs", required=True, help="folder of .tbd files (stubs.py)")
    parser.add_argument("--python", help="interpreter of the wheel's version")
    arguments = parser.parse_args()
    faults = check_wheel(arguments.wheel, arguments.mlx, arguments.stubs, arguments.python)
    print(Path(arguments.wheel).name, *(faults or ["OK"]), sep="\n  ")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
