"""Scores against scikit-learn, NumPy and loops in float64, on every backend."""

import mlx.core as mx
import numpy as np
import outlier_data as data
import pytest
from mlx_bulwark.outliers import (
    COPOD,
    ECOD,
    HBOS,
    KNN,
    LOF,
    Ensemble,
    IsolationForest,
    Mahalanobis,
    PCAReconstruction,
    PerClass,
    RobustZ,
)
from scipy import spatial, stats
from scipy.special import erf
from sklearn import covariance, decomposition, ensemble, neighbors
from sklearn.utils.estimator_checks import check_estimator


def compare(found, expected, rtol=2e-5):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)


# scikit-learn's own checks


@pytest.mark.filterwarnings("ignore")  # of its checks: fewer rows than neighbours, names that go missing
@pytest.mark.parametrize(
    "detector",
    [
        RobustZ(),
        ECOD(),
        COPOD("paper"),
        HBOS(),
        KNN(),
        KNN(novelty=True),
        LOF(),
        LOF(novelty=True),
        Mahalanobis(),
        Mahalanobis("ledoit_wolf"),
        Mahalanobis("mcd"),
        PCAReconstruction(),
        IsolationForest(20),
        Ensemble([KNN(), LOF(), HBOS(), IsolationForest(5, random_state=0)]),
        Ensemble([KNN(), Mahalanobis()], combination="rank"),
    ],
    ids=repr,
)
def test_scikit_learn_accepts(detector):
    results = check_estimator(detector, on_fail=None, on_skip=None)
    assert len(results) > 40
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] not in ("passed", "skipped")] == []


# Neighbours


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_lof_is_that_of_scikit_learn(backend, offset):
    x, new = data.rows(70) + np.float32(offset), data.rows(9, seed=1) + np.float32(offset)
    theirs, ours = neighbors.LocalOutlierFactor(7), LOF(7)
    np.testing.assert_array_equal(ours.fit_predict(x), theirs.fit_predict(x.astype(np.float64)))
    compare(ours.negative_outlier_factor_, theirs.negative_outlier_factor_)
    assert ours.offset_ == theirs.offset_ == -1.5
    theirs = neighbors.LocalOutlierFactor(7, novelty=True, contamination=0.2).fit(x.astype(np.float64))
    ours = LOF(7, novelty=True, contamination=0.2).fit(x)
    compare(ours.offset_, theirs.offset_)
    for z in (new, x):
        compare(ours.score_samples(z), theirs.score_samples(z.astype(np.float64)))


def test_lof_with_the_cosine(backend):
    x = data.rows(60)
    theirs = neighbors.LocalOutlierFactor(5, metric="cosine").fit(x.astype(np.float64))
    compare(LOF(5, metric="cosine").fit(x).training_scores_, theirs.negative_outlier_factor_, rtol=1e-3)


def test_lof_of_duplicates_is_infinite_and_says_so(backend):
    x = np.concatenate([np.zeros((6, 2)), data.rows(30, 2), [[0.01, 0.0]]])
    with pytest.warns(UserWarning, match=r"^\[LOF\] .* but 6 of 37 rows have more than 5: rows beside them score inf"):
        detector = LOF(5).fit(x)
    anomaly = -detector.training_scores_
    assert anomaly[36] == np.inf
    assert (anomaly[:6] == 1).all()
    assert not np.isnan(anomaly).any()


def brute(x, y, own, metric="euclidean"):
    """Distances to the rows of y, the nearest first; `own` leaves out the row itself."""
    distances = spatial.distance.cdist(x.astype(np.float64), y.astype(np.float64), metric)
    if own:
        np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("largest", lambda d: d[:, 3]),
        ("mean", lambda d: d[:, :4].mean(axis=1)),
        ("median", lambda d: np.median(d[:, :4], axis=1)),
    ],
)
def test_knn_is_that_of_all_distances(backend, method, expected, metric):
    x, new = data.rows(60), data.rows(9, seed=1)
    detector = KNN(4, method=method, metric=metric, novelty=True).fit(x)
    compare(-detector.training_scores_, expected(brute(x, x, True, metric)))
    compare(detector.anomaly_score(new), expected(brute(new, x, False, metric)))
    compare(detector.anomaly_score(x), expected(brute(x, x, False, metric)))


def test_threshold_of_neighbours_is_that_of_rows_without_themselves(backend):
    x = data.rows(30 if backend == "metal-sim" else 100)
    kth = brute(x, x, True)[:, 4]
    expected = np.where(-kth < np.percentile(-kth, 10), -1, 1)
    assert (expected == -1).sum() == len(x) // 10
    np.testing.assert_array_equal(KNN().fit_predict(x), expected)
    compare(KNN(novelty=True).fit(x).offset_, np.percentile(-kth, 10))
    # An ensemble knows its training rows again
    both = Ensemble([KNN(), LOF(4)])
    np.testing.assert_array_equal(both.fit_predict(x), both.predict(x))
    np.testing.assert_array_equal(both.training_scores_, both.score_samples(x))


def test_threshold_of_neighbours_means_the_same_for_new_rows():
    # 4000 new rows of the same distribution: the share beyond the threshold is off by less than 5 standard errors of
    # both samples together, a false alarm less than once in a million. With themselves among their neighbours the
    # training rows would give a share of 0.18.
    rng = np.random.default_rng(0)
    detector = KNN(2, novelty=True, contamination=0.1).fit(rng.normal(size=(4000, 3)))
    share = (detector.predict(rng.normal(size=(4000, 3))) == -1).mean()
    assert abs(share - 0.1) < 5 * np.sqrt(2 * 0.1 * 0.9 / 4000)


@pytest.mark.parametrize("detector", [KNN(2), LOF(2)])
def test_methods_go_with_novelty(detector):
    x = data.rows(20)
    for name in ("predict", "score_samples", "anomaly_score", "decision_function"):
        assert not hasattr(detector, name)
        with pytest.raises(AttributeError) as e:
            getattr(detector, name)
        assert "with novelty=True only" in str(e.value.__cause__)
    assert hasattr(detector, "fit_predict")
    novel = type(detector)(2, novelty=True).fit(x)
    assert not hasattr(novel, "fit_predict")
    with pytest.raises(AttributeError, match="with novelty=True only"):
        detector.fit(x).explain(x)


def test_more_neighbours_than_rows_are_warned_of():
    with pytest.warns(UserWarning, match=r"n_neighbors must be below the 4 rows but is 5: 3 are taken"):
        detector = KNN(5).fit(data.rows(4))
    compare(-detector.training_scores_, brute(data.rows(4), data.rows(4), True)[:, 2])


# Columns


def tails(x, reference):
    """Left and right tail of each value, by counting."""
    n = len(reference)
    left = [[max((column <= v).sum(), 1) / n for v, column in zip(row, reference.T, strict=True)] for row in x]
    right = [[max((column >= v).sum(), 1) / n for v, column in zip(row, reference.T, strict=True)] for row in x]
    return -np.log(left), -np.log(right)


def aggregated(x, reference, method, aggregation):
    left, right = tails(x, reference)
    skewness = stats.skew(reference.astype(np.float64), axis=0)
    chosen = np.where(skewness < 0, left, right)
    if aggregation == "paper":
        return np.max([left.sum(1), right.sum(1), chosen.sum(1)], axis=0)
    if method == "ecod":
        return np.maximum(left, right).sum(1)
    return np.maximum(chosen, (left + right) / 2).sum(1)


@pytest.mark.parametrize("aggregation", ["per_feature", "paper"])
@pytest.mark.parametrize("method", ["ecod", "copod"])
def test_tails_are_those_of_float64(backend, method, aggregation):
    x = data.rows(90)
    x[:, 1] = np.round(x[:, 1])  # ties
    new = np.concatenate([data.rows(8, seed=1) * 1.5, x[:3]])
    detector = {"ecod": ECOD, "copod": COPOD}[method](aggregation).fit(x)
    compare(-detector.training_scores_, aggregated(x, x, method, aggregation), rtol=2e-6)
    compare(detector.anomaly_score(new), aggregated(new, x, method, aggregation), rtol=2e-6)


@pytest.mark.parametrize("name", data.NAMES)
def test_scores_do_not_depend_on_the_rows_beside(backend, name):
    if backend == "metal-sim" and name not in ("ECOD", "COPOD", "KNN", "HBOS", "Mahalanobis"):
        pytest.skip("no kernel but those of the others")
    x = data.rows(50)
    detector = data.fitted(name, x)
    odd = x[:1] + 4
    alone = detector.score_samples(odd)
    flooded = detector.score_samples(np.concatenate([x[:7], np.repeat(odd, 40, axis=0)]))
    np.testing.assert_allclose(flooded[7:], np.full(40, alone[0]), rtol=1e-12)


def test_histograms_are_those_of_numpy(backend):
    x, new = data.rows(90), data.rows(20, seed=1)
    x[:, 1], new[:, 1] = np.clip(np.round(x[:, 1]), 0, 8), np.round(new[:, 1])
    x[0, 1], x[1, 1] = 0, 8  # all of them on edges of bins
    detector = HBOS(8, alpha=0.05, tol=0.25).fit(x)
    low, high = x.min(axis=0).astype(np.float64), x.max(axis=0).astype(np.float64)
    scaled, others = (((a - low) / (high - low)).astype(np.float32).astype(np.float64) for a in (x, new))
    expected = np.zeros(len(new))
    for column, values in zip(scaled.T, others.T, strict=True):
        density, edges = np.histogram(column, bins=8, density=True)
        score = -np.log2(density + 0.05)
        for i, v in enumerate(values):
            far = max(edges[0] - v, v - edges[-1]) > 0.25 * (edges[1] - edges[0])
            b = np.clip(np.digitize(v, edges, right=True) - 1, 0, 7)
            expected[i] += score.max() if far else score[b]
    compare(detector.anomaly_score(new), expected)


def test_robust_z_is_that_of_scipy(backend):
    x, new = data.rows(90), data.rows(9, seed=1)
    x[:50, 2] = 1.0  # most of it: the median absolute deviation is 0
    mad = stats.median_abs_deviation(x.astype(np.float64), axis=0, scale="normal")
    assert mad[2] == 0
    mad[2] = np.sqrt(np.pi / 2) * np.abs(x[:, 2] - 1.0).mean()
    compare(RobustZ().fit(x).anomaly_score(new), np.abs((new - np.median(x, axis=0)) / mad).mean(axis=1))


# Covariances


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("empirical", covariance.EmpiricalCovariance()),
        ("ledoit_wolf", covariance.LedoitWolf()),
        ("mcd", covariance.MinCovDet(random_state=0)),
    ],
)
def test_mahalanobis_is_that_of_scikit_learn(backend, name, model):
    x, new = data.rows(150).astype(np.float64), data.rows(9, seed=1)
    if name == "ledoit_wolf":  # which shrinks towards a multiple of the identity, here among standardized columns
        x = (x - x.mean(axis=0)) / x.std(axis=0)
    x[:15] += 20  # what a robust estimate does not follow
    if name == "ledoit_wolf":
        unit = x.std(axis=0)
        model.fit((x - x.mean(axis=0)) / unit)
        expected = model.mahalanobis((new - x.mean(axis=0)) / unit)
    else:
        expected = model.fit(x).mahalanobis(new)
    detector = Mahalanobis(name, random_state=0).fit(x)
    compare(detector.anomaly_score(new), expected, rtol=2e-4 if name == "mcd" else 2e-5)
    assert name != "mcd" or set(np.argsort(detector.training_scores_)[:15]) == set(range(15))


def test_directions_without_variance_do_not_hide_what_leaves_them(backend):
    x = data.rows(80, 3)
    x = np.concatenate([x, x[:, :1] * 2 - x[:, 1:2], np.full((80, 1), 7.0)], axis=1)
    ordinary, off_plane, off_constant = (x[:1] + np.array([0, 0, 0, *off]) for off in ((0, 0), (0.5, 0), (0, 0.5)))
    for detector in (Mahalanobis(), Mahalanobis("mcd", random_state=0), PCAReconstruction()):
        detector.fit(x)
        scores = detector.anomaly_score(np.concatenate([ordinary, off_plane, off_constant]))
        assert (scores[1:] > 1000 * (-detector.training_scores_).max()).all(), detector
        assert (detector.predict(np.concatenate([off_plane, off_constant])) == -1).all()
        assert np.median(-detector.training_scores_) < 10


@pytest.mark.parametrize("weighted", [True, False])
def test_principal_components_are_those_of_scikit_learn(weighted):
    x, new = data.rows(150).astype(np.float64), data.rows(9, seed=1)
    mean, unit = x.mean(axis=0), x.std(axis=0)
    model = decomposition.PCA().fit((x - mean) / unit)
    left = model.transform((new - mean) / unit)[:, 2:]
    variances = model.explained_variance_[2:] * 149 / 150 if weighted else 1.0
    detector = PCAReconstruction(2, weighted=weighted).fit(x)
    compare(detector.anomaly_score(new), (left**2 / variances).sum(axis=1))
    share = float(model.explained_variance_ratio_[:2].sum())
    assert PCAReconstruction(share - 1e-6).fit(x).n_components_ == 2
    assert PCAReconstruction(share + 1e-6).fit(x).n_components_ == 3
    assert PCAReconstruction(1 - 1e-12).fit(x).n_components_ == 4


# Trees


@pytest.mark.parametrize("options", [{}, {"max_features": 0.5, "bootstrap": True, "max_samples": 40}])
def test_isolation_forest_is_that_of_scikit_learn(options):
    x, new = data.rows(300), data.rows(50, seed=1)
    theirs = ensemble.IsolationForest(n_estimators=30, random_state=3, **options).fit(x)
    ours = IsolationForest(30, random_state=3, **options).fit(x)
    assert not ours.frame_.center.any()
    # Its thresholds are float64 numbers between float32 rows; those of scaled rows are the scaled ones, to rounding.
    compare(ours.score_samples(new), theirs.score_samples(new), rtol=1e-3)
    assert (np.abs(ours.score_samples(new) - theirs.score_samples(new)) < 1e-6).mean() > 0.9
    assert ours.offset_ == theirs.offset_ == -0.5


# Several


def test_probabilities_are_gaussian_tails_of_training_scores():
    x, new = data.rows(80), data.rows(9, seed=1)
    detector = Ensemble([ECOD(), RobustZ()]).fit(x)
    expected = np.zeros(9)
    for member in (ECOD().fit(x), RobustZ().fit(x)):
        own = -member.training_scores_
        z = (member.anomaly_score(new) - own.mean()) / own.std()
        expected += np.maximum(0, erf(z / np.sqrt(2))) / 2
    compare(detector.anomaly_score(new), expected, rtol=1e-9)


def test_ranks_are_shares_of_lower_training_scores():
    x, new = data.rows(80), data.rows(9, seed=1)
    detector = Ensemble([ECOD(), RobustZ()], combination="rank").fit(x)
    expected = np.zeros(9)
    for member in (ECOD().fit(x), RobustZ().fit(x)):
        own, scores = -member.training_scores_, member.anomaly_score(new)
        expected += [stats.percentileofscore(own, s, kind="mean") / 200 for s in scores]
    compare(detector.anomaly_score(new), expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.*rows beside them score infinity")
def test_infinite_scores_of_a_member_count_as_certain():
    x = np.concatenate([np.zeros((30, 2)), data.rows(60, 2), [[0.01, 0.0]]])
    detector = Ensemble([LOF(5), ECOD()]).fit(x)
    scores = -detector.training_scores_
    assert np.isfinite(scores).all()
    assert scores[-1] >= 0.5
    assert np.isfinite(detector.offset_)


def test_classes_are_fitted_by_themselves():
    x = np.concatenate([data.rows(60), data.rows(40, seed=2) + 9])
    y = np.array(["a"] * 60 + ["b"] * 40)
    order = np.random.default_rng(0).permutation(100)
    x, y = x[order], y[order]
    detector = PerClass(Mahalanobis()).fit(x, y)
    new, of = data.rows(10, seed=3), np.array(["a", "b"] * 5)
    for c in "ab":
        alone = Mahalanobis().fit(x[y == c])
        np.testing.assert_array_equal(detector.training_scores_[y == c], alone.training_scores_)
        np.testing.assert_array_equal(detector.score_samples(new, of)[of == c], alone.score_samples(new[of == c]))
        np.testing.assert_array_equal(detector.predict(new, of)[of == c], alone.predict(new[of == c]))
        np.testing.assert_array_equal(
            detector.explain(new, of).contributions[of == c], alone.explain(new[of == c]).contributions
        )
    assert (PerClass(KNN()).fit_predict(x, y) == -1).sum() == 10
    with pytest.raises(ValueError, match=r"\[PerClass\] y must have labels that were there at fit but has \['c'\]"):
        detector.predict(new[:1], ["c"])
    with pytest.raises(ValueError, match=r"\[PerClass\] each class must have two rows at least .*: 'z'"):
        PerClass(ECOD()).fit(x[:5], ["y", "y", "y", "z", "y"])
    with pytest.raises(ValueError, match=r"\[PerClass\] y must be 5 integers or strings but has shape \[4\]"):
        PerClass(ECOD()).fit(x[:5], [1, 1, 1, 1])


# Reasons


@pytest.mark.parametrize("name", data.NAMES)
def test_explanations_add_up_and_name_the_column(backend, name):
    if backend == "metal-sim" and name not in ("ECOD", "KNN"):
        pytest.skip("no kernel but those of the others")
    x = data.rows(60)
    x[:, 3] += x[:, 0]
    detector = data.fitted(name, x)
    odd = x[:6].copy()
    odd[:, 2] += 25 * np.sign(stats.skew(x[:, 2]))  # the tail that COPOD looks at
    explained = detector.explain(odd)
    assert explained.contributions.shape == (6, 5)
    if "cosine" not in name:  # an angle has no single column
        assert (explained.contributions.argmax(axis=1) == 2).all()
        assert [explained.top(i, 1)[0][0] for i in range(6)] == ["column 2"] * 6
    if name == "HBOS":
        least = np.array(detector.table_.scores).min(axis=1).sum()
        compare(explained.contributions.sum(axis=1), detector.anomaly_score(odd) - least)
    elif "Forest" not in name:
        compare(explained.contributions.sum(axis=1), detector.anomaly_score(odd), rtol=1e-4)


@pytest.mark.parametrize("detector", [KNN(3), LOF(3), KNN(3, metric="cosine", method="mean")])
def test_training_rows_are_explained_without_themselves(detector):
    x = data.rows(40)
    detector.fit(x)
    picked = np.array([7, 31, 2])
    explained = detector.explain(x[picked], training_rows=picked)
    compare(explained.contributions.sum(axis=1), -detector.training_scores_[picked])
    for wrong in ([1, 2], [40, 1, 2], [-1, 0, 1], [0.5, 1.0, 2.0]):
        with pytest.raises(ValueError, match="training_rows must be 3 whole numbers below 40"):
            detector.explain(x[picked], training_rows=wrong)


def test_many_rows_are_scored_in_blocks(monkeypatch):
    x = data.rows(50)
    expected = {name: data.fitted(name, x).score_samples(x) for name in ("KNN", "LOF", "IsolationForest", "Ensemble")}
    monkeypatch.setattr("mlx_bulwark.outliers.base.BLOCK_ROWS", 7)
    monkeypatch.setattr("mlx_bulwark.outliers.neighbors.BLOCK_ROWS", 3)
    monkeypatch.setattr("mlx_bulwark.outliers.forest._WALKED_AT_ONCE", 100)
    for name, scores in expected.items():
        detector = data.fitted(name, x)
        np.testing.assert_allclose(detector.score_samples(mx.array(x)), scores, rtol=1e-12)
