"""What the tools of this folder must refuse: planted faults, each in an extension that is built here for it."""

import os
import shutil
import subprocess
import sys

import build_macos
import check_macho
import pin
import pytest

# A module that loads MLX and the C++ library, in which faults are planted below.
SOURCE = """
#include <string>
namespace mlx::core { const char* version(); int copy_gpu(); }
extern "C" int mine();
extern "C" int PyBulwark_Mine();
extern "C" __attribute__((visibility("default"))) const char* PyInit__ext() {
  static std::string key = "nanobind_system_libcpp_abi1_a1_v22";
  return FAULT key.append(mlx::core::version(), 1).c_str();
}
"""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("macos")


@pytest.fixture(scope="module")
def mlx(folder):
    return build_macos.fetch_mlx(PYTHON, folder)


@pytest.fixture
def compiler(folder, mlx, tmp_path):
    """Run macos-c++ in a folder of its own; returns (status, output)."""
    environment = os.environ | build_macos.cross_environment(mlx, folder)

    def run(*arguments, **changes):
        done = subprocess.run(
            [build_macos.HERE / "macos-c++", *arguments],
            env=environment | changes,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    return run


@pytest.fixture
def extension(compiler, folder, mlx, tmp_path):
    """Build the module with a fault; returns what the check says of it."""

    def build(fault="", source=SOURCE, rpath=check_macho.RPATH, link=(), **changes):
        (tmp_path / "ext.cpp").write_text(source.replace("FAULT", fault))
        status, output = compiler("-c", "-O2", "-std=c++20", "-fvisibility=hidden", "ext.cpp", "-o", "ext.o", **changes)
        assert status == 0, output
        words = ["-bundle", "ext.o", str(mlx / "lib/libmlx.dylib"), f"-Wl,-rpath,{rpath}", "-o", "_ext.so", *link]
        status, output = compiler(*words, **changes)
        assert status == 0, output
        return check_macho.check(tmp_path / "_ext.so", mlx, folder / "stubs", sys.executable)

    return build


def test_a_sound_extension_passes(extension):
    assert extension() == []


def test_newer_macos(extension):
    assert extension(MACOSX_DEPLOYMENT_TARGET="15.0") == ["it wants macOS [15, 0, 0], not (14, 0)"]


def test_signature(extension):
    (fault,) = extension(link=["-Wl,-no_adhoc_codesign"])
    assert "no (ad-hoc) signature" in fault


def test_rpath(extension):
    assert extension(rpath="/tmp/mlx/lib") == [f"its rpath is ['/tmp/mlx/lib'], not {check_macho.RPATH}"]


def test_entry(extension):
    assert extension(source=SOURCE.replace("PyInit__ext", "PyInit_ext")) == ["it does not export _PyInit__ext"]


def test_nanobind_of_another_version(extension):
    (fault,) = extension(source=SOURCE.replace("a1_v22", "v21"))
    assert fault.startswith(
        "its nanobind key is nanobind_system_libcpp_abi1_v21, that of mlx nanobind_system_libcpp_abi1_a1"
    )


def test_symbols_that_nothing_exports(extension):
    assert extension("mine() ? nullptr :", link=["-Wl,-U,_mine"]) == ["nothing exports _mine"]


def test_symbols_that_this_python_does_not_export(extension):
    (fault,) = extension("PyBulwark_Mine() ? nullptr :", link=["-Wl,-U,_PyBulwark_Mine"])
    assert fault == f"{sys.executable} does not export PyBulwark_Mine"


def test_symbols_that_libcxx_lacks(extension, folder, mlx, tmp_path):
    assert extension() == []
    older = tmp_path / "stubs"
    shutil.copytree(folder / "stubs", older)
    libcxx = older / "libc++.tbd"
    libcxx.write_text("\n".join(line for line in libcxx.read_text().splitlines() if "6append" not in line))
    (fault,) = check_macho.check(tmp_path / "_ext.so", mlx, older)
    assert "libc++.1.dylib of macOS 14 is not known to export" in fault
    assert "6append" in fault


def test_linker_refuses_what_libmlx_declares_and_does_not_export(compiler, mlx, tmp_path):
    (tmp_path / "ext.cpp").write_text(SOURCE.replace("FAULT", "mlx::core::copy_gpu() ? nullptr :"))
    assert compiler("-c", "-O2", "-std=c++20", "ext.cpp", "-o", "ext.o") == (0, "")
    status, output = compiler("-bundle", "ext.o", str(mlx / "lib/libmlx.dylib"), "-o", "_ext.so")
    assert status != 0
    assert "undefined symbol: __ZN3mlx4core8copy_gpuEv" in output


def test_compiler_refuses_what_macos_14_lacks(compiler, tmp_path):
    (tmp_path / "new.cpp").write_text("#include <string.h>\nchar* f(char* s) { return strchrnul(s, 1); }\n")
    status, output = compiler("-c", "-Werror", "new.cpp", "-o", "new.o")
    assert status != 0
    assert "'strchrnul' is only available on macOS 15.4 or newer" in output
    assert compiler("-c", "-Werror", "new.cpp", "-o", "new.o", MACOSX_DEPLOYMENT_TARGET="15.4")[0] == 0


def test_names_of_wheels(tmp_path):
    for name in (
        "mlx_bulwark-0.1.0-cp312-cp312-macosx_15_0_arm64.whl",
        "mlx_bulwark-0.1.0-cp312-abi3-macosx_14_0_arm64.whl",
    ):
        (fault,) = check_macho.check_wheel(tmp_path / name, None, None)
        assert name in fault


def test_pins_move_everywhere(tmp_path):
    for name in pin.FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pin.ROOT / name, tmp_path / name)
    old, new = pin.pins(), ("9.8.7", "6.5.4")
    pin.move(new, tmp_path)
    assert pin.pins((tmp_path / "cmake/mlx.cmake").read_text()) == new
    for name in pin.FILES:
        before, after = (pin.ROOT / name).read_text(), (tmp_path / name).read_text()
        assert before != after
        assert after.count(new[0]) == before.count(old[0])
        assert not any(v in after for v in old)
    pin.move(old, tmp_path)
    assert all((tmp_path / n).read_text() == (pin.ROOT / n).read_text() for n in pin.FILES)


def test_pins_stand_nowhere_else():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=pin.ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    kept = [f for f in tracked if not f.startswith("benchmarks/")]
    assert [f for f in kept if pin.pins()[0].encode() in (pin.ROOT / f).read_bytes() and f not in pin.FILES] == []
