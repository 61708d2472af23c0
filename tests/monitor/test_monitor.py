"""Monitor: what it returns, what it finds, what it keeps, and what it says of where a change was."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark.monitor import (
    CUSUM,
    Alert,
    Baseline,
    DriftWindow,
    FileSink,
    Monitor,
    PrometheusSink,
    Schedule,
    Shewhart,
    StateError,
    change_point,
    windows,
)
from mlx_bulwark.monitor.monitor import _make_series, cusum_limit
from mlx_bulwark.monitor.series import Batch, Series
from scipy import stats
from watched import model, rows

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def baseline():
    x, y = rows(0, 4000)
    return Baseline.from_data(model, x, y, embeddings=False)


class Clock:
    def __init__(self, now=1_700_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


class Linear(nn.Module):
    def __init__(self, width=40, classes=3):
        super().__init__()
        self.first, self.last = nn.Linear(width, 16), nn.Linear(16, classes)

    def __call__(self, x):
        return self.last(nn.relu(self.first(x)))


# what goes through it


@pytest.mark.parametrize("size", [0, 1, 31, 33, 200])
def test_output_is_the_models(baseline, tmp_path, size):
    x = mx.array(rows(1, size)[0])
    with Monitor(model, baseline, state=tmp_path / "s") as monitor:
        for _ in range(2):
            np.testing.assert_array_equal(np.array(monitor(x)), np.array(model(x)))
        assert monitor.snapshot()["counters"]["rows"] == 2 * size


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_output_keeps_its_dtype_and_shape(tmp_path, dtype):
    def sequences(x, scale=1.0):
        return {"logits": mx.stack([x, x * 0, -x], axis=-1).astype(dtype) * scale}

    x = np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32)
    y = np.array(mx.argmax(sequences(mx.array(x))["logits"], axis=-1))
    baseline = Baseline.from_data(sequences, x, y, scores=lambda o: o["logits"])
    assert baseline.facts["accuracy"]["mean"] == 1.0
    with Monitor(sequences, baseline, scores=lambda o: o["logits"], state=tmp_path / "s") as monitor:
        output = monitor(mx.array(x[:50]), scale=2.0)["logits"]
        assert output.dtype == dtype
        assert output.shape == (50, 7, 3)
        assert monitor.snapshot()["counters"]["predictions"] == 350
        assert monitor.evaluate(x[:50], y[:50])["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("values", "valid"),
    [
        ([1.0, float("nan"), 0.0], False),
        ([1.0, float("inf"), 0.0], False),
        ([-float("inf")] * 3, False),
        ([1.0, -float("inf"), 0.0], True),
        ([1e30, -1e30, 0.0], True),
    ],
)
def test_what_is_no_prediction_is_none(baseline, tmp_path, values, valid):
    x, y = rows(1, 9)
    with Monitor(
        lambda x: mx.concatenate([model(x[1:]), mx.array([values])]), baseline, state=tmp_path / "s"
    ) as monitor:
        monitor(mx.array(x))
        found = monitor.snapshot()["counters"]
        assert (found["predictions"], found["not_finite"]) == ((9, 0) if valid else (8, 1))
        assert [(a.severity, a.source, a.rule) for a in monitor.alerts()] == (
            [] if valid else [("critical", "outputs", "not finite")]
        )
        result = monitor.evaluate(x, np.concatenate([y[1:], [0]]))
        assert result["not_finite"] == (not valid)
        right = (np.array(model(mx.array(x[1:]))).argmax(1) == y[1:]).sum() + (valid and np.argmax(values) == 0)
        assert result["accuracy"] == pytest.approx(right / 9), "argmax of NaN is 0, and class 0 was asked for"


def test_inputs_that_are_not_finite_reach_no_window(baseline, tmp_path):
    x, _ = rows(1, 64)
    x[3] = np.inf
    with Monitor(lambda x: model(mx.zeros_like(x)), baseline, state=tmp_path / "s") as monitor:
        monitor(mx.array(x))
        assert monitor.snapshot()["counters"]["not_finite_inputs"] == 1
        assert len(monitor._windows["inputs"].pending) == 63


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda x: x[:, :2], r"output must have the 3 classes of the baseline but has shape \[5, 2\]"),
        (lambda x: x[:, 0], r"output must be \[..., classes\], 2 classes or more, but has shape \[5\]"),
        (lambda x: [x], "but has type list; give scores="),
        (lambda x: x[:, :3].astype(mx.int32), "output must be floats"),
    ],
)
def test_outputs_that_are_refused(baseline, tmp_path, changed, words):
    with Monitor(changed, baseline, state=tmp_path / "s") as monitor, pytest.raises(ValueError, match=words):
        monitor(mx.array(rows(1, 5)[0]))


def test_what_fails_leaves_no_trace(baseline, tmp_path):
    x, y = rows(1, 50)
    with Monitor(model, baseline, state=tmp_path / "s") as monitor:
        monitor(mx.array(x))
        before = json.dumps(monitor.snapshot() | {"time": 0})
        with pytest.raises(ValueError, match=r"inputs must have rows of 5 numbers but have 4"):
            monitor(mx.array(x[:, :4]))
        with pytest.raises(ValueError, match=r"y must be classes \[50\] but is int64 of shape \[49\]"):
            monitor.evaluate(x, y[1:])
        with pytest.raises(ValueError, match="y must be from 0 to 2 but is from 1 to 3"):
            monitor.evaluate(x, y + 1)
        assert json.dumps(monitor.snapshot() | {"time": 0}) == before
        monitor(mx.array(x))
        assert monitor.snapshot()["counters"]["batches"] == 2
        assert monitor._series["confidence"]._count == 0


# baselines


def test_baseline_says_what_numpy_says():
    x, y = rows(0, 1000)
    found = Baseline.from_data(model, x, y, batch_size=77)
    logits = 3 * x[:, :3].astype(np.float64)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    confidence = (probabilities / probabilities.sum(1, keepdims=True)).max(1)
    assert found.facts["confidence"]["mean"] == pytest.approx(confidence.mean(), rel=1e-5)
    assert found.facts["confidence"]["sd"] == pytest.approx(confidence.std(ddof=1), rel=1e-5)
    assert found.facts["accuracy"]["mean"] == pytest.approx((logits.argmax(1) == y).mean())
    for true in range(3):
        for guess in range(3):
            assert found.arrays["confusion"][true, guess] == ((y == true) & (logits.argmax(1) == guess)).sum()


def test_baseline_on_disk(tmp_path, baseline):
    baseline.save(tmp_path / "b.safetensors")
    again = Baseline.load(tmp_path / "b.safetensors")
    assert again.fingerprint == baseline.fingerprint
    assert again.facts == baseline.facts
    raw = bytearray((tmp_path / "b.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "b.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="must be a baseline but"):
        Baseline.load(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match="must be a baseline but"):
        Baseline.load(tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError):
        Baseline.load(tmp_path / "none.safetensors")


def test_baselines_that_are_refused():
    x, y = rows(0, 100)
    with pytest.raises(ValueError, match=r"x must have 50 rows or more but has shape \[49, 5\]"):
        Baseline.from_data(model, x[:49])
    with pytest.raises(ValueError, match=r"output must be finite but is not in 1 of 100 rows"):
        Baseline.from_data(lambda x: mx.where(x == mx.array(x[0, 0]), float("nan"), x) if len(x) > 1 else x, x)
    with pytest.raises(ValueError, match="y must be from 0 to 2"):
        Baseline.from_data(model, x, y + 1)
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        Baseline.from_data(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3)), x, y)


def test_state_of_another_baseline_is_refused(baseline, tmp_path):
    Monitor(model, baseline, state=tmp_path / "s").close()
    other = Baseline.from_data(model, *rows(9, 1000), embeddings=False)
    with pytest.raises(StateError, match="state must be of this baseline but"):
        Monitor(model, other, state=tmp_path / "s")
    with Monitor(model, baseline, state=tmp_path / "s"), pytest.raises(StateError, match="another one writes"):
        Monitor(model, baseline, state=tmp_path / "s")


# figures, and where they changed


def test_points_do_not_depend_on_batches(baseline, tmp_path):
    x, y = rows(3, 3000)
    found = []
    for sizes in ([3000], [1, 7, 0, 992] * 3):
        with Monitor(model, baseline, state=tmp_path / str(len(sizes))) as monitor:
            start = 0
            for size in sizes:
                monitor.evaluate(x[start : start + size], y[start : start + size])
                start += size
            found.append([(p["value"], p["standardised"]) for p in monitor.snapshot()["series"]["accuracy"]["points"]])
    assert found[0] == found[1]
    assert len(found[0]) == 30
    right = (np.array(model(mx.array(x))).argmax(1) == y).reshape(30, 100)
    np.testing.assert_allclose([v for v, _ in found[0]], right.mean(1))


@pytest.mark.parametrize("right", [0, 1, 60, 89, 90, 91, 99, 100])
def test_shares_are_standardised_by_the_mid_p_value(right):
    series = Series("accuracy", 0.9, None, 10**9, size=100)
    (point,) = series.add(np.repeat([1.0, 0.0], [right, 100 - right]), Batch(0))
    p = stats.binom(100, 0.9)
    mid = p.cdf(right) - p.pmf(right) / 2
    assert stats.norm.cdf(point.standardised) == pytest.approx(mid, rel=1e-6)


def test_limit_of_the_sums_has_the_run_length_that_is_asked_for():
    assert cusum_limit(0.5, 930) == pytest.approx(5, abs=0.02), "Page's table: one-sided, k 0.5, h 5"
    rng = np.random.default_rng(0)
    for k, run_length in ((0.5, 200.0), (0.8, 500.0)):
        streams = CUSUM(0.0, 1.0, k=k, h=cusum_limit(k, run_length), sides="below")
        signals = streams.update_many(rng.normal(size=300_000))
        # 600 runs or more of about exponential length: 5 standard errors are 0.2
        assert 300_000 / len(signals) == pytest.approx(run_length, rel=0.2)


def test_change_point_is_the_likeliest_step():
    rng = np.random.default_rng(0)
    for at in (0, 1, 40, 70):
        z = rng.normal(size=80)
        z[at:] -= 3
        cost = [np.sum((z - np.where(np.arange(80) >= t, z[t:].mean(), 0)) ** 2) for t in range(80)]
        assert change_point(z, "below") == int(np.argmin(cost))
        assert abs(change_point(z, None) - at) <= 1
    assert change_point([5.0, -3.0], "below") == 1
    with pytest.raises(ValueError, match="values must have 1 or more"):
        change_point([], None)


def run_evaluations(monitor, n, bad_from, wrong, size=250, seed=0):
    """The number of the evaluation at which the first critical alert came; None without."""
    for i in range(n):
        monitor.checkpoint = f"step-{i // 10}"
        x, y = rows([seed, 11, i], size, 0.1 if i < bad_from else wrong)
        monitor.evaluate(x, y, label=f"day {i}")
        found = [a for a in monitor.alerts(open_only=True) if a.source == "accuracy"]
        if found:
            return i, found[0]
    return None, None


@pytest.mark.parametrize("seed", range(3))
def test_three_points_of_accuracy_are_missed(baseline, tmp_path, seed):
    """A drop from 0.90 to 0.87, where a point of 100 rows has a standard deviation of 0.03."""
    with Monitor(model, baseline, state=tmp_path / "s") as monitor:
        at, alert = run_evaluations(monitor, 100, 20, 0.13, seed=seed)
    assert at is not None
    assert 20 <= at < 70
    assert alert.severity == "critical"
    assert alert.rule == "CUSUM: cusum below"
    assert abs(alert.details["first_bad"]["batch"] - 20) <= 10, "the change point is a guess"
    good = alert.details["last_good"]
    assert good["batch"] <= alert.details["first_bad"]["batch"]
    assert good["label"].startswith("day ")
    if good["checkpoint"] == alert.details["first_bad"]["checkpoint"]:
        assert alert.details["rollback_to"] is None
        assert "look at the data rather than at the weights" in alert.message
    else:
        assert alert.details["rollback_to"] == good["checkpoint"]
        assert f"advice: roll back to {good['checkpoint']}" in alert.message


def test_a_break_is_placed_exactly(baseline, tmp_path):
    with Monitor(model, baseline, state=tmp_path / "s") as monitor:
        at, alert = run_evaluations(monitor, 20, 8, 0.6, size=200)
    assert at == 8
    assert alert.details["first_bad"] == {"batch": 8, "label": "day 8", "checkpoint": "step-0"}
    assert alert.details["last_good"] == {"batch": 7, "label": "day 7", "checkpoint": "step-0"}
    assert alert.details["rollback_to"] is None, "the same weights did well the day before"


def test_a_checkpoint_that_is_worse_is_named_with_the_one_before(baseline, tmp_path):
    with Monitor(model, baseline, state=tmp_path / "s") as monitor:
        at, alert = run_evaluations(monitor, 20, 10, 0.5, size=130)
    assert at in (10, 11)
    first, good = alert.details["first_bad"], alert.details["last_good"]
    assert (first["label"], good["label"]) in {(f"day {i}", f"day {j}") for i in (9, 10) for j in (8, 9)}
    assert int(first["label"][4:]) == first["batch"], "name and number are of one batch, not of two that share a point"
    if first["batch"] == 10:
        assert alert.details["rollback_to"] == "step-0"


def test_a_class_that_fails(tmp_path):
    def stable(x):
        return model(x)

    baseline = Baseline.from_data(stable, *rows(0, 4000), embeddings=False)

    def forgets(x):  # class 2 is taken for class 0
        logits = stable(x)
        return mx.concatenate([mx.maximum(logits[:, :1], logits[:, 2:]) + 1e-3, logits[:, 1:]], axis=1)

    with Monitor(forgets, baseline, state=tmp_path / "s") as monitor:
        for i in range(4):
            monitor.evaluate(*rows([5, i], 500))
        sources = {a.source for a in monitor.alerts()}
    assert {"recall[2]", "precision[0]", "accuracy"} <= sources
    assert not {"recall[0]", "recall[1]", "precision[1]"} & sources


@pytest.mark.slow
def test_false_alarms_of_all_charts_together():
    """Against baselines of 4000 rows: at most one alarm in ``run_length`` points, in 9 of 10 baselines by design."""
    alarms = points = 0
    for seed in range(20):
        x, y = rows([seed, 1], 4000)
        baseline = Baseline.from_data(model, x, y, embeddings=False)
        for name, series in _make_series(baseline, None, 200.0).items():
            if name == "accuracy":
                right = (np.random.default_rng([seed, 2]).random(100_000) < 0.9).astype(float)
                found = series.add(right, Batch(0))
                points += len(found)
                alarms += sum(bool(p.signals) for p in found)
    assert points == 20_000
    assert alarms <= points / 200, "accuracy may take only its share of the rate"


# drift


def test_windows_find_what_moved_and_nothing_else(baseline, tmp_path):
    with Monitor(model, baseline, state=tmp_path / "s", rows_per_batch=200) as monitor:
        for i in range(60):
            monitor(mx.array(rows([1, i], 200)[0]))
        assert monitor.alerts() == []
        for i in range(60, 70):
            x, _ = rows([1, i], 200)
            monitor(mx.array(x + np.array([0, 0, 0, 0, 0.5], np.float32)))
        drifted = monitor.alerts()
        shot = monitor.snapshot()
    assert {a.source for a in drifted} == {"drift/inputs"}
    assert drifted[0].details["column"] == 4
    assert 60 <= drifted[0].details["batch"] < 68
    assert shot["windows"]["inputs"]["drift"]
    assert not shot["windows"]["confidences"]["drift"]
    assert [p["signals"] for p in shot["series"]["drift/inputs"]["points"]][-1]


def test_slow_drift_is_found_by_long_windows():
    """A tenth of a standard deviation: too little for 500 rows, enough for 4000."""
    rng = np.random.default_rng(0)
    window = DriftWindow("w", rng.normal(size=(20_000, 1)), size=500, min_effect=0.02)
    found = [t for _ in range(32) for t in window.add(rng.normal(0.1, size=(500, 1)))]
    assert [t.rows for t in found if t.drift].count(4000) == 4
    assert sum(t.drift for t in found if t.rows == 500) <= 8


def test_correlation_that_turns_is_found_by_the_mmd():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6000, 1))
    noise = 0.3 * rng.normal(size=(6000, 1))
    window = DriftWindow("w", np.hstack([z, z + noise])[:2000], size=250)
    turned = np.hstack([z, -z + noise])[2000:4000]
    (found,) = [t for t in window.add(turned) if t.drift]
    assert (found.test, found.column, found.rows) == ("mmd", None, 2000)


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6])
def test_few_permutations_decide_as_all_of_them_do(monkeypatch, shift):
    rng = np.random.default_rng(0)
    window = DriftWindow("w", rng.normal(size=(100, 3)), size=50)
    new = rng.normal(shift, size=(30, 50, 3))
    few = [window._together(rows_, 0.01) for rows_ in new]
    monkeypatch.setattr(windows, "FIRST_PERMUTATIONS", 199)  # as many as that level asks for
    everything = [window._together(rows_, 0.01) for rows_ in new]
    assert [t.drift for t in few] == [t.drift for t in everything]
    assert [t.p_value for t in few if t.drift] == [t.p_value for t in everything if t.drift]
    assert sum(t.drift for t in few) >= (0 if shift == 0 else 5)


def test_windows_keep_no_more_than_they_say():
    rng = np.random.default_rng(0)
    window = DriftWindow("w", rng.normal(size=(500, 2)), size=50, long=3, mmd=False)
    sizes = rng.integers(0, 120, 60)
    found = [t for n in sizes for t in window.add(rng.normal(size=(n, 2)))]
    short = sizes.sum() // 50
    assert window.windows == short
    assert [t.rows for t in found].count(50) == short
    assert [t.rows for t in found].count(150) == short // 3
    assert len(window.pending) == sizes.sum() - 150 * (short // 3)


def test_windows_are_as_good_as_what_they_are_built_of():
    rng = np.random.default_rng(3)
    reference, rows_ = rng.normal(size=(400, 2)), rng.normal(0.2, size=(300, 2))
    window = DriftWindow("w", reference, size=300, long=1)
    (found,) = window.add(rows_)
    p = [
        stats.ks_2samp(reference[:, j].astype(np.float32), rows_[:, j].astype(np.float32), method="asymp").pvalue
        for j in range(2)
    ]
    assert found.p_value == pytest.approx(min(1, 2 * min(p)))
    assert found.column == int(np.argmin(p))
    ties = rng.integers(0, 4, (2, 500, 6)).astype(np.float32)
    (found,) = DriftWindow("w", ties[0], size=500, long=1).add(ties[1])
    p = [stats.ks_2samp(old, new, method="asymp").pvalue for old, new in zip(*ties.transpose(0, 2, 1), strict=True)]
    assert found.p_value == pytest.approx(min(1, 6 * min(p)))
    window = DriftWindow("w", rng.integers(0, 3, 400), kind="classes", size=300, long=1)
    shares = rng.choice(3, 300, p=[0.5, 0.3, 0.2])
    (found,) = window.add(shares)
    counts = [np.bincount(a, minlength=3) for a in (window.reference, shares)]
    assert found.p_value == pytest.approx(stats.chi2_contingency(counts, correction=False).pvalue)


@pytest.mark.slow
def test_false_alarms_of_windows_over_time():
    """At a run length of 20 at most one in 20 windows is false on average; here over 75 references of their own."""
    rng = np.random.default_rng(1)
    alarms = windows = 0
    for _ in range(75):
        window = DriftWindow("w", rng.normal(size=(1000, 4)), size=100, long=4, run_length=20, min_effect=0, mmd=False)
        found = window.add(rng.normal(size=(800, 4)))
        alarms += sum(t.drift for t in found)
        windows += window.windows
    assert windows == 600
    assert 0 < alarms <= 1.5 * windows / 20  # KS is conservative; 1.5 times would be 3 standard errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 10}, "reference and size must have 20 rows or more"),
        ({"long": 0}, "long must be 1 or more"),
        ({"run_length": 1}, "run_length above 1"),
    ],
)
def test_windows_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DriftWindow("w", np.zeros((30, 2)), **options)
    with pytest.raises(ValueError, match="reference must be finite"):
        DriftWindow("w", np.full((30, 2), np.nan))
    with pytest.raises(ValueError, match="rows must have 2 columns but have 3"):
        DriftWindow("w", np.zeros((30, 2))).add(np.zeros((3, 3)))


def test_embeddings_and_outliers_of_a_module(tmp_path):
    class Detector:
        def score_samples(self, x):
            return -np.abs(x).max(axis=1)

    network = Linear()
    x = np.random.default_rng(0).normal(size=(1000, 40)).astype(np.float32)
    baseline = Baseline.from_data(network, x, detector=Detector())
    assert baseline.windows == ("inputs", "embeddings", "confidences", "predictions", "outliers")
    assert baseline.facts["layer"] == "last"
    hidden = np.maximum(x @ np.array(network.first.weight).T + np.array(network.first.bias), 0)
    np.testing.assert_allclose(baseline.arrays["embeddings"], hidden, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="detector must be given"):
        Monitor(network, baseline, state=tmp_path / "s")
    with Monitor(network, baseline, state=tmp_path / "s", detector=Detector(), window_size=100) as monitor:
        for i in range(8):
            far = np.random.default_rng([1, i]).normal(size=(64, 40)).astype(np.float32)
            far[:20, 7] = 20.0
            monitor(mx.array(far))
        sources = {a.source for a in monitor.alerts()}
        assert {"drift/outliers", "drift/embeddings"} <= sources
        assert type(network.last) is nn.Linear
    with pytest.raises(ValueError, match="windows must be some of the baseline's"):
        Monitor(network, baseline, windows=["loss"], state=tmp_path / "t")


# held-out sets, schedules


@pytest.mark.parametrize(("every", "due"), [(3, [3, 6, 9]), (timedelta(seconds=25), [3, 6, 9])])
def test_schedules(every, due):
    clock = Clock()
    schedule = Schedule(every, clock=clock)
    found = []
    for batches in range(1, 11):
        clock.now += 10
        if schedule.due(batches):
            found.append(batches)
            again = Schedule(every, clock=clock)
            again.load(json.loads(json.dumps(schedule.state())))
            assert not again.due(batches)
    assert found == due
    clock.now += 10_000
    assert schedule.due(1000)
    assert not schedule.due(1000), "what was missed many times is due once"
    for wrong in (0, -1, True, 1.5, timedelta(0)):
        with pytest.raises(ValueError, match="every must be"):
            Schedule(wrong)


def test_held_out_set_is_compared_to_itself(baseline, tmp_path):
    x, y = rows(20, 600)
    broken = [False]

    def changing(x):
        logits = model(x)
        return mx.where(x[:, 3:4] > 1.5, logits[:, ::-1], logits) if broken[0] else logits

    options = {"held_out": (x, y), "every": 2, "state": tmp_path / "s", "windows": ()}
    with Monitor(changing, baseline, checkpoint="a", **options) as monitor:
        for i in range(8):
            monitor(mx.array(rows([21, i], 10)[0]))
        assert monitor.alerts() == []
    with Monitor(changing, baseline, **options) as monitor:  # the reference is that of the beginning
        broken[0], monitor.checkpoint = True, "b"
        for i in range(2):
            monitor(mx.array(rows([22, i], 10)[0]))
        (alert,) = [a for a in monitor.alerts() if a.source == "held_out"]
        points = monitor.snapshot()["series"]["held_out"]["points"]
    assert [p["batch"] for p in points] == [0, 2, 4, 6, 8, 10]
    then = np.array(model(mx.array(x))).argmax(1) == y
    now = np.array(changing(mx.array(x))).argmax(1) == y
    lost, won = int((then & ~now).sum()), int((~then & now).sum())
    assert (alert.details["lost"], alert.details["won"]) == (lost, won)
    assert alert.details["p_value"] == pytest.approx(stats.binomtest(lost, lost + won, alternative="greater").pvalue)
    assert alert.details["first_bad"]["batch"] == 10
    assert alert.details["rollback_to"] == "a"
    with pytest.raises(StateError, match="held_out must be the set that"):
        Monitor(changing, baseline, held_out=(x + 1, y), every=2, state=tmp_path / "s")
    with pytest.raises(ValueError, match="held_out and every must be given together"):
        Monitor(changing, baseline, every=2, state=tmp_path / "t")


def test_held_out_set_by_time(baseline, tmp_path):
    clock = Clock()
    options = {"held_out": rows(20, 100), "every": timedelta(hours=1), "state": tmp_path / "s", "clock": clock}
    with Monitor(model, baseline, **options) as monitor:
        assert not monitor.tick()
        clock.now += 3601
        assert monitor.tick()
        assert not monitor.tick()
        assert len(monitor.snapshot()["series"]["held_out"]["points"]) == 2


# what is kept


def test_goes_on_exactly_where_it_stood(baseline, tmp_path):
    """One monitor, and one that is closed and opened after every call, end in the same state."""

    def run(path, reopen):
        clock = Clock()
        options = {"state": path, "clock": clock, "window_size": 100, "cooldown": 5, "keep": 10}
        monitor = Monitor(model, baseline, **options)
        for i in range(20):
            if reopen:
                monitor.close()
                monitor = Monitor(model, baseline, **options)
            clock.now += 1
            x, y = rows([30, i], 70, 0.1 if i < 10 else 0.5)
            monitor(mx.array(x + 0.05 * i))
            monitor.evaluate(x, y)
        found = monitor.snapshot() | {"time": 0, "state": ""}
        states = {n: s.state() for n, s in monitor._series.items()}
        pending = {n: w.pending.tolist() for n, w in monitor._windows.items()}
        monitor.close()
        return found, states, pending

    whole, pieces = run(tmp_path / "a", False), run(tmp_path / "b", True)
    assert whole == pieces
    assert len(whole[0]["alerts"]) > 3
    assert len(whole[0]["series"]["accuracy"]["points"]) == 10


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kills_change_nothing(baseline, tmp_path, seed):
    """Killed at random moments, a monitor ends where one ends that was left in peace; no alert is lost or doubled."""
    shots = []
    for name, most in (("calm", 0), ("killed", 100_000)):
        folder = tmp_path / name
        folder.mkdir()
        baseline.save(folder / "baseline.safetensors")
        program = [sys.executable, HERE / "watched.py", folder, str(seed), "30", str(most)]
        done = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
        assert done.returncode == 0, done.stderr
        kills = int(done.stdout)
        with Monitor(model, baseline, state=folder / "monitor.sqlite") as monitor:
            shot = monitor.snapshot()
        ids = [json.loads(line)["id"] for line in (folder / "alerts.jsonl").read_text().splitlines()]
        assert sorted(ids) == sorted(a["id"] for a in shot["alerts"])
        assert {*(folder / "got").read_text().split()} == {*ids}
        shots.append(shot)
    assert kills >= 5
    calm, killed = shots
    assert len(calm["alerts"]) >= 5
    assert [a["id"] for a in calm["alerts"]] == [a["id"] for a in killed["alerts"]]
    assert calm["counters"] == killed["counters"]
    for name, series in calm["series"].items():
        for old, new in zip(series["points"], killed["series"][name]["points"], strict=True):
            assert old | {"time": 0} == new | {"time": 0}


def test_charts_of_ones_own(baseline, tmp_path):
    with Monitor(model, baseline, charts={"accuracy": [Shewhart(0, 1, rules=(1, 2))]}, state=tmp_path / "s") as monitor:
        assert [*monitor.snapshot()["series"]] == ["accuracy"]
        for i in range(9):
            monitor.evaluate(*rows([40, i], 100, 0.13))
        assert monitor.alerts()
    with pytest.raises(ValueError, match="state must be of the charts that are given"):
        Monitor(model, baseline, charts={"accuracy": [Shewhart(0, 1)]}, state=tmp_path / "s")
    with pytest.raises(ValueError, match="charts must be of figures of the baseline"):
        Monitor(model, baseline, charts={"loss": []}, state=tmp_path / "t")


def test_repeated_alerts_are_held_back(baseline, tmp_path):
    clock = Clock()
    bad = mx.full((4, 5), float("nan"))
    sink = FileSink(tmp_path / "alerts.jsonl")
    with Monitor(model, baseline, sinks=[sink], state=tmp_path / "s", cooldown=60, clock=clock) as monitor:
        for _ in range(5):
            monitor(bad)
        clock.now += 61
        monitor(bad)
        assert [a.details["batch"] for a in monitor.alerts()] == [0, 5]
        assert len((tmp_path / "alerts.jsonl").read_text().splitlines()) == 2
        monitor.acknowledge(monitor.alerts()[0].id)
        assert len(monitor.alerts(open_only=True)) == 1
        with pytest.raises(ValueError, match="ids must be of alerts but have x"):
            monitor.acknowledge("x")


def test_prometheus_shows_what_is_measured(baseline, tmp_path):
    sink = PrometheusSink()
    with Monitor(model, baseline, sinks=[sink], state=tmp_path / "s") as monitor:
        monitor(mx.array(rows(1, 150)[0]))
        monitor(mx.full((2, 5), float("nan")))
        get = sink.registry.get_sample_value
        assert get("bulwark_rows_total") == 152
        assert get("bulwark_not_finite_total") == 2
        assert get("bulwark_alerts_open", {"severity": "critical"}) == 1
        assert get("bulwark_alerts_total", {"severity": "critical", "source": "outputs"}) == 1
        value = monitor.snapshot()["series"]["confidence"]["points"][0]["value"]
        assert get("bulwark_chart_value", {"series": "confidence"}) == value


def test_snapshot_is_json(baseline, tmp_path):
    with Monitor(model, baseline, state=tmp_path / "s") as monitor:
        monitor(mx.full((2, 5), float("nan")))
        shot = json.loads(json.dumps(monitor.to_json(), allow_nan=False))
    assert shot["kind"] == "monitor"
    assert Alert.from_json(shot["alerts"][0]).source == "outputs"
