import os

import pytest

import msl

WHY_NOT = msl.missing()


@pytest.fixture(scope="session")
def simulator():
    """Skip the test where the simulator's compiler is missing, unless it is expected here."""
    if WHY_NOT:
        (pytest.fail if os.environ.get("BULWARK_EXPECT_SIM") == "1" else pytest.skip)(WHY_NOT)


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.getreports("skipped") if WHY_NOT and WHY_NOT in str(r.longrepr)]
    if skipped:
        terminalreporter.section(f"{len(skipped)} tests SKIPPED: {WHY_NOT}", yellow=True)
