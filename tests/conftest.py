import os

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


@pytest.fixture(params=os.environ.get("BULWARK_TEST_BACKENDS", "native,reference").split(","))
def backend(request):
    """Run the test once on every backend; ops that are built inside belong to it."""
    _native.use(request.param)
    yield request.param
    _native.use_from_environment()
