"""The command mlx-bulwark attack, from the outside."""

import json
import re
import sys

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark import cli

MODEL = """
import mlx.nn as nn
import mlx.core as mx

def make():
    return nn.Linear(2, 3)

def huge():
    model = nn.Linear(2, 3)
    return lambda x: 1e6 * (x @ mx.array([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]) + mx.array([-0.5, 0.5, -9.0]))

def dropout():
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 3))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "attacked_by_this_test", raising=False)
    (tmp_path / "attacked_by_this_test.py").write_text(MODEL)
    model = nn.Linear(2, 3)
    model.update({"weight": mx.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.1]]), "bias": mx.array([-0.5, 0.5, -0.2])})
    model.save_weights("weights.safetensors")
    x = np.array([[0.95, 0.3], [0.6, 0.3], [0.1, 0.6], [0.45, 0.6]], np.float32)
    np.savez("data.npz", x=x, y=np.array([0, 0, 1, 0]))
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mlx-bulwark", "attack", *map(str, arguments)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    return e.value.code or 0


BASE = ("--model", "attacked_by_this_test:make", "--weights", "weights.safetensors", "--data", "data.npz")
PGD = ("--attack", "pgd", "--steps", 5)


def test_table_and_picture(folder, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    assert run(monkeypatch, *BASE, *PGD, "--eps", 0.05, "--eps", 0.2, "--attack", "fgsm", "--plot", "robust.png") == 0
    printed = capsys.readouterr()
    assert len(re.findall(r"worst case", printed.out)) == 2
    assert re.search(r"pgd +│ linf +│ +0\.2 │ +0\.5000", printed.out)
    assert "picture    robust.png" in printed.out
    assert "2/2" in printed.err
    assert matplotlib.image.imread(folder / "robust.png").size > 1000


def test_json_alone(folder, monkeypatch, capsys):
    assert run(monkeypatch, *BASE, *PGD, "--eps", 0.2, "--json", "--no-progress") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    (found,) = json.loads(printed.out)["runs"]
    assert (found["eps"], found["inputs"], found["clean_accuracy"], found["robust_accuracy"]) == (0.2, 4, 0.75, 0.5)
    assert found["attacks"][0]["name"] == "pgd"
    assert found["flags"] == []


def test_every_attack(folder, monkeypatch, capsys):
    names = "fgsm", "pgd", "apgd", "apgd-dlr", "cw", "deepfool", "fab", "square", "hopskipjump"
    options = [part for name in names for part in ("--attack", name)]
    settings = ("--norm", "l2", "--steps", 20, "--queries", 100, "--no-checks", "--inputs", 2, "--batch-size", 1)
    assert run(monkeypatch, *BASE, *options, *settings, "--eps", 0.2, "--json", "--no-progress") == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert [a["name"] for a in found["attacks"]] == list(names)
    assert found["inputs"] == 2
    assert found["robust_accuracy"] == 0.5


def test_masked_gradients_end_with_3(folder, monkeypatch, capsys):
    options = ("--model", "attacked_by_this_test:huge", "--data", "data.npz", "--eps", 0.2, *PGD)
    assert run(monkeypatch, *options) == 3
    assert "flag       zero_gradients" in capsys.readouterr().out
    assert run(monkeypatch, *options, "--no-checks") == 0


def test_dropout_is_put_out_of_training(folder, monkeypatch, capsys):
    options = ("--model", "attacked_by_this_test:dropout", "--data", "data.npz", "--eps", 0.2, *PGD)
    assert run(monkeypatch, *options, "--no-checks") == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "attacked_by_this_test"}, "--model must be module:function"),
        ({"--data": "none.npz"}, "--data must be a readable"),
        ({"--data": "far.npz"}, "within the bounds"),
        ({"--data": "labels.npz"}, "y must be in"),
        ({"--eps": -1}, "eps must be"),
        ({"--norm": "l3"}, "norm must be"),
        ({"--attack": "nothing"}, "--attack must be fgsm, pgd"),
        ({"--attack": "cw"}, "--norm must be l2 for --attack cw"),
        ({"--attack": "fgsm", "--steps": 3}, "--steps must be an option of an --attack"),
        ({"--steps": 0}, "steps must be"),
        ({"--inputs": 0}, "--inputs must be"),
        ({"--batch-size": 0}, "batch_size must be"),
    ],
)
def test_options_that_cannot_be_used(folder, monkeypatch, capsys, changes, words):
    np.savez("far.npz", x=np.full((3, 2), 7.0), y=np.zeros(3, int))
    np.savez("labels.npz", x=np.zeros((3, 2)), y=np.full(3, 7))
    options = {**dict(zip(BASE[::2], BASE[1::2], strict=True)), "--eps": 0.1, "--attack": "pgd", **changes}
    arguments = [part for item in options.items() for part in item]
    assert run(monkeypatch, *arguments, "--no-progress") == 2
    printed = capsys.readouterr()
    assert re.match(r"mlx-bulwark: ", printed.err)
    assert re.search(words, printed.err)
    assert printed.out == ""


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for option in ("--model", "--weights", "--data", "--eps", "--norm", "--attack", "--json", "--plot", "--queries"):
        assert option in text
