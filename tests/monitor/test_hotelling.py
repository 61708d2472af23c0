"""Hotelling's T2 against the quadratic form in exact fractions, and SciPy's distributions."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from mlx_bulwark.monitor import Chart, HotellingT2
from scipy import stats


def quadratic_form(x, mean, covariance):
    """(x - mean)' S^-1 (x - mean), by Gauss's elimination in fractions."""
    d = [Fraction(a) - Fraction(b) for a, b in zip(x, mean, strict=True)]
    rows = [[Fraction(v) for v in row] + [b] for row, b in zip(covariance, d, strict=True)]
    for i in range(len(d)):
        for j in range(i + 1, len(d)):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    solved = [Fraction(0)] * len(d)
    for i in reversed(range(len(d))):
        known = sum(rows[i][j] * solved[j] for j in range(i + 1, len(d)))
        solved[i] = (rows[i][-1] - known) / rows[i][i]
    return float(sum(a * b for a, b in zip(d, solved, strict=True)))


def covariance_of(d, seed=0):
    a = np.random.default_rng(seed).normal(size=(d, d))
    return a @ a.T + 0.1 * np.eye(d)


@pytest.mark.parametrize("d", [1, 2, 5, 9])
def test_statistic_is_the_quadratic_form(d):
    mean, covariance = np.arange(d) / 3, covariance_of(d)
    x = np.random.default_rng(1).normal(size=(31, d)) * 3
    expected = [quadratic_form(row, mean.tolist(), covariance.tolist()) for row in x.tolist()]
    np.testing.assert_allclose(HotellingT2(mean, covariance).statistic(x), expected, rtol=1e-11)


def test_a_covariance_near_singular_is_solved_not_inverted():
    covariance = [[1.0, 1 - 1e-9], [1 - 1e-9, 1.0]]
    x = [[1.0, 1.0], [1.0, 1.001]]
    expected = [quadratic_form(row, [0, 0], covariance) for row in x]
    np.testing.assert_allclose(HotellingT2([0, 0], covariance).statistic(x), expected, rtol=1e-6)


def test_limits():
    assert HotellingT2(np.zeros(3), np.eye(3), false_alarm_rate=0.01).limit == pytest.approx(stats.chi2.isf(0.01, 3))
    # Montgomery, section 11.3: phase II, individual observations: p (m + 1) (m - 1) / (m^2 - m p) F
    m, p = 40, 3
    expected = p * (m + 1) * (m - 1) / (m * m - m * p) * stats.f.isf(0.01, p, m - p)
    assert HotellingT2(np.zeros(3), np.eye(3), false_alarm_rate=0.01, size=40).limit == pytest.approx(expected)


def test_the_limit_of_estimates_holds_its_rate():
    # 4,000 baselines of 20 vectors, 5 new ones each, at a rate of 0.02: 400 expected, and as those of one baseline go
    # together the standard deviation is below 20 * sqrt(5). Fixed seed.
    rng = np.random.default_rng(0)
    found = known = 0
    for _ in range(4000):
        chart = HotellingT2.from_baseline(rng.normal(size=(20, 3)), false_alarm_rate=0.02)
        t2 = chart.statistic(rng.normal(size=(5, 3)))
        found += int((t2 > chart.limit).sum())
        known += int((t2 > stats.chi2.isf(0.02, 3)).sum())
    assert 400 - 90 < found < 400 + 90
    assert known > 1000  # what the chi-square limit would do


def test_a_signal_names_the_coordinate():
    chart = HotellingT2([10, 20, 30], [[4, 3.8, 0], [3.8, 4, 0], [0, 0, 1]])
    assert chart.update([12, 22, 30]) is None
    assert "coordinate 2, 6 sigma" in str(chart.update([10, 20, 36]))
    signal = chart.update([10, 23, 30])
    assert "coordinate 1" in str(signal)
    assert (signal.index, signal.rule, signal.limit) == (2, "T2", chart.limit)
    assert signal.value == pytest.approx(quadratic_form([10, 23, 30], chart.mean, chart.covariance.tolist()))


@pytest.mark.parametrize("cut", [0, 1, 2, 500, 4999, 5000])
def test_bits_do_not_depend_on_how_many_come_at_once(cut):
    x = np.random.default_rng(2).normal(size=(5000, 7))
    x[[3, 4500], [1, 2]] = math.nan, math.inf
    x[77], x[78] = 1e200, [1e308, -1e308] * 3 + [1e308]

    def make():
        return HotellingT2(np.zeros(7), covariance_of(7), false_alarm_rate=0.3)

    whole, first, single = make(), make(), make()
    at_once = [s.to_json() for s in whole.update_many(x)]
    signals = first.update_many(x[:cut])
    second = Chart.from_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    signals += second.update_many(x[cut:])
    assert [s.to_json() for s in signals] == at_once
    assert [s.to_json() for s in map(single.update, x[:300]) if s] == [s for s in at_once if s["index"] < 300]
    assert [s["index"] for s in at_once if s["rule"] == "not finite"] == [3, 4500]
    assert {77: "inf", 78: "inf"}.items() <= {s["index"]: s["value"] for s in at_once}.items()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: HotellingT2([0, 0], np.ones((2, 2))), "positive definite but is not"),
        (lambda: HotellingT2([0, 0], np.eye(3)), r"but have shapes \[2\] and \[3, 3\]"),
        (lambda: HotellingT2([0, 0], [[1, 0.5], [0, 1]]), "must be symmetric"),
        (lambda: HotellingT2([0, math.nan], np.eye(2)), "must be finite"),
        (lambda: HotellingT2([0, 0], np.eye(2), size=2), "size must be above the 2 coordinates but is 2"),
        (lambda: HotellingT2([0], [[1]]).update([1, 2]), r"must be \[n, 1\] but have shape \[1, 2\]"),
        (lambda: HotellingT2.from_baseline(np.ones((2, 2))), r"must be \[m, d\], m > d, but are \[2, 2\]"),
        (lambda: HotellingT2.from_baseline([[1.0], [math.nan]]), "have 1 rows that are not, the first at 1"),
        (lambda: HotellingT2.from_baseline(np.ones((9, 2))), "positive definite"),
    ],
)
def test_refusals(build, words):
    with pytest.raises(ValueError, match=words):
        build()
