"""A backdoor planted in digits: it works, is found, and is gone after removal or unlearning."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark.poison import remove, retrain, scan, unlearn
from mlx_bulwark.poison.attacks import attack_success_rate, badnets

sklearn = pytest.importorskip("sklearn.datasets")


def make_model():
    return nn.Sequential(lambda x: x.reshape(len(x), -1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def accuracy(model, x, y):
    return float((np.array(model(mx.array(x)).argmax(axis=1)) == y).mean())


@pytest.fixture(scope="module")
def case():
    images, y = sklearn.load_digits(return_X_y=True)
    x = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(y))
    train, test = order[:1400], order[1400:]
    poisoned = badnets(x[train], y[train], rate=0.08, target=4, trigger=np.ones((2, 2, 1), np.float32), seed=0)
    model = retrain(make_model, poisoned.x, poisoned.y, epochs=20)
    assert attack_success_rate(model, x[test], y[test], poisoned) > 0.9
    return poisoned, model, x[test], y[test]


def test_after_removal_and_training_again_the_trigger_does_nothing(case):
    poisoned, model, x, y = case
    report = scan(model, poisoned.x, poisoned.y, expected_rate=0.08)
    kept = remove(poisoned.x, poisoned.y, report)
    assert len(kept.y) + len(report.suspects) == len(poisoned.y)
    assert len(np.intersect1d(kept.indices, poisoned.indices)) <= 2
    np.testing.assert_array_equal(kept.x, poisoned.x[kept.indices])
    again = retrain(make_model, *kept[:2], epochs=20)
    assert attack_success_rate(again, x, y, poisoned) < 0.05
    assert accuracy(again, x, y) > accuracy(model, x, y) - 0.01


def test_unlearning_takes_the_trigger_and_leaves_the_digits(case):
    poisoned, trained, x, y = case
    model = make_model()
    model.update(trained.parameters())
    model.eval()
    unlearn(model, poisoned.x, poisoned.y, poisoned.indices, epochs=5)
    assert not model.training
    assert attack_success_rate(model, x, y, poisoned) < 0.1
    assert accuracy(model, x, y) > accuracy(trained, x, y) - 0.02


def test_mlx_arrays_stay_mlx_arrays(case):
    poisoned, model, _, _ = case
    report = scan(model, poisoned.x, poisoned.y, methods=["spectre"], expected_rate=0.1)
    kept = remove(mx.array(poisoned.x), poisoned.y, report)
    assert isinstance(kept.x, mx.array)
    np.testing.assert_array_equal(np.array(kept.x), poisoned.x[kept.indices])


def test_refusals(case):
    poisoned, model, _, _ = case
    report = scan(model, poisoned.x, poisoned.y, methods=["spectre"])
    with pytest.raises(ValueError, match="report must be of these 5 rows but is of 1400"):
        remove(poisoned.x[:5], poisoned.y[:5], report)
    with pytest.raises(ValueError, match="suspects must be some, not all, of the 1400 rows but are 0"):
        unlearn(model, poisoned.x, poisoned.y, np.zeros(0, int))
    with pytest.raises(ValueError, match="suspects must be some, not all"):
        unlearn(model, poisoned.x, poisoned.y, [1400])
    with pytest.raises(ValueError, match="x must have rows but is empty"):
        retrain(make_model, poisoned.x[:0], poisoned.y[:0])
