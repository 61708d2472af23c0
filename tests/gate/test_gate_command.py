"""The command mlx-bulwark gate, from the outside."""

import json
import sys

import numpy as np
import pytest
from mlx_bulwark import cli
from mlx_bulwark.gate import Schema, read_quarantine


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 3)).astype(np.float32), rng.integers(0, 3, 300)
    np.savez("good.npz", x=x, y=y)
    x = x.copy()
    x[7, 1], x[9, 0] = np.nan, 1e6
    np.savez("bad.npz", x=x, y=y)
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mlx-bulwark", "gate", *map(str, arguments)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    return e.value.code or 0


def test_infer_then_check(folder, monkeypatch, capsys):
    assert run(monkeypatch, "infer", "good.npz", "--out", "s.json") == 0
    assert Schema.load("s.json").name == "good"
    assert run(monkeypatch, "check", "good.npz", "--schema", "s.json") == 0
    assert "all hold" in capsys.readouterr().out
    assert run(monkeypatch, "check", "bad.npz", "--schema", "s.json", "--quarantine", "q.jsonl") == 1
    printed = capsys.readouterr().out
    assert "missing" in printed
    assert "range" in printed
    assert [d.row for d in read_quarantine("q.jsonl")] == [7, 9]


def test_json(folder, monkeypatch, capsys):
    assert run(monkeypatch, "infer", "good.npz", "--out", "s.json", "--json", "--false-alarm", 1e-4) == 0
    assert Schema.from_json(capsys.readouterr().out) == Schema.load("s.json")
    assert run(monkeypatch, "check", "bad.npz", "--schema", "s.json", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert found["bad_rows"] == 2
    assert (found["counts"]["missing"], found["counts"]["range"]) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("check", "good.npz"), 2),
        (("check", "good.npz", "--schema", "absent.json"), 2),
        (("check", "absent.npz", "--schema", "s.json"), 2),
        (("check", "good.npz", "--schema", "wrong.json"), 2),
        (("check", "broken.npz", "--schema", "s.json", "--json"), 1),
        (("check", "good.npz", "--schema", "s.json", "--max-bytes", 100), 1),
        (("infer", "good.npz", "--quantiles", 0.9, 0.1), 2),
        (("infer", "broken.npz"), 2),
    ],
)
def test_what_cannot_be_used(folder, monkeypatch, capsys, arguments, code):
    Schema().save("s.json")
    (folder / "wrong.json").write_text('{"format": 1, "feilds": {}}')
    (folder / "broken.npz").write_bytes((folder / "good.npz").read_bytes()[:200])
    assert run(monkeypatch, *arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if "--json" in arguments:
        assert not json.loads(captured.out)["ok"]
        assert "broken.npz" in captured.err
