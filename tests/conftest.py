import os

import pytest
from mlx_bulwark import _native


@pytest.fixture(params=os.environ.get("BULWARK_TEST_BACKENDS", "native,reference").split(","))
def backend(request):
    """Run the test once on every backend; ops that are built inside belong to it."""
    _native.use(request.param)
    yield request.param
    _native.use_from_environment()
