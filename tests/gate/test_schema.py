"""Schemas: their JSON, statistics, policies and the false-alarm rate of inferred ones."""

import json

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_bulwark import gate
from mlx_bulwark.gate import (
    Field,
    GateError,
    Outlier,
    Quarantine,
    Relation,
    Schema,
    SchemaError,
    Trusted,
    read_quarantine,
    rule,
    to_pandera,
)
from mlx_bulwark.gate.fields import _more_than
from scipy import stats


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8, np.int64, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(1, 3), (31, 2), (1000, 5), (70_001, 1), (63,), (300_003,), (40, 4, 3), (9, 600)])
@pytest.mark.parametrize("broken", [True, False])
@pytest.mark.parametrize("statistics", [True, False])
def test_statistics_are_those_of_float64(dtype, shape, broken, statistics):
    rng = np.random.default_rng(0)
    x = (rng.normal(100, 10, shape) % 127).astype(dtype)
    if x.dtype.kind == "f" and broken:
        x.ravel()[::7] = np.nan
        x.ravel()[::11] = np.inf
    axis = x.ndim - 2 if x.ndim > 1 else None
    schema = Schema(fields={"x": Field(axis=axis, missing=1, infinite=1)})
    found = schema.check(x, statistics=statistics).statistics["x"]
    assert ("mean" in found) == statistics
    wide = x.reshape(-1, x.shape[-1] if axis is not None else 1).astype(np.float64)
    for j, column in enumerate(wide.T):
        good = column[np.isfinite(column)]
        assert found["count"][j] == len(good)
        assert found["missing"][j] == np.isnan(column).sum()
        assert found["infinite"][j] == np.isinf(column).sum()
        if len(good):
            assert (found["minimum"][j], found["maximum"][j]) == (good.min(), good.max())
        if len(good) and statistics:
            assert found["mean"][j] == pytest.approx(good.mean(), rel=1e-9, abs=1e-7 * good.std())  # as promised
        if len(good) > 1 and statistics:
            assert found["std"][j] == pytest.approx(good.std(ddof=1), rel=3e-7, abs=1e-12)


def test_columns_of_one_matrix_are_read_together_and_found_apart():
    """What a frame made of a matrix holds: strided views beside each other; others between them must not be taken."""
    x = np.random.default_rng(0).random((500, 7), np.float32)
    x[3, 2], x[4, 5] = np.nan, 7.0
    columns = {f"c{j}": x[:, j] for j in (5, 1, 2, 0, 6)} | {"back": x[::-1, 4], "half": x[:250, 3]}
    columns["half"] = np.concatenate([columns["half"]] * 2)
    fields = {name: Field(high=1, mean=(0, 1) if name == "c2" else None) for name in columns}
    report = Schema(fields=fields).check(columns)
    assert {(r.rule, r.where, r.count, r.rows) for r in report.findings} == {
        ("missing", "c2", 1, (3,)),
        ("range", "c5", 1, (4,)),
    }
    for name, column in columns.items():
        found = report.statistics[name]
        assert (found["minimum"], found["maximum"]) == ([np.nanmin(column)], [np.nanmax(column)]), name
        assert ("mean" in found) == (name == "c2")
    assert report.statistics["c2"]["mean"] == [pytest.approx(np.nanmean(x[:, 2].astype(np.float64)), rel=1e-9)]


def test_robust_scale_and_exact_tests_are_scipys():
    x = np.random.default_rng(0).standard_t(3, (501, 2))
    outlier = Schema.infer(x).fields["x"].outlier
    np.testing.assert_allclose(outlier.center, np.median(x, axis=0))
    np.testing.assert_allclose(outlier.scale, stats.median_abs_deviation(x, scale="normal"))
    for k, m, c, n in ((3, 50, 1, 200), (0, 10, 5, 10), (20, 40, 10, 90)):
        table = [[k, m - k], [c, n - c]]
        assert _more_than(k, m, c, n) == pytest.approx(stats.fisher_exact(table, "greater").pvalue, rel=1e-9)


def false_alarms(draw, runs, rate, train=400, test=300):
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(runs):
        schema = Schema.infer(draw(rng, train), quantiles=(0.05, 0.95), false_alarm=rate)
        refused += not schema.check(draw(rng, test)).ok
    return refused


def normal(rng, n):
    return rng.normal(5, 2, (n, 3)), rng.integers(0, 4, n)


def skewed(rng, n):
    return {"income": rng.gamma(2, 1000, n), "kind": rng.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1])}


@pytest.mark.parametrize("draw", [normal, skewed])
@pytest.mark.parametrize("runs", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_clean_resamples_stay_within_the_stated_rate(draw, runs):
    """At the stated rate more alarms than this are seen in one of 10^5 runs."""
    rate = 0.02
    assert false_alarms(draw, runs, rate) <= stats.binom.isf(1e-5, runs, rate)


def test_changed_data_are_refused():
    rng = np.random.default_rng(0)
    schema = Schema.infer(normal(rng, 2000))
    x, y = normal(rng, 2000)
    assert schema.check((x, y)).ok
    assert schema.check((x + 0.5, y)).counts["trusted_mean"] == 3
    assert schema.check((5 + 2 * (x - 5), y)).counts["quantiles"] == 3
    assert schema.check((x, np.where(rng.random(2000) < 0.2, 0, y))).counts["trusted_balance"] >= 1


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("as_mlx", [False, True])
def test_the_same_for_every_form_of_the_data(kind, as_mlx):
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(kind)
    x[4, 1], x[5, 2] = 9, np.nan
    data = mx.array(x.astype(np.float32)) if as_mlx else np.asfortranarray(x)[::1]
    report = Schema(fields={"x": Field(low=-5, high=5, axis=0)}).check(data)
    assert (report.counts["range"], report.counts["missing"]) == (1, 1)
    assert np.flatnonzero(report.bad_rows).tolist() == [4, 5]
    frame = pd.DataFrame(x, columns=list("abc"))
    columns = Schema(fields={k: Field(low=-5, high=5) for k in "abc"})
    assert columns.check(frame).counts == columns.check(dict(frame.items())).counts
    assert columns.check(frame).counts["range"] == 1


def test_pandera_finds_the_same():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=200), "b": rng.normal(size=200)})
    schema = Schema(fields={k: Field(low=-2, high=2) for k in "ab"})
    import pandera.errors

    with pytest.raises(pandera.errors.SchemaErrors) as e:
        to_pandera(schema).validate(frame, lazy=True)
    assert len(e.value.failure_cases) == schema.check(frame).counts["range"]
    counts = schema.check(frame, frame_schema=to_pandera(schema)).counts
    assert sum(c for k, c in counts.items() if k.startswith("pandera:")) == len(e.value.failure_cases) > 0


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    data = {
        "x": np.zeros((n, 3), np.float32),
        "t": np.arange(n),
        "y": np.zeros(n, int),
        "s": np.array(["a"] * n, object),
    }
    from mlx_bulwark.gate import Contributors, NearDuplicates, Series

    schema = Schema(
        fields={"x": Field(axis=0, low=(0, 0, 0)), "s": Field(values=("a",), max_length=3), "y": Field(values=(0,))},
        duplicates=0.0,
        conflicts=0.0,
        near_duplicates=NearDuplicates(distance=0.1),
        series=Series(time="t", max_gap=1, max_jump={"y": 1}, max_run={"y": 1}),
        relations=(
            Relation(left="t", op="==", right=("y",)),
            Relation(left="t", op="determines", right=("y",)),
            Relation(left="x", op="padded", right=("t",)),
        ),
        contributors=Contributors(field="s", max_rows=9, item="t", min_agreement=0.5),
    )
    report = schema.check(data)
    assert {r.rule for r in report.findings} <= {"padding"}  # a row of zeros of length 0 is all padding
    json.loads(report.to_json())


def test_drop_keeps_what_and_where_and_why(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    x[2, 0], x[4, 1] = np.nan, 99
    y = mx.arange(6)
    schema = Schema(fields={"x": Field(low=0, high=50), "y": Field(low=0, high=5)})
    (kept, labels), report = schema.validate((x, y), "drop", quarantine=tmp_path / "q.jsonl")
    np.testing.assert_array_equal(kept, x[[0, 1, 3, 5]])
    assert labels.tolist() == [0, 1, 3, 5]
    assert report.dropped == 2
    dropped = list(read_quarantine(tmp_path / "q.jsonl"))
    assert [(d.row, [r["rule"] for r in d.reasons]) for d in dropped] == [(2, ["missing"]), (4, ["range"])]
    np.testing.assert_array_equal(dropped[0].values["x"], x[2])
    assert dropped[1].values["y"] == 4
    with pytest.raises(GateError, match="within 10 bytes"):
        schema.validate((x, y), "drop", quarantine=Quarantine(tmp_path / "small.jsonl", 10))
    assert not (tmp_path / "small.jsonl").exists()


def test_policies():
    x = np.array([1.0, 7.0])
    schema = Schema(fields={"x": Field(low=0, high=5)}, rows=(2, 2))
    with pytest.raises(GateError, match=r"x must lie in \[0, 5\] but 1 rows do not") as e:
        schema.validate(x)
    assert e.value.report.counts["range"] == 1
    assert schema.validate(x, "report").data is x
    with pytest.raises(GateError, match="rows"):  # what dropping cannot mend
        schema.validate(np.array([1.0, 7.0, 2.0]), "drop", quarantine="never-written.jsonl")
    with pytest.raises(ValueError, match="quarantine must be given"):
        schema.validate(x, "drop")
    with pytest.raises(ValueError, match="policy must be"):
        schema.validate(x, "mend")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "must parse"),
        ("[]", "must be an object"),
        ("{}", "format must be 1"),
        ('{"format": 2}', "format must be 1"),
        ('{"format": 1, "format": 1}', "stands twice"),
        ('{"format": 1, "feilds": {}}', "has feilds"),
        ('{"format": 1, "fields": []}', "schema.fields must be an object but is"),
        ('{"format": 1, "fields": {"x": {"lo": 1}}}', r"schema.fields.x must have only .* but has lo"),
        ('{"format": 1, "fields": {"x": {"low": "a"}}}', "schema.fields.x.low must be"),
        ('{"format": 1, "fields": {"x": {"low": true}}}', "schema.fields.x.low must be"),
        ('{"format": 1, "fields": {"x": {"low": NaN}}}', "finite numbers"),
        ('{"format": 1, "fields": {"x": {"low": 2, "high": 1}}}', "low must be at most high"),
        ('{"format": 1, "fields": {"x": {"low": [1, 2]}}}', "have an axis"),
        ('{"format": 1, "fields": {"x": {"missing": 2}}}', "share from 0 to 1"),
        ('{"format": 1, "fields": {"x": {"pattern": "("}}}', "regular expression"),
        ('{"format": 1, "fields": {"x": {"mean": [1]}}}', "list of 2"),
        ('{"format": 1, "relations": [{"left": "a", "op": ">", "right": ["b"]}]}', r"relations\[0\].op must be one of"),
        ('{"format": 1, "relations": [{"left": "a", "op": "<"}]}', "missing 1 required"),
        ('{"format": 1, "false_alarm": 0}', "false_alarm"),
        ("[" * 100_000, "must"),
    ],
)
def test_json_is_read_strictly(text, words):
    with pytest.raises(SchemaError, match=words):
        Schema.from_json(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda s: (
            st.lists(s, max_size=3)
            | st.dictionaries(
                st.sampled_from(["format", "fields", "x", "low", "rows", "series", "axes"]), s, max_size=4
            )
        ),
    )
)
def test_any_json_is_a_schema_or_refused(plain):
    plain = {**plain, "format": 1} if isinstance(plain, dict) else plain
    try:
        schema = Schema.from_json(json.dumps(plain))
    except SchemaError:
        return
    assert Schema.from_json(schema.to_json()) == schema


def test_domain_rules_are_never_code(tmp_path):
    text = '{"format": 1, "domain": [{"name": "os.system", "version": "1"}]}'
    with pytest.raises(SchemaError, match="has no such rule"):
        Schema.from_json(text).check(np.zeros(3))

    @rule("even", "1")
    def even(fields):
        return fields["x"] % 2 == 0

    with pytest.raises(SchemaError, match="has versions 1"):
        Schema.from_json(text.replace("os.system", "even").replace('"1"}', '"2"}')).check(np.arange(3))
    assert Schema.from_json(text.replace("os.system", "even")).check(np.arange(3)).counts["domain"] == 1
    Schema().save(tmp_path / "s.json")
    assert Schema.load(tmp_path / "s.json") == Schema()


@pytest.mark.parametrize(
    "rules",
    [
        {"axis": 0, "outlier": Outlier(center=(0.0, 1.0), scale=(1.0,), limit=3.0)},
        {"axis": 0, "low": (0.0,), "outlier": Outlier(center=(0.0, 1.0), scale=1.0, limit=3.0)},
        {"axis": 0, "trusted": Trusted(rows=9, values=(9, 9), mean=(0.0, 0.0), std=(1.0,))},
        {"axis": 0, "trusted": Trusted(rows=9, values=(9, 9), low=(0.0, 0.0), high=(1.0, 1.0))},
        {"trusted": Trusted(rows=9, values=(9, 9), mean=(0.0, 0.0), std=(1.0, 1.0))},
    ],
)
def test_lists_of_other_lengths_are_refused(rules):
    with pytest.raises(SchemaError, match="lists must"):
        Schema(fields={"x": Field(**rules)})


def test_data_of_other_channels_than_the_rules_are_a_finding():
    rule = Outlier(center=(0.0, 0.0), scale=1.0, limit=3.0)
    (finding,) = Schema(fields={"x": Field(axis=0, outlier=rule)}).check(np.zeros((4, 3))).findings
    assert (finding.rule, finding.words) == ("shape", "x must have the 2 channels of its rules but has 3")


def test_datetimes_have_a_first_and_a_last_moment():
    t = np.array(["2024-01-01", "2024-01-03T12:00:00.5", "NaT", "2024-02-01"], "M8[ns]")
    rule = Field(dtype="datetime", earliest="2024-01-02", latest="2024-01-03T12:00:00.5", missing=1)
    (finding,) = Schema(fields={"t": rule}).check({"t": t}).findings
    assert (finding.rule, finding.rows) == ("range", (0, 3))
    aware = pd.Series(pd.to_datetime(t)).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")
    assert Schema(fields={"t": rule}).check(pd.DataFrame({"t": aware})).findings[0].rows == (0, 3)
    inferred = Schema.infer({"t": t}).fields["t"]
    assert (inferred.earliest, inferred.latest) == ("2023-12-01T00:00:00.000000", "2024-03-03T00:00:00.000000")
    assert Schema.from_json(Schema(fields={"t": rule}).to_json()).fields["t"] == rule
    for wrong in ("yesterday", "2024-13-01", "2024-01-01T00:00:00Z", "1e9"):
        with pytest.raises(SchemaError, match="earliest"):
            Schema(fields={"t": Field(earliest=wrong)})


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        (Field(low=0), np.array(["1", "-5"], object)),
        (Field(outlier=Outlier(center=0.0, scale=1.0, limit=3.0)), np.array(["1", "x"], object)),
        (Field(high=0), np.array(["2024-01-01"], "M8[s]")),
        (Field(latest="2024-01-01"), np.array([1.7e9])),
        (Field(latest="2024-01-01"), np.array(["2025-01-01"], object)),
    ],
)
def test_rules_of_another_type_are_not_passed_over(rule, values):
    assert Schema(fields={"x": rule}).check({"x": values}).counts["type"] == 1


@pytest.mark.parametrize(
    "values",
    [
        np.array([1.0, np.nan, 2.0, 1.0, np.nan, 2.0]),
        np.array(["a", None, "b", "a", None, "b"], object),
        np.array(["2024-01-01", "NaT", "2024-01-02", "2024-01-01", "NaT", "2024-01-02"], "M8[s]"),
        np.array([[1, 2], [1, 1], [2, 1], [1, 2], [3, 3], [2, 1]]),
    ],
    ids=["numbers", "texts", "datetimes", "rows"],
)
def test_values_of_a_key_are_unique(values):
    schema = Schema(fields={"key": Field(unique=True, missing=1)})
    assert schema.check({"key": values[:3]}).ok
    (finding,) = schema.check({"key": values}).findings
    assert (finding.rule, finding.rows) == ("unique", (3, 5))
    stream = gate.stream([{"key": values[:3]}, {"key": values[3:]}], schema, policy="report")
    assert len(list(stream)) == 2
    assert stream.report.counts["unique"] == 2


def test_several_keys_and_whole_rows_are_told_apart_in_streams():
    schema = Schema(fields={"a": Field(unique=True), "b": Field(unique=True)}, duplicates=0.0)
    batches = [{"a": np.array([1, 2]), "b": np.array([2, 1])}, {"a": np.array([3, 4]), "b": np.array([4, 1])}]
    stream = gate.stream(batches, schema, policy="report")
    assert len(list(stream)) == 2
    assert stream.report.counts["unique"] == 1
    assert stream.report.counts["duplicates"] == 0
