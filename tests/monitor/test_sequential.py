"""CUSUM and EWMA against their definitions, recomputed by plain loops; many streams against one chart each."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark.monitor import CUSUM, EWMA, NELSON, Chart, Shewhart, Streams, WesternElectric

CHARTS = {
    "nelson": lambda: Shewhart(0.1, 0.9, rules=NELSON),
    "limits": lambda: Shewhart(0.1, 0.9, limit=2.0),
    "western electric": lambda: WesternElectric(0.1, 0.9),
    "cusum": lambda: CUSUM(0.1, 0.9, h=2.5),
    "cusum head start": lambda: CUSUM(0.1, 0.9, h=2.5, head_start=0.5),
    "cusum below": lambda: CUSUM(0.1, 0.9, h=2.5, sides="below", restart=False),
    "ewma": lambda: EWMA(0.1, 0.9, limit=2.0),
    "ewma asymptotic": lambda: EWMA(0.1, 0.9, limit=1.5, exact=False),
    "ewma above": lambda: EWMA(0.1, 0.9, limit=1.5, sides="above", restart=False),
}
numbers = st.floats(-6, 6) | st.sampled_from([math.nan, math.inf, -math.inf, 0.1, 1e300, -1e300, 5e-324])
values = st.lists(numbers, max_size=60)


def naive_cusum(z, k, h, start, restart):
    """Indices and sides of the signals, each sum recomputed from the whole of what came since it was last 0."""
    found, since = [], 0
    for i in range(len(z)):
        up = down = start
        for v in z[since : i + 1]:
            up, down = max(0.0, up + v - k), max(0.0, down - v - k)
        sides = ["above"] * (up > h) + ["below"] * (down > h)
        found += [(i, side) for side in sides]
        if sides and restart:
            since = i + 1
    return found


def naive_ewma(z, weight, limit, exact, restart):
    found, since = [], 0
    for i in range(len(z)):
        run = z[since : i + 1]
        average = sum(weight * (1 - weight) ** (len(run) - 1 - j) * v for j, v in enumerate(run))
        bound = limit * math.sqrt(weight / (2 - weight) * (1 - (1 - weight) ** (2 * len(run)) if exact else 1))
        if abs(average) > bound:
            found.append((i, "above" if average > 0 else "below"))
            if restart:
                since = i + 1
    return found


def fired(signals):
    return [(s.index, o.side) for s in signals for o in (s, *s.others)]


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("head_start", [0.0, 0.5])
def test_cusum_is_its_definition(restart, head_start):
    z = np.random.default_rng(0).normal(0.2, 1.3, 600).tolist()
    chart = CUSUM(5.0, 2.0, k=0.5, h=3.0, head_start=head_start, restart=restart)
    signals = chart.update_many([5 + 2 * v for v in z])
    expected = naive_cusum(z, 0.5, 3.0, 3 * head_start, restart)
    assert fired(signals) == expected
    assert len(expected) > 20


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_ewma_is_its_definition(restart, exact):
    z = np.random.default_rng(1).normal(0.2, 1.3, 600).tolist()
    chart = EWMA(5.0, 2.0, weight=0.25, limit=2.0, exact=exact, restart=restart)
    expected = naive_ewma(z, 0.25, 2.0, exact, restart)
    signals = chart.update_many([5 + 2 * v for v in z])
    assert fired(signals) == expected
    assert len(expected) > 20
    if exact:
        s = signals[0]
        bound = 2.0 * math.sqrt(0.25 / 1.75 * (1 - 0.75 ** (2 * s.points)))
        assert abs(s.limit - 5) / 2 == pytest.approx(bound, rel=1e-12)


def test_cusum_of_a_textbook():
    # Montgomery, "Introduction to Statistical Quality Control", table 9.1 and 9.2: mean 10, sigma 1, K = 0.5, H = 5:
    # C+ passes 5 first at period 29, with 5.28, and N+ = 7.
    data = [9.45, 7.99, 9.29, 11.66, 12.16, 10.18, 8.04, 11.46, 9.20, 10.34, 9.03, 11.47, 10.51, 9.40, 10.08]
    data += [9.37, 10.62, 10.31, 8.52, 10.84, 10.90, 9.33, 12.29, 11.50, 10.60, 11.08, 10.38, 11.62, 11.31, 10.52]
    signal, *_ = CUSUM(10.0, 1.0, restart=False).update_many(data)
    assert (signal.index, signal.points, signal.side) == (28, 7, "above")
    assert signal.statistic == pytest.approx(5.28)


def test_ewma_of_a_textbook():
    # The same data with lambda 0.1 and L 2.7: Montgomery's table 9.10 passes its limits first at period 29, not at 28
    # with 10.4904; the average of period 1 is 9.945, and its limits are 9.73 and 10.27.
    chart = EWMA(10.0, 1.0, weight=0.1, limit=2.7)
    data = [9.45, 7.99, 9.29, 11.66, 12.16, 10.18, 8.04, 11.46, 9.20, 10.34, 9.03, 11.47, 10.51, 9.40, 10.08]
    data += [9.37, 10.62, 10.31, 8.52, 10.84, 10.90, 9.33, 12.29, 11.50, 10.60, 11.08, 10.38, 11.62, 11.31, 10.52]
    signal, *_ = chart.update_many(data)
    assert signal.index == 28
    assert signal.statistic > signal.limit


@pytest.mark.parametrize("name", CHARTS)
@given(x=values, cut=st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_split_anywhere_saved_and_loaded(name, x, cut):
    whole, first, single = CHARTS[name](), CHARTS[name](), CHARTS[name]()
    signals = first.update_many(x[:cut])
    second = Chart.from_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    signals += second.update_many(x[cut:])
    at_once = [s.to_json() for s in whole.update_many(x)]
    assert [s.to_json() for s in signals] == at_once
    assert [s.to_json() for s in map(single.update, x) if s] == at_once
    assert second.state() == whole.state() == single.state()


@pytest.mark.parametrize("name", CHARTS)
def test_a_long_series_in_many_pieces(name):
    x = np.random.default_rng(4).normal(size=400) * 1.4
    whole, chart, signals = CHARTS[name](), CHARTS[name](), []
    for piece in np.split(x, np.arange(1, 400, 7)):
        chart = Chart.from_state(json.loads(json.dumps(chart.state(), allow_nan=False)))
        signals += chart.update_many(piece)
    assert len(signals) > 10
    assert [s.to_json() for s in signals] == [s.to_json() for s in whole.update_many(x)]


@pytest.mark.parametrize("name", CHARTS)
@given(data=st.data(), streams=st.integers(1, 4), steps=st.integers(0, 40), cut=st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_streams_are_charts_side_by_side(name, data, streams, steps, cut):
    x = np.array(data.draw(st.lists(numbers, min_size=streams * steps, max_size=streams * steps)))
    x = x.reshape(steps, streams)
    center = np.array(data.draw(st.lists(st.floats(-1, 1), min_size=streams, max_size=streams)))
    sigma = np.array(data.draw(st.lists(st.floats(0.5, 2), min_size=streams, max_size=streams)))
    together = CHARTS[name]().streams(streams, center=center, sigma=sigma)
    found = [together.update_many(x[:cut])]
    together = Streams.from_state(json.loads(json.dumps(together.state(), allow_nan=False)))
    found.append(together.update_many(x[cut:]))
    got = sorted((int(v.stream[i]), int(v.index[i]), rule) for v in found for i in range(len(v)) for rule in v.rules(i))
    expected = []
    for j in range(streams):
        parameters = CHARTS[name]()._parameters() | {"center": float(center[j]), "sigma": float(sigma[j])}
        signals = type(CHARTS[name]())(**parameters).update_many(x[:, j])
        expected += [(j, s.index, o.rule) for s in signals for o in (s, *s.others)]
    assert got == sorted(expected)


def test_streams_come_in_pieces_of_any_length(monkeypatch):
    x = np.random.default_rng(2).normal(size=(1000, 3)) * 1.5
    for name, chart in CHARTS.items():
        whole = chart().streams(3).update_many(x)
        monkeypatch.setattr("mlx_bulwark.monitor.location.AT_ONCE", 100)
        pieces = chart().streams(3).update_many(x)
        monkeypatch.undo()
        assert len(whole) > 10, name
        for field in ("index", "stream", "flags"):
            assert getattr(whole, field).tolist() == getattr(pieces, field).tolist(), name


def test_what_is_not_finite_never_poisons_a_chart():
    clean = np.random.default_rng(3).normal(size=400) * 1.5
    holes = np.insert(clean, np.repeat([0, 5, 100, 399], 3), [math.nan, math.inf, -math.inf] * 4)
    for name, chart in CHARTS.items():
        one, other = chart(), chart()
        signals = other.update_many(holes)
        assert sum(s.rule == "not finite" for s in signals) == 12, name
        kept = [(s.value, s.rule, s.statistic) for s in signals if s.rule != "not finite"]
        assert kept == [(s.value, s.rule, s.statistic) for s in one.update_many(clean)], name
        assert one._memory() == other._memory()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: CUSUM(0, 0), "sigma must be above 0 but is 0"),
        (lambda: CUSUM(math.nan, 1), "center must be finite but is nan"),
        (lambda: CUSUM(0, 1, sides="left"), "sides must be one of both, above, below but is 'left'"),
        (lambda: CUSUM(0, 1, head_start=1), "head_start below 1"),
        (lambda: EWMA(0, 1, weight=1.5), "weight must be at most 1 but is 1.5"),
        (lambda: Shewhart(0, 1, rules=(0,)), r"rules must be some of \[1, 2, 3, 4, 5, 6, 7, 8\] but are \[0\]"),
        (lambda: WesternElectric(0, 1, rules=(5,)), r"rules must be some of \[1, 2, 3, 4\] but are \[5\]"),
        (lambda: CUSUM(0, 1).update("x"), "value must be a number but is 'x'"),
        (lambda: CUSUM(0, 1).update_many([[1]]), r"values must be \[n\] but have shape \[1, 1\]"),
        (lambda: CUSUM(0, 1).streams(2).update_many([[1]]), r"values must be \[n, 2\] but have shape \[1, 1\]"),
        (lambda: CUSUM(0, 1).streams(2, sigma=[1, 0]), "sigma must be above 0 but has 0"),
        (lambda: EWMA.from_state(CUSUM(0, 1).state()), "state must be of a EWMA but is of a CUSUM"),
        (lambda: Chart.from_state({"kind": "other"}), "state must be that of a chart but has 'other'"),
        (
            lambda: Shewhart.from_baseline([1.0, math.nan]),
            "values must be finite but have 1 that are not, the first at 1",
        ),
        (lambda: Shewhart.from_baseline([1.0, 1.0]), "their moving range gives a sigma of 0"),
        (lambda: Shewhart.from_baseline([1.0]), r"values must be \[n\] with n >= 2"),
    ],
)
def test_refusals(build, words):
    with pytest.raises(ValueError, match=words):
        build()
