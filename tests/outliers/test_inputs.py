"""What is taken, what is refused and how, and numbers that are awkward."""

import builtins
import importlib
import sys

import mlx.core as mx
import numpy as np
import outlier_data as data
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mlx_bulwark.outliers import ECOD, HBOS, KNN, LOF, Mahalanobis, PCAReconstruction, RobustZ
from mlx_bulwark.outliers.frame import LIMIT, frame_of

QUICK = ["RobustZ", "ECOD", "HBOS", "KNN", "LOF", "Mahalanobis", "PCA", "IsolationForest", "Ensemble of ranks"]


@pytest.mark.parametrize(
    "make",
    [
        mx.array,
        lambda x: mx.array(x).astype(mx.float16),
        lambda x: mx.array(x).astype(mx.bfloat16),
        lambda x: x.astype(np.float64),
        lambda x: np.asfortranarray(x),
        lambda x: x.tolist(),
        lambda x: np.repeat(x, 2, axis=0)[::2],
        lambda x: pd.DataFrame(x),
        lambda x: pa.table({f"c{j}": c for j, c in enumerate(x.T)}),
    ],
)
def test_arrays_lists_and_tables_are_alike(make):
    x = np.round(data.rows(40) * 4) / 4  # numbers of bfloat16
    x = np.clip(x, -30, 30)
    expected = ECOD().fit(x).training_scores_
    np.testing.assert_array_equal(ECOD().fit(make(x)).training_scores_, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, bool])
def test_integers_are_numbers(dtype):
    x = np.random.default_rng(0).integers(0, 2, (40, 3)).astype(dtype)
    np.testing.assert_array_equal(
        RobustZ().fit(x).training_scores_, RobustZ().fit(x.astype(np.float64)).training_scores_
    )


def frames():
    yield "pandas", pd.DataFrame
    try:
        import polars
    except ImportError:
        return
    yield "polars", polars.DataFrame


@pytest.mark.parametrize("make", [pytest.param(m, id=i) for i, m in frames()])
def test_names_of_columns_are_kept_and_checked(make):
    x = data.rows(40, 3)
    columns = {"age": x[:, 0], "height": x[:, 1], "weight": x[:, 2]}
    detector = ECOD().fit(make(columns))
    assert detector.feature_names_in_.tolist() == ["age", "height", "weight"]
    assert detector.explain(make(columns)).columns == ["age", "height", "weight"]
    np.testing.assert_array_equal(detector.score_samples(make(columns)), detector.training_scores_)
    with pytest.raises(ValueError, match="feature names should match"):
        detector.score_samples(make({"age": x[:, 0], "height": x[:, 1], "income": x[:, 2]}))
    with pytest.raises(ValueError, match="same order"):
        detector.score_samples(make({"height": x[:, 1], "age": x[:, 0], "weight": x[:, 2]}))
    with pytest.raises(ValueError, match=r"\[ECOD\] X must be numeric but has 1 columns that are not: 'name'"):
        detector.score_samples(make(columns | {"name": ["x"] * 40}))


@pytest.mark.parametrize("name", data.NAMES)
def test_where_and_how_many(name):
    x = data.rows(30).astype(np.float64)
    detector = data.fitted(name, x)
    x[3, 1] = x[9, 1] = np.nan
    x[4, 2] = -np.inf
    message = (
        rf"^\[{type(detector).__name__}\] X must have no NaN and no inf but has 2 NaN and 1 inf, in 3 of 30 rows: "
        r"column 1 \(2, first in row 3\), column 2 \(1, first in row 4\)$"
    )
    with pytest.raises(ValueError, match=message):
        data.fitted(name, x)
    with pytest.raises(ValueError, match=message):
        detector.predict(x)
    with pytest.raises(ValueError, match="'b' \\(2, first in row 3\\), column 'c'"):
        data.fitted(name, pd.DataFrame(x, columns=list("abcde")))
    with pytest.raises(ValueError, match=r"X has 4 features, but .* is expecting 5"):
        detector.predict(data.rows(3, 4))
    with pytest.raises(ValueError, match="1 sample"):
        data.fitted(name, x[:1])
    with pytest.raises(ValueError, match="0 sample"):
        detector.predict(x[:0])
    with pytest.raises(ValueError, match="Complex data not supported"):
        detector.predict(x[:2] * 1j)
    with pytest.raises(ValueError, match="Reshape your data"):
        detector.predict(data.rows(3)[0])


@pytest.mark.parametrize("name", data.NAMES)
def test_words_among_numbers_are_found(name):
    with pytest.raises(ValueError, match=r"has 2 values that are not, the first 'many' in row 1, column 0$"):
        data.detectors()[name].fit([["1", "2"], ["many", "3"], ["4", "few"]])


def test_numbers_in_words_are_numbers():
    assert ECOD().fit([["1", "2"], ["5", "3"]]).n_features_in_ == 2


@settings(max_examples=20)
@given(st.data())
@pytest.mark.parametrize("name", data.NAMES)
def test_any_bad_value_is_refused_with_its_place(name, given_data):
    n, d = given_data.draw(st.integers(2, 9)), given_data.draw(st.integers(1, 9))
    x = np.zeros((n, d), given_data.draw(st.sampled_from([np.float32, np.float64])))
    cells = st.tuples(st.integers(0, n - 1), st.integers(0, d - 1))
    bad = given_data.draw(st.dictionaries(cells, st.sampled_from([np.nan, np.inf, -np.inf]), min_size=1, max_size=12))
    for cell, value in bad.items():
        x[cell] = value
    first = min(j for _, j in bad)
    nans = sum(np.isnan(v) for v in bad.values())
    detector = data.detectors()[name]
    with pytest.raises(ValueError, match=rf"\[{type(detector).__name__}\] X must have no NaN and no inf but has ") as e:
        detector.fit(x)
    text = str(e.value)
    assert (f"{nans} NaN" in text) == (nans > 0)
    assert (f"{len(bad) - nans} inf" in text) == (len(bad) > nans)
    assert f"in {len({i for i, _ in bad})} of {n} rows" in text
    count = sum(j == first for _, j in bad)
    assert f"column {first} ({count}, first in row {min(i for i, j in bad if j == first)})" in text


@settings(max_examples=12, phases=(Phase.explicit, Phase.generate))
@given(st.data())
@pytest.mark.parametrize("name", data.NAMES)
def test_any_finite_numbers_get_scores_and_no_nan(name, given_data):
    """Constant columns, copies, subnormal and huge numbers: scores may be infinite by LOF alone."""
    fewest = 3 if name == "PCA, plain" else 1  # columns: it is left with one beside its two components
    n, d = given_data.draw(st.integers(2, 12)), given_data.draw(st.integers(fewest, 4))
    numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([0.0, 1.0, 1e300, -1e300]))
    row = st.lists(numbers, min_size=d, max_size=d)
    x = np.array(given_data.draw(st.lists(row, min_size=n, max_size=n)))
    new = np.array(given_data.draw(st.lists(row, min_size=1, max_size=3)))
    detector = data.fitted(name, x)
    for scores in (detector.training_scores_, detector.score_samples(new), detector.explain(new).contributions):
        assert not np.isnan(scores).any()
        assert np.isfinite(scores).all() or isinstance(detector, LOF)
    assert set(detector.predict(new)) <= {-1, 1}


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("name", QUICK)
def test_units_do_not_matter(name, size):
    """Numbers beyond float32 are scored as they are, or in units of their own."""
    x, new = data.rows(50).astype(np.float64), data.rows(5, seed=1).astype(np.float64)
    unit = 2.0 ** np.round(np.log2(size))
    plain, scaled = data.fitted(name, x), data.fitted(name, x * unit)
    factor = unit if name == "KNN" else 1.0
    np.testing.assert_allclose(scaled.score_samples(new * unit), plain.score_samples(new) * factor, rtol=1e-6)


@pytest.mark.parametrize("name", ["RobustZ", "ECOD", "KNN", "LOF", "Mahalanobis", "PCA"])
def test_dates_in_seconds_keep_their_fractions(name):
    x, new = data.rows(50).astype(np.float64), data.rows(5, seed=1).astype(np.float64)
    far = data.fitted(name, x + 1.7e9).score_samples(new + 1.7e9)
    np.testing.assert_allclose(far, data.fitted(name, x).score_samples(new), rtol=1e-3)


@pytest.mark.parametrize("name", ["RobustZ", "ECOD", "HBOS", "KNN", "LOF", "Mahalanobis", "IsolationForest"])
def test_one_giant_does_not_blur_the_rest(name):
    x = data.rows(60).astype(np.float64)
    x[7, 1] = 1e300
    detector = data.fitted(name, x)
    scores = detector.training_scores_
    assert scores[7] < np.median(scores)
    assert scores[7] == scores.min() or name in ("ECOD", "HBOS", "IsolationForest")  # to which a column is one of five
    if name not in ("Mahalanobis", "HBOS"):  # whose scale the giant sets
        assert len(np.unique(scores)) > 40
        assert detector.frame_.apply(x)[7, 1] == np.float32(LIMIT)


def test_frames_lose_nothing_of_small_numbers_beside_large_ones():
    x = np.array([1e-6, 2e-6, 1.0, 2.0, 3.0, 1e6], np.float32)[:, None]
    assert len(np.unique(frame_of(x, per_column=True).apply(x))) == 6


def test_constant_columns_score_rows_that_leave_them():
    x = np.concatenate([data.rows(60, 2), np.full((60, 1), 5.0)], axis=1)
    for detector in (RobustZ(), ECOD(), HBOS(), KNN(novelty=True), Mahalanobis(), PCAReconstruction()):
        detector.fit(x)
        ordinary, off = detector.anomaly_score([[*x[0, :2], 5.0], [*x[0, :2], 9.0]])
        assert off > ordinary, detector


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        (ECOD(contamination=0.0), r"\[ECOD\] contamination must be above 0 and at most 0.5 but is 0.0"),
        (ECOD(contamination="auto"), r"\[ECOD\] contamination must be above 0 and at most 0.5 but is 'auto'"),
        (LOF(contamination=0.7), r"\[LOF\] contamination must be auto or above 0 and at most 0.5 but is 0.7"),
        (ECOD("mine"), r"\[ECOD\] aggregation must be one of per_feature, paper but is 'mine'"),
        (KNN(0), r"\[KNN\] n_neighbors must be a whole number from 1 but is 0"),
        (KNN(metric="manhattan"), r"\[KNN\] metric must be one of euclidean, cosine but is 'manhattan'"),
        (KNN(method="least"), r"\[KNN\] method must be one of largest, mean, median but is 'least'"),
        (HBOS(2.5), r"\[HBOS\] n_bins must be a whole number from 1 but is 2.5"),
        (Mahalanobis("none"), r"\[Mahalanobis\] covariance must be one of .* but is 'none'"),
        (PCAReconstruction(1.5), r"n_components must be a whole number from 1, or above 0 and below 1, but is 1.5"),
        (PCAReconstruction(5), r"n_components must be below n_features = 5 but is 5"),
    ],
)
def test_parameters_out_of_range_are_refused(detector, message):
    with pytest.raises(ValueError, match=message):
        detector.fit(data.rows(20))


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    plain = builtins.__import__
    for module in [m for m in sys.modules if m.startswith(("sklearn", "mlx_bulwark.outliers"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "mlx-bulwark\[outliers\]"'):
        importlib.import_module("mlx_bulwark.outliers")
