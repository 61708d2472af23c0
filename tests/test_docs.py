"""The documents say what is so: their files exist, and README's Python runs as it stands."""

import inspect
import re
import socket
import subprocess
import sys
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
    assert 'pip install ".[test]" && pytest -n 2 --dist worksteal' in commands


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["bw"].backend().name == "native"


def test_readme_training_of_several_ranks_runs_under_mlx_launch(tmp_path):
    (block,) = [block for block in blocks("README.md", "python") if "mx.distributed.init" in block]
    script = tmp_path / "train.py"
    script.write_text(
        "import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim, mlx_bulwark as bw, numpy as np\n"
        "x, y = np.ones((600, 20), np.float32), np.zeros(600, np.int64)\n"
        "model = nn.Linear(20, 2)\n"
        "def loss_fn(model, x, y):\n"
        "    return nn.losses.cross_entropy(model(x), y, reduction='none')\n"
        f"{block}\nprint('rank', rank, 'of', size, 'steps', engine.steps, flush=True)\n"
    )
    with socket.socket() as s:  # launch wants the first of two free ports
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = "from mlx._distributed_utils.launch import main; main()"  # mlx.launch, of this very interpreter
    command = [sys.executable, "-c", launch, "-n", "2", "--backend", "ring", "--starting-port", str(port)]
    done = subprocess.run(
        [*command, "--", sys.executable, script], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {"rank 0 of 2 steps 5", "rank 1 of 2 steps 5"} <= set(done.stdout.splitlines()), done.stdout + done.stderr


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
