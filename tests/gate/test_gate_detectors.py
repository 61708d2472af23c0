"""Rules of fitted detectors: rows that no column shows are found, at the stated rate, from files and in streams too."""

import json
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("sklearn")

from mlx_bulwark import gate, outliers
from mlx_bulwark.gate import Outliers, Schema, SchemaError, register_detector

MIX = np.array([[1.0, 0.95, 0.0], [0.0, np.sqrt(1 - 0.95**2), 0.0], [0.0, 0.0, 1.0]])


def draw(rows, seed):
    """Two columns that go together, and one alone."""
    return np.random.default_rng(seed).normal(size=(rows, 3)) @ MIX


def planted(rows, seed, *where):
    x = draw(rows, seed)
    for i in where:
        x[i, :2] = [2.5, -2.5]  # each in its column's range
    return x


@pytest.fixture(scope="module")
def schema():
    return Schema.infer(draw(4000, 0), detector=outliers.Mahalanobis())


def test_rows_that_no_column_shows_are_found(schema):
    hard = schema.outliers[0]
    report = schema.check(planted(2000, 1, 7, 70, 700))
    (finding,) = report.findings
    assert (finding.rule, finding.rows, finding.where) == ("outliers", (7, 70, 700), "x")
    assert report.bad_rows.sum() == 3
    x = draw(4000, 0)
    mahalanobis = outliers.Mahalanobis().fit(x[np.random.default_rng(0).permutation(4000)[:2000]])
    found = -mahalanobis.score_samples(planted(2000, 1, 7, 70, 700)) > hard.limit
    assert np.flatnonzero(found).tolist() == [7, 70, 700]


def test_clean_batches_are_refused_at_the_stated_rate():
    """200 pairs of trusted and new data at a rate of 5 % for the one test: 26 or more have a probability of 1e-5."""
    refused = 0
    for i in range(200):
        schema = Schema.infer(draw(300, 2 * i), quantiles=(0.1, 0.9), detector=outliers.Mahalanobis())
        schema = replace(schema, fields={}, extra=True, false_alarm=0.05)
        refused += schema.check(draw(200, 2 * i + 1)).counts["trusted_outliers"] > 0
    assert 0 < refused < 26


def test_more_rows_far_out_than_in_trusted_data_are_found(schema):
    x = draw(2000, 3)
    x[:60] = 0.0, 0.0, 4.3
    counts = schema.check(x).counts
    assert counts["outliers"] == 0
    assert counts["trusted_outliers"] >= 60


@pytest.mark.parametrize("make", [np.asarray, mx.array, lambda x: {"a": x[:, :2], "b": x[:, 2]}])
@pytest.mark.parametrize(
    "detector", [outliers.KNN(novelty=True), outliers.ECOD(), outliers.IsolationForest(random_state=0)]
)
def test_any_detector_and_container(make, detector):
    trusted = make(draw(600, 0).astype(np.float32))
    schema = Schema.infer(trusted, quantiles=(0.05, 0.95), detector=detector)
    assert schema.check(make(draw(600, 1).astype(np.float32))).ok
    x = draw(600, 1).astype(np.float32)
    x[:200] = 1.5 * np.abs(x[:200]) + 2
    assert schema.check(make(x)).counts["trusted_outliers"]


def test_missing_values_are_not_scored_and_other_shapes_are_told(schema):
    alone = replace(schema, fields={}, extra=True)
    x = planted(100, 1, 5)
    x[5, 0], x[9, 2] = np.nan, np.inf
    assert alone.check(x).ok
    (finding,) = alone.check(x[:, :2]).findings[:1]
    assert finding.found == "has 2"
    assert "be numbers" in alone.check({"x": np.array(["a", "b"])}).findings[0].limit
    assert alone.check({"z": x}).ok
    assert alone.check(x[:0]).ok


def test_a_detector_that_is_fitted_again_leaves_its_rule_alone():
    detector = outliers.Mahalanobis().fit(draw(500, 0))
    rule = Outliers(detector="m.safetensors", hash=register_detector(detector), fields=("x",), limit=30.0)
    detector.fit(100 * draw(500, 0))
    assert Schema(outliers=(rule,)).check(planted(100, 1, 4)).counts["outliers"] == 1


def test_budget():
    x = draw(1000, 0)
    hash_ = register_detector(outliers.Mahalanobis().fit(x))
    rule = Outliers(detector="m.safetensors", hash=hash_, fields=("x",), limit=100.0, share=0.02)
    assert Schema(outliers=(rule,)).check(planted(100, 1, 4, 5)).ok
    assert Schema(outliers=(rule,)).check(planted(100, 1, 4, 5, 6)).counts["outliers"] == 3


def test_streams_drop_the_rows(schema, tmp_path):
    batches = [planted(500, i, 3 * i) for i in range(4)]
    kept = gate.stream(batches, schema, policy="drop", quarantine=tmp_path / "dropped.jsonl")
    assert [len(b) for b in kept] == [499] * 4
    assert [d.row for d in gate.read_quarantine(tmp_path / "dropped.jsonl")] == [0, 503, 1006, 1509]


@pytest.fixture
def saved(schema, tmp_path, monkeypatch):
    """A schema in a folder, in a process that has not seen its detector."""
    schema.save(tmp_path / "s.json")
    monkeypatch.setattr("mlx_bulwark.gate.detectors._FITTED", {})
    return tmp_path


def test_the_detector_lies_beside_the_schema(schema, saved):
    x = planted(300, 1, 7)
    with pytest.raises(SchemaError, match=r"must be known but is not: Schema\.load"):
        Schema.from_json((saved / "s.json").read_text()).check(x)
    loaded = Schema.load(saved / "s.json")
    assert loaded == schema
    assert loaded.check(x).to_dict() == {**schema.check(x).to_dict()}
    assert sorted(p.suffix for p in saved.iterdir()) == [".json", ".safetensors"]


def test_another_detector_is_refused(schema, saved):
    file = saved / schema.outliers[0].detector
    outliers.Mahalanobis().fit(draw(500, 9)).save(file)
    with pytest.raises(SchemaError, match="must have the hash"):
        Schema.load(saved / "s.json")
    file.write_bytes(b"junk")
    with pytest.raises(SchemaError, match="safetensors"):
        Schema.load(saved / "s.json")
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(SchemaError, match="must be a file"):
        Schema.load(saved / "s.json")


@pytest.mark.parametrize("name", ["../m.safetensors", "/m.safetensors", "m.pkl", "a\0.safetensors", "c:m.safetensors"])
def test_the_file_is_a_plain_name(saved, name):
    plain = json.loads((saved / "s.json").read_text())
    plain["outliers"][0]["detector"] = name
    (saved / "s.json").write_text(json.dumps(plain))
    with pytest.raises(SchemaError, match="must be the name of a"):
        Schema.load(saved / "s.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fields": ()}, "must name a field"),
        ({"share": 2.0}, "share from 0 to 1"),
        ({"limit": float("inf")}, "must be finite"),
        ({"trusted": (5, 6)}, "rows and how many"),
    ],
)
def test_what_a_rule_cannot_say(change, words):
    rule = Outliers(**{"detector": "a.safetensors", "hash": "0", "fields": ("x",), "limit": 1.0, **change})
    with pytest.raises(SchemaError, match=words):
        Schema(outliers=(rule,))


def test_what_is_no_fitted_detector():
    with pytest.raises(ValueError, match="must be a fitted one"):
        register_detector(outliers.Mahalanobis())
    with pytest.raises(ValueError, match="novelty=False"):
        register_detector(outliers.KNN().fit(draw(50, 0)))
    with pytest.raises(ValueError, match="20 finite rows"):
        Schema.infer(draw(10, 0), detector=outliers.Mahalanobis())
    with pytest.raises(ValueError, match="floating fields"):
        Schema.infer(np.arange(40), detector=outliers.Mahalanobis())


def test_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("typer")
    from mlx_bulwark import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlx-bulwark", *arguments])
        with pytest.raises(SystemExit) as end:
            cli._app()(prog_name="mlx-bulwark")
        return int(end.value.code or 0), capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    np.save("trusted.npy", draw(1000, 0))
    np.save("new.npy", planted(500, 1, 3))
    assert run("gate", "infer", "trusted.npy", "--out", "s.json", "--detector", "mahalanobis")[0] == 0
    code, out = run("gate", "check", "new.npy", "--schema", "s.json", "--json")
    told = json.loads(out.out)
    assert (code, told["counts"]["outliers"], len(told["statistics"]["x"]["mean"])) == (1, 1, 3)
    code, out = run("gate", "infer", "trusted.npy", "--detector", "mahalanobis")
    assert (code, "--out" in out.err) == (2, True)
