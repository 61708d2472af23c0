"""The gate of benchmarks/run.py, on suites written here: nothing of a case that is not proven correct is reported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"

SUITES = {
    "good": """
def run(bench):
    bench.row("early/seconds", 2.0, "s", better="lower")  # before its check
    bench.check("early", lambda: None)
    bench.check("late", True)
    times = bench.compare({"slow": lambda: sum(range(20000)), "fast": lambda: sum(range(100))}, rounds=3)
    bench.row("late/ratio", times.ratio("slow", "fast"), "x", peer="fast", better="lower")
    assert bench.peer("no_such_module") is None
    assert bench.peer("no_such_module") is None
""",
    "wrong": """
def boom():
    raise ArithmeticError("off by one")

def run(bench):
    bench.check("good", True)
    bench.row("good/seconds", 1.0, "s", better="lower")
    bench.check("false", lambda: 1 + 1 == 3)
    bench.row("false/seconds", 1.0, "s", better="lower")
    bench.check("raises", boom)
    bench.row("raises/seconds", 1.0, "s", better="lower")
    bench.row("unchecked/seconds", 1.0, "s", better="lower")
    bench.check("withdrawn", True)
    bench.row("withdrawn/seconds", 1.0, "s", better="lower")
    bench.check("withdrawn", False)
    bench.check("nan", True)
    bench.row("nan/seconds", float("nan"), "s", better="lower")
""",
    "dies": """
def run(bench):
    bench.check("before", True)
    bench.row("before/seconds", 1.0, "s", better="lower")
    raise RuntimeError("out of luck")
""",
    "memory": """
def hold(megabytes):
    floor = bytearray(50 << 20)  # part of the floor
    def step():
        return sum(bytearray(b"\\1") * (megabytes << 20)) - sum(floor[:9])
    return step

def run(bench):
    peak = bench.peak_memory(hold, 40)
    bench.check("hold", 39 << 20 <= peak <= 60 << 20)
    bench.row("hold/peak_memory", peak, "B", better="lower")
""",
}


@pytest.fixture
def bench(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    shutil.copy(RUN, folder)
    for name, text in SUITES.items():
        (folder / f"{name}.py").write_text(text)

    def call(*arguments):
        done = subprocess.run(
            [sys.executable, folder / "run.py", *arguments, "--json", tmp_path / "rows.json"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        rows = tmp_path / "rows.json"
        return done, json.loads(rows.read_text()) if rows.exists() else None

    return call


def test_proven_rows_are_written(bench):
    done, rows = bench("good")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows[0] == {"name": "good/early/seconds", "value": 2.0, "unit": "s", "peer": None, "better": "lower"}
    assert rows[1]["name"] == "good/late/ratio"
    assert rows[1]["value"] > 5
    assert done.stdout.count("rows with this peer are skipped") == 1
    assert "good/late/ratio" in done.stdout


def test_unproven_rows_are_not_written(bench):
    done, rows = bench("wrong")
    assert done.returncode == 1
    assert [r["name"] for r in rows] == ["wrong/good/seconds"]
    for case in ("false", "raises", "unchecked", "withdrawn", "nan"):
        assert f"FAILED wrong/{case}" in done.stdout
    assert "off by one" in done.stdout


def test_a_suite_that_dies_loses_nothing(bench):
    done, rows = bench("dies", "good")
    assert done.returncode == 1
    assert "out of luck" in done.stdout
    assert [r["name"] for r in rows] == ["dies/before/seconds", "good/early/seconds", "good/late/ratio"]


def test_peak_memory_is_above_the_floor(bench):
    done, rows = bench("memory")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows[0]["name"] == "memory/hold/peak_memory"


def test_list_and_unknown_suite(bench):
    done, _ = bench("--list")
    assert done.stdout.split() == sorted(SUITES)
    done, rows = bench("no_such_suite")
    assert done.returncode == 2
    assert "no_such_suite" in done.stderr
    assert rows is None
