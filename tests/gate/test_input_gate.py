"""The gate before a model, against NumPy row by row."""

import copy
import io
import json
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mlx_bulwark.gate import GateCounts, InputError, InputGate

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
NAN, INF = float("nan"), float("inf")
SMALL = ("Reshape", "Contiguous", "Squeeze", "Add", "Equal", "GreaterEqual", "LessEqual", "LogicalAnd")
VALUES = st.sampled_from([0.0, 0.25, 1.0, -0.001, 1.5, -1e30, 1e30, NAN, INF, -INF])


def faults(x, low, high):
    """What each row has, by NumPy."""
    rows = x.reshape(len(x), int(np.prod(x.shape[1:])))
    nan, inf = np.isnan(rows).any(axis=1), np.isinf(rows).any(axis=1)
    with np.errstate(invalid="ignore"):
        return nan, inf, (x < low).reshape(rows.shape).any(axis=1), (x > high).reshape(rows.shape).any(axis=1)


def counted(x, low, high, refused):
    return GateCounts(len(x), *(int(f.sum()) for f in faults(x, low, high)), int(refused))


def test_a_clean_batch_is_read_once_and_waited_for_once(monkeypatch):
    gate = InputGate([2, 3], mx.float32, (0, 1), model=lambda x: x + 1)
    x, graph, waits = mx.array(np.full((4, 2, 3), 0.5, np.float32)), io.StringIO(), []
    mx.export_to_dot(graph, gate._nothing_wrong(x), x=x)
    lines = graph.getvalue().splitlines()
    assert sum(line.startswith('"x" ->') for line in lines) == 1
    assert [line for line in lines if "label" in line and not _is_small(line)] == [
        line for line in lines if 'label ="column_stats"' in line
    ]

    class Verdict:
        def item(self):
            waits.append("verdict")
            return True

    monkeypatch.setattr(InputGate, "_nothing_wrong", lambda self, x: Verdict())
    monkeypatch.setattr(InputGate, "_faults", lambda self, x: waits.append("rows"))
    monkeypatch.setattr(mx, "eval", lambda *a: waits.append("eval"))
    gate(x)
    assert waits == ["verdict"]


def _is_small(line):
    """An op of a few numbers, or one that copies nothing."""
    return any(f'label ="{name}"' in line for name in SMALL)


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 9), st.just(2), st.just(3)), elements=VALUES))
def test_masks_and_counts_are_those_of_numpy(x):
    gate = InputGate([2, 3], mx.float32, (0, 1), policy="mask")
    output, valid = gate(mx.array(x))
    bad = np.logical_or.reduce(faults(x, 0, 1))
    np.testing.assert_array_equal(np.array(valid), ~bad)
    np.testing.assert_array_equal(np.array(output)[~bad], x[~bad])
    assert np.isnan(np.array(output)[bad]).all()
    assert gate.counts == counted(x, 0, 1, bad.sum())


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 9), st.just(3)), elements=VALUES))
def test_clipping_moves_to_the_nearest_bound_and_refuses_nan(x):
    gate = InputGate([3], mx.float32, (0, 1), policy="clip")
    lost = np.isnan(x).any(axis=1)
    if lost.any():
        with pytest.raises(InputError) as e:
            gate(mx.array(x))
        assert e.value.rows == np.flatnonzero(lost).tolist()
    else:
        np.testing.assert_array_equal(np.array(gate(mx.array(x))), np.clip(x, 0, 1))
    assert gate.counts == counted(x, 0, 1, lost.sum())


def test_raise_names_rows_and_reasons():
    gate = InputGate([2], mx.float32, (0, 1))
    x = np.full((7, 2), 0.5, np.float32)
    np.testing.assert_array_equal(np.array(gate(mx.array(x))), x)
    x[[1, 2, 4, 6], 0] = NAN, INF, -0.1, 1.1
    with pytest.raises(InputError, match=r"finite and in \[0, 1\] but 4 of 7 rows are not: row 1: NaN; row 2: an") as e:
        gate(mx.array(x))
    assert "row 4: below the bounds; and 1 further rows" in str(e.value)
    assert e.value.rows == [1, 2, 4, 6]
    assert gate.counts == GateCounts(14, 1, 1, 1, 2, 4)
    assert json.loads(gate.reset_counts().to_json())["refused"] == 4
    assert gate.counts == GateCounts()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_row_does_nothing_to_others_bit_for_bit(dtype, backend):
    mx.random.seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    model.set_dtype(dtype)
    gate = InputGate([8], dtype, (-1, 1), policy="mask", model=model)
    x = mx.random.uniform(-1, 1, (33, 8)).astype(dtype)
    clean = gate(x)
    assert clean.valid.all()
    spoiled = np.array(x.astype(mx.float32))
    for row, value in ((0, NAN), (5, INF), (17, 7.0), (32, -INF)):
        spoiled[row, row % 8] = value
    output, valid = gate(mx.array(spoiled).astype(dtype))
    good = np.array(valid)
    assert np.flatnonzero(~good).tolist() == [0, 5, 17, 32]
    bits = [np.array(o.view(mx.uint8)) for o in (output, clean.output)]
    np.testing.assert_array_equal(bits[0][good], bits[1][good])
    assert mx.isnan(output[mx.array([0, 5, 17, 32])]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_are_rounded_to_the_dtype(dtype):
    gate = InputGate([1], dtype, (0.1, 0.3))
    edge = mx.array([[0.1], [0.3]]).astype(dtype)
    assert mx.array_equal(gate(edge), edge)
    with pytest.raises(InputError):
        gate(mx.array([[0.1 * (1 - 2**-6)]]).astype(dtype))


@pytest.mark.parametrize("bounds", [(np.array([0, -1, 5]), np.array([1, 1, 6])), (mx.array([0.0, -1, 5]), None)])
def test_bounds_of_each_channel(bounds):
    low = np.array([0, -1, 5.0])
    high = np.array([1, 1, 6.0]) if bounds[1] is not None else INF
    gate = InputGate([None, 4, 3], mx.float32, bounds, policy="mask")
    x = np.random.default_rng(0).uniform(low, np.minimum(low + 1, high), (5, 2, 4, 3)).astype(np.float32)
    assert gate(mx.array(x)).valid.all()
    x[1, 0, 2, 2], x[3, 1, 0, 0], x[4, 0, 0, 1] = 4.9, 1.5, -1.2
    expected = ~np.logical_or.reduce(faults(x, low, high))
    assert expected.tolist() == [True, False, True, bounds[1] is None, False]
    assert np.array(gate(mx.array(x)).valid).tolist() == expected.tolist()


def test_clipping_to_bounds_of_each_channel_with_an_open_side():
    gate = InputGate([2], mx.float32, (mx.array([0.0, 5.0]), None), policy="clip")
    assert gate(mx.array([[-3.0, -INF]])).tolist() == [[0, 5]]
    with pytest.raises(InputError, match="row 0: an infinity"):
        gate(mx.array([[1.0, INF]]))
    assert gate.counts == GateCounts(2, 0, 2, 1, 0, 1)


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int32, mx.int64, mx.uint64])
def test_integers(dtype):
    gate = InputGate([None], dtype, (2, 9), policy="mask")
    output, valid = gate(mx.array([[2, 9], [1, 3], [3, 10]], dtype))
    assert valid.tolist() == [True, False, False]
    assert output.tolist() == [[2, 9], [2, 2], [2, 2]]
    assert InputGate([], dtype)(mx.array([3, 4], dtype)).tolist() == [3, 4]


def test_values_that_are_not_finite_pass_where_they_may():
    x = mx.array([[NAN], [INF], [-INF], [1.0]])
    gate = InputGate([1], mx.float32, (0, None), False, policy="mask")
    assert gate(x).valid.tolist() == [True, True, False, True]
    assert gate.counts == GateCounts(4, 1, 2, 1, 0, 1)
    assert InputGate([1], mx.float32)(mx.array([[1e38]])).item() == pytest.approx(1e38)
    with pytest.raises(InputError, match="x must be finite but 3 of 4"):
        InputGate([1], mx.float32)(x)


@pytest.mark.parametrize("policy", ["raise", "mask", "clip"])
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (mx.zeros((2, 28)), r"shape \[B, 28, any\] but has \[2, 28\]"),
        (mx.zeros((2, 27, 3)), r"shape \[B, 28, any\] but has \[2, 27, 3\]"),
        (mx.zeros((2, 28, 3), mx.float16), "dtype mlx.core.float32 but has mlx.core.float16"),
        (mx.zeros((2, 28, 3), mx.int32), "dtype"),
        (np.zeros((2, 28, 3), np.float32), "mlx array but is ndarray"),
        (mx.array(0.0), "shape"),
    ],
)
def test_wrong_shape_and_dtype_are_refused_always(policy, x, words):
    gate = InputGate([28, None], mx.float32, (0, 1), policy=policy)
    with pytest.raises(ValueError, match=words):
        gate(x)
    assert gate(mx.zeros((0, 28, 5))) is not None
    assert gate.counts == GateCounts()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shape": [0]}, "shape"),
        ({"shape": [2.0]}, "shape"),
        ({"dtype": mx.bool_}, "dtype"),
        ({"dtype": mx.complex64}, "dtype"),
        ({"bounds": (1, 0)}, "first exceeds"),
        ({"bounds": (NAN, 0)}, "finite"),
        ({"bounds": (0, 1e39)}, "within"),
        ({"bounds": (np.zeros(4), 1)}, "last axes"),
        ({"dtype": mx.uint8, "bounds": (0, 256)}, "integers that"),
        ({"dtype": mx.uint8, "bounds": (0.5, 3)}, "integers that"),
        ({"policy": "repair"}, "policy"),
        ({"model": 3}, "model"),
    ],
)
def test_settings_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=rf"\[InputGate\] .*{words}"):
        InputGate(**{"shape": [3], **arguments})


def test_it_is_a_layer():
    gate = InputGate([4], mx.float32, (0, 1))
    linear = nn.Linear(4, 2)
    model = nn.Sequential(gate, linear)
    x = mx.full((3, 4), 0.5)
    assert mx.array_equal(model(x), InputGate([4], mx.float32, (0, 1), model=linear)(x))
    assert not gate.parameters()
    assert mx.allclose(mx.grad(lambda x: model(x).sum())(x), linear.weight.sum(axis=0))
    assert copy.deepcopy(model).layers[0].counts.rows == 6
    assert len(mx.compile(linear)(gate(x))) == 3


def test_trees_of_outputs():
    gate = InputGate([1], policy="mask", model=lambda x: {"logits": x * 2, "class": mx.argmax(x, axis=1), "n": 3})
    output, valid = gate(mx.array([[NAN], [1.0]]))
    assert valid.tolist() == [False, True]
    assert np.isnan(output["logits"][0].item())
    assert output["logits"][1].item() == 2
    assert output["n"] == 3


def test_counts_over_threads_lose_nothing():
    gate = InputGate([2], mx.float32, (0, 1), policy="mask", model=lambda x: x)
    failures = []

    def serve():
        try:
            with mx.stream(mx.new_stream(mx.cpu)):
                for i in range(200):
                    gate(mx.array([[0.5, 0.5], [0.5, NAN if i % 2 else 2.0]]))
        except Exception as e:  # a thread's error is lost otherwise
            failures.append(e)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert gate.counts == GateCounts(1600, 400, 0, 0, 400, 800)


def test_inputs_that_are_not_contiguous():
    x = mx.array(np.random.default_rng(0).uniform(0, 1, (6, 5, 4)).astype(np.float32))
    gate = InputGate([2, 4], mx.float32, (0, 1))
    assert mx.array_equal(gate(x[::2, 1:5:2]), x[::2, 1:5:2])
    assert mx.array_equal(gate(x[:4, :2, ::-1]), x[:4, :2, ::-1])
