"""The doctor, on sound packages and on ones that are spoiled here."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_bulwark as bw
import msl
import msl.bridge
import pytest
from mlx_bulwark import _native, doctor

PACKAGE = Path(bw.__file__).parent
SIMULATOR = Path(msl.__file__).parent
OPS = {
    name: f
    for name in bw.__all__
    if inspect.isfunction(f := getattr(bw, name))
    and f.__module__.startswith("mlx_bulwark.ops.")
    and "stream" in inspect.signature(f).parameters
}
COUNT = len(OPS) * (2 if mx.is_available(mx.gpu) else 1)
# Appended to the copy's __init__.py, each spoils one op.
PLANTED = """
import os, time
from . import _native
def _plant(name, spoil):
    right = getattr(_native.ext, name)
    setattr(_native.ext, name, lambda *a: spoil(right(*a)))
def _abort(x): os.write(2, b"the GPU has fallen off\\n"); os.abort()
def _refuse(x): raise RuntimeError("[bulwark] Metal kernel sq_norms of clip.metal: program_source:3:1: error: no")
"""


@pytest.fixture
def no_simulator(monkeypatch):
    monkeypatch.setattr(_native, "_simulator", None)


@pytest.fixture
def copy(tmp_path):
    """A copy of the installed package, to which a test appends code; runs its command."""
    folder = tmp_path / "mlx_bulwark"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))

    def call(*arguments, planted="", **environment):
        with (folder / "__init__.py").open("a") as file:
            file.write(planted and PLANTED + planted)
        return subprocess.run(
            [sys.executable, "-m", "mlx_bulwark.cli", "doctor", *arguments],
            env={k: v for k, v in os.environ.items() if not k.startswith("BULWARK_")}
            | {"PYTHONPATH": str(tmp_path), "COLUMNS": "120"}
            | environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    call.folder = folder
    return call


def lines_of(done):
    return {line.split()[0]: line for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0] in OPS}


def test_every_op_has_its_line():
    assert set(doctor.CASES) == set(OPS), "an op wants cases in mlx_bulwark/doctor.py, under its own name"


def test_every_native_function_is_run(monkeypatch, no_simulator):
    stub = ast.parse((PACKAGE / "_ext.pyi").read_text()).body
    wanted = {f.name for f in stub if isinstance(f, ast.FunctionDef) and any(a.arg == "stream" for a in f.args.args)}
    called = set()
    for name in wanted:
        f = getattr(_native.ext, name)
        monkeypatch.setattr(_native.ext, name, lambda *a, name=name, f=f: (called.add(name), f(*a))[1])
    assert doctor.examine(isolated=False).ok
    assert called == wanted


def test_every_metal_kernel_is_run(monkeypatch, sim):
    launched = set()

    class Recorder:
        reports = ()

        def __call__(self, extension):
            launched.update(call.kernel for call in sim.calls)
            sim(extension)

    monkeypatch.setattr(_native, "_simulator", Recorder())
    report = doctor.examine(isolated=False)
    assert report.ok
    assert {c.backend for c in report.checks} >= {"native", "metal-sim"}
    launched.update(call.kernel for call in sim.calls)
    for name, text, _ in _native.ext.sources():
        kernels = {kernel.name for kernel in msl.build(msl.bridge.write_source(name, text)).translation.kernels}
        assert kernels <= launched, "a Metal kernel wants a case in mlx_bulwark/doctor.py that launches it"


def test_a_sound_package(no_simulator):
    report = doctor.examine(isolated=False)
    assert report.ok
    assert [(c.op, c.backend, c.device) for c in report.checks if c.device == "cpu"] == [
        (op, "native", "cpu") for op in doctor.CASES
    ]
    assert all(c.error <= c.tolerance and c.case and c.seconds and c.message is None for c in report.checks)
    assert (report.mlx, report.built_for_mlx, report.mlx_is_newer) == (mx.__version__, mx.__version__, False)
    assert report.abi_key == report.mlx_abi_key
    assert report.abi_key.startswith("nanobind_")
    assert report.backend == bw.backend().name


def test_the_backend_is_as_it_was(monkeypatch, backend):
    monkeypatch.setattr(doctor, "CASES", {"gaussian": doctor.CASES["gaussian"]})
    before = bw.backend()
    assert doctor.examine(isolated=False).checks
    assert bw.backend() == before


def test_a_report_of_the_simulator_is_a_fault(monkeypatch, sim):
    class Reporter:
        reports = ("a read of memory never written",)
        __call__ = staticmethod(sim)

    monkeypatch.setattr(_native, "_simulator", Reporter())
    report = doctor.examine(isolated=False)
    off = [c for c in report.checks if not c.ok]
    assert {c.op for c in off} == set(OPS)
    assert {(c.backend, c.message) for c in off} == {("metal-sim", "a read of memory never written")}


def test_a_wrong_kernel(monkeypatch, no_simulator):
    right = _native.ext.sample_sq_norms
    monkeypatch.setattr(_native.ext, "sample_sq_norms", lambda *a: right(*a) * 1.0001)
    report = doctor.examine(isolated=False)
    assert not report.ok
    (off,) = [c for c in report.checks if not c.ok]
    assert (off.op, off.backend, off.case) == ("sample_sq_norms", "native", "float32")
    assert off.error == pytest.approx(1e-4, rel=0.01)
    assert off.message == "it differs from the reference"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x * float("nan"), "the result holds NaN or infinity"),
        (lambda x: x[:-1], "the shape is (10002,), not (10003,)"),
    ],
)
def test_a_kernel_that_gives_no_values(monkeypatch, no_simulator, spoil, message):
    right = _native.ext.gaussian
    monkeypatch.setattr(_native.ext, "gaussian", lambda *a: spoil(right(*a)))
    (off,) = [c for c in doctor.examine(isolated=False).checks if not c.ok]
    assert (off.op, off.error, off.message) == ("gaussian", None, message)
    json.loads(doctor.examine(isolated=False).to_json(), parse_constant=pytest.fail)


def test_command(copy):
    done = copy()
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(lines_of(done)) == set(OPS)
    assert all(line.endswith("ok") for line in lines_of(done).values())
    assert f"built for MLX {mx.__version__}" in done.stdout
    assert f"All {COUNT} checks are ok." in done.stdout


def test_command_with_planted_faults(copy):
    planted = """
_plant("clipped_sum", lambda x: [y * 1.001 for y in x])
_plant("random_bits", _abort)
_plant("sample_sq_norms", _refuse)
"""
    done = copy(planted=planted)
    assert done.returncode == 1
    lines = lines_of(done)
    assert set(lines) == set(OPS)
    off = {op for op, line in lines.items() if line.endswith("OFF")}
    assert off == {"clipped_sum", "random_bits", "sample_sq_norms"}
    assert f"{3 * COUNT // len(OPS)} of {COUNT} checks are off." in done.stdout
    assert "the process was killed by SIGABRT: the GPU has fallen off" in done.stdout
    assert "Metal kernel sq_norms of clip.metal: program_source:3:1: error: no" in " ".join(done.stdout.split())


def test_command_ends_a_kernel_that_does_not(copy):
    with (copy.folder / "doctor.py").open("a") as file:
        file.write("\nTIME_LIMIT = 3.0\n")
    done = copy("--json", planted='_plant("gaussian", lambda x: time.sleep(100))')
    assert done.returncode == 1
    off = {c["op"]: c["message"] for c in json.loads(done.stdout)["checks"] if not c["ok"]}
    assert off["gaussian"] == "it did not end within 3 s"
    assert set(off.values()) == {off["gaussian"]}  # a busy machine may keep others from it too


def test_json(copy):
    done = copy("--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert {name: type(value) for name, value in report.items()} == {
        "kind": str,
        "mlx_bulwark": str,
        "python": str,
        "system": str,
        "chip": str,
        "mlx": str,
        "built_for_mlx": str,
        "mlx_is_newer": bool,
        "abi_key": str,
        "mlx_abi_key": str,
        "instruction_set": str,
        "backend": str,
        "reason": str,
        "device": str,
        "metal": bool,
        "gpu": dict,
        "checks": list,
        "ok": bool,
    }
    assert {name: type(value) for name, value in report["checks"][0].items()} == {
        "op": str,
        "backend": str,
        "device": str,
        "ok": bool,
        "case": str,
        "error": float,
        "tolerance": float,
        "seconds": float,
        "message": type(None),
    }


@pytest.mark.parametrize(("built", "newer"), [("0.1.2", True), ("99.0.0", False)])
def test_beside_another_mlx(copy, built, newer):
    (copy.folder / "_built.py").write_text(f'MLX = "{built}"\n')
    done = copy("--json", PYTHONWARNINGS="ignore")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["backend"], report["mlx_is_newer"], report["instruction_set"]) == ("reference", newer, None)
    assert f"built for mlx {built} but mlx {mx.__version__} is installed" in report["reason"]
    assert [c for c in report["checks"] if c["device"] == "cpu"] == []
    words = " ".join(copy(PYTHONWARNINGS="ignore").stdout.split())
    assert report["reason"] in words
    assert ("which is newer than that" in words) == newer


def test_module_needs_no_optional_package():
    code = (
        "import runpy, sys; sys.modules.update(typer=None, rich=None); "
        "runpy.run_module('mlx_bulwark.doctor', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ok"]


def test_command_with_the_simulator(copy, sim):
    done = copy("--simulator", str(SIMULATOR))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "metal-sim, CPU" in done.stdout
    done = copy("--simulator", str(SIMULATOR.parent))
    assert done.returncode == 2
    assert done.stderr.startswith("mlx-bulwark: --simulator must be the folder tests/msl of a checkout but is ")
