"""STRIP: entropies against a plain loop, its rate of false alarms, and triggered inputs found."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from backdoored import digits, trained
from mlx_bulwark.poison import STRIP
from scipy.special import softmax
from scipy.stats import entropy

WEIGHTS = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32) * 3


def linear(x):
    return x @ mx.array(WEIGHTS)


def uniform(n, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (n, 6)).astype(np.float32)


@pytest.mark.parametrize("blend", ["sum", "mean"])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_entropy_is_over_classes_and_averaged_over_overlays(blend, batch_size):
    clean, x = uniform(31), uniform(5, 1)
    strip = STRIP(linear, clean, n=12, false_rejection_rate=0.1, blend=blend, batch_size=batch_size)
    found = strip.entropy(x)
    overlays = clean[np.random.default_rng(0).permutation(31)[:12]].astype(np.float64)
    for row, value in zip(x.astype(np.float64), found, strict=True):
        blends = [np.minimum(row + o, 1) if blend == "sum" else (row + o) / 2 for o in overlays]
        wanted = np.mean([entropy(softmax(b @ WEIGHTS.astype(np.float64))) for b in blends])
        assert value == pytest.approx(wanted, rel=1e-5)


def test_sum_is_taken_from_the_lower_bound():
    clean = uniform(31) * 2 - 1
    strip = STRIP(linear, clean, n=3, false_rejection_rate=0.1, bounds=(-1, 1))
    overlays = clean[np.random.default_rng(0).permutation(31)[:3]]
    dark = np.full((1, 6), -1, np.float32)  # the darkest input adds nothing
    wanted = np.mean([entropy(softmax(o @ WEIGHTS)) for o in overlays])
    assert strip.entropy(dark)[0] == pytest.approx(wanted, rel=1e-5)


def test_threshold_is_the_rank_that_keeps_the_rate():
    strip = STRIP(linear, uniform(229), n=30, false_rejection_rate=0.01)
    assert len(strip.clean_entropy) == 199
    assert strip.threshold == strip.clean_entropy[1]  # 2 of 200 ranks are as low: 1 %


def test_false_rejections_are_as_many_as_said():
    # 40 splits of 400 new inputs: the mean rate is 5 %, its deviation below 0.4 %; four of them are a chance of 6e-5.
    rates = []
    for seed in range(40):
        strip = STRIP(linear, uniform(130, seed), n=11, false_rejection_rate=0.05, seed=seed)
        rates.append(strip.detect(uniform(400, 1000 + seed)).mean())
    assert 0.034 < np.mean(rates) < 0.066


def test_score_of_an_input_depends_on_nothing_else():
    strip = STRIP(linear, uniform(150), n=40)
    x = uniform(9, 5)
    alone = np.concatenate([strip.entropy(x[i : i + 1]) for i in range(9)])
    np.testing.assert_allclose(strip.entropy(x), alone, rtol=1e-6)
    np.testing.assert_array_equal(strip.detect(x), strip.p_values(x) <= strip.false_rejection_rate)
    assert strip.entropy(x[:0]).shape == (0,)


def test_triggered_digits_are_found_in_a_backdoored_model_alone():
    _, (clean, _), (x, y) = digits()
    model, poisoned = trained(target=3)
    strip = STRIP(model, clean, n=50)
    triggered = poisoned.trigger(x[y != 3])
    assert strip.detect(triggered).mean() >= 0.9
    assert strip.detect(x).mean() <= 0.05
    assert STRIP(trained()[0], clean, n=50).detect(triggered).mean() <= 0.2
    np.testing.assert_array_equal(strip.detect(mx.array(triggered)), strip.detect(triggered))


def nan_after(x):
    return mx.where(x[:, :1] > 0.5, mx.array(float("nan")), linear(x))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"n": 0}, "n must be an integer >= 1 but is 0"),
        ({"n": 60}, "clean must have 159 inputs or more but has 150"),
        ({"false_rejection_rate": 0.001}, "clean must have 1019 inputs or more"),
        ({"false_rejection_rate": 1}, "false_rejection_rate must be a number above 0 and below 1 but is 1"),
        ({"blend": "max"}, "blend must be 'sum' or 'mean' but is 'max'"),
        ({"bounds": (0, 0.5)}, "clean must be within the bounds"),
        ({"bounds": (1, 0)}, "bounds must be finite and increase"),
        ({"clean": np.full((150, 6), np.nan, np.float32)}, "clean must be finite but has 150 inputs"),
        ({"clean": np.zeros((150, 6), np.int64)}, "clean must be floats"),
        ({"clean": [[0.0]]}, "clean must be a NumPy or MLX array"),
        ({"model": nan_after}, "model must return finite logits but has NaN or infinity"),
        ({"model": lambda x: x[:, :1]}, "model must have 2 classes or more but has 1"),
        ({"model": lambda x: x[:, 0]}, "model must return logits of shape"),
        ({"model": nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))}, "model must be in evaluation mode"),
    ],
)
def test_refusals(changed, words):
    arguments = {"model": linear, "clean": uniform(150), "n": 20} | changed
    with pytest.raises(ValueError, match=r"\[STRIP\]") as e:
        STRIP(arguments.pop("model"), arguments.pop("clean"), **arguments)
    assert words in str(e.value)


def test_refusals_of_inputs():
    strip = STRIP(linear, uniform(150), n=20)
    with pytest.raises(ValueError, match=r"x must have inputs of shape \(6,\) but has \(5,\)"):
        strip.detect(uniform(3)[:, :5])
    with pytest.raises(ValueError, match="x must be within the bounds"):
        strip.detect(uniform(3) + 1)
    with pytest.raises(TypeError, match="model must be callable"):
        STRIP(None, uniform(150))
