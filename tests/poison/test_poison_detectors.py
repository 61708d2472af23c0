"""Each detector against another way to compute the same: NumPy, scikit-learn, or a loop from the paper."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark.poison import (
    activation_clustering,
    class_mixture,
    cross_fitted,
    deep_knn,
    label_noise,
    self_influence,
    spectral_signatures,
    spectre,
    telling_values,
)
from mlx_bulwark.poison.classes import principal
from mlx_bulwark.poison.clustering import silhouettes
from mlx_bulwark.poison.label_noise import _folds
from mlx_bulwark.poison.spectre import _quantum_entropy, robust_covariance
from scipy.linalg import expm


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 181)
    return rng.normal(size=(181, 7)) * np.arange(1, 8) + 50 + 2 * np.eye(7)[y], y


def test_spectral_signatures_are_squared_projections_on_the_first_singular_vector(rows):
    features, y = rows
    found = spectral_signatures(features, y)
    for label in range(3):
        own = features[y == label] - features[y == label].mean(axis=0)
        _, values, directions = np.linalg.svd(own)
        np.testing.assert_allclose(found.scores[y == label], (own @ directions[0]) ** 2, rtol=2e-3, atol=1e-2)
        assert found.statistics[label] == pytest.approx(values[0] ** 2 / np.square(values).sum(), rel=1e-3)


def test_spectral_signatures_are_centred(rows):
    features, y = rows
    np.testing.assert_allclose(
        spectral_signatures(features + 1e6, y).scores, spectral_signatures(features, y).scores, rtol=1e-3, atol=1e-3
    )


def test_clusters_and_silhouettes_are_those_of_scikit_learn(rows):
    cluster, metrics = pytest.importorskip("sklearn.cluster"), pytest.importorskip("sklearn.metrics")
    features, y = rows
    features[(y == 1) & (np.arange(181) % 5 == 0)] += 15
    found = activation_clustering(features, y, components=4)
    for label in range(3):
        points = principal(features[y == label], 4)
        oracle = cluster.KMeans(2, n_init=20, random_state=0).fit(points)
        if label == 1:  # well apart: the best split is one
            smaller = oracle.labels_ == (oracle.labels_.mean() < 0.5)
            np.testing.assert_array_equal(found.smaller[y == label], smaller)
        inside = found.smaller[y == label]
        np.testing.assert_allclose(silhouettes(points, inside), metrics.silhouette_samples(points, inside), atol=1e-7)
        assert found.detection.statistics[label] == pytest.approx(metrics.silhouette_score(points, inside))
        assert found.relative_size[label] == inside.mean()
        cost = sum(np.square(points[part] - points[part].mean(axis=0)).sum() for part in (inside, ~inside))
        assert cost <= oracle.inertia_ * 1.01
    assert max(found.detection.statistics, key=found.detection.statistics.get) == 1


def test_principal_components_are_those_of_the_singular_value_decomposition(rows):
    own = rows[0] - rows[0].mean(axis=0)
    _, _, directions = np.linalg.svd(own, full_matrices=False)
    np.testing.assert_allclose(np.abs(principal(rows[0], 3)), np.abs(own @ directions[:3].T), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_deep_knn_by_a_loop(rows, k):
    features, y = rows
    found = deep_knn(features, y, k=k)
    for i in range(len(y)):
        distances = np.square(features - features[i]).sum(axis=1)
        distances[i] = np.inf
        votes = np.bincount(y[np.argsort(distances, kind="stable")[: min(k, 180)]], minlength=3) / min(k, 180)
        own, votes[y[i]] = votes[y[i]], 0
        assert found.scores[i] == pytest.approx(votes.max() - own)


def test_label_noise_by_the_papers_loop():
    rng = np.random.default_rng(1)
    p = rng.dirichlet([0.5] * 4, 200)
    y = np.where(rng.uniform(size=200) < 0.8, p.argmax(axis=1), rng.integers(0, 4, 200))
    found = label_noise(p, y)
    thresholds = [p[y == k, k].mean() for k in range(4)]
    counts = np.zeros((4, 4))
    for i in range(200):
        above = [k for k in range(4) if p[i, k] >= thresholds[k]]
        best = max(above, key=lambda k: p[i, k]) if above else None
        if best is not None:
            counts[y[i], best] += 1
        assert found.issues[i] == (best is not None and best != y[i])
        other = max(p[i, k] for k in range(4) if k != y[i])
        assert found.detection.scores[i] == pytest.approx(np.log(other) - np.log(p[i, y[i]]))
    joint = counts / counts.sum(axis=1, keepdims=True) * np.bincount(y)[:, None]
    np.testing.assert_allclose(found.joint, joint / joint.sum())


def test_label_noise_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match="must be >= 0 and sum to 1 but do not in 2 rows, the first 1"):
        label_noise(np.array([[0.5, 0.5], [0.9, 0.2], [np.nan, 1.0]]), np.zeros(3, int))
    with pytest.raises(ValueError, match="y must be below the 2 classes of probabilities but has 2"):
        label_noise(np.full((1, 2), 0.5), np.array([2]))


def test_cross_fitted_is_a_logistic_regression_on_the_other_folds():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(2)
    y = np.arange(90) % 3
    features = rng.normal(size=(90, 4)) + np.eye(4)[y]
    found = cross_fitted(features, y, folds=2)
    x = (features - features.mean(axis=0)) / features.std(axis=0)
    part = _folds(y, 2, np.random.default_rng(0))
    assert {tuple(np.bincount(y[part == k])) for k in (0, 1)} == {(15, 15, 15)}
    for k in (0, 1):
        oracle = linear.LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(x[part != k], y[part != k])
        np.testing.assert_allclose(found[part == k], oracle.predict_proba(x[part == k]), atol=0.01)


def test_self_influence_is_the_squared_gradient_of_the_last_layer():
    rng = np.random.default_rng(3)
    features, y = rng.normal(size=(33, 5)).astype(np.float32), rng.integers(0, 4, 33)
    layer = nn.Linear(5, 4)
    logits = np.array(layer(mx.array(features)))
    found = self_influence(features, logits, y)
    loss = nn.value_and_grad(layer, lambda x, y: nn.losses.cross_entropy(layer(x), y, reduction="sum"))
    for i in range(33):
        _, gradient = loss(mx.array(features[i : i + 1]), mx.array(y[i : i + 1]))
        squares = sum(float(mx.square(g).sum().item()) for g in gradient.values())
        assert found.scores[i] == pytest.approx(squares, rel=2e-3, abs=1e-4)


def test_quantum_entropy_scores_are_those_of_the_matrix_exponential():
    whitened = np.random.default_rng(4).normal(size=(200, 5)) * [3, 1, 1, 1, 2]
    covariance = whitened.T @ whitened / 200
    norm = np.linalg.eigvalsh(covariance)[-1]
    weights = expm(4 * (covariance - np.eye(5)) / (norm - 1))
    expected = np.einsum("ni,ij,nj->n", whitened, weights, whitened) / np.trace(weights)
    scores, top = _quantum_entropy(whitened)
    np.testing.assert_allclose(scores, expected, rtol=1e-8)
    assert top == pytest.approx(norm)


def test_the_robust_covariance_is_not_moved_by_poison_and_has_the_size_of_the_rest():
    rng = np.random.default_rng(5)
    points = rng.normal(size=(1000, 3)) * [1, 2, 4]
    points[:300] = rng.normal(size=(300, 3)) * 0.3 + [40, 0, 0]
    mean, factor = robust_covariance(points, rng)
    np.testing.assert_allclose(mean, 0, atol=1.0)
    ratio = np.diagonal(factor @ factor.T) / [1, 4, 16]
    assert ratio.max() / ratio.min() < 2  # its shape is that of the clean rows


def test_spectre_finds_what_spectral_signatures_do_not():
    rng = np.random.default_rng(6)
    features = rng.normal(size=(400, 6)) * [20, 1, 1, 1, 1, 1]
    features[:30, 4] += 8
    y = np.zeros(400, int)
    hit = [set(np.argsort(-f(features, y).scores)[:30]) & set(range(30)) for f in (spectre, spectral_signatures)]
    assert len(hit[0]) >= 29
    assert len(hit[1]) < 10


def test_telling_values_by_a_loop():
    rng = np.random.default_rng(7)
    x, y = rng.integers(0, 4, (120, 3)) / 3, np.arange(120) % 3
    x[:, 1] = np.where(y == 1, 0.9, rng.choice([0.1, 0.4, 0.6], 120))  # the most frequent value tells, and is left out
    x[:, 2] = np.where((y == 2) & (rng.uniform(size=120) < 0.9), 0.9, 0.1)
    found = telling_values(x, y).scores
    expected = np.zeros(120)
    for j in range(3):
        values, counts = np.unique(x[:, j], return_counts=True)
        for value in np.delete(values, counts.argmax()):  # each value has a bin of its own here
            same = x[:, j] == value
            for i in np.flatnonzero(same):
                n, k, z = same.sum(), (same & (y == y[i])).sum(), 2.5
                p = k / n
                low = (p + z * z / (2 * n) - z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
                low = min(max(low, 1e-3), 1 - 1e-3)
                told = np.log(low / (1 - low)) - np.log((1 / 3) / (2 / 3)) - 2.5
                expected[i] += max(told, 0) if n >= 8 else 0
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_mixture_tells_which_half_is_odd_when_both_are_as_large():
    rng = np.random.default_rng(8)
    features, odd = rng.normal(size=(400, 8)), np.arange(400) < 200
    features[odd, 2] += 8
    views = rng.normal(-0.7, 0.4, (400, 1)) + 0.7 * odd[:, None]
    found = class_mixture(features, views, np.zeros(400, int))
    assert ((found.detection.scores > 0.5) == odd).mean() > 0.98
    flipped = class_mixture(features, -0.7 - views, np.zeros(400, int))
    assert ((flipped.detection.scores > 0.5) == ~odd).mean() > 0.98


@pytest.mark.parametrize("detect", [spectral_signatures, activation_clustering, deep_knn, cross_fitted, spectre])
def test_not_finite_features_are_refused_with_counts(detect):
    features = np.ones((40, 3))
    features[[4, 6], 1] = np.nan
    with pytest.raises(ValueError, match=r"must be finite but have NaN or infinity in 2 of 40 rows, the first 4"):
        detect(features, np.zeros(40, int))


@pytest.mark.parametrize("detect", [spectral_signatures, spectre, deep_knn])
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_huge_and_tiny_features_rank_alike(rows, detect, scale):
    features, y = rows
    features = features - 50
    usual, scaled = detect(features, y).scores, detect(features * scale, y).scores
    np.testing.assert_allclose(scaled / scaled.max(), usual / usual.max(), rtol=1e-3, atol=1e-4)
