"""The choice of the backend, and what the build puts into the wheel."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import cmake
import mlx.core as mx
import mlx_bulwark as bw
import pytest
from mlx_bulwark import _native

PACKAGE = Path(bw.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
MLX = mx.__version__

# Imports the package, runs an op, and tells what it saw.
PROBE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mlx_bulwark as bw
    import mlx.core as mx
    norms = bw.sample_sq_norms([mx.array([[3.0, 4.0], [0.0, 1.0]])]).tolist()
print(json.dumps({
    "backend": bw.backend().name,
    "reason": bw.backend().reason,
    "warnings": [str(w.message) for w in caught],
    "loaded": "mlx_bulwark._ext" in sys.modules,
    "norms": norms,
    "file": bw.__file__,
}))
"""


def python(code, path, **environment):
    """Run code in a process of its own, with ``path`` before everything that is installed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BULWARK_")} | environment
    environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=path)


@pytest.fixture
def copy(tmp_path):
    """A copy of the installed package that a test may spoil."""
    shutil.copytree(PACKAGE, tmp_path / "mlx_bulwark", ignore=shutil.ignore_patterns("__pycache__"))

    def probe(**environment):
        done = python(PROBE, tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert seen["file"].startswith(str(tmp_path))
        assert seen["norms"] == [25.0, 1.0]
        return seen

    probe.package = tmp_path / "mlx_bulwark"
    return probe


def remove_extension(package):
    (library,) = package.glob("_ext*.so")
    library.unlink()


def build_for_another_mlx(package):
    (package / "_built.py").write_text('MLX = "0.1.2"\n')


def test_native_runs_where_versions_agree(copy):
    seen = copy()
    assert (seen["backend"], seen["warnings"], seen["loaded"]) == ("native", [], True)


def test_another_mlx_falls_back_with_one_warning(copy):
    build_for_another_mlx(copy.package)
    seen = copy()
    assert seen["backend"] == "reference"
    (warning,) = seen["warnings"]
    assert f"mlx {MLX} is installed" in warning
    assert "built for mlx 0.1.2" in warning
    assert re.search(r"`pip install '?mlx(\[\w+\])?==0\.1\.2'?`", warning)
    assert seen["reason"] in warning


def test_extension_is_not_loaded_before_versions_agree(copy):
    build_for_another_mlx(copy.package)
    remove_extension(copy.package)
    (copy.package / "_ext.py").write_text("raise SystemExit('the extension was loaded')\n")
    assert not copy()["loaded"]


def test_missing_extension_falls_back_with_one_warning(copy):
    remove_extension(copy.package)
    (copy.package / "_built.py").unlink()
    seen = copy()
    assert seen["backend"] == "reference"
    (warning,) = seen["warnings"]
    assert "no native extension" in warning
    assert "`pip install .`" in warning


def test_broken_extension_falls_back_with_one_warning(copy):
    (library,) = copy.package.glob("_ext*.so")
    library.write_bytes(b"not a library")
    seen = copy()
    assert seen["backend"] == "reference"
    (warning,) = seen["warnings"]
    assert "does not load" in warning
    assert "pip install --force-reinstall" in warning


@pytest.mark.parametrize(
    ("value", "name"), [("auto", "native"), ("", "native"), ("native", "native"), ("reference", "reference")]
)
def test_environment_chooses(copy, value, name):
    seen = copy(BULWARK_BACKEND=value)
    assert (seen["backend"], seen["warnings"], seen["loaded"]) == (name, [], name == "native")


def test_wrong_environment_is_refused(copy):
    done = python("import mlx_bulwark", copy.package.parent, BULWARK_BACKEND="Native")
    assert done.returncode == 1
    assert (
        "ValueError: [bulwark] BULWARK_BACKEND must be one of auto, native, reference, metal-sim but is 'Native'"
        in done.stderr
    )


def test_native_is_an_order_not_a_wish(copy):
    build_for_another_mlx(copy.package)
    done = python("import mlx_bulwark", copy.package.parent, BULWARK_BACKEND="native")
    assert done.returncode == 1
    assert f"ImportError: [bulwark] backend native: the extension was built for mlx 0.1.2 but mlx {MLX}" in done.stderr


def test_mlx_without_its_library_says_what_to_install(copy):
    fake = copy.package.parent / "mlx"
    fake.mkdir()
    (fake / "__init__.py").touch()
    (fake / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')\n")
    done = python("import mlx_bulwark", copy.package.parent)
    assert done.returncode == 1
    assert "`pip install 'mlx-bulwark[cpu]'`" in done.stderr


def test_backend_tells_what_runs(backend):
    assert bw.backend().name == ("native" if backend == "metal" else backend)
    assert bw.backend().reason
    assert _native.runs_native(None) == _native.runs_native(mx.cpu) == (backend != "reference")
    assert _native.runs_native(mx.default_stream(mx.cpu)) == (backend != "reference")


def test_gpu_streams_run_the_reference_unless_they_are_metal():
    _native.use("native")
    assert _native.runs_native(mx.gpu) == mx.metal.is_available()
    assert _native.runs_native(mx.Device(mx.gpu, 0)) == mx.metal.is_available()


def test_backend_tells_of_a_default_device_that_the_extension_does_not_run_on(monkeypatch):
    _native.use("native")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert bw.backend().name == "reference"
    assert bw.backend().reason.endswith("but the default device is Device(gpu, 0)")
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert bw.backend() == ("native", "the extension is loaded")


def test_simulator_is_an_order_to_tests_only(copy):
    done = python("import mlx_bulwark", copy.package.parent, BULWARK_BACKEND="metal-sim")
    assert done.returncode == 1
    assert "RuntimeError: [bulwark] backend metal-sim: no simulator is connected" in done.stderr


def test_instruction_set_can_be_lowered():
    code = "from mlx_bulwark import _native; print(_native.ext.isa())"
    best = python(code, "/").stdout.strip()
    assert best in ("base", "avx2", "avx512")
    assert python(code, "/", BULWARK_ISA="base").stdout.strip() == "base"
    assert python(code, "/", BULWARK_ISA="avx2").stdout.strip() == ("base" if best == "base" else "avx2")


def test_stub_matches_the_extension():
    _native.use("native")
    stub = {
        f.name: [a.arg for a in f.args.args]
        for f in ast.parse((PACKAGE / "_ext.pyi").read_text()).body
        if isinstance(f, ast.FunctionDef)
    }
    built = {}
    for name, f in vars(_native.ext).items():
        if callable(f):
            (signature,) = f.__nb_signature__
            tree = ast.parse(re.sub(r"\\\d+", "0", signature[0]) + ": ...").body[0]
            built[name] = [a.arg for a in tree.args.args]
    assert built == stub


def test_wheel_holds_types_and_licence():
    files = {str(f) for f in metadata.files("mlx-bulwark")}
    assert {"mlx_bulwark/py.typed", "mlx_bulwark/_ext.pyi", "mlx_bulwark/_built.py"} <= files
    assert any(re.fullmatch(r"mlx_bulwark/_ext\..*\.so", f) for f in files)
    assert any(f.endswith("licenses/LICENSE") for f in files)
    assert not any(f.startswith(("csrc", "tests", "benchmarks")) or f.endswith((".cpp", ".h")) for f in files)


def test_wheel_pins_the_mlx_it_was_built_for():
    requires = [r.replace('"', "'").replace(" ", "") for r in metadata.requires("mlx-bulwark")]
    assert f"mlx=={MLX}" in requires
    for extra in ("cpu", "cuda12", "cuda13"):
        assert f"mlx[{extra}]=={MLX};extra=='{extra}'" in requires
    assert f"mlx[cpu]=={MLX};sys_platform=='linux'andextra=='demo'" in requires
    pins = {re.split(r"[;]", r)[0] for r in requires if re.match(r"mlx(\[|=)", r)}
    assert all(p.endswith(f"=={MLX}") for p in pins)
    assert bw.__version__ == metadata.version("mlx-bulwark")


@pytest.fixture
def configure(tmp_path):
    """Run cmake/mlx.cmake against an environment that holds the given versions (None: not installed)."""

    def run(*, nanobind="3.1.0", mlx=MLX, library=True):
        site = tmp_path / "site"
        found = site / "cmake"
        found.mkdir(parents=True)
        (found / "nanobind-config.cmake").touch()
        body = f"__version__ = {nanobind!r}\n\ndef cmake_dir():\n    return {str(found)!r}\n" if nanobind else "1 / 0\n"
        (site / "nanobind.py").write_text(body)
        (site / "mlx" / "include" / "mlx").mkdir(parents=True)
        (site / "mlx" / "__init__.py").write_text("" if mlx else "raise ImportError\n")
        (site / "mlx" / "core.py").touch()
        numbers = dict(zip(("MAJOR", "MINOR", "PATCH"), (mlx or "0.0.0").split("."), strict=True))
        lines = "".join(f"#define MLX_VERSION_{k} {v}\n" for k, v in numbers.items())
        (site / "mlx" / "include" / "mlx" / "version.h").write_text(lines)
        if library:
            (site / "mlx" / "share" / "cmake" / "MLX").mkdir(parents=True)
            (site / "mlx" / "share" / "cmake" / "MLX" / "MLXConfig.cmake").touch()
        script = tmp_path / "probe.cmake"
        script.write_text(
            textwrap.dedent(f"""
            cmake_minimum_required(VERSION 3.24)
            set(Python_EXECUTABLE "{sys.executable}")
            include("{ROOT}/cmake/mlx.cmake")
            message(STATUS "built for ${{MLX_BUILT_FOR}}")
            """)
        )
        done = subprocess.run(
            [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-P", script],
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


def test_configure_takes_the_right_pair(configure):
    status, output = configure()
    assert status == 0, output
    assert f"built for {MLX}" in output


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        ({"nanobind": "2.15.0"}, "must be built with nanobind 3.1.0"),
        ({"nanobind": "2.15.0"}, "but nanobind 2.15.0 is installed: `pip install nanobind==3.1.0`"),
        ({"nanobind": None}, "needs nanobind at build time"),
        ({"mlx": "0.31.9"}, f"must be built against mlx {MLX} but mlx 0.31.9 is installed: `pip install"),
        ({"mlx": None}, "needs mlx at build time"),
        ({"library": False}, f'on Linux plain `mlx` holds none, `pip install "mlx[cpu]=={MLX}"` brings it'),
    ],
)
def test_configure_refuses_a_wrong_pair(configure, versions, sentence):
    status, output = configure(**versions)
    assert status != 0
    assert sentence in output
