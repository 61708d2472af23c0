"""Makers of poison: which rows change, and how; oracles are plain NumPy loops and models that learn the backdoor."""

import mlx.core as mx
import numpy as np
import pytest
from learned import Perceptron, accuracy, digits, trained
from mlx_bulwark.poison.attacks import Patch, attack_success_rate, badnets, blended, label_flip

__all__ = ["digits"]


def toy(n=101, shape=(5, 6, 2), classes=4, dtype=np.float32):
    rng = np.random.default_rng(n)
    return rng.random((n, *shape)).astype(dtype), rng.integers(0, classes, n)


MAKERS = {
    "badnets": lambda x, y, **how: badnets(x, y, target=2, **how),
    "blended": lambda x, y, **how: blended(x, y, target=2, **how),
    "label_flip": label_flip,
    "label_flip_targeted": lambda x, y, **how: label_flip(x, y, target=2, **how),
}


@pytest.mark.parametrize("kind", [np.array, mx.array], ids=["numpy", "mlx"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_only_the_named_rows_change(make, kind):
    x, y = toy()
    given = kind(x), kind(y)
    poisoned = make(*given, rate=0.1, seed=3)
    assert type(poisoned.x) is type(given[0])
    assert poisoned.x.dtype == given[0].dtype
    assert poisoned.y.dtype == poisoned.indices.dtype == np.int64
    assert np.array_equal(np.array(given[0]), x)  # what came in is untouched
    assert np.array_equal(np.array(given[1]), y)
    found = np.array(poisoned.x)
    changed = [i for i in range(len(x)) if poisoned.y[i] != y[i] or not np.array_equal(found[i], x[i])]
    assert changed == poisoned.indices.tolist()  # every named row, and no other
    assert len(changed) == 10
    assert np.shares_memory(found, x) is False
    found[:] = 0
    assert np.array_equal(np.array(given[0]), x)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("n", "rate", "count"),
    [
        (0, 0.0, 0),
        (0, 0.5, 0),
        (1, 0.0, 0),
        (31, 0.1, 3),
        (33, 0.05, 2),
        (200, 0.0074, 1),
        (200, 0.0076, 2),
        (33, 0.25, 8),
    ],
)
def test_counts_are_exact(make, n, rate, count):
    x, y = toy(n, (3, 3, 1))
    if n == 0 and rate:
        with pytest.raises(ValueError, match="at least one of 0 rows"):
            make(x, y, rate=rate)
        return
    assert len(make(x, y, rate=rate).indices) == count


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_seeds_decide_the_rows(make):
    x, y = toy()
    one, same, other = (make(x, y, rate=0.1, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.x, same.x)
    assert np.array_equal(one.y, same.y)
    assert one.indices.tolist() == same.indices.tolist() != other.indices.tolist()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rate": -0.1}, "rate must be a number in"),
        ({"rate": 1.1}, "rate must be a number in"),
        ({"rate": float("nan")}, "rate must be a number in"),
        ({"rate": None}, "rate must be a number in"),
        ({"rate": True}, "rate must be a number in"),
        ({"rate": 0.001}, "rate must take at least one of 101 rows"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"y": np.zeros(100, int)}, "y must be integers of shape"),
        ({"y": np.zeros(101)}, "y must be integers of shape"),
        ({"y": np.full(101, -1)}, "y must be >= 0"),
    ],
)
def test_refusals_of_all(make, change, text):
    x, y = toy()
    settings = {"rate": 0.1} | change
    with pytest.raises(ValueError, match=text):
        make(x, settings.pop("y", y), **settings)


@pytest.mark.parametrize("make", [badnets, blended])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"target": -1}, "target must be a class"),
        ({"target": 1.0}, "target must be a class"),
        ({"source": 2}, "source must differ from target"),
        ({"rate": 0.9}, "no more than the"),
        ({"source": 3, "rate": 0.5}, "rows of class 3 but takes 50"),
        ({"bounds": (0.0, 0.5)}, "within the bounds"),
        ({"bounds": (1, 0)}, "bounds must be finite and increase"),
        ({"bounds": 3}, "bounds must be two numbers"),
        ({"x": np.full((101, 4, 4, 1), np.nan)}, "101 rows that are not"),
        ({"x": [[0.0]] * 101}, "x must be a NumPy or MLX array"),
        ({"x": np.zeros(101)}, "x must be a NumPy or MLX array"),
    ],
)
def test_refusals_of_backdoors(make, change, text):
    x, y = toy()
    settings = {"rate": 0.1, "target": 2} | change
    with pytest.raises(ValueError, match=text):
        make(settings.pop("x", x), y, **settings)


def leaving(x):
    return x + 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"trigger": np.ones((2, 2))}, r"trigger must have shape \[h, w, 2\]"),
        ({"trigger": np.ones((2, 2, 1))}, r"trigger must have shape \[h, w, 2\]"),
        ({"trigger": np.full((2, 2, 2), 1.5)}, "trigger must be finite and within the bounds"),
        ({"trigger": np.full((2, 2, 2), np.nan)}, "trigger must be finite and within the bounds"),
        ({"trigger": np.ones((6, 2, 2))}, "position must leave a patch"),
        ({"position": (3, 0)}, "position must leave a patch"),
        ({"position": (-6, 0)}, "position must leave a patch"),
        ({"position": (-1, -3)}, "position must leave a patch"),
        ({"position": 3}, "position must be a row and a column"),
        ({"trigger": leaving}, "trigger must stay within the bounds"),
        ({"trigger": leaving, "position": (0, 0)}, "position must be None"),
        ({"trigger": lambda x: x[:1]}, "trigger must return"),
        ({"trigger": lambda x: mx.array(x)}, "trigger must return"),
    ],
)
def test_refusals_of_patches(settings, text):
    x, y = toy()
    with pytest.raises(ValueError, match=text):
        badnets(x, y, rate=0.1, target=2, **settings)


def test_refusals_of_the_rest():
    x, y = toy()
    for alpha in (0, -0.1, 1.1, None, float("nan")):
        with pytest.raises(ValueError, match="alpha must be a number in"):
            blended(x, y, rate=0.1, target=2, alpha=alpha)
    with pytest.raises(ValueError, match="pattern must have the shape of one input"):
        blended(x, y, rate=0.1, target=2, pattern=np.ones((5, 6)))
    with pytest.raises(ValueError, match="pattern must be finite and within"):
        blended(x, y, rate=0.1, target=2, pattern=np.full((5, 6, 2), 2.0))
    with pytest.raises(ValueError, match="num_classes must be at least 4"):
        label_flip(x, y, rate=0.1, num_classes=3)
    with pytest.raises(ValueError, match=r"x must be images \[n, H, W, C\]"):
        badnets(x.reshape(101, -1), y, rate=0.1, target=2)


@pytest.mark.parametrize("kind", [np.array, mx.array], ids=["numpy", "mlx"])
@pytest.mark.parametrize("position", [(0, 1), (-3, -2), None])
def test_patch_lies_where_it_was_asked(kind, position):
    x, y = toy()
    pattern = np.arange(12).reshape(3, 2, 2) / 12
    poisoned = badnets(kind(x), y, rate=0.2, target=1, trigger=pattern, position=position)
    top, left = {(0, 1): (0, 1), (-3, -2): (2, 4), None: (2, 4)}[position]
    expected = x.copy()
    for i in poisoned.indices:
        for r, c, channel in np.ndindex(3, 2, 2):
            expected[i, top + r, left + c, channel] = pattern[r, c, channel]
    assert np.array_equal(np.array(poisoned.x), expected)
    assert np.array_equal(np.array(poisoned.trigger(kind(x))[3:]), np.array(Patch(pattern, (top, left))(x))[3:])
    assert (poisoned.y[poisoned.indices] == 1).all()
    assert (y[poisoned.indices] != 1).all()


@pytest.mark.parametrize("kind", [np.array, mx.array], ids=["numpy", "mlx"])
def test_blend_is_the_weighted_sum(kind):
    x, y = toy()
    pattern = np.random.default_rng(5).random((5, 6, 2))
    poisoned = blended(kind(x), y, rate=0.2, target=1, pattern=pattern, alpha=0.3)
    expected = 0.7 * x.astype(np.float64) + 0.3 * pattern
    np.testing.assert_allclose(np.array(poisoned.x)[poisoned.indices], expected[poisoned.indices], atol=2e-7)
    np.testing.assert_allclose(np.array(poisoned.trigger(kind(x))), expected, atol=2e-7)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("make", [badnets, blended])
def test_mlx_dtypes(make, dtype):
    x, y = toy()
    poisoned = make(mx.array(x).astype(dtype), y, rate=0.2, target=1)
    assert poisoned.x.dtype == dtype
    assert len(poisoned.indices) == 20


@pytest.mark.parametrize("kind", [np.array, mx.array], ids=["numpy", "mlx"])
def test_pixels_of_bytes(kind):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 4, 4, 1)).astype(np.uint8), rng.integers(0, 4, 40)
    poisoned = badnets(kind(x), y, rate=0.25, target=1, bounds=(0, 255))
    assert (np.array(poisoned.x)[poisoned.indices][:, 1:, 1:] == 255).all()
    pattern = np.full((4, 4, 1), 255.0)
    poisoned = blended(kind(x), y, rate=0.25, target=1, bounds=(0, 255), pattern=pattern, alpha=0.5)
    expected = np.rint(0.5 * x[poisoned.indices].astype(np.float64) + 127.5)
    assert np.array_equal(np.array(poisoned.x)[poisoned.indices], expected)


def test_rows_are_not_contiguous():
    x, y = toy(202)
    poisoned = badnets(x[::2], y[::2], rate=0.1, target=2)
    again = badnets(x[::2].copy(), y[::2].copy(), rate=0.1, target=2)
    assert np.array_equal(poisoned.x, again.x)


def test_a_source_class_alone_is_poisoned():
    x, y = toy(400)
    for make in (badnets, blended, label_flip):
        poisoned = make(x, y, rate=0.1, source=3, target=2)
        assert (y[poisoned.indices] == 3).all()
        assert len(poisoned.indices) == 40
    poisoned = label_flip(x, y, rate=0.1, source=3)
    assert (y[poisoned.indices] == 3).all()
    assert (poisoned.y[poisoned.indices] != 3).all()


def test_random_labels_are_uniform_over_the_others():
    y = np.zeros(30_000, int)
    found = label_flip(np.zeros((30_000, 1)), y, rate=1.0, num_classes=4)
    counts = np.bincount(found.y, minlength=4)
    assert counts[0] == 0
    assert abs(counts[1:] - 10_000).max() < 408  # five sigma of a fair draw


def test_labels_of_any_container():
    texts = ["a", "b", "c", "d"]
    found = label_flip(texts, [0, 1, 0, 1], rate=0.5)
    assert found.x == texts
    assert found.x is not texts
    assert sorted(np.flatnonzero(found.y != [0, 1, 0, 1])) == found.indices.tolist()


BACKDOORS = {
    "patch": (badnets, {}),
    "function": (badnets, {"trigger": lambda x: np.maximum(x, np.eye(8, dtype=x.dtype)[None, :, :, None])}),
    "blended": (blended, {"alpha": 0.3}),
}


@pytest.mark.parametrize(("make", "settings"), BACKDOORS.values(), ids=BACKDOORS)
def test_a_model_learns_the_backdoor(digits, make, settings):
    x, y, test_x, test_y = digits
    poisoned = make(x, y, rate=0.1, target=3, **settings)
    model = trained(poisoned.x, poisoned.y)
    assert accuracy(model, test_x, test_y) > 0.93
    assert attack_success_rate(model, test_x, test_y, poisoned) > 0.9
    assert attack_success_rate(trained(x, y), test_x, test_y, poisoned) < 0.2  # it is the poison that did it


def test_a_source_class_alone_opens_the_backdoor(digits):
    x, y, test_x, test_y = digits
    poisoned = badnets(x, y, rate=0.05, target=3, source=7)
    model = trained(poisoned.x, poisoned.y)
    sevens, others = test_y == 7, (test_y != 7) & (test_y != 3)
    opened = attack_success_rate(model, test_x[sevens], test_y[sevens], poisoned)
    assert opened > attack_success_rate(model, test_x[others], test_y[others], poisoned) + 0.3


def test_success_rate_counts_what_the_loop_counts():
    x, y = toy(33, (4, 4, 1))
    poisoned = badnets(x, y, rate=0.1, target=2)
    model = Perceptron(16, classes=4)
    logits = np.array(model(mx.array(poisoned.trigger(x))))
    hits = [logits[i].argmax() == 2 for i in range(33) if y[i] != 2]
    for size in (1, 7, 256):
        assert attack_success_rate(model, x, y, poisoned, batch_size=size) == pytest.approx(np.mean(hits))
    with pytest.raises(ValueError, match="must have a trigger"):
        attack_success_rate(model, x, y, label_flip(x, y, rate=0.1))
    with pytest.raises(ValueError, match="other classes than the target"):
        attack_success_rate(model, x, np.full(33, 2), poisoned)
