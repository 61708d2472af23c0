"""Shewhart charts against the rules' definitions, recomputed over the whole history by plain loops."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark.monitor import NELSON, Chart, Shewhart, Signal, WesternElectric

RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
TURNS = [0.5, 0.6] * 7
# rule, points whose last one breaks it, points that come close
MADE = [
    (1, [0.0, 3.01], [0.0, 3.0]),
    (2, [0.1] * 9, [0.1] * 8 + [0.0]),
    (2, [0.1] * 9, [0.1] * 4 + [-0.1] + [0.1] * 8),
    (3, RISING, [*RISING[:5], 0.5]),
    (3, [0.7, *RISING], [0.7, *RISING[:5]]),
    (4, TURNS, [*TURNS[:-1], 0.5]),
    (4, [0.1, *TURNS], [*TURNS[:7], *TURNS[6:13]]),
    (5, [2.1, 0.0, 2.1], [2.1, 0.0, 0.0, 2.1]),
    (5, [0.0, 2.1, 2.1], [2.1, 0.0, -2.1]),
    (5, [2.5, 2.5], [2.0, 2.5]),
    (6, [1.1, 1.1, 0.0, 1.1, 1.1], [1.1, 1.1, 0.0, 1.1, 0.9, 1.1]),
    (6, [1.1] * 4, [1.1, 1.1, 1.1, 1.0, 1.0]),
    (6, [1.1] * 4, [1.1, 1.1, 1.1, -1.1, -1.1]),
    (7, [0.9, -0.9, 0.0] * 5, [0.9, -0.9] * 7 + [1.01]),
    (8, [1.1, -1.1] * 4, [1.1, -1.1] * 3 + [1.0, 1.1]),
    (8, [1.1] * 7 + [-1.1], [1.1] * 8),
]


def naive(rule, z):
    """Whether the newest of the points, in sigmas from the centre, breaks a rule: its definition, word by word."""
    new = z[-1]
    sides = [z, [-v for v in z]]
    if rule == 1:
        return abs(new) > 3
    if rule == 2:
        return len(z) >= 9 and any(all(v > 0 for v in s[-9:]) for s in sides)
    if rule == 3:
        return len(z) >= 6 and any(all(s[-i - 1] > s[-i - 2] for i in range(5)) for s in sides)
    if rule == 4:
        if len(z) < 14:
            return False
        steps = [b - a for a, b in zip(z[-14:-1], z[-13:], strict=True)]
        return all(a * b < 0 for a, b in itertools.pairwise(steps))
    if rule == 5:
        return any(s[-1] > 2 and sum(v > 2 for v in s[-3:]) >= 2 for s in sides)
    if rule == 6:
        return any(s[-1] > 1 and sum(v > 1 for v in s[-5:]) >= 4 for s in sides)
    if rule == 7:
        return len(z) >= 15 and all(abs(v) <= 1 for v in z[-15:])
    last = z[-8:]
    return len(last) == 8 and all(abs(v) > 1 for v in last) and any(v > 0 for v in last) and any(v < 0 for v in last)


def fired(signals):
    return [(s.index, rule) for s in signals for rule in sorted(o.rule for o in (s, *s.others))]


def expected(values, rules=NELSON):
    found, kept = [], []
    for i, v in enumerate(values):
        if not math.isfinite(v):
            found.append((i, "not finite"))
            continue
        kept.append(v)
        found += [(i, f"nelson {rule}") for rule in rules if naive(rule, kept)]
    return found


@pytest.mark.parametrize("flip", [1, -1])
@pytest.mark.parametrize(("rule", "breaks", "close"), MADE)
def test_a_rule_fires_at_its_point_and_not_one_earlier(rule, breaks, close, flip):
    chart = Shewhart(center=10.0, sigma=0.5, rules=(rule,))
    signals = [chart.update(10 + 0.5 * flip * z) for z in breaks]
    assert signals[:-1] == [None] * (len(breaks) - 1)
    assert signals[-1].rule == f"nelson {rule}"
    assert (signals[-1].index, signals[-1].value) == (len(breaks) - 1, 10 + 0.5 * flip * breaks[-1])
    assert chart.fresh().update_many([10 + 0.5 * flip * z for z in close]) == []
    near = chart.fresh()
    assert [near.update(10 + 0.5 * flip * z) for z in close] == [None] * len(close)


values = st.lists(
    st.sampled_from([0.0, 0.5, -0.5, 0.75, 1.0, 1.5, -1.5, 2.0, 2.5, -2.5, 3.0, -3.5, math.nan, math.inf])
    | st.floats(-4, 4),
    max_size=60,
)


@given(values)
@settings(max_examples=300, deadline=None)
def test_signals_are_those_of_the_definitions(z):
    one_by_one = Shewhart(0.0, 1.0, rules=NELSON)
    assert fired(Shewhart(0.0, 1.0, rules=NELSON).update_many(z)) == expected(z)
    assert fired([s for s in map(one_by_one.update, z) if s]) == expected(z)


@given(values, st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_a_chart_that_was_saved_goes_on(z, cut):
    whole, first = Shewhart(0.1, 0.9, rules=NELSON), Shewhart(0.1, 0.9, rules=NELSON)
    signals = first.update_many(z[:cut])
    second = Chart.from_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    signals += second.update_many(z[cut:])
    assert [s.to_json() for s in signals] == [s.to_json() for s in whole.update_many(z)]
    assert second.state() == whole.state()


def test_words():
    chart = Shewhart(0.0, 1.0, rules=NELSON)
    (signal,) = chart.update_many([2.5, 3.5])
    assert isinstance(signal, Signal)
    assert str(signal) == "value 1 is 3.5: above the limit of 3 (3 sigma)"
    assert [o.message for o in signal.others] == ["value 1 is 3.5: 2 of the last 3 points are above 2 (2 sigma)"]
    assert chart.update(math.nan).message == "value 2 is not a number"


@given(values)
@settings(max_examples=200, deadline=None)
def test_western_electric_is_four_of_them_with_a_run_of_8(z):
    found, kept = [], []
    for i, v in enumerate(z):
        if not math.isfinite(v):
            found.append((i, "not finite"))
            continue
        kept.append(v)
        run = len(kept) >= 8 and (min(kept[-8:]) > 0 or max(kept[-8:]) < 0)
        broken = [naive(1, kept), naive(5, kept), naive(6, kept), run]
        found += [(i, f"western electric {rule}") for rule, holds in enumerate(broken, 1) if holds]
    assert fired(WesternElectric(0.0, 1.0).update_many(z)) == found
