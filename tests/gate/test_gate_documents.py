"""Python of docs/drift.md and docs/inputs.md, run as it stands."""

import re
from pathlib import Path

import pytest

DOCUMENTS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", ["drift.md", "inputs.md"])
def test_blocks_run(name):
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCUMENTS / name).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), names)
