"""The command mlx-bulwark certify, from the outside."""

import json
import os
import re
import sys
import warnings
import zipfile

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark import cli
from mlx_bulwark.smoothing import CertifiedTable

MODEL = """
import mlx.nn as nn
import mlx.core as mx

def make():
    return nn.Linear(1, 2)

def plain():
    return lambda x: mx.concatenate([x, -x], axis=1)

def flat():
    return lambda x: x[:, 0]

def nothing():
    return None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "classifier_of_this_test", raising=False)
    (tmp_path / "classifier_of_this_test.py").write_text(MODEL)
    model = nn.Linear(1, 2)
    model.update({"weight": mx.array([[1.0], [-1.0]]), "bias": mx.zeros(2)})
    model.save_weights("weights.safetensors")
    np.savez("data.npz", x=np.array([[1.0], [-1.0], [0.0]], np.float32), y=np.array([0, 1, 0]))
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mlx-bulwark", "certify", *map(str, arguments)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    return e.value.code or 0


BASE = ("--model", "classifier_of_this_test:make", "--weights", "weights.safetensors", "--data", "data.npz", "--n", 500)


def test_tables_figures_and_picture(folder, monkeypatch, capsys):
    assert run(monkeypatch, *BASE, "--sigma", 0.25, "--sigma", 0.5, "--plot", "certified.png") == 0
    printed = capsys.readouterr()
    assert re.search(r"0\.25 +3 +0\.333 +0\.667", printed.out)
    assert "3/3" in printed.err
    table = CertifiedTable.read_csv(folder / "bulwark-certified" / "sigma-0.25.csv")
    assert table.column("predict").tolist() == [0, 1, -1]
    assert (folder / "bulwark-certified" / "sigma-0.5.csv").exists()
    assert matplotlib.image.imread(folder / "certified.png").size > 1000


def test_json_alone_and_a_run_that_goes_on(folder, monkeypatch, capsys):
    found = []
    for more in ((), (), ("--restart",)):
        assert run(monkeypatch, *BASE, "--sigma", 0.25, "--json", "--no-progress", "--out", "o", *more) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        found.append((json.loads(printed.out), (folder / "o" / "sigma-0.25.csv").read_text()))
    assert found[0][0]["runs"][0]["certified_accuracy"]["0.25"] == pytest.approx(2 / 3)
    assert found[0][0]["interrupted"] is False
    assert found[0] == found[1]
    assert found[2][1] != found[0][1]


def test_an_interruption_keeps_what_is_done(folder, monkeypatch, capsys):
    from mlx_bulwark.smoothing import command

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    run(monkeypatch, *BASE, "--sigma", 0.25, "--no-progress")
    monkeypatch.setattr(command, "certify_dataset", interrupted)
    capsys.readouterr()
    assert run(monkeypatch, *BASE, "--sigma", 0.25, "--json") == 130
    figures = json.loads(capsys.readouterr().out)
    assert figures["interrupted"] is True
    assert figures["runs"][0]["inputs"] == 3


def test_uniform_noise_bounds_and_targets(folder, monkeypatch, capsys):
    options = ("--norm", "l1", "--bounds", -1, 1, "--levels", 256, "--target-radius", 0.1, "--looks", 2, "--skip", 2)
    assert run(monkeypatch, *BASE, "--sigma", 0.5, *options, "--json", "--no-progress") == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["inputs"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "classifier_of_this_test"}, "--model must be module:function"),
        ({"--model": "no_such_module:make"}, "--model must name a function"),
        ({"--model": "classifier_of_this_test:no"}, "--model must name a function"),
        ({"--model": "classifier_of_this_test:nothing"}, "--model must return a model"),
        ({"--model": "classifier_of_this_test:plain"}, "mlx.nn.Module for --weights"),
        ({"--weights": "data.npz"}, "--weights must be a .safetensors file"),
        ({"--weights": "none.safetensors"}, "--weights must fit"),
        ({"--data": "none.npz"}, "--data must be a readable"),
        ({"--data": "weights.safetensors"}, "--data must be a readable"),
        ({"--data": "other.npz"}, "--data must have the arrays"),
        ({"--data": "integers.npz"}, "--data must have floating inputs"),
        ({"--data": "labels.npz"}, r"labels in \[0, 2\)"),
        ({"--data": "objects.npz"}, "--data must be a readable"),
        ({"--data": "link.npz"}, "must be a file but is a link"),
        ({"--data": "twice.npz"}, "has some twice"),
        ({"--sigma": -1}, "sigma must"),
        ({"--alpha": 1}, "alpha must"),
        ({"--n": 0}, "n must"),
        ({"--norm": "linf"}, "norm must"),
        ({"--levels": 5}, "levels must come with bounds"),
        ({"--target-radius": 99}, "must"),
    ],
)
def test_options_that_cannot_be_used(folder, monkeypatch, capsys, changes, words):
    np.savez("other.npz", a=np.zeros(3))
    np.savez("integers.npz", x=np.zeros((3, 1), int), y=np.zeros(3, int))
    np.savez("labels.npz", x=np.zeros((3, 1)), y=np.full(3, 7))
    np.savez("objects.npz", x=np.array([[None]], object), y=np.zeros(1, int))
    os.symlink("data.npz", "link.npz")
    with zipfile.ZipFile("twice.npz", "w") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            f.writestr("x.npy", b"")
    options = {**dict(zip(BASE[::2], BASE[1::2], strict=True)), "--sigma": 0.25, **changes}
    assert run(monkeypatch, *(part for item in options.items() for part in item)) == 2
    printed = capsys.readouterr()
    assert re.match(r"mlx-bulwark: ", printed.err)
    assert re.search(words, printed.err)
    assert printed.out == ""


def test_outputs_that_are_no_logits(folder, monkeypatch, capsys):
    options = ("--model", "classifier_of_this_test:flat", "--data", "data.npz", "--sigma", 0.25)
    assert run(monkeypatch, *options) == 2
    assert "--model must return logits" in capsys.readouterr().err


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for option in ("--model", "--weights", "--data", "--sigma", "--json", "--target-radius", "--restart"):
        assert option in text
