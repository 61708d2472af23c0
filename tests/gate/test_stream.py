"""Guards of running pipelines, and of augmentations."""

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from mlx_bulwark import gate
from mlx_bulwark.gate import Field, GateError, Schema, Series, read_quarantine

UNIT = Schema(fields={"x": Field(low=0, high=1)})


def test_rows_are_counted_from_the_beginning(tmp_path):
    batches = [np.array([0.1, 0.2]), np.array([5.0, 0.3]), np.array([7.0, 8.0]), np.array([0.4])]
    guarded = gate.stream(batches, UNIT, policy="drop", quarantine=tmp_path / "q.jsonl")
    assert [b.tolist() for b in guarded] == [[0.1, 0.2], [0.3], [0.4]]
    assert [d.row for d in read_quarantine(tmp_path / "q.jsonl")] == [2, 4, 5]
    assert (guarded.report.rows, guarded.report.dropped, guarded.report.counts["range"]) == (7, 3, 3)
    assert [r.rows for r in guarded.report.findings] == [(2, 4, 5)]


def test_a_bad_batch_is_not_given_out():
    guarded = gate.stream([np.array([0.5]), np.array([2.0])], UNIT)
    next(guarded)
    with pytest.raises(GateError, match="first in row 0"):
        next(guarded)
    assert guarded.report.counts["range"] == 1


def test_copies_and_time_go_across_batches():
    schema = Schema(duplicates=0.0, duplicate_fields=("x",), series=Series(time="t", group="g", max_gap=2))
    first = {"x": np.array([1, 2, 3]), "t": np.array([1, 1, 2]), "g": np.array(["a", "b", "a"], object)}
    second = {"x": np.array([3, 4, 5]), "t": np.array([2, 9, 3]), "g": np.array(["a", "b", "a"], object)}
    guarded = gate.stream([first, second], schema, policy="report")
    assert len(list(guarded)) == 2
    counts = guarded.report.counts
    assert (counts["duplicates"], counts["time_order"], counts["time_gap"]) == (1, 1, 1)


def test_copies_are_forgotten_beyond_what_is_remembered():
    schema = Schema(duplicates=0.0)
    batches = [np.arange(i, i + 10) for i in (0, 10, 20, 0)]
    for remember, found in ((100, 10), (15, 0)):
        guarded = gate.stream(batches, schema, policy="report", remember=remember)
        list(guarded)
        assert guarded.report.counts["duplicates"] == found


def test_truncated_streams():
    schema = Schema(rows=(10, 20))
    with pytest.raises(GateError, match="has 9"):
        list(gate.stream([np.zeros(4), np.zeros(5)], schema))
    assert len(list(gate.stream([np.zeros(4), np.zeros(6)], schema))) == 2


def test_memory_is_bounded():
    schema = Schema(fields={"x": Field(low=0, high=1)}, duplicates=1.0)
    rng = np.random.default_rng(0)

    def consume(batches):
        tracemalloc.start()
        for _ in gate.stream((rng.random((512, 4)) for _ in range(batches)), schema, remember=2000):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    consume(3)
    assert consume(200) < 1.2 * consume(20)


def test_datasets_are_gone_through_again():
    data = gate.dataset([np.array([0.5]), np.array([1.0])], UNIT)
    assert len(data) == 2
    for _ in range(2):
        assert len(list(data)) == 2
        assert data.report.rows == 2


class Stream:
    """As a stream of mlx.data: gives samples once, until it is reset."""

    def __init__(self, samples):
        self.samples, self.at = samples, 0

    def reset(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(self.samples):
            raise StopIteration
        self.at += 1
        return self.samples[self.at - 1]


def test_streams_are_reset():
    samples = [{"image": np.full((2, 2), v, np.uint8), "label": np.array(i)} for i, v in enumerate((1, 2, 3))]
    schema = Schema(fields={"image": Field(dtype="uint8", shape=(2, 2)), "label": Field(values=(0, 1))})
    data = gate.dataset(Stream(samples), schema, policy="report", sample_batch=2)
    for _ in range(2):
        assert [int(s["label"]) for s in data] == [0, 1, 2]
        assert data.report.counts["values"] == 1


def test_mlx_data():
    dx = pytest.importorskip("mlx.data")
    samples = [{"image": np.full((2, 2), i, np.uint8), "label": i} for i in range(10)]
    schema = Schema(fields={"image": Field(dtype="uint8", shape=(2, 2)), "label": Field(low=0, high=8)})
    data = gate.dataset(dx.buffer_from_vector(samples).batch(5), schema, policy="report")
    assert [len(b["image"]) for b in data] == [5, 5]
    assert data.report.counts["range"] == 1
    data = gate.dataset(dx.buffer_from_vector(samples).to_stream(), schema, policy="report", sample_batch=4)
    for _ in range(2):
        assert len(list(data)) == 10
        assert data.report.counts["range"] == 1


X, Y = np.random.default_rng(0).random((64, 8)), np.arange(64) % 2
LABELLED = Schema(fields={"x": Field(low=0, high=1, shape=(8,)), "y": Field(values=(0, 1))})


def shifted(x, y):
    return np.clip(x + 0.001 * np.random.default_rng().normal(size=x.shape), 0, 1), y


def relabelling(x, y):
    return x, 1 - y


def writing(x, y):
    x *= 0.99
    return x, y


AUGMENTATIONS = [
    ("range", lambda x, y: (x + 1, y), "range"),
    ("shape", lambda x, y: (x[:, 1:], y), "shape"),
    ("NaN", lambda x, y: (np.where(x > 0.9, np.nan, x), y), "missing"),
    ("label", relabelling, "labels"),
    ("drift", lambda x, y: (x * 0.01, y), "augmentation_drift"),
    ("unseeded draws", shifted, "determinism"),
    ("writes into its input", writing, "in_place"),
]


@pytest.mark.parametrize(("function", "rule"), [a[1:] for a in AUGMENTATIONS], ids=[a[0] for a in AUGMENTATIONS])
def test_wrong_augmentations_are_found(function, rule):
    guarded = gate.augmentation(function, LABELLED)
    with pytest.raises(GateError) as e:
        guarded(X.copy(), Y)
    assert e.value.report.counts[rule] > 0
    assert guarded.before.ok


def test_seeded_draws_pass_and_differ_from_call_to_call():
    def noisy(x, y):
        noise = 0.01 * mx.random.normal(x.shape) + mx.array(0.01 * np.random.normal(size=x.shape))
        return mx.clip(x + noise, 0, 1), y

    guarded = gate.augmentation(noisy, LABELLED)
    x, y = mx.array(X.astype(np.float32)), mx.array(Y)
    first, _ = guarded(x, y)
    second, _ = guarded(x, y)
    assert guarded.after.ok
    assert not mx.array_equal(first, second)


def test_bad_input_of_an_augmentation():
    guarded = gate.augmentation(lambda x, y: (x, y), LABELLED)
    with pytest.raises(GateError, match="x must lie"):
        guarded(X + 1, Y)
