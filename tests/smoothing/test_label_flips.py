"""Label flips against all labels that there are, on sets small enough to try them all."""

import itertools
import math

import numpy as np
import packaged_data
import pytest
from mlx_bulwark.smoothing import certify_label_flips, label_flip_radius


def outcomes(x, test, regularization, labelings, num_classes):
    """Scores [labeling, test row, class] of ridge regression trained on each of the labelings."""
    weights = test @ np.linalg.solve(x.T @ x + regularization * np.eye(x.shape[1]), x.T)
    return np.einsum("tn,lnc->ltc", weights, np.eye(num_classes)[labelings])


def class_probabilities(scores, labels, labelings, q, num_classes):
    """Exact probability of each class, over all labels that random flips can make of these."""
    changed = (labelings != labels).sum(1)
    probability = (q / (num_classes - 1)) ** changed * (1 - q) ** (len(labels) - changed)
    winners = scores == scores.max(-1, keepdims=True)
    return np.einsum("l,ltc->tc", probability, winners * (winners.sum(-1) == 1)[..., None])  # a tie is nobody's


@pytest.mark.parametrize(("num_classes", "n", "q"), [(2, 12, 0.05), (2, 12, 0.15), (3, 8, 0.03)])
def test_no_flips_within_the_radius_change_the_smoothed_prediction(num_classes, n, q):
    rng = np.random.default_rng(num_classes)
    certified = 0
    labelings = np.array(list(itertools.product(range(num_classes), repeat=n)))
    for _ in range(4):
        labels = np.arange(n) % num_classes
        x = np.eye(num_classes)[labels] - 1 / num_classes + 0.05 * rng.standard_normal((n, num_classes))
        test = x[rng.permutation(n)[:5]]
        found = certify_label_flips(x, labels, test, q, num_classes=num_classes, regularization=20.0)
        scores = outcomes(x, test, 20.0, labelings, num_classes)
        true = class_probabilities(scores, labels, labelings, q, num_classes)
        for t in np.flatnonzero(found.prediction >= 0):
            assert true[t, found.prediction[t]] >= found.lower_bound[t] - 1e-9
        for attacked in labelings[(labelings != labels).sum(1) <= found.flips.max()]:
            after = class_probabilities(scores, attacked, labelings, q, num_classes)
            within = (found.prediction >= 0) & (found.flips >= (attacked != labels).sum())
            assert (after.argmax(1) == found.prediction)[within].all()
        certified += int(((found.flips >= 1) if num_classes == 2 and q < 0.1 else (found.prediction >= 0)).sum())
    assert certified >= 10  # the test says something


def test_chernoff_s_bound_is_the_least_over_t():
    rng = np.random.default_rng(0)
    x, labels, q = rng.standard_normal((60, 3)), rng.integers(0, 2, 60), 0.2
    x[:, 0] += 4 * labels - 2
    test = x[:20]
    found = certify_label_flips(x, labels, test, q, regularization=5.0)
    weights = test @ np.linalg.solve(x.T @ x + 5 * np.eye(3), x.T)
    t = np.linspace(0, 200, 20_001)
    for row in range(20):
        signs = np.where(labels == 1, 1, -1) * (1 if weights[row] @ np.where(labels == 1, 1, -1) > 0 else -1)
        moments = sum(np.log((1 - q) * np.exp(-t * w) + q * np.exp(t * w)) for w in weights[row] * signs)
        assert 1 - np.exp(moments.min()) == pytest.approx(found.lower_bound[row], abs=2e-6)


def test_the_radius_is_the_published_formula():
    for p in (0.501, 0.9, 0.999, 1 - 1e-9):
        for q in (0.05, 0.3, 0.49):
            bound = math.log(4 * p * (1 - p)) / (2 * (1 - 2 * q) * math.log(q / (1 - q)))
            assert label_flip_radius(p, q) == max(0, math.ceil(bound) - 1)
    assert label_flip_radius([0.0, 0.3, 0.5], 0.3).tolist() == [0, 0, 0]
    assert label_flip_radius(0.99, 0.5, num_classes=10) < label_flip_radius(0.99, 0.8, num_classes=10)


def test_what_cannot_be_certified():
    x, labels = np.ones((4, 2)), np.array([0, 1, 0, 1])
    found = certify_label_flips(x, labels, [[1.0, 1.0], [0.0, 0.0]], 0.1)
    assert found.prediction.tolist() == [-1, -1]
    assert found.flips.tolist() == [0, 0]
    assert len(certify_label_flips(x, labels, np.zeros((0, 2)), 0.1).flips) == 0
    for arguments, words in [
        ((x, labels, x, 0.5), "q must"),
        ((x, labels, x, 0.0), "q must"),
        ((x, labels[:3], x, 0.1), "labels must"),
        ((x, labels + 1, x, 0.1), "labels must"),
        ((x, labels * 0.5, x, 0.1), "labels must"),
        ((x, labels, x[:, :1], 0.1), "test_features must"),
        ((x * math.nan, labels, x, 0.1), "features must be finite but has 8"),
        ((x[0], labels, x, 0.1), "features must have 2 axes"),
    ]:
        with pytest.raises(ValueError, match=rf"\[certify_label_flips\] {words}"):
            certify_label_flips(*arguments)
    with pytest.raises(ValueError, match="p must"):
        label_flip_radius(1.5, 0.1)
    with pytest.raises(ValueError, match="num_classes must"):
        label_flip_radius(0.9, 0.1, num_classes=1)


def test_ones_and_sevens():
    """800 images of MNIST: a good part of the test images keep their class whatever 20 of the labels are."""
    images, labels = packaged_data.mnist_images()
    chosen = np.random.default_rng(0).permutation(np.flatnonzero((labels == 1) | (labels == 7)))
    x, y = images[chosen].reshape(-1, 784) / 255, (labels[chosen] == 7).astype(int)
    accuracy = {}
    for q in (0.1, 0.4):
        found = certify_label_flips(x[:800], y[:800], x[800:900], q)
        right = found.prediction == y[800:900]
        accuracy[q] = [float((right & (found.flips >= r)).mean()) for r in (0, 1, 10, 20)]
    assert accuracy[0.1][0] > 0.9
    assert accuracy[0.1][3] > 0.4
    assert accuracy[0.4][2] > 0.3
