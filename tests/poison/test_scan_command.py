"""The command mlx-bulwark scan, from the outside."""

import json
import sys

import matplotlib.image
import numpy as np
import pytest
from mlx_bulwark import cli
from mlx_bulwark.poison import scan_features
from mlx_bulwark.poison.attacks import label_flip

MODEL = """
import mlx.nn as nn

def make():
    return nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 6))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 6, 600)
    x = (rng.normal(size=(600, 12)) + 6 * np.eye(12)[y]).astype(np.float32)
    np.savez("clean.npz", x=x, y=y)
    flipped = label_flip(x, y, rate=0.06, seed=1)
    np.savez("poisoned.npz", x=flipped.x, y=flipped.y)
    np.save("indices.npy", flipped.indices)
    lines = [",".join([*(f"{v:.5f}" for v in row), str(k)]) for row, k in zip(x, flipped.y, strict=True)]
    (tmp_path / "table.csv").write_text("\n".join([",".join([*(f"c{j}" for j in range(12)), "label"]), *lines]) + "\n")
    (tmp_path / "scan_model.py").write_text(MODEL)
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mlx-bulwark", "scan", *map(str, arguments)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    return e.value.code or 0


MADE = ("poisoned.npz", "--model", "scan_model:make")


@pytest.mark.parametrize("arguments", [("poisoned.npz",), ("table.csv",), MADE])
def test_poison_is_accused_and_told(folder, monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments, "--json", "--out", "found.json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((folder / "found.json").read_text())
    assert told["kind"] == "poison_scan"
    assert len(np.intersect1d(told["suspects"], np.load("indices.npy"))) >= 34


def test_the_picture_shows_scores_and_the_worst_images(folder, monkeypatch, capsys):
    assert run(monkeypatch, "poisoned.npz", "--plot", "rows.png") == 1
    with np.load("poisoned.npz") as data:
        np.savez("images.npz", x=data["x"].reshape(-1, 3, 4, 1), y=data["y"])
    assert run(monkeypatch, "images.npz", "--plot", "images.png") == 1
    assert "Scanning: 100%" in capsys.readouterr().err
    rows, images = (matplotlib.image.imread(folder / name) for name in ("rows.png", "images.png"))
    assert images.shape[0] > 1.5 * rows.shape[0]
    for picture in (rows, images):
        red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
        assert ((red > 0.7) & (green < 0.3) & (blue < 0.3)).sum() > 100  # suspects
    assert run(monkeypatch, "images.npz", "--plot", "missing/images.png", "--no-progress") == 2
    told = capsys.readouterr().err
    assert "missing/images.png" in told
    assert "Scanning" not in told


def test_a_picture_wants_the_rows_that_were_scanned(tmp_path):
    report = scan_features(np.random.default_rng(0).normal(size=(100, 4)), np.arange(100) % 4)
    report.plot(tmp_path / "alone.png")
    assert matplotlib.image.imread(tmp_path / "alone.png").size > 1000
    with pytest.raises(ValueError, match=r"\[ScanReport.plot\] x must have the 100 rows that were scanned but has 99"):
        report.plot(tmp_path / "other.png", np.zeros((99, 3, 3)))
    assert not (tmp_path / "other.png").exists()


def test_clean_data_are_not(folder, monkeypatch, capsys):
    assert run(monkeypatch, "clean.npz", "--worst", 3) == 0
    printed = capsys.readouterr().out
    assert "not accused" in printed
    assert printed.count("row ") == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.npz"], "missing.npz"),
        (["poisoned.npz", "--weights", "w.safetensors"], "--weights must come with --model"),
        (["poisoned.npz", "--label", "z"], "--label must name the column of labels"),
        (["poisoned.npz", "--expected-rate", "0.9"], "expected_rate must be above 0"),
        (["poisoned.npz", "--model", "nowhere:make"], "--model must name a function"),
    ],
)
def test_misuse_ends_with_2(folder, monkeypatch, capsys, arguments, words):
    assert run(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err
