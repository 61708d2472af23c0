"""Drift: statistics against SciPy and plain loops, rates on data that have not drifted, planted drift."""

import json

import matplotlib.image
import mlx.core as mx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_bulwark import cli
from mlx_bulwark.gate import (
    Drift,
    benjamini_hochberg,
    chi_square,
    classifier_two_sample,
    kolmogorov_smirnov,
    maximum_mean_discrepancy,
    population_stability_index,
    wasserstein,
)
from scipy import stats

SMALL = st.lists(st.integers(0, 6), min_size=2, max_size=40)


def largest_difference(x, y):
    """The KS statistic, value by value."""
    return max(abs(np.mean(np.array(x) <= v) - np.mean(np.array(y) <= v)) for v in {*x, *y})


@given(SMALL, SMALL)
def test_ks_looks_between_ties_only(x, y):
    found = kolmogorov_smirnov(x, y)
    assert found.statistic == pytest.approx(largest_difference(x, y), abs=1e-12)
    assert found.effect == found.statistic


@pytest.mark.parametrize(("n", "m"), [(2, 3), (31, 33), (400, 500), (3000, 501)])
def test_ks_is_that_of_scipy(n, m):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=n), rng.normal(0.1, 1, m)
    expected = stats.ks_2samp(x, y)
    found = kolmogorov_smirnov(x, y)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.1, abs=1e-12)


@pytest.mark.slow
def test_ks_p_values_stay_valid_with_ties():
    """500 pairs of no drift: at most 5 % below 0.05, exceeded by 4 deviations with probability 3e-5."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 5, (500, 2, 50))
    rate = np.mean([kolmogorov_smirnov(x, y).p_value <= 0.05 for x, y in pairs])
    assert rate <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 500)


def test_chi_square_is_that_of_scipy_where_no_category_is_rare():
    counts = [[30, 50, 20], [60, 45, 45]]
    expected = stats.chi2_contingency(counts, correction=False)
    found = chi_square(*counts)
    assert (found.statistic, found.p_value) == pytest.approx((expected.statistic, expected.pvalue))
    assert found.effect == pytest.approx(np.abs(np.divide([30, 50, 20], 100) - np.divide([60, 45, 45], 150)).sum() / 2)


def test_chi_square_takes_rare_categories_together():
    found = chi_square([500, 480, 3, 2, 0], [510, 470, 0, 1, 9])
    expected = stats.chi2_contingency([[500, 480, 5], [510, 470, 10]], correction=False)
    assert found.statistic == pytest.approx(expected.statistic)
    assert chi_square([2, 1], [1, 2]).p_value == 1
    assert chi_square([100, 0], [50, 0]).p_value == 1


@pytest.mark.slow
def test_chi_square_keeps_its_rate_with_many_rare_categories():
    """2000 pairs of a Zipf law over 200 words: 5 % below 0.05, exceeded by 4 deviations with probability 3e-5."""
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 201)
    draws = rng.multinomial(100, p / p.sum(), (2000, 2))
    rate = np.mean([chi_square(x, y).p_value <= 0.05 for x, y in draws])
    assert rate <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 2000)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=12))
def test_psi_by_hand(counts):
    old, new = [a + 1 for a, _ in counts], [b for _, b in counts]
    new[0] += 1
    expected = 0
    for a, b in zip(old, new, strict=True):
        p, q = max(a / sum(old), 1e-4), max(b / sum(new), 1e-4)
        expected += (p - q) * np.log(p / q)
    found = population_stability_index(old, new)
    assert found.value == pytest.approx(expected)
    assert found.null_mean == pytest.approx((len(old) - 1) * (1 / sum(old) + 1 / sum(new)))


def test_psi_without_drift_has_the_mean_that_is_told():
    """3000 draws over 10 bins, 1000 and 500 rows: within 4 deviations of the mean, and 3 % for higher orders."""
    rng = np.random.default_rng(0)
    draws = [[rng.multinomial(n, [0.1] * 10) for n in (1000, 500)] for _ in range(3000)]
    values = np.array([population_stability_index(*d).value for d in draws])
    told = population_stability_index(*draws[0]).null_mean
    assert abs(values.mean() - told) < 4 * values.std() / np.sqrt(3000) + 0.03 * told


def test_bins_of_the_psi_hold_equal_shares_of_the_reference():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=1000), rng.normal(0.3, 1, 700)
    result = Drift(x[:, None], joint=()).compare(y[:, None]).results[0]
    inner = np.sort(x)[np.arange(1, 10) * 100 - 1]
    counts = [
        [int(((a < v) & (v <= b)).sum()) for a, b in zip([-9e9, *inner], [*inner, 9e9], strict=True)] for v in (x, y)
    ]
    assert counts[0] == [100] * 10
    assert result.psi == pytest.approx(population_stability_index(*counts).value)
    assert result.wasserstein == pytest.approx(stats.wasserstein_distance(x, y))
    assert wasserstein(x, x + 2) == pytest.approx(2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.001, 0.999))
def test_benjamini_hochberg_is_the_step_up_rule(p, q):
    """The largest k with p_(k) <= k q / n, by hand; equality is left to rounding."""
    order = np.sort(p)
    limits = q * np.arange(1, len(p) + 1) / len(p)
    if (np.abs(order - limits) < 1e-12).any():
        return
    below = np.flatnonzero(order <= limits)
    rejected = np.array(p) <= (order[below[-1]] if len(below) else -1)
    assert (benjamini_hochberg(p) <= q).tolist() == rejected.tolist()
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p), rtol=1e-12)


def no_drift(test, rounds, **options):
    rng = np.random.default_rng(1)
    return np.array([test(*rng.normal(size=(2, 60, 3)), seed=i, **options).p_value for i in range(rounds)])


@pytest.mark.slow
def test_p_values_of_the_mmd_are_uniform_without_drift():
    """300 seeds, 99 permutations; the KS test against the uniform law of 1/100 ... 1 fails by chance in 1e-4."""
    p = no_drift(maximum_mean_discrepancy, 300, permutations=99)
    smeared = p - np.random.default_rng(0).uniform(0, 0.01, len(p))  # the p-value is a rank among 100
    assert stats.kstest(smeared, "uniform").pvalue > 1e-4


@pytest.mark.slow
def test_p_values_of_the_classifier_are_uniform_without_drift():
    """60 seeds; the KS test against the uniform law fails by chance in 1e-4."""
    assert stats.kstest(no_drift(classifier_two_sample, 60), "uniform").pvalue > 1e-4


def table(rng, n):
    return {
        "height": rng.normal(170, 8, n),
        "income": rng.lognormal(10, 1, n),
        "age": rng.integers(18, 80, n),
        "city": rng.choice(["Rome", "Oslo", "Lima"], n, p=[0.5, 0.3, 0.2]),
        "score": np.where(rng.uniform(size=n) < 0.05, np.nan, rng.uniform(size=n)),
    }


@pytest.mark.slow
def test_false_alarms_stay_within_the_stated_rate():
    """1000 clean resamples, columns only, effects of any size: 5 % at most, exceeded by 4 deviations in 3e-5."""
    rng = np.random.default_rng(0)
    drift = [Drift(table(rng, 100), min_effect=0, joint=()).compare(table(rng, 80)).drift for _ in range(1000)]
    assert np.mean(drift) <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.slow
def test_false_alarms_of_all_tests_together():
    """40 clean resamples at alpha 0.2: 8 findings at most, exceeded by 4 deviations in 3e-5."""
    rng = np.random.default_rng(0)
    least = {"mmd": 0.0, "classifier": 0.0}
    drift = [
        Drift(table(rng, 100), alpha=0.2, min_effect=0, min_joint_effect=least, seed=i).compare(table(rng, 100)).drift
        for i in range(40)
    ]
    assert np.mean(drift) <= 0.2 + 4 * np.sqrt(0.2 * 0.8 / 40)


def changed(kind, data):
    if kind == "mean":
        data["height"] = data["height"] + 5
    elif kind == "variance":
        data["height"] = (data["height"] - 170) * 1.8 + 170
    elif kind == "unit":
        data["income"] = data["income"] / 1000
    elif kind == "category":
        data["city"] = np.where(data["city"] == "Oslo", "Bern", data["city"])
    elif kind == "missing":
        data["score"] = np.where(np.arange(len(data["score"])) % 3 == 0, np.nan, data["score"])
    return data


@pytest.mark.parametrize(
    ("kind", "name", "test", "words"),
    [
        ("mean", "height", "ks", "median 16"),
        ("variance", "height", "ks", "KS 0."),
        ("unit", "income", "ks", "median"),
        ("category", "city", "chi2", "1 categories that the reference has not: 'Bern'"),
        ("missing", "score", "missing", "% of the reference, "),
    ],
)
def test_planted_drift_is_found_where_it_is(kind, name, test, words):
    rng = np.random.default_rng(0)
    drift = Drift(table(rng, 1000), joint=())
    assert not drift.compare(table(rng, 800)).drift
    found = drift.compare(changed(kind, table(rng, 800))).findings
    assert [(r.name, r.test) for r in found] == [(name, test)]
    assert words in found[0].reason


def test_a_change_of_correlation_is_seen_by_the_tests_of_all_columns_alone():
    rng = np.random.default_rng(0)
    drift = Drift(rng.normal(size=(1000, 4)))
    assert not drift.compare(rng.normal(size=(1000, 4))).drift
    cov = np.eye(4)
    cov[0, 1] = cov[1, 0] = 0.8
    found = drift.compare(rng.multivariate_normal(np.zeros(4), cov, 1000))
    assert {r.test for r in found.findings} == {"mmd", "classifier"}
    assert {r.name for r in found.findings} == {"all columns"}
    assert [r.p_adjusted for r in found.results[-2:]] == [min(1, 2 * r.p_value) for r in found.results[-2:]]


def test_a_large_sample_does_not_cry_wolf():
    rng = np.random.default_rng(0)
    result = Drift(rng.normal(size=200_000)).compare(rng.normal(0.03, 1, 200_000)).results[0]
    assert result.verdict == "small"
    assert result.p_adjusted < 1e-6
    assert "significant, adjusted p" in result.reason
    few = Drift(np.arange(4.0)).compare(np.arange(4.0) + 2).results[0]
    assert few.verdict == "none"
    assert "chance" in few.reason


def test_the_reference_is_frozen():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2))
    y = rng.normal(size=(200, 2))
    drift = Drift(x)
    before = drift.compare(y).to_json()
    x += 100
    assert drift.compare(y).to_json() == before
    drift.compare(y + 100)
    assert drift.compare(y).to_json() == before


def as_mlx(x):
    return mx.array(x)


def as_frame(x):
    return pd.DataFrame(x, columns=["0", "1", "2"])


def as_arrow(x):
    return pa.table({str(j): x[:, j] for j in range(3)})


def as_mapping(x):
    return {j: x[:, j].tolist() for j in range(3)}


@pytest.mark.parametrize("form", [as_mlx, as_frame, as_arrow, as_mapping])
def test_all_forms_of_tables_are_one(form):
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    expected = Drift(x[:100], joint=("mmd",)).compare(x[100:] + 1).to_json()
    assert Drift(form(x[:100]), joint=("mmd",)).compare(form(x[100:] + 1)).to_json() == expected


def test_axes_beyond_the_first_are_columns_and_half_precision_is_read():
    x = mx.random.normal((50, 2, 3)).astype(mx.bfloat16)
    assert [r.name for r in Drift(x, joint=()).compare(x).results] == list("012345")
    assert len(Drift(mx.random.normal((50,))).compare(mx.zeros(3)).results) == 1


def test_kinds_of_columns():
    frame = pd.DataFrame(
        {
            "word": pd.Categorical(["a", "b", None] * 20),
            "flag": [True, False, True] * 20,
            "when": pd.date_range("2026-01-01", periods=60),
            "code": [1, 2, 3] * 20,
            "mixed": [1, None, 2.5] * 20,
            "nullable": pd.array([1, None, 3] * 20, dtype="Int64"),
        }
    )
    found = {(r.name, r.test): r for r in Drift(frame, categorical=["code"], joint=()).compare(frame).results}
    assert set(found) == {
        ("word", "chi2"),
        ("word", "missing"),
        ("flag", "chi2"),
        ("when", "ks"),
        ("code", "chi2"),
        ("mixed", "ks"),
        ("mixed", "missing"),
        ("nullable", "ks"),
        ("nullable", "missing"),
    }
    assert all(r.effect == 0 for r in found.values())
    floats = frame.assign(code=frame["code"].astype(float))
    assert not Drift(frame, categorical=["code"], joint=()).compare(floats).drift


def test_odd_columns():
    x = np.array([[1.0, np.nan, np.inf], [1, np.nan, 2], [1, np.nan, -np.inf]] * 10)
    report = Drift(x).compare(x)
    verdicts = {(r.name, r.test): r.verdict for r in report.results}
    assert verdicts[("1", "ks")] == verdicts[("all columns", "mmd")] == "untested"
    assert verdicts[("0", "ks")] == verdicts[("2", "ks")] == "none"
    assert not report.drift
    assert Drift(np.ones(50)).compare(np.ones(50) * 2).drift
    huge = np.random.default_rng(0).normal(size=(60, 2)) * 1e300
    assert not Drift(huge).compare(huge).drift


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Drift(np.ones((5, 2)), alpha=0), "alpha"),
        (lambda: Drift(np.ones((5, 2)), min_effect=1), "min_effect"),
        (lambda: Drift(np.ones((5, 2)), joint=("ks",)), "joint"),
        (lambda: Drift(np.ones((5, 2)), bins=1), "bins"),
        (lambda: Drift(np.ones((5, 2)), categorical=["x"]), "categorical"),
        (lambda: Drift(np.ones((1, 2))), "2 rows or more but has 1"),
        (lambda: Drift(np.float32(3)), "array"),
        (lambda: Drift({}), "one length"),
        (lambda: Drift({"a": [1, 2], "b": [1]}), "one length"),
        (lambda: Drift(np.ones((5, 2), complex)), "complex"),
        (lambda: Drift(np.ones((5, 2))).compare(np.ones((5, 3))), "but has also 2"),
        (lambda: Drift({"a": [1, 2]}).compare({"b": [1, 2]}), "but has no a and also b"),
        (lambda: Drift({"a": [1, 2]}).compare({"a": ["x", "y"]}), "'a' must be numbers but has words, the first 'x'"),
        (lambda: Drift(np.ones((5, 2))).compare(np.ones((0, 2))), "2 rows or more but has 0"),
    ],
)
def test_misuse_is_told(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_report(tmp_path):
    rng = np.random.default_rng(0)
    report = Drift({"a": rng.normal(size=300), "b": [None] * 300}).compare({"a": rng.normal(2, 1, 300), "b": [1] * 300})
    content = json.loads(report.to_json())
    assert content["drift"] is True
    assert content["results"][0]["name"] == "a"
    assert content["results"][0]["psi_null_mean"] == pytest.approx(9 * 2 / 300)
    assert content["results"][1]["p_value"] is None
    assert "a       ks" in report.table().replace("column", "a     ") or "ks" in str(report)
    assert str(report).splitlines()[-1].startswith("2 of 5 tests found drift; 300 rows against 300")
    report.plot(tmp_path / "drift.png")
    assert matplotlib.image.imread(tmp_path / "drift.png").size > 1000


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["mlx-bulwark", "drift", *map(str, arguments)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    return e.value.code or 0


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for name, shift in (("old", 0), ("same", 0), ("new", 8)):
        data = changed("mean", table(rng, 400)) if shift else table(rng, 400)
        frame = pd.DataFrame(data)
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        frame.to_parquet(tmp_path / f"{name}.parquet")
        np.save(tmp_path / f"{name}.npy", frame[["height", "age"]].to_numpy())
        np.savez(
            tmp_path / f"{name}.npz", height=data["height"], city=data["city"], pixels=rng.normal(size=(400, 2, 2))
        )
    return tmp_path


@pytest.mark.parametrize("kind", ["csv", "parquet", "npy", "npz"])
def test_command(files, monkeypatch, capsys, kind):
    old, same, new = (files / f"{name}.{kind}" for name in ("old", "same", "new"))
    assert run(monkeypatch, old, same, "--columns-only") == 0
    assert "no drift found" in capsys.readouterr().out
    assert run(monkeypatch, old, new, "--json", "--columns-only", "--plot", files / "p.png") == 1
    content = json.loads(capsys.readouterr().out)
    (found,) = [r for r in content["results"] if r["verdict"] == "drift"]
    assert found["name"] == ("x[0]" if kind == "npy" else "height")
    assert (files / "p.png").stat().st_size > 1000


def test_command_of_all_tests(files, monkeypatch, capsys):
    assert run(monkeypatch, files / "old.csv", files / "new.csv", "--seed", 3) == 1
    assert "all columns" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["old.csv", "nothing.csv"], "nothing.csv"),
        (["old.csv", "old.txt"], "old.txt"),
        (["old.csv", "broken.npz"], "broken.npz"),
        (["old.csv", "broken.npy"], "broken.npy"),
        (["old.csv", "broken.csv"], "broken.csv"),
        (["old.csv", "broken.parquet"], "broken.parquet"),
        (["old.csv", "pickled.npy"], "pickled.npy"),
        (["old.csv", "old.npz"], "columns of the reference"),
        (["old.csv", "new.csv", "--alpha", "2"], "alpha"),
    ],
)
def test_misuse_of_the_command(files, monkeypatch, capsys, arguments, words):
    for kind in ("npz", "npy", "csv", "parquet"):
        (files / f"broken.{kind}").write_bytes(b"PK\x03\x04 a,b\n1,2,3\n\xff")
    np.save(files / "pickled.npy", np.array([{}], object), allow_pickle=True)
    (files / "old.txt").write_text("1")
    monkeypatch.chdir(files)
    assert run(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err
