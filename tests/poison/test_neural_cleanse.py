"""Neural Cleanse: its statistics against SciPy's, planted targets found, clean models left in peace."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from backdoored import digits, trained
from mlx_bulwark.poison import neural_cleanse
from mlx_bulwark.poison.neural_cleanse import ReversedTrigger, _judged, anomaly_index, outlier_p_values
from scipy import stats


def linear(*targets, classes=6):
    """Each class of four bright values; the backdoors: value 24 + c alone means class c."""
    weights = np.zeros((30, classes), np.float32)
    rows = np.arange(4 * classes)
    weights[rows, rows // 4] = 8
    for c in targets:
        weights[24 + c, c] = 60
    weights = mx.array(weights)
    return lambda x: x @ weights


def inputs(n=80):
    x = np.random.default_rng(1).uniform(0, 1, (n, 30)).astype(np.float32)
    x[:, 24:] = 0
    return x


def judged(norms, success=1.0, alpha=0.05):
    norms = np.array(norms, float)
    index = anomaly_index(norms)
    blank = np.zeros(1, np.float32)
    triggers = [
        ReversedTrigger(c, blank, blank, n, success, i) for c, (n, i) in enumerate(zip(norms, index, strict=True))
    ]
    return _judged(tuple(triggers), alpha)


@pytest.mark.parametrize("n", [3, 10, 33])
def test_index_is_the_paper_s_of_logarithms(n):
    norms = np.random.default_rng(n).lognormal(3, 1, n)
    logs = np.log(norms)
    wanted = (np.median(logs) - logs) / stats.median_abs_deviation(logs, scale="normal")
    np.testing.assert_allclose(anomaly_index(norms), wanted, rtol=1e-3)  # 1.4826 is rounded


def test_p_value_is_that_of_a_regression_with_the_class_as_its_own_variable():
    # The t of a dummy variable for one observation is the externally studentized residual: by least squares here.
    norms = np.random.default_rng(2).lognormal(3, 0.5, 10)
    logs = np.sort(np.log(norms))
    design = np.stack([np.ones(10), np.eye(10)[0]], axis=1)
    solved, (rss,), *_ = np.linalg.lstsq(design, logs, rcond=None)
    t = solved[1] / np.sqrt(rss / 8 * np.linalg.inv(design.T @ design)[1, 1])
    assert outlier_p_values(norms)[0] == pytest.approx(min(1, 10 * stats.t.cdf(t, 8)), rel=1e-9)


@pytest.mark.parametrize("classes", [5, 10, 43])
def test_clean_norms_are_accused_as_rarely_as_said(classes):
    # 3000 draws at 5 %: above 6.6 % is 4 deviations from the rate, 3e-5. The other conditions make it rarer still.
    draws = np.random.default_rng(classes).lognormal(3, 0.4, (3000, classes))
    assert np.mean([outlier_p_values(d)[0] <= 0.05 for d in draws]) < 0.066
    assert np.mean([judged(d).accused for d in draws[:500]]) < 0.05


def test_several_targets_do_not_hide_each_other():
    clean = [60, 75, 50, 66, 81, 58, 70, 64]
    assert judged([5, *clean, 6]).accused_classes.tolist() == [0, 9]
    assert judged([5, *clean, 72]).accused_classes.tolist() == [0]
    assert not judged([62, *clean, 72]).accused


def test_each_condition_is_needed():
    clean = [60, 61, 59, 60.5, 60.2, 59.8, 61.2, 60.1, 59.5]
    assert judged([8, *clean]).accused
    assert not judged([30, *clean]).accused  # an outlier, p 1e-12, but half as large as the others
    assert judged([30, *clean]).p_value < 1e-6
    assert not judged([8, *clean], success=0.89).accused
    spread = [15, 200, 25, 90, 40, 400, 30, 60, 22]
    assert not judged([8, *spread]).accused  # far below the median, but so are others


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_are_not_compared_and_it_is_said(classes):
    found = neural_cleanse(linear(1, classes=classes), inputs(), steps=5)
    assert not found.accused
    assert found.p_value is None
    assert f"{classes} classes cannot be compared" in found.reason
    assert len(found.triggers) == classes


@pytest.mark.parametrize("targets", [(2,), (4,), (0, 3)])
def test_planted_value_is_the_trigger(targets):
    found = neural_cleanse(linear(*targets), inputs())
    assert found.accused_classes.tolist() == list(targets)
    for c in targets:
        trigger = found.triggers[c]
        assert trigger.mask.argmax() == 24 + c
        assert trigger.pattern[24 + c] > 0.5
        assert trigger.norm < 2
        assert trigger.success > 0.9
    assert f"class {targets[0]}" in found.reason


def test_equal_classes_are_not_accused():
    found = neural_cleanse(linear(), inputs(), steps=100)
    assert not found.accused


def test_stamped_inputs_are_the_blend_and_the_success_is_theirs():
    model, x = linear(2), inputs()
    trigger = neural_cleanse(model, x, steps=60).triggers[1]
    mask, pattern = trigger.mask.astype(np.float64), trigger.pattern.astype(np.float64)
    stamped = x * (1 - mask) + mask * pattern
    np.testing.assert_allclose(trigger.stamp(x), stamped, rtol=1e-5)
    weights = np.array(model(mx.eye(30)), np.float64)
    others = (x @ weights).argmax(axis=1) != 1
    assert trigger.success == pytest.approx(((stamped @ weights).argmax(axis=1) == 1)[others].mean())
    assert trigger.norm == pytest.approx(mask.sum(), rel=1e-5)


@pytest.mark.parametrize("target", [0, 7])
def test_target_of_backdoored_digits(target):
    model, _ = trained(target)
    _, (x, _), _ = digits()
    found = neural_cleanse(model, x, steps=300)
    assert found.accused_classes.tolist() == [target], found.reason
    trigger = found.triggers[target]
    assert trigger.mask.shape == (8, 8, 1)
    assert trigger.pattern.shape == (8, 8, 1)
    corner = trigger.mask[-3:, -3:].sum() / trigger.mask.sum()
    assert corner > 0.3  # 9 of 64 pixels


def test_clean_digits_are_not_accused():
    _, (x, _), _ = digits()
    for seed in range(2):
        found = neural_cleanse(trained(seed=seed)[0], x, steps=200)
        assert not found.accused, found.reason


def test_same_seed_same_result_and_bounds_are_kept():
    x = inputs() * 4 - 2
    first, second = (neural_cleanse(linear(), x, steps=20, bounds=(-2, 2), seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.norms, second.norms)
    patterns = np.stack([t.pattern for t in first.triggers])
    assert -2 <= patterns.min() <= patterns.max() <= 2
    assert patterns.min() < 0


def test_bar_counts_the_steps(capsys):
    neural_cleanse(linear(), inputs(), steps=7, progress=True)
    assert "7/7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"trusted": inputs(0)}, "trusted must have 1 inputs or more but has 0"),
        ({"trusted": inputs() + 1}, "trusted must be within the bounds"),
        ({"trusted": inputs() * np.nan}, "trusted must be finite but has 80 inputs"),
        ({"trusted": inputs().astype(int)}, "trusted must be floats"),
        ({"steps": 0}, "steps must be an integer >= 1 but is 0"),
        ({"batch_size": True}, "batch_size must be an integer >= 1 but is True"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0 but is 0"),
        ({"success": 1.0}, "success must be a number above 0 and below 1"),
        ({"alpha": 0}, "alpha must be a number above 0 and below 1"),
        ({"model": lambda x: linear()(x) * mx.array(float("nan"))}, "model must return finite logits"),
        ({"model": lambda x: linear()(x)[:, :1]}, "model must have 2 classes or more but has 1"),
        ({"model": nn.Sequential(nn.Linear(30, 6), nn.Dropout(0.5))}, "model must be in evaluation mode"),
    ],
)
def test_refusals(changed, words):
    arguments = {"model": linear(), "trusted": inputs()} | changed
    with pytest.raises(ValueError, match=r"\[neural_cleanse\]") as e:
        neural_cleanse(arguments.pop("model"), arguments.pop("trusted"), **arguments)
    assert words in str(e.value)
