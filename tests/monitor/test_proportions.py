"""Charts of shares against the binomial distribution, summed term by term in fractions."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark.monitor import Chart, ClassChart, PChart, confusion_matrix


def probability(n, p, counts):
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in counts)


@pytest.mark.parametrize("p", [Fraction(99, 100), Fraction(1, 2), Fraction(1, 50), Fraction(1999, 2000)])
@pytest.mark.parametrize("n", [1, 2, 31, 200, 333])
@pytest.mark.parametrize(("sides", "share"), [("both", 2), ("below", 1), ("above", 1)])
def test_exact_limits_hold_the_rate_and_no_narrower_ones_would(p, n, sides, share):
    rate = Fraction(1, 100)
    chart = PChart(float(p), false_alarm_rate=float(rate), sides=sides)
    low, high = [], []
    for k in range(n + 1):
        signal = chart.update((k, n))
        if signal:
            (low if signal.side == "below" else high).append(k)
            assert signal.value == k / n
    assert low == list(range(len(low)))
    assert high == list(range(n + 1 - len(high), n + 1))
    tail = rate / share
    if sides != "above":
        assert probability(n, p, low) < tail <= probability(n, p, range(len(low) + 1))
    if sides != "below":
        assert probability(n, p, high) < tail <= probability(n, p, range(n - len(high), n + 1))


def test_normal_limits_are_three_sigma():
    lower, upper = PChart(0.9, method="normal", false_alarm_rate=0.0026997960632601866).limits(100)
    assert (lower, upper) == pytest.approx((0.9 - 0.09, 0.9 + 0.09))
    assert PChart(0.99, method="normal").limits(100)[1] == 1.0


subgroups = st.tuples(st.integers(0, 300), st.integers(0, 60)).map(lambda v: (v[0], v[0] + v[1]))
holes = st.sampled_from([(math.nan, 10), (3, math.inf), (math.nan, math.nan)])


@given(st.lists(subgroups | holes, max_size=40), st.integers(0, 40), st.sampled_from(["exact", "normal"]))
@settings(max_examples=100, deadline=None)
def test_at_once_one_by_one_saved_and_loaded(values, cut, method):
    whole, first, single = (PChart(0.9, method=method) for _ in range(3))
    signals = first.update_many(values[:cut])
    second = Chart.from_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    signals += second.update_many(values[cut:])
    at_once = [s.to_json() for s in whole.update_many(values)]
    assert [s.to_json() for s in signals] == at_once
    assert [s.to_json() for s in map(single.update, values) if s] == at_once
    assert whole.state() == second.state() == single.state()
    assert [s["index"] for s in at_once if s["rule"] == "not finite"] == [
        i for i, v in enumerate(values) if not all(map(math.isfinite, v))
    ]


def test_baselines():
    values = [(95, 100), (0, 0), (190, 200), (10, 50)]
    assert PChart.from_baseline(values).p == 295 / 350
    assert PChart.from_baseline(values, estimator="median").p == 0.95
    assert PChart.from_baseline([(200, 200)]).p == 200.5 / 201
    assert PChart.from_baseline([(0, 9)]).p == 0.05


def test_standardize():
    z = PChart(0.9).standardize([(90, 100), (84, 100), (0, 0)])
    np.testing.assert_allclose(z, [0, -2, np.nan], atol=1e-12)


BASELINE = np.array([[480, 15, 5], [10, 980, 10], [0, 6, 294]])


def test_each_class_has_its_own_charts():
    chart = ClassChart.from_baseline(BASELINE, names=["a", "b", "c"])
    assert chart.recall == [0.96, 0.98, 0.98]
    assert chart.precision == pytest.approx([480 / 490, 980 / 1001, 294 / 309])
    assert chart.update([[96, 3, 1], [2, 196, 2], [0, 1, 59]]) is None
    signal = chart.update([[96, 3, 1], [2, 196, 2], [0, 12, 48]])
    assert (signal.rule, signal.index, signal.value) == ("recall of class c below", 1, 0.8)
    assert str(signal).startswith("value 1: recall of class c is 0.8 (48 of 60): below the limit of 0.9")
    assert [s.rule for s in signal.others] == ["precision of class b below"]
    assert chart.update(np.full((3, 3), math.nan)).rule == "not finite"
    assert chart.update(np.zeros((3, 3))) is None


def test_class_charts_share_the_rate():
    chart = ClassChart([0.9] * 5, [0.9] * 4 + [None], false_alarm_rate=0.09)
    rates = [c.false_alarm_rate for c in chart._charts.values()]
    assert len(rates) == 9
    assert sum(rates) == pytest.approx(0.09)


def test_a_class_that_the_baseline_lacks_is_not_watched():
    chart = ClassChart.from_baseline([[50, 0], [0, 0]])
    assert (chart.recall, chart.precision) == ([50.5 / 51, None], [50.5 / 51, None])
    assert chart.update([[50, 0], [40, 0]]).rule == "precision of class 0 below"


def test_class_charts_at_once_saved_and_loaded():
    rng = np.random.default_rng(0)
    matrices = rng.poisson(BASELINE / 10 + 3, (60, 3, 3)).astype(float)
    matrices[7, 1, 1] = math.nan
    whole, first, single = (ClassChart.from_baseline(BASELINE) for _ in range(3))
    at_once = [s.to_json() for s in whole.update_many(matrices)]
    signals = first.update_many(matrices[:23])
    second = Chart.from_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    signals += second.update_many(matrices[23:])
    assert [s.to_json() for s in signals] == at_once
    assert [s.to_json() for s in map(single.update, matrices) if s] == at_once
    assert len(at_once) > 10


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=50))
@settings(max_examples=50, deadline=None)
def test_confusion_matrix_counts(pairs):
    expected = [[0] * 4 for _ in range(4)]
    for true, predicted in pairs:
        expected[true][predicted] += 1
    y, predicted = [v[0] for v in pairs], [v[1] for v in pairs]
    assert confusion_matrix(y, predicted, 4).tolist() == expected


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PChart(1.0), "p and false_alarm_rate must be above 0 and below 1 but are 1.0"),
        (lambda: PChart(0.5, method="wilson"), "method must be one of exact, normal"),
        (lambda: PChart(0.5).update((3, 2)), r"right <= size, but have \[3.0, 2.0\] at 0"),
        (lambda: PChart(0.5).update((1.5, 2)), "whole numbers"),
        (lambda: PChart(0.5).update((-1, 2)), "whole numbers"),
        (lambda: PChart(0.5).update(0.5), r"pairs \[n, 2\] but have shape \[1\]"),
        (lambda: PChart.from_baseline([(0, 0)]), "must have subgroups with rows"),
        (lambda: ClassChart([0.9], [0.9, 0.8]), "of the same classes but have 1, 2 and 1"),
        (lambda: ClassChart([None], [None]), "must have a class that is watched"),
        (lambda: ClassChart([0.9], [0.9]).update([[1, 2]]), r"must be \[n, 1, 1\] but have shape \[1, 1, 2\]"),
        (lambda: ClassChart([0.9], [0.9]).update([[-1]]), "must be counts but have -1"),
        (lambda: confusion_matrix([0, 5], [0, 1], 2), "y must be from 0 to 1 but has 5 at 1"),
        (lambda: confusion_matrix([0], [0, 1], 2), r"must be \[n\] but have shapes \[1\] and \[2\]"),
        (lambda: confusion_matrix([0.5], [0], 2), "y must be whole numbers but has dtype float64"),
    ],
)
def test_refusals(build, words):
    with pytest.raises(ValueError, match=words):
        build()
