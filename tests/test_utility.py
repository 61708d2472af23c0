import json
import sys

import pytest
from mlx_bulwark.cli import main


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mlx-bulwark", "privacy-utility", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


def test_curve(monkeypatch, capsys, tmp_path):
    files = ["--json", tmp_path / "curve.json", "--plot", tmp_path / "curve.png"]
    quick = ["--steps", 3, "--batch-size", 64, "--seeds", 2]
    assert run(monkeypatch, "--epsilon", 4, "--epsilon", 0.5, *quick, *files) == 0
    curve = json.loads((tmp_path / "curve.json").read_text())
    low, high = curve["points"]
    assert low["epsilon"] <= 0.5 < high["epsilon"] <= 4
    assert low["noise_multiplier"] > high["noise_multiplier"]
    assert len(low["test_accuracies"]) == len(curve["nonprivate_test_accuracies"]) == 2
    assert 0 <= low["mean_test_accuracy"] <= 1
    assert curve["adjacency"] == "add or remove one example"
    assert (tmp_path / "curve.png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert "not covered by epsilon" in out
    assert "add or remove one example" in out
    assert f"{100 * high['mean_test_accuracy']:.1f} %" in out


@pytest.mark.parametrize("arguments", [["--epsilon", "0"], ["--epsilon", "21"], ["--seeds", "0"], ["--data", "x"]])
def test_refused(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    assert arguments[0] in capsys.readouterr().err
