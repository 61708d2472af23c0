import os
import sys

import mlx.core as mx
import msl
import msl.bridge
import pytest
from hypothesis import HealthCheck, settings
from mlx_bulwark import _native

# The same examples at every run; no deadline, since sanitizer builds are many times slower. The backend fixture is set
# once for all examples of a test, which is meant.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")

SIMULATOR = msl.bridge.Simulator()
_native.connect(SIMULATOR)


def use_simulator():
    """Choose the backend metal-sim; skip the test where the simulator cannot be built, unless it is expected here."""
    if reason := msl.missing():
        (pytest.fail if os.environ.get("BULWARK_EXPECT_SIM") == "1" else pytest.skip)(f"metal-sim: {reason}")
    _native.use("metal-sim")


BACKENDS = "native,reference,metal-sim" + (",metal" if sys.platform == "darwin" else "")


def pytest_sessionstart():
    if os.environ.get("BULWARK_EXPECT_METAL") == "1" and not mx.metal.is_available():
        pytest.exit("BULWARK_EXPECT_METAL is 1 but MLX has no Metal device on this machine", returncode=1)


@pytest.fixture(autouse=True)
def same_start():
    """Initial weights and shuffles do not depend on which tests a process has run before."""
    mx.random.seed(0)


@pytest.fixture(params=os.environ.get("BULWARK_TEST_BACKENDS", BACKENDS).split(","))
def backend(request):
    """Run the test once on every backend; ops that are built inside belong to it.

    ``metal`` is the extension on the GPU, ``native`` and ``reference`` are on the CPU.
    """
    device = mx.default_device()
    if request.param == "metal-sim":
        use_simulator()
    elif request.param == "metal":
        if not mx.metal.is_available():
            pytest.skip("MLX has no Metal device on this machine")
        mx.set_default_device(mx.gpu)
        _native.use("native")
    else:
        mx.set_default_device(mx.cpu)
        _native.use(request.param)
    yield request.param
    reports = SIMULATOR.reports if request.param == "metal-sim" else []
    mx.set_default_device(device)
    _native.use_from_environment()
    assert not reports, "\n".join(reports)


@pytest.fixture
def sim():
    """The backend metal-sim, and its simulator, of which a test may ask what happened."""
    use_simulator()
    yield SIMULATOR
    SIMULATOR.reset()
    _native.use_from_environment()
