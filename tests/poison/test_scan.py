"""The scan: planted poison is found, clean sets are not accused, and every reason stands."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark.poison import METHODS, scan, scan_features
from mlx_bulwark.poison.attacks import badnets, label_flip
from mlx_bulwark.poison.scan import BESIDE_TRUSTED, _Data, _marked_strangers

CLASSES = 10


def features_of(y, rng, width=16):
    """Features of a model: a centre for each class, and directions in which its rows vary."""
    centres = rng.normal(size=(CLASSES, width)) * 4
    return centres[y] + rng.normal(size=(len(y), width)) @ np.diag(np.linspace(0.3, 1.5, width))


def images_of(y, rng):
    """Blurred shapes: a pattern for each class and noise, with a border of zeros."""
    shapes = rng.uniform(size=(CLASSES, 8, 8, 1))
    x = np.clip(shapes[y] * 0.7 + rng.uniform(-0.3, 0.3, (len(y), 8, 8, 1)), 0, 1)
    return np.pad(x, ((0, 0), (0, 3), (0, 3), (0, 0))).astype(np.float32)


@pytest.fixture(scope="module")
def clean():
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, 1200)
    return features_of(y, rng), images_of(y, rng), y


def poisoned_set(clean, rate=0.08, target=2):
    """A patch in the images; the features of its rows are the target's, moved along one direction."""
    features, x, y = clean
    found = badnets(x, y, rate=rate, target=target, seed=1)
    moved = features.copy()
    rng = np.random.default_rng(2)
    middle = features[y == target].mean(axis=0)
    direction = rng.normal(size=features.shape[1])
    away = features[found.indices] - np.stack([features[y == c].mean(axis=0) for c in y[found.indices]])
    moved[found.indices] = middle + 3 * direction / np.linalg.norm(direction) + away
    return moved, found


def test_a_patch_is_found_and_blamed(clean):
    features, poisoned = poisoned_set(clean)
    report = scan_features(features, poisoned.y, inputs=poisoned.x)
    planted = np.zeros(len(poisoned.y), bool)
    planted[poisoned.indices] = True
    assert report.accused
    assert report.p_value < 0.01
    assert planted[report.ranking[: len(poisoned.indices)]].mean() > 0.95
    assert planted[report.suspects].mean() > 0.9
    assert planted[report.suspects].sum() > 0.95 * planted.sum()
    assert report.methods["class_mixture"].accused_classes == (2,)
    assert "tell its label" in report.reason(int(report.ranking[0]))


@pytest.mark.parametrize("trigger", [0.4, 1.0])  # the brighter one makes patched images neighbours of each other
def test_few_rows_with_a_patch_are_blamed_as_strangers_in_their_class(clean, trigger):
    _, x, y = clean
    poisoned = badnets(x, y, rate=0.03, target=1, trigger=np.full((3, 3, 1), trigger), seed=1)
    report = scan_features(np.zeros((len(y), 1)), poisoned.y, inputs=poisoned.x, methods=["telling_values"])
    found = report.methods["telling_values"]
    assert found.accused_classes == (1,)
    assert found.p_value < 1e-6
    assert "without the values that tell class 1, neighbours contradict" in found.reason
    np.testing.assert_array_equal(np.sort(report.suspects), poisoned.indices)


def test_marks_and_wrong_labels_that_have_nothing_to_do_with_each_other():
    """Of 40 p-values at most 7 are <= 0.05: more by chance in 1 of 1,000 runs, were the tests exact."""
    rng, below, marked = np.random.default_rng(2), 0, 0
    for seed in range(40):
        y = rng.integers(0, CLASSES, 1000)
        x = images_of(y, rng)
        flipped = label_flip(x, y, rate=0.1, seed=seed)
        x[(flipped.y == 3) & (rng.uniform(size=1000) < 0.6), -3:, -3:] = 0.4  # a scanner of its own, say
        data = _Data(np.zeros((1000, 1)), flipped.y, None, x, None, 0)
        found = _marked_strangers(data.detect("telling_values"), data)
        below += found.p_value <= 0.05
        marked += "class 3" in found.words
    assert below <= 7
    assert marked >= 35  # else nothing was tested


def test_wrong_labels_are_found_and_blamed(clean):
    features, x, y = clean
    flipped = label_flip(x, y, rate=0.05, seed=3)
    report = scan_features(features, flipped.y, inputs=x)
    assert report.accused
    assert report.methods["label_noise"].accused
    assert len(np.intersect1d(report.ranking[:60], flipped.indices)) >= 57
    assert len(np.intersect1d(report.suspects, flipped.indices)) >= 57
    assert "bear another label" in report.reason(int(report.ranking[0]))


@pytest.mark.parametrize("seed", range(6))
def test_clean_sets_are_not_accused(seed):
    # at 1 % each, all six fixed seeds would pass by chance with 94 %; they are fixed, and do
    rng = np.random.default_rng(100 + seed)
    y = rng.integers(0, CLASSES, 900)
    report = scan_features(features_of(y, rng), y, inputs=images_of(y, rng))
    assert not report.accused
    assert len(report.suspects) == 0


def test_the_expected_rate_sets_the_number_of_suspects(clean):
    features, x, y = clean
    report = scan_features(features, y, inputs=x, expected_rate=0.1)
    assert not report.accused
    np.testing.assert_array_equal(report.suspects, report.ranking[:180])


def test_a_trusted_split_lets_neighbours_judge(clean):
    features, x, y = clean
    rows = np.arange(len(y))
    held, own = rows < 300, rows >= 300
    flipped = label_flip(x[own], y[own], rate=0.06, seed=3)
    report = scan_features(
        features[own], flipped.y, inputs=flipped.x, trusted=(features[held], y[held], x[held]), natural_noise=0.2
    )
    assert report.methods["deep_knn"].accused
    assert report.methods["input_knn"].accused
    assert not report.methods["label_noise"].accused  # for a fifth of the labels may be wrong
    same = scan_features(features[own], y[own], inputs=x[own], trusted=(features[held], y[held], x[held]))
    assert not same.accused


def crowd(rng, rows, poison=0):
    """Features, labels and logits of four classes; rows of the last that lie elsewhere look like class 0."""
    y = np.arange(rows) % 4
    features = rng.normal(size=(rows, 12)) + 4 * np.eye(12)[y]
    odd = np.flatnonzero(y == 3)[:poison]
    features[odd, 8:] += 5
    logits = 3 * features[:, :4]
    logits[odd, 0] += 30
    return features, y, logits


def test_with_a_trusted_split_every_method_judges():
    rng = np.random.default_rng(0)
    features, y, logits = crowd(rng, 1200, poison=40)
    other = crowd(rng, 400)
    report = scan_features(features, y, logits=logits, trusted=(*other[:2], None, other[2]), methods=BESIDE_TRUSTED)
    for name, result in report.methods.items():
        assert result.accused, name
        assert result.accused_classes == (3,), name
    odd = np.flatnonzero(y == 3)[:40]
    assert np.isin(odd, report.suspects).mean() > 0.3
    assert (y[report.suspects] == 3).all()


def test_beside_trusted_rows_clean_ones_are_accused_as_rarely_as_said():
    """Of 150 p-values at most 17 are <= 0.05: more by chance in 1 of 1,000 runs, were the tests exact."""
    rng, below = np.random.default_rng(1), 0
    methods = ("spectral_signatures", "self_influence")
    for _ in range(75):
        features, y, logits = crowd(rng, 600)
        own = slice(0, 400)
        trusted = (features[400:], y[400:], None, logits[400:])
        report = scan_features(features[own], y[own], logits=logits[own], trusted=trusted, methods=methods)
        below += sum(m.p_value <= 0.05 for m in report.methods.values())
    assert below <= 17


def test_with_a_model_and_what_it_prints(clean):
    _, x, y = clean
    model = nn.Sequential(lambda x: x.reshape(len(x), -1), nn.Linear(121, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    flipped = label_flip(x, y, rate=0.05, seed=3)
    report = scan(model, flipped.x, flipped.y, num_classes=CLASSES)
    assert tuple(report.methods) == METHODS
    assert sorted(report.ranking.tolist()) == list(range(len(y)))
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert told["kind"] == "poison_scan"
    assert [w["row"] for w in told["worst"]] == report.ranking[:20].tolist()
    assert [line.split()[0] for line in report.table().splitlines()] == ["method", *METHODS]
    np.testing.assert_array_equal(scan(model, mx.array(flipped.x), flipped.y).ranking, report.ranking)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_models_in_half_precision(clean, dtype):
    _, x, y = clean
    model = nn.Sequential(lambda x: x.reshape(len(x), -1).astype(dtype), nn.Linear(121, 16), nn.Linear(16, CLASSES))
    model.set_dtype(dtype)
    report = scan(model, x[:200], y[:200], methods=["spectre", "self_influence"])
    assert np.isfinite(report.scores).all()
    assert report.p_value is None
    assert not report.accused


@pytest.mark.parametrize("sizes", [(0,), (1,), (2,), (1, 2), (60,), (60, 1, 2), (60, 60, 60, 60, 3), (0, 60, 60)])
def test_tiny_classes_and_few_classes(sizes):
    y = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(0)
    report = scan_features(rng.normal(size=(len(y), 5)), y, inputs=rng.uniform(size=(len(y), 7)))
    assert sorted(report.ranking.tolist()) == list(range(len(y)))
    assert np.isfinite(report.scores).all()
    json.dumps(report.to_json(), allow_nan=False)
    assert report.table()


def test_constant_features():
    y = np.repeat(np.arange(5), 40)
    report = scan_features(np.ones((200, 5)), y, inputs=np.ones((200, 7)), logits=np.zeros((200, 5)))
    assert np.isfinite(report.scores).all()


def test_refusals(clean):
    features, x, y = clean
    broken = features.copy()
    broken[[7, 9], 3] = np.nan
    with pytest.raises(ValueError, match=r"features must be finite but have NaN or infinity in 2 of 1200 rows.* 7"):
        scan_features(broken, y)
    odd = x.copy()
    odd[5] = np.inf
    with pytest.raises(ValueError, match=r"x must be finite but has NaN or infinity in 1 of 1200 rows, the first 5"):
        scan_features(features, y, inputs=odd)
    with pytest.raises(ValueError, match="y must be 1200 integers but has int64 of shape"):
        scan_features(features, y[:-1])
    with pytest.raises(ValueError, match="y must be labels >= 0 but has 1200 below"):
        scan_features(features, y - 10)
    with pytest.raises(ValueError, match="methods must be some of"):
        scan_features(features, y, methods=["voodoo"])
    with pytest.raises(ValueError, match="expected_rate must be above 0"):
        scan_features(features, y, expected_rate=0.9)
    with pytest.raises(ValueError, match="false_alarm_rate must be above 0 and below 1"):
        scan_features(features, y, false_alarm_rate=0)
    with pytest.raises(ValueError, match="trusted features must have 16 columns but have 3"):
        scan_features(features, y, trusted=(np.zeros((4, 3)), np.zeros(4, int)))
    model = nn.Sequential(lambda x: x.reshape(len(x), -1), nn.Linear(121, 3))
    with pytest.raises(ValueError, match="y must be below the model's 3 classes but has 9"):
        scan(model, x, y)
    with pytest.raises(IndexError, match=r"row must be in \[0, 1200\) but is 1200"):
        scan_features(features, y, methods=["spectre"]).reason(1200)


def test_integers_that_may_be_tokens_are_left_to_features(clean):
    features, _, y = clean
    report = scan_features(features, y, inputs=np.arange(len(y) * 3).reshape(-1, 3))
    assert "may be tokens" in report.skipped["input_knn"]
