"""Python of docs/attacks.md, run as it stands."""

import re
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "attacks.md"


def test_blocks_run():
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, DOCUMENT.name, "exec"), names)


def test_every_flag_is_explained():
    import mlx_bulwark.attacks.checks as checks

    source = Path(checks.__file__).read_text()
    flags = set(re.findall(r'Flag\("(\w+)"', source))
    told = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), re.MULTILINE))
    assert flags == told
