"""The benchmark of Metal kernels, where there is no Metal: its arithmetic, its bytes, and its run on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import chips, metal_speed  # noqa: E402
from benchmarks import run as bench_run  # noqa: E402

SMALL = metal_speed.Sizes(
    values=32_000,
    batch=64,
    columns=8_000,
    leaves=12,
    leaf=2048,
    tokens=96,
    width=64,
    copies=200,
    neighbors=150,
    rows=3_000,
    samples=8,
)


def bench(**options):
    return bench_run.Bench("metal_speed", quick=True, device="gpu", **options)


def values(a_bench):
    return {r["name"].removeprefix("metal_speed/"): r["value"] for r in a_bench.released()}


@pytest.mark.parametrize(
    ("name", "cores", "gigabytes"),
    [
        ("Apple M1", 8, 68.25),
        ("Apple M2 Max", 12, 400.0),
        ("Apple M3 Max", 14, 300.0),
        ("Apple M3 Max", 16, 400.0),
        ("Apple M4 Max", 16, 546.0),
        ("Apple M4 Max", 99, None),
        ("Apple M99", 8, None),
        ("AMD EPYC", 2, None),
    ],
)
def test_published_bandwidths(name, cores, gigabytes):
    assert chips.bandwidth(name, cores) == gigabytes


def test_rows_against_values_by_hand():
    b = bench(chip_bandwidth=400.0)
    b.check("case", True)
    metal_speed.rows(b, "case", nbytes=400_000_000, seconds=2e-3, reference_seconds=10e-3)
    assert values(b) == pytest.approx(
        {
            "case/time": 2000.0,
            "case/vs_compiled_reference": 5.0,
            "case/throughput": 200.0,
            "case/share_of_published_bandwidth": 50.0,
            "case/predicted_time": 1000.0,
            "case/measured_over_predicted": 2.0,
            "case/predicted_time_M1": 5860.8059,
            "case/predicted_time_M2_Max": 1000.0,
            "case/predicted_time_M3_Ultra": 488.40049,
            "case/predicted_time_M4_Max": 732.60073,
        }
    )


@pytest.mark.parametrize("case", list(metal_speed.cases(SMALL)), ids=lambda case: case.name)
def test_bytes_are_those_that_kernels_move(sim, case):
    sim.reset()
    mx.eval(case.op(*case.inputs))
    buffers = [b for call in sim.calls for b in call.buffers.values() if b["space"] == "device"]
    assert sim.reports == []
    family = case.name.partition(".")[0]
    once = "unique_" if family in ("ghost", "neighbors", "tails") else ""  # what is asked for again, caches have
    moved = sum(b[f"{once}read"] + b[f"{once}written"] for b in buffers)
    assert case.nbytes <= moved * 1.02
    if family != "neighbors":  # its lists of candidates come on top, which are short where rows are long
        # factors, partial norms, and partial statistics of each 128 rows, seven values a column, come on top
        assert case.nbytes >= moved / (1.12 if family == "tails" else 1.08)


def test_suite_on_the_cpu():
    b = bench(chip_bandwidth=100.0)
    metal_speed.run(b, SMALL)
    b.close()
    assert b.problems == []
    found = values(b)
    for case in metal_speed.cases(SMALL):
        seconds = found[f"{case.name}/time"] / 1e6
        assert seconds > 0
        assert found[f"{case.name}/throughput"] == pytest.approx(case.nbytes / seconds / 1e9)
        assert (f"{case.name}/arithmetic" in found) == bool(case.flops)
        assert found[f"{case.name}/share_of_published_bandwidth"] == pytest.approx(found[f"{case.name}/throughput"])


def test_a_wrong_kernel_has_no_rows(monkeypatch):
    monkeypatch.setattr(metal_speed.bw, "gaussian", lambda *a: mx.zeros(SMALL.values))
    b = bench(chip_bandwidth=100.0)
    metal_speed.run(b, SMALL)
    assert [p for p in b.problems if "noise.gaussian" in p]
    assert not any(name.startswith("noise.gaussian.") for name in values(b))


def test_gpu_has_no_peers(capsys):
    assert bench().peer("numpy") is None
    assert "no numpy (it would run on the CPU)" in capsys.readouterr().out


@pytest.mark.skipif(mx.metal.is_available(), reason="there is a Metal device")
def test_without_a_gpu_one_sentence():
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--device", "gpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "benchmarks/run.py: --device gpu needs a Metal device but MLX has none on this machine\n"


@pytest.fixture
def fake_gpu(monkeypatch):
    """The CPU, which says that it is the GPU of a Mac."""

    def give(name):
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "is_available", lambda device: True)
        monkeypatch.setattr(mx, "device_info", lambda device: {"device_name": name, "memory_size": 1 << 36})
        monkeypatch.setattr(mx, "set_default_device", lambda device: None)
        monkeypatch.setattr(metal_speed.Sizes, "__new__", lambda cls: SMALL)

    return give


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", "metal_speed", "--device", "gpu", "--quick", *map(str, arguments)])
    return bench_run.main()


def test_json_to_send_in(monkeypatch, fake_gpu, tmp_path, capsys):
    fake_gpu("Apple M2 Max")
    assert call(monkeypatch, "--json", tmp_path / "rows.json") == 0
    sent = json.loads((tmp_path / "rows.json").read_text())
    assert sent["machine"]["gpu"] == {"device_name": "Apple M2 Max", "memory_size": 1 << 36}
    assert (sent["machine"]["device"], sent["machine"]["bandwidth"]) == ("gpu", 400.0)
    assert sent["machine"]["mlx"] == mx.__version__
    rows = {r["name"]: r["value"] for r in sent["rows"]}
    case = "metal_speed/clip.clip_and_sum.64x8000"
    assert rows[f"{case}/predicted_time"] == pytest.approx((2 * 64 * 8000 * 4 + 4 * 8000) / 400e9 * 1e6)
    assert rows[f"{case}/predicted_time"] == rows[f"{case}/predicted_time_M2_Max"]
    assert "memory bandwidth of the chip, as published: 400 GB/s" in capsys.readouterr().out


def test_an_unknown_chip(monkeypatch, fake_gpu, tmp_path):
    fake_gpu("Apple M99")
    with pytest.raises(SystemExit, match="bandwidth of Apple M99 is not known here: give it by --bandwidth"):
        call(monkeypatch)
    assert call(monkeypatch, "--bandwidth", "1000", "--json", tmp_path / "rows.json") == 0
    assert json.loads((tmp_path / "rows.json").read_text())["machine"]["bandwidth"] == 1000.0
