import contextlib
import json
import pickle

import numpy as np
import outlier_data as data
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark import outliers
from mlx_bulwark.outliers import ECOD, KNN, IsolationForest, PerClass, RobustZ, load


@pytest.mark.parametrize("name", data.NAMES)
def test_a_detector_comes_back_whole(tmp_path, name):
    x, new = data.rows(40).astype(np.float64), data.rows(9, seed=1)
    detector = data.fitted(name, x + 1e7, contamination=0.2)
    path = tmp_path / "detector.safetensors"
    detector.save(path)
    again = load(path)
    assert type(again) is type(detector)
    assert repr(again) == repr(detector)
    np.testing.assert_array_equal(again.score_samples(new + 1e7), detector.score_samples(new + 1e7))
    np.testing.assert_array_equal(again.predict(x + 1e7), detector.predict(x + 1e7))
    np.testing.assert_array_equal(again.explain(new).contributions, detector.explain(new).contributions)
    np.testing.assert_array_equal(again.training_scores_, detector.training_scores_)
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "detector.safetensors"]


@pytest.mark.parametrize("y", [np.arange(40) % 2, np.array(["cat", "dog"] * 20), np.array(["a", "b"] * 20, object)])
def test_classes_come_back(tmp_path, y):
    x = data.rows(40)
    detector = PerClass(RobustZ()).fit(x, y)
    detector.save(tmp_path / "d")
    np.testing.assert_array_equal(load(tmp_path / "d").score_samples(x, y), detector.score_samples(x, y))


def test_names_come_back(tmp_path):
    pd = pytest.importorskip("pandas")
    x = pd.DataFrame(data.rows(20, 2), columns=["a", "ü"])
    ECOD().fit(x).save(tmp_path / "d")
    assert load(tmp_path / "d").explain(x).columns == ["a", "ü"]


def test_others_can_read_the_arrays(tmp_path):
    x = data.rows(20)
    KNN().fit(x).save(tmp_path / "d")
    arrays = safetensors.numpy.load_file(tmp_path / "d")
    assert arrays["reference_"].shape == (20, 5)
    with safetensors.safe_open(tmp_path / "d", "numpy") as f:
        assert json.loads(f.metadata()["mlx_bulwark"])["detector"]["detector"] == "KNN"


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    path = tmp_path / "d"
    IsolationForest(3).fit(data.rows(20)).save(path)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "load", None)
    assert load(path).n_features_in_ == 5
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(path)


def test_what_cannot_be_kept_is_refused(tmp_path):
    path = tmp_path / "d"
    ECOD().fit(data.rows(9)).save(path)
    before = path.read_bytes()
    detector = IsolationForest(3, random_state=np.random.RandomState(0)).fit(data.rows(9))
    with pytest.raises(ValueError, match=r"\[save\] params/random_state must be a number, .* but is RandomState"):
        detector.save(path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="not fitted yet"):
        ECOD().save(path)


class LoadError(Exception):
    pass


def read(path):
    try:
        return load(path)
    except ValueError as e:
        raise (LoadError if str(e).startswith("[load] ") else AssertionError)(str(e)) from e


@settings(max_examples=60)
@given(st.data())
def test_a_file_that_is_cut_or_changed_gives_an_error_or_a_detector(tmp_path_factory, given_data):
    """Never a crash of another kind: a forged file is data, too."""
    path = tmp_path_factory.mktemp("changed") / "d"
    data.fitted("HBOS", data.rows(9, 2)).save(path)
    whole = bytearray(path.read_bytes())
    if given_data.draw(st.booleans()):
        whole = whole[: given_data.draw(st.integers(0, len(whole) - 1))]
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=r"^\[load\] "):
            load(path)
        return
    for _ in range(given_data.draw(st.integers(1, 3))):
        whole[given_data.draw(st.integers(0, len(whole) - 1))] = given_data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    with contextlib.suppress(LoadError):
        assert isinstance(read(path), outliers.OutlierDetector)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'\\"detector\\": \\"RobustZ\\"', b'\\"detector\\": \\"posix_s\\"'),
        (b'\\"format\\": 1', b'\\"format\\": 9'),
        (b'\\"center_\\"', b'\\"_enter_\\"'),
        (b'\\"center_\\"', b'\\"predict\\"'),
    ],
)
def test_forged_content_is_refused(tmp_path, old, new):
    path = tmp_path / "d"
    RobustZ().fit(data.rows(9)).save(path)
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(ValueError, match=r"^\[load\] "):
        load(path)
