"""What a run of the tests must not leave out in silence."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

TEST = Path(__file__).parent / "ops" / "test_clip.py"


def pytest_with(**environment):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", TEST, "-k", "test_huge_and_tiny_values"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_metal_is_expected():
    done = pytest_with(BULWARK_EXPECT_METAL="1", BULWARK_TEST_BACKENDS="native")
    sentence = "BULWARK_EXPECT_METAL is 1 but MLX has no Metal device on this machine"
    there = mx.metal.is_available()
    assert done.returncode == (0 if there else 1)
    assert (sentence in done.stdout + done.stderr) != there


def test_metal_is_not_expected():
    done = pytest_with(BULWARK_EXPECT_METAL="", BULWARK_TEST_BACKENDS="native,metal")
    assert done.returncode == 0
    assert ("4 passed, 4 skipped" in done.stdout) != mx.metal.is_available()


def test_the_simulator_is_expected():
    done = pytest_with(BULWARK_EXPECT_SIM="1", BULWARK_TEST_BACKENDS="metal-sim", PATH="")
    assert done.returncode == 1
    assert "the Metal simulator" in done.stdout


def test_a_browser_is_expected():
    tests = Path(__file__).parent / "report" / "test_browser.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tests, "-k", "landmarks"]
    for expected, code in (("1", 1), ("", 0)):
        environment = os.environ | {"BULWARK_EXPECT_BROWSER": expected, "PATH": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == code
    assert "1 skipped" in done.stdout
