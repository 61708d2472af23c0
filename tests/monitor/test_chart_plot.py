"""Pictures of charts: they show every point that is out of control, and are the same each time."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from mlx_bulwark.monitor import CUSUM, EWMA, NELSON, ClassChart, HotellingT2, PChart, Shewhart, WesternElectric

pytest.importorskip("matplotlib")
RNG = np.random.default_rng(0)
X = np.append(RNG.normal(size=60), [math.nan, 4.0, 3.5, -5.0, -4.0])
PICTURES = {
    "shewhart": (Shewhart(0.0, 1.0, rules=NELSON), X),
    "western electric": (WesternElectric(0.0, 1.0), X),
    "cusum": (CUSUM(0.0, 1.0), X),
    "cusum below": (CUSUM(0.0, 1.0, sides="below", restart=False), X),
    "ewma": (EWMA(0.0, 1.0), X),
    "p": (PChart(0.9), [(90, 100), (0, 0), (170, 200), (70, 100), (math.nan, 3)]),
    "t2": (HotellingT2([0, 0], np.eye(2)), np.append(RNG.normal(size=(30, 2)), [[5, 5], [math.nan, 0]], axis=0)),
}


def panel(chart, values):
    (found,) = chart.fresh()._panels(values)
    return found


@pytest.mark.parametrize("name", PICTURES)
def test_marks_are_the_signals(name):
    chart, values = PICTURES[name]
    signals = chart.fresh().update_many(values)
    found = panel(chart, values)
    assert {i for i, _ in found.marks} == {s.index for s in signals if s.rule != "not finite"}
    assert found.missing == [s.index for s in signals if s.rule == "not finite"]
    assert found.marks
    assert found.missing
    heights = {i: {float(c[i]) for c in found.curves.values()} for i, _ in found.marks}
    assert all(height in heights[i] for i, height in found.marks)


@pytest.mark.parametrize("name", ["cusum", "ewma", "p", "t2"])
def test_a_point_is_marked_where_it_leaves_the_limits(name):
    chart, values = PICTURES[name]
    found = panel(chart, values)
    curves = list(found.curves.values())[: 2 if name == "cusum" else 1]
    lower = found.lower if found.lower is not None else np.full(len(found.upper), -np.inf)
    outside = {i for c in curves for i in np.flatnonzero((c < lower) | (c > found.upper)).tolist()}
    assert outside == {i for i, _ in found.marks}


@pytest.mark.parametrize("name", PICTURES)
def test_svg(name):
    chart, values = PICTURES[name]
    count = chart.count
    text = chart.plot(values, title="Accuracy & <more>")
    assert chart.count == count
    words = " ".join(ElementTree.fromstring(text).itertext())
    assert "Accuracy & <more>" in words
    assert "out of control: " in words
    assert "not finite: 1" in words
    assert text == chart.plot(values, title="Accuracy & <more>")


def test_panels_of_classes():
    matrices = np.tile([[48, 2], [3, 47]], (5, 1, 1))
    matrices[3] = [[30, 20], [3, 47]]
    chart = ClassChart([0.96, 0.94], [0.94, 0.96], names=["cat", "dog"])
    recall, precision = chart.fresh()._panels(matrices)
    assert recall.marks == [(3, 0.6)]
    assert precision.marks == [(3, 47 / 67)]
    assert "class cat" in chart.plot(matrices)


def test_files(tmp_path):
    chart = Shewhart(0.0, 1.0)
    assert chart.plot(X, tmp_path / "a.png") is None
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    chart.plot(X, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == chart.plot(X)
    assert len(chart.plot(np.zeros(20_000))) < 200_000
    chart.plot([])
    with pytest.raises(ValueError, match=r"path must end in .svg or .png but is"):
        chart.plot(X, tmp_path / "a.pdf")
