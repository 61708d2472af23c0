import json
import re
import sys

import matplotlib.image
import numpy as np
import outlier_data as data
import pandas as pd
import pytest
from mlx_bulwark.cli import main
from mlx_bulwark.outliers import ECOD, KNN, Ensemble, command, load

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def people(tmp_path):
    """A table with four rows that are odd, each in a way of its own."""
    rng = np.random.default_rng(0)
    height = rng.normal(172, 9, 300)
    weight = 0.9 * height - 85 + rng.normal(0, 5, 300)
    table = pd.DataFrame({"height": height, "weight": weight, "age": rng.integers(18, 90, 300).astype(float)})
    table.loc[37, "weight"] = 7.0
    table.loc[111, "age"] = 999.0
    table.loc[200, ["height", "weight"]] = [150.0, 110.0]
    path = tmp_path / "people.csv"
    table.to_csv(path, index=False)
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mlx-bulwark", "outliers", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


def test_the_worst_rows_and_why(monkeypatch, capsys, people, tmp_path):
    files = [tmp_path / name for name in ("s.csv", "f.json", "p.png")]
    options = ["--contamination", "0.01", "--top", "4", "--csv", files[0], "--json", files[1], "--plot", files[2]]
    assert run(monkeypatch, people, *options) == 0
    out = capsys.readouterr().out
    assert "300 rows, 3 columns" in out
    assert "outliers   3 (1.0%)" in out
    lines = [line for line in out.splitlines() if re.match(r" *\d+ +[\d.]+ +[█·]{10} ", line)]
    assert {int(line.split()[0]) for line in lines[:3]} == {37, 111, 200}
    assert len(lines) == 4
    (age,) = [line for line in lines if line.split()[0] == "111"]
    assert re.search(r"age \(9\d%\): 999, usually 2\d(\.\d+)? to 8\d", age)
    figures = json.loads(files[1].read_text())
    assert [w["row"] for w in figures["worst"][:3]] == [int(line.split()[0]) for line in lines[:3]]
    assert [w["outlier"] for w in figures["worst"]] == [True, True, True, False]
    assert figures["rows"] == 300
    written = np.loadtxt(files[0], delimiter=",", skiprows=1)
    expected = Ensemble(contamination=0.01, random_state=0).fit(pd.read_csv(people).to_numpy())
    np.testing.assert_array_equal(written[:, 1], -expected.training_scores_)
    assert written[:, 2].sum() == figures["outliers"] == 3
    assert matplotlib.image.imread(files[2]).std() > 0.05
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.json", "p.png", "people.csv", "s.csv"]


@pytest.mark.parametrize("detector", command.DETECTORS)
def test_every_detector_finds_them(monkeypatch, capsys, people, detector):
    assert run(monkeypatch, people, "--detector", detector, "--top", "30") == 0
    out = capsys.readouterr().out
    rows = [int(line.split()[0]) for line in out.splitlines() if re.match(r" *\d+ +[-\d.einf+]+ +[█·]{10} ", line)]
    assert len(rows) == 30
    assert {37, 111} <= set(rows) or detector in ("ecod", "hbos")  # to which a giant is one far column, no more


def test_a_reference_and_a_saved_detector(monkeypatch, capsys, people, tmp_path):
    table = pd.read_csv(people)
    table.iloc[:100][["weight", "age", "height"]].to_parquet(tmp_path / "clean.parquet")
    call = [people, "--reference", tmp_path / "clean.parquet", "--detector", "knn", "--save", tmp_path / "d"]
    assert run(monkeypatch, *call, "--csv", tmp_path / "a.csv") == 0
    assert "clean.parquet" in capsys.readouterr().out
    knn = KNN(novelty=True).fit(table.iloc[:100].to_numpy())
    found = np.loadtxt(tmp_path / "a.csv", delimiter=",", skiprows=1)[:, 1]
    np.testing.assert_array_equal(found, knn.anomaly_score(table.to_numpy()))
    table[["age", "weight", "height"]].to_csv(tmp_path / "moved.csv", index=False)
    assert load(tmp_path / "d").feature_names_in_.tolist() == ["height", "weight", "age"]
    assert run(monkeypatch, tmp_path / "moved.csv", "--load", tmp_path / "d", "--csv", tmp_path / "b.csv") == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_columns_of_arrays_go_by_number(monkeypatch, capsys, tmp_path):
    x = data.rows(50)
    x[7, 3] = 1e6
    np.save(tmp_path / "x.npy", x)
    assert run(monkeypatch, tmp_path / "x.npy", "--columns", "3,1", "--detector", "robust-z", "--top", "1") == 0
    assert re.search(r"\n +7 .* 3 \(100%\): 1e\+06", capsys.readouterr().out)


def test_infinite_scores_are_told(monkeypatch, capsys, tmp_path):
    x = np.concatenate([np.zeros((30, 2)), data.rows(60, 2), [[0.01, 0.0]]])
    np.save(tmp_path / "x.npy", x)
    files = ["--json", tmp_path / "f.json", "--plot", tmp_path / "p.png"]
    assert run(monkeypatch, tmp_path / "x.npy", "--detector", "lof", *files) == 0
    assert re.search(r"\n +90 +inf ", capsys.readouterr().out)
    assert json.loads((tmp_path / "f.json").read_text())["worst"][0]["anomaly_score"] == "inf"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--detector", "magic"], r"--detector must be one of ensemble, .* but is magic"),
        (["--contamination", "0.9"], r"--contamination must be above 0 and at most 0.5 but is 0.9"),
        (["--columns", "height,shoe"], r".*must have the columns height, shoe but has no shoe"),
        (["--load", "d", "--contamination", "0.1"], r"--load must stand without --reference and --contamination"),
        (["--load", "people.csv"], r"\[load\] people.csv must be a whole safetensors file but is not"),
        (["--reference", "narrow.npy"], r"--reference must have the 3 columns of FILE but has 2"),
        (["--reference", "people.txt"], r"\[score_file\] path must end in one of .npy"),
    ],
)
def test_what_cannot_be_used_ends_with_one_line_and_code_2(monkeypatch, capsys, people, arguments, message):
    monkeypatch.chdir(people.parent)
    np.save("narrow.npy", np.zeros((9, 2)))
    assert run(monkeypatch, people, *arguments) == 2
    error = capsys.readouterr().err
    assert re.match(rf"mlx-bulwark: {message}", error)
    assert error.count("\n") == 1


def test_bad_data_ends_with_one_line_and_code_2(monkeypatch, capsys, people):
    table = pd.read_csv(people)
    table.loc[5, "age"] = np.nan
    table.to_csv(people, index=False)
    assert run(monkeypatch, people) == 2
    assert "has 1 NaN, in 1 of 300 rows: column 2 (1, first in row 5)" in capsys.readouterr().err
    table["name"] = "x"
    table.to_csv(people, index=False)
    assert run(monkeypatch, people) == 2
    assert "has 1 columns that are not: 'name' (string)" in capsys.readouterr().err


def test_files_that_are_not_there_end_with_code_1(monkeypatch, capsys, people, tmp_path):
    assert run(monkeypatch, tmp_path / "no.csv") == 1
    assert "no.csv: there is no such file" in capsys.readouterr().err
    assert run(monkeypatch, people, "--csv", tmp_path / "no" / "s.csv") == 1
    assert "s.csv: No such file or directory" in capsys.readouterr().err


def test_help_and_missing_packages(monkeypatch, capsys, people):
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for option in (
        "--detector",
        "--columns",
        "--contamination",
        "--reference",
        "--csv",
        "--json",
        "--plot",
        "Exit codes",
    ):
        assert option in text
    for name in command.DETECTORS:
        assert name in text
    monkeypatch.setattr("mlx_bulwark.cli.find_spec", lambda name: None if name == "pyarrow" else 1)
    assert run(monkeypatch, people) == 1
    assert 'pip install "mlx-bulwark[arrow]"' in capsys.readouterr().err


def test_findings_name_the_detector(people):
    assert command.find(people, detector="ecod").detector == repr(ECOD())
