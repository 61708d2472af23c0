"""Build macOS arm64 wheels on Linux and check them: ``build_macos.py --out DIR PYTHON...``, one interpreter a wheel."""

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import check_macho
import pin
import stubs
import ziglang

HERE = Path(__file__).resolve().parent
MACOS = ".".join(map(str, check_macho.MINOS))
PLATFORM = f"macosx_{MACOS.replace('.', '_')}_arm64"
ZIG = Path(ziglang.__file__).parent / "zig"

ASK = """if True:
    import sys, sysconfig
    print("%d.%d" % sys.version_info[:2], sys.implementation.name, sysconfig.get_config_var("Py_DEBUG") or 0,
          sysconfig.get_config_var("Py_GIL_DISABLED") or 0)
"""


def run(*command, **options):
    """Run a command; on failure show what it printed and stop."""
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def version(python):
    """Version of an interpreter, whose headers must be those of an ordinary CPython."""
    number, name, debug, free_threaded = run(python, "-c", ASK).split()
    if (name, debug, free_threaded) != ("cpython", "0", "0"):
        sys.exit(
            f"{python} must be an ordinary CPython but is {name}, Py_DEBUG {debug}, Py_GIL_DISABLED {free_threaded}"
        )
    return number


def linker():
    """LLVM's linker for Mach-O, the newest one."""
    installed = glob.glob("/usr/lib/llvm-*/bin/ld64.lld")
    found = max(installed, key=lambda path: int(re.search(r"llvm-(\d+)", path)[1]), default=shutil.which("ld64.lld"))
    if not found:
        sys.exit("there is no ld64.lld: `apt-get install lld-19` brings it")
    return found


def fetch_mlx(number, folder):
    """Folder ``mlx`` of the macOS wheels of MLX for a version of Python."""
    mlx = pin.pins()[0]
    return pin.fetch([f"mlx=={mlx}", f"mlx-metal=={mlx}"], PLATFORM, number, folder)


def cross_environment(mlx, folder):
    """Write the linker's stubs into ``folder``; variables that macos-c++ and macos-ar need."""
    stubs.write(folder / "stubs", [*mlx.glob("lib/*.dylib"), *mlx.glob("core.*.so")], ZIG, check_macho.MINOS)
    return {
        "ZIG": str(ZIG),
        "LD64": linker(),
        "MACOS_STUBS": str(folder / "stubs"),
        "MACOSX_DEPLOYMENT_TARGET": MACOS,
        "ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(folder / "zig"),
    }


def build(python, number, mlx, environment, folder, out):
    """The wheel for one interpreter, with the headers and the library of ``mlx``, of whatever CPython that is."""
    venv = folder / f"venv-{number}"
    run(python, "-m", "venv", "--without-pip", venv)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python"]
    run(*pip, "install", "-q", "scikit-build-core", f"nanobind=={pin.pins()[1]}")
    target = {
        "_PYTHON_HOST_PLATFORM": f"macosx-{MACOS}-arm64",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{number.replace('.', '')}-darwin.so",
        "CMAKE_TOOLCHAIN_FILE": str(HERE / "macos-arm64.cmake"),
        "CMAKE_ARGS": f"-DMLX_ROOT={mlx / 'share/cmake/MLX'} -DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
        "SKBUILD_BUILD_DIR": str(folder / f"build-{number}"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # cmake and ninja
    }
    run(*pip, "wheel", "-v", "--no-build-isolation", "--no-deps", "--config-settings=install.strip=false",
        "-w", out, HERE.parent, env=os.environ | environment | target)  # fmt: skip
    (wheel,) = out.glob(f"*-cp{number.replace('.', '')}-*.whl")
    return wheel


def main():
    """Build and check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="where the wheels go")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it (default: a temporary one)")
    parser.add_argument("python", nargs="+", help="interpreter whose version, and headers, to build for")
    arguments = parser.parse_args()
    folder = (arguments.keep or Path(tempfile.mkdtemp())).resolve()
    numbers = {python: version(python) for python in arguments.python}
    first, *rest = arguments.python

    def build_and_check(python):
        start = time.monotonic()
        mlx = headers if python == first else fetch_mlx(numbers[python], folder / f"mlx-{numbers[python]}")
        wheel = build(python, numbers[python], headers, environment, folder, arguments.out)
        faults = check_macho.check_wheel(wheel, mlx, folder / "stubs", python)
        print("\n  ".join([f"{wheel.name} ({time.monotonic() - start:.0f} s)", *(faults or ["OK"])]), flush=True)
        return not faults

    try:
        headers = fetch_mlx(numbers[first], folder / f"mlx-{numbers[first]}")
        environment = cross_environment(headers, folder)
        sound = [build_and_check(first)]  # before the others, so that a cache of objects has something for them
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sound += pool.map(build_and_check, rest)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    sys.exit(not all(sound))


if __name__ == "__main__":
    main()
