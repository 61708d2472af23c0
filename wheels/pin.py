"""The MLX and the nanobind that the extension is built for: show the pins, move them, fetch MLX for a platform."""

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = ROOT / "cmake/mlx.cmake"
FILES = ["cmake/mlx.cmake", "pyproject.toml", "README.md", "CHANGELOG.md", "tests/test_native.py"]


def pins(text=None):
    """Versions of MLX and of nanobind."""
    text = PINNED.read_text() if text is None else text
    return tuple(re.search(rf"set\({name}_SUPPORTED ([\d.]+)\)", text)[1] for name in ("MLX", "NANOBIND"))


def newest(package):
    """Newest version of a package that pip finds."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return re.search(r"\(([\d.]+)\)", done.stdout)[1]


def move(new, root=ROOT):
    """Write other pins into every file that names them."""
    old = pins((root / "cmake/mlx.cmake").read_text())
    for name in FILES:
        text = (root / name).read_text()
        for before, after in zip(old, new, strict=True):
            text = re.sub(rf"(?<![\d.]){re.escape(before)}(?!\.?\d)", after, text)
        (root / name).write_text(text)


def fetch(packages, platform, python, folder):
    """Unpack wheels for another platform into one folder, and return their folder ``mlx``."""
    folder = Path(folder)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--platform", platform, "--python-version", python, "-d", folder, *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()
    return folder / "mlx"


def main():
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="print both versions")
    moving = commands.add_parser("move", help="write other versions wherever they stand")
    moving.add_argument("mlx", nargs="?", help="default: the newest")
    moving.add_argument("nanobind", nargs="?", help="default: the newest")
    fetching = commands.add_parser(
        "fetch", help="unpack MLX's library and headers, to build against without installing"
    )
    fetching.add_argument("package", choices=["mlx-cpu", "mlx-metal"])
    fetching.add_argument("platform", help="for example manylinux_2_35_x86_64")
    fetching.add_argument("folder")
    arguments = parser.parse_args()
    if arguments.command == "move":
        move((arguments.mlx or newest("mlx"), arguments.nanobind or newest("nanobind")))
    if arguments.command == "fetch":
        print(fetch([f"{arguments.package}=={pins()[0]}"], arguments.platform, "3.12", arguments.folder))
    else:
        print(*pins())


if __name__ == "__main__":
    main()
