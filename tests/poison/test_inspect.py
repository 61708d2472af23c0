"""The pruning check, activation ranges, and the inspection of a model as a whole."""

import copy
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from backdoored import Perceptron, accuracy, digits, trained
from mlx.utils import tree_flatten
from mlx_bulwark.poison import STRIP, ActivationRange, fine_prune, inspect, pruning_check
from mlx_bulwark.poison.attacks import attack_success_rate
from scipy import stats

BLOCK = np.zeros((25, 6), np.float32)
BLOCK[np.arange(24), np.arange(24) // 4] = 8


def block(backdoor=0.0):
    """Six classes, each of four bright values; the last value means class 2."""
    weights = BLOCK.copy()
    weights[24, 2] = backdoor
    return lambda x: x @ mx.array(weights)


def block_inputs(n=200, seed=0):
    x = np.random.default_rng(seed).uniform(0, 1, (n, 25)).astype(np.float32)
    x[:, 24] = 0
    return x


def test_pruning_is_what_zeroed_weights_do():
    _, (x, y), _ = digits()
    model, _ = trained(3)
    check = pruning_check(model, (x, y))
    features = np.maximum(np.array(model.hidden(mx.array(x.reshape(len(x), -1)))), 0)
    np.testing.assert_array_equal(check.order, np.argsort(features.mean(axis=0), kind="stable"))
    assert check.layer == "last"
    before = np.array(model(mx.array(x))).argmax(axis=1)
    for k in (0, 1, 13, 30, 48):
        other = copy.deepcopy(model)
        weight = np.array(other.last.weight)
        weight[:, check.order[:k]] = 0
        other.last.weight = mx.array(weight)
        predicted = np.array(other(mx.array(x))).argmax(axis=1)
        assert check.accuracy[k] == pytest.approx((predicted == y).mean(), abs=0.003)  # a tie may go either way
        assert check.changed[k] == pytest.approx((predicted != before).mean(), abs=0.003)
    assert check.accuracy[check.dormant] >= check.accuracy[0] - 0.01 - 1e-9 > check.accuracy[check.dormant + 1]


class Idle(nn.Module):
    """Units 10 and above are idle on inputs whose last value is 0."""

    def __init__(self, speaks):
        super().__init__()
        rng = np.random.default_rng(2)
        body = np.zeros((20, 11), np.float32)
        body[:10, :10] = 3 * np.eye(10)
        body[10:, 10] = 5
        head = np.concatenate([3 * np.eye(10), rng.normal(0, 0.3, (10, 10))], axis=1)
        head[4, 10:] += speaks
        self.body, self.last = nn.Linear(11, 20, bias=False), nn.Linear(20, 10, bias=False)
        self.body.weight, self.last.weight = mx.array(body), mx.array(head.astype(np.float32))

    def __call__(self, x):
        return self.last(nn.relu(self.body(x)))


def idle_inputs(n=200):
    x = np.random.default_rng(1).uniform(0, 1, (n, 11)).astype(np.float32)
    x[:, 10] = 0
    return x, x[:, :10].argmax(axis=1)


def test_idle_units_that_speak_for_one_class_are_accused():
    for speaks, accused in ((0, False), (2, True)):
        check = pruning_check(Idle(speaks), idle_inputs())
        assert check.dormant >= 10
        assert check.accused is accused, check.reason
        rest = np.delete(check.weights, check.weights.argmax())
        t = (check.weights.max() - rest.mean()) / (rest.std(ddof=1) * np.sqrt(1 + 1 / 9))
        assert check.p_value == pytest.approx(min(1, 10 * stats.t.sf(t, 8)))
    assert "class 4" in check.reason


@pytest.mark.parametrize(("speaks", "accused"), [(0.0, False), (2.5, True)])
def test_idle_units_that_speak_for_one_class_alone_are_accused(speaks, accused):
    model = Idle(0)
    head = np.array(model.last.weight)
    head[:, 10:] = 0  # the other classes' sums do not vary at all
    head[4, 10:] = speaks
    model.last.weight = mx.array(head)
    check = pruning_check(model, idle_inputs())
    assert check.accused is accused, check.reason
    assert check.p_value == pytest.approx(0 if accused else 1, abs=1e-9)


def test_few_classes_are_not_compared():
    mx.random.seed(1)
    model = nn.Sequential(nn.Linear(11, 8), nn.ReLU(), nn.Linear(8, 2))
    x, y = idle_inputs()
    check = pruning_check(model, (x, y % 2))
    assert check.p_value is None
    assert not check.accused
    assert "2 classes cannot be compared" in check.reason


def test_fine_pruning_closes_the_backdoor_and_leaves_the_model_alone():
    _, trusted, (x, y) = digits()
    model, poisoned = trained(7)
    before = [np.array(a) for _, a in tree_flatten(model.parameters())]
    found = fine_prune(model, trusted, epochs=30)
    for (_, a), b in zip(tree_flatten(model.parameters()), before, strict=True):
        np.testing.assert_array_equal(np.array(a), b)
    repaired = Perceptron()
    repaired.load_weights(list(found.weights.items()))
    repaired.eval()
    assert not np.array(repaired.last.weight)[:, found.pruned].any()
    assert attack_success_rate(model, x, y, poisoned) > 0.95
    assert attack_success_rate(repaired, x, y, poisoned) < 0.5
    assert accuracy(repaired, x, y) > accuracy(model, x, y) - 0.03
    assert found.accuracy_before == pytest.approx(accuracy(model, *trusted), abs=0.003)
    assert found.accuracy_after == accuracy(repaired, *trusted)


def test_scores_of_activation_ranges_are_deviations_above_the_highest():
    _, (x, _), (new, _) = digits()
    model, _ = trained(3)
    ranges = ActivationRange(model, x, false_alarm_rate=0.02)
    features = [np.maximum(np.array(model.hidden(mx.array(a.reshape(len(a), -1)))), 0).astype(float) for a in (x, new)]
    order = np.random.default_rng(0).permutation(len(x))
    low, rest = features[0][order[:200]], features[0][order[200:]]
    scale = low.std(axis=0) + 0.1 * low.std(axis=0).mean()
    wanted = np.array([max((f - low.max(axis=0)) / scale) for f in features[1]])
    np.testing.assert_allclose(ranges.score(new), wanted, atol=1e-4)
    calibration = np.sort([max((f - low.max(axis=0)) / scale) for f in rest])
    assert ranges.threshold == pytest.approx(calibration[-4], abs=1e-4)  # 4 of 201 ranks
    counts = [((features[1][:, j] - low[:, j].max()) / scale[j] >= ranges.threshold).sum() for j in range(48)]
    np.testing.assert_array_equal(ranges.units(new), counts)


def test_false_alarms_of_activation_ranges_are_as_many_as_said():
    # 40 splits of 400 new inputs at 5 %: the mean's deviation is below 0.4 %; four of them are a chance of 6e-5.
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(25, 16), nn.ReLU(), nn.Linear(16, 6))
    rates = []
    for seed in range(40):
        ranges = ActivationRange(model, block_inputs(238, seed), false_alarm_rate=0.05, seed=5000 + seed)
        rates.append(ranges.detect(block_inputs(400, 1000 + seed)).mean())
    assert 0.034 < np.mean(rates) < 0.066


def test_backdoored_digits_are_accused_by_all_that_can_tell():
    _, trusted, (x, y) = digits()
    model, poisoned = trained(7)
    triggered = poisoned.trigger(x[y != 7][:60])
    inputs = np.concatenate([x[:140], triggered])
    report = inspect(model, trusted, inputs=inputs, num_classes=10)
    assert report.accused
    assert report.accused_classes.tolist() == [7]
    assert report.methods["strip"].accused
    assert np.isin(np.arange(140, 200), report.suspects).mean() > 0.9
    assert (report.suspects < 140).mean() < 0.15
    assert "class 7" in report.reason
    assert "accused" in report.table()
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["kind"] == "model_inspection"
    assert content["methods"]["neural_cleanse"]["accused"] is True
    assert [t["target"] for t in content["triggers"]] == [7]
    assert np.shape(content["triggers"][0]["mask"]) == (8, 8, 1)


def test_clean_digits_are_not_accused():
    _, trusted, (x, _) = digits()
    report = inspect(trained(seed=1)[0], trusted, inputs=x, steps=200)
    assert not report.accused, report.table()
    assert all(r.p_value is not None for r in report.methods.values())
    least = min(r.p_value for r in report.methods.values())
    assert report.p_value == pytest.approx(min(1, 4 * least))
    assert not len(report.suspects)
    assert "no sign of a backdoor" in report.reason


def test_what_cannot_be_used_says_why():
    report = inspect(block(60), block_inputs())
    assert report.accused_classes.tolist() == [2]
    reasons = {name: r.reason for name, r in report.methods.items() if r.p_value is None}
    assert reasons == {
        "pruning": "the model is a function, whose units are unknown",
        "strip": "there are no inputs to judge",
        "activation_range": "there are no inputs to judge",
    }
    assert report.p_value == report.methods["neural_cleanse"].p_value
    assert "untested" in report.table()
    assert inspect(block(), block_inputs(), methods="strip").reason == "no method could be used"
    constant = nn.Sequential(nn.Linear(25, 6), nn.ReLU())
    found = inspect(constant, (block_inputs(), np.zeros(200, int)), methods=["pruning"]).methods["pruning"]
    assert found.reason.startswith("model must end in a linear layer")


def test_counts_of_inputs_are_judged_as_chance_has_them():
    # 200 inspections of clean inputs at 5 %: more than 22 accused are a chance of 2e-4 at the rate itself; by its
    # steps the p-value stays below the rate. The threshold is drawn with the trusted inputs: the binomial alone fails.
    accused = 0
    for seed in range(200):
        x = block_inputs(190, seed)
        found = inspect(block(), x[:90], inputs=x[90:], methods=["strip"], false_rejection_rate=0.05, batch_size=3000)
        accused += found.accused
    assert accused <= 22


def test_strip_is_the_class_with_the_same_arguments():
    x, new = block_inputs(), block_inputs(50, 9)
    found = inspect(block(60), x, inputs=new, methods=["strip"]).methods["strip"]
    strip = STRIP(block(60), x, n=50, false_rejection_rate=0.01)
    assert found.details["threshold"] == strip.threshold
    assert found.details["found"] == strip.detect(new).sum()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"methods": ["guess"]}, "methods must be some of neural_cleanse"),
        ({"methods": []}, "methods must be some of"),
        ({"alpha": 0}, "alpha must be a number above 0 and below 1"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"num_classes": 5}, "num_classes must be the model's 6 but is 5"),
        ({"trusted": block_inputs() * 2}, "trusted must be within the bounds"),
        ({"trusted": (block_inputs(), np.full(200, 6))}, r"labels must be in [0, 6)"),
        ({"trusted": (block_inputs(), np.zeros(199, int))}, "labels must be integers of shape (200,)"),
        ({"inputs": block_inputs()[:, :5]}, "inputs must have inputs of shape (25,) but has (5,)"),
        ({"inputs": block_inputs() * np.nan}, "inputs must be finite but has 200 inputs"),
        ({"model": lambda x: block()(x) * mx.array(float("nan"))}, "model must return finite logits"),
        ({"model": nn.Sequential(nn.Linear(25, 6), nn.Dropout(0.5))}, "model must be in evaluation mode"),
    ],
)
def test_refusals(changed, words):
    arguments = {"model": block(), "trusted": block_inputs()} | changed
    with pytest.raises(ValueError, match=r"\[inspect\]") as e:
        inspect(arguments.pop("model"), arguments.pop("trusted"), **arguments)
    assert words in str(e.value)


@pytest.mark.parametrize("call", [pruning_check, fine_prune])
def test_refusals_of_pruning(call):
    x, y = idle_inputs()
    with pytest.raises(TypeError, match=r"model must be a mlx.nn.Module"):
        call(lambda x: x, (x, y))
    with pytest.raises(ValueError, match="trusted must be inputs and labels but is ndarray"):
        call(Idle(0), x)
    with pytest.raises(ValueError, match="accuracy_loss must be a number above 0"):
        call(Idle(0), (x, y), accuracy_loss=0)


def test_refusals_of_activation_ranges():
    x, _ = idle_inputs()
    with pytest.raises(ValueError, match="trusted must have 198 inputs or more but has 100"):
        ActivationRange(Idle(0), x[:100])
    with pytest.raises(ValueError, match="all are constant"):
        ActivationRange(Idle(0), np.zeros((200, 11), np.float32))
