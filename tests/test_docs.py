"""The documents say what is so: their files exist, and README's Python runs as it stands."""

import inspect
import re
from pathlib import Path

import mlx_bulwark as bw
import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`((?:\.ci|benchmarks|cmake|csrc|python|tests)/[\w./]+)`", text))
    named |= {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    assert named
    assert [n for n in sorted(named) if not (ROOT / n).exists()] == []


def test_readme_gives_the_two_commands():
    commands = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    assert 'pip install ".[demo]" && mlx-bulwark demo' in commands
    assert 'pip install ".[test]" && pytest' in commands


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["bw"].backend().name == "native"


def public_functions():
    for name in bw.__all__:
        found = getattr(bw, name)
        if inspect.isfunction(found):
            yield name, found
        elif found.__module__.startswith("mlx_bulwark"):
            for method, f in vars(found).items():
                f = getattr(f, "__func__", f)
                if inspect.isfunction(f) and not method.startswith("_"):
                    yield f"{name}.{method}", f


@pytest.mark.parametrize(("name", "function"), list(public_functions()))
def test_docstrings_are_whole(name, function):
    text = inspect.getdoc(function) or ""
    arguments = re.search(r"^Args:\n(.*?)(?=^\w|\Z)", text, re.MULTILINE | re.DOTALL)
    documented = re.findall(r"^    (\w+): ", arguments[1], re.MULTILINE) if arguments else []
    assert documented == [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    assert re.search(r"^Returns:$", text, re.MULTILINE) or inspect.signature(function).return_annotation is None
    assert re.search(r"^Example:\n    >>> ", text, re.MULTILINE)
