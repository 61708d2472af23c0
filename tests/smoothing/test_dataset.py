"""Tables: what is written, kept, refused and taken up again."""

import json
import math
import re

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark.smoothing import CertifiedTable, Row, Smooth, certify_dataset, plot_certified_accuracy

X = np.array([[1.0], [-1.0], [0.0], [0.6], [-0.7]], np.float32)
LABELS = np.array([0, 1, 0, 1, 1])
OPTIONS = {"n": 500, "progress": False}


def sign(x):
    return mx.concatenate([x, -x], axis=1)


def test_a_table_is_what_certify_says(tmp_path):
    file = tmp_path / "certified.csv"
    table = certify_dataset(Smooth(sign, 2, 0.25), X, LABELS, file=file, **OPTIONS)
    assert table.column("index").tolist() == [0, 1, 2, 3, 4]
    assert table.column("label").tolist() == LABELS.tolist()
    assert table.column("predict").tolist() == [0, 1, -1, 0, 1]
    assert table.column("correct").tolist() == [True, True, False, False, True]
    assert (table.column("radius")[[0, 1, 3, 4]] > 0).all()
    assert table.column("radius")[2] == 0
    assert (table.column("time") > 0).all()
    lines = file.read_text().splitlines()
    assert lines[0] == "index,label,predict,radius,correct,time"
    assert re.fullmatch(r"0,0,0,0\.\d+,1,\d+\.\d{6}", lines[1])
    read = CertifiedTable.read_csv(file)
    np.testing.assert_array_equal(read.column("radius"), table.column("radius"))  # to the last bit
    assert [r.predict for r in read.rows] == [r.predict for r in table.rows]


def test_certified_accuracy_counts_what_is_right_and_far_enough():
    rows = [Row(0, 1, 1, 0.5, True, 1.0), Row(1, 1, 2, 0.9, False, 1.0), Row(2, 0, -1, 0.0, False, 2.0)]
    table = CertifiedTable(tuple(rows))
    assert table.certified_accuracy([0.0, 0.5, 0.51, 0.9]).tolist() == [1 / 3, 1 / 3, 0, 0]
    assert table.certified_accuracy(0.2) == pytest.approx(1 / 3)
    summary = table.summary((0.25,))
    assert summary["abstained"] == pytest.approx(1 / 3)
    assert summary["average_certified_radius"] == pytest.approx(0.5 / 3)
    assert summary["seconds"] == pytest.approx(4 / 3)
    assert math.isnan(CertifiedTable(()).certified_accuracy(0.0))
    assert CertifiedTable(()).summary() == {"inputs": 0}
    with pytest.raises(ValueError, match="name must be one of"):
        table.column("radii")


class Interrupting:
    """A model that is interrupted at its n-th batch."""

    def __init__(self, batches):
        self.batches = batches

    def __call__(self, x):
        self.batches -= 1
        if self.batches < 0:
            raise KeyboardInterrupt
        return sign(x)


def test_an_interrupted_run_goes_on_with_fresh_noise(tmp_path):
    file = tmp_path / "certified.csv"
    interrupted = Smooth(Interrupting(5), 2, 0.25)  # two batches an input, and one ahead
    with pytest.raises(KeyboardInterrupt):
        certify_dataset(interrupted, X, LABELS, file=file, **OPTIONS)
    before = file.read_text()
    assert before.count("\n") == 3
    file.write_text(before + "2,0,-1,0.")  # torn by a power cut
    resumed = Smooth(sign, 2, 0.25)
    assert resumed._key.tolist() != interrupted._key.tolist()
    table = certify_dataset(resumed, X, LABELS, file=file, **OPTIONS)
    assert table.column("index").tolist() == [0, 1, 2, 3, 4]
    assert file.read_text().startswith(before)
    assert file.read_text().count("\n") == 6
    again = certify_dataset(Smooth(Interrupting(0), 2, 0.25), X, LABELS, file=file, **OPTIONS)  # nothing is left
    assert again == CertifiedTable.read_csv(file)


def test_files_of_other_runs_are_refused_and_kept(tmp_path):
    file = tmp_path / "certified.csv"
    certify_dataset(Smooth(sign, 2, 0.25), X, LABELS, file=file, **OPTIONS)
    before = file.read_text()
    for smooth, x, labels, options, words in [
        (Smooth(sign, 2, 0.5), X, LABELS, {}, "other sigma"),
        (Smooth(sign, 2, 0.25, norm="l1"), X, LABELS, {}, "other norm"),
        (Smooth(sign, 2, 0.25, bounds=(-2, 2)), X, LABELS, {}, "other bounds"),
        (Smooth(sign, 2, 0.25), X, LABELS, {"alpha": 0.01}, "other alpha"),
        (Smooth(sign, 2, 0.25), X + 0.1, LABELS, {}, "other data"),
        (Smooth(sign, 2, 0.25), X, 1 - LABELS, {}, "other data"),
    ]:
        with pytest.raises(ValueError, match=rf"file must be new.*{words}"):
            certify_dataset(smooth, x, labels, file=file, **{**OPTIONS, **options})
    (tmp_path / "certified.csv.json").unlink()
    with pytest.raises(ValueError, match="no readable"):
        certify_dataset(Smooth(sign, 2, 0.25), X, LABELS, file=file, **OPTIONS)
    assert file.read_text() == before


def test_what_is_no_table_is_refused(tmp_path):
    file = tmp_path / "x.csv"
    for text, words in [
        ("idx,label\n", "must begin"),
        ("", "must begin"),
        ("index,label,predict,radius,correct,time\n0,1\n", "in line 2"),
        ("index,label,predict,radius,correct,time\n0,1,1,0.5,1,0.1\n0,1,x,0.5,1,0.1\n", "in line 3"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            CertifiedTable.read_csv(file)


def test_every_second_input():
    assert certify_dataset(Smooth(sign, 2, 0.25), X, LABELS, skip=2, **OPTIONS).column("index").tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("x", "labels", "options", "words"),
    [
        (X, LABELS[:3], {}, "labels must be 5 integers"),
        (X, LABELS * 0.5, {}, "labels must be 5 integers"),
        (X[:, 0], LABELS, {}, "x must be"),
        (X, LABELS, {"skip": 0}, "skip must"),
        (X, LABELS, {"n": 0}, "n must"),
        (X * math.nan, LABELS, {}, "x must be finite"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, x, labels, options, words):
    with pytest.raises(ValueError, match=words):
        certify_dataset(Smooth(sign, 2, 0.25), x, labels, file=tmp_path / "f.csv", **{**OPTIONS, **options})
    assert not list(tmp_path.iterdir())


def test_progress_is_told_on_standard_error(capsys):
    certify_dataset(Smooth(sign, 2, 0.25), X, LABELS, n=100)
    printed = capsys.readouterr()
    assert "Certify" in printed.err
    assert "5/5" in printed.err
    assert printed.out == ""


def test_an_interrupted_module_gets_its_mode_back():
    model = nn.Sequential(nn.Linear(1, 2), nn.Dropout(0.5))
    model.train()
    certify_dataset(Smooth(model, 2, 0.25), X, LABELS, **OPTIONS)
    assert model.training
    with pytest.raises(ValueError, match="logits"):
        certify_dataset(Smooth(model, 3, 0.25), X, LABELS, **OPTIONS)
    assert model.training


def test_the_plot_has_falling_steps(tmp_path):
    from mlx_bulwark.smoothing.plot import curve

    rows = (Row(0, 1, 1, 0.5, True, 1.0), Row(1, 1, 1, 0.2, True, 1.0), Row(2, 0, -1, 0.0, False, 2.0))
    x, y = curve(CertifiedTable(rows))
    assert x.tolist() == [0, 0, 0.2, 0.2, 0.5, 0.5]
    np.testing.assert_allclose(y, [2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0])
    file = tmp_path / "certified.png"
    plot_certified_accuracy({"sigma 0.25": CertifiedTable(rows), "sigma 0.5": CertifiedTable(rows)}, file, title="t")
    assert matplotlib.image.imread(file).shape[2] == 4
    with pytest.raises(ValueError, match="tables must have rows"):
        plot_certified_accuracy({"none": CertifiedTable(())}, file)
    with pytest.raises(ValueError, match="tables must have rows"):
        plot_certified_accuracy({}, file)


def test_settings_stand_beside_the_table(tmp_path):
    certify_dataset(Smooth(sign, 2, 0.25), X, LABELS, file=tmp_path / "t.csv", looks=[100, 500], **OPTIONS)
    settings = json.loads((tmp_path / "t.csv.json").read_text())
    assert settings["sigma"] == 0.25
    assert settings["looks"] == [100, 500]
    assert "key" not in settings
