"""Decisions of smoothed classifiers, where the truth is known in closed form."""

import copy
import itertools
import math
import os
import pickle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark.smoothing import ABSTAIN, Smooth
from mlx_bulwark.smoothing import smooth as module
from scipy import stats


def sign(x):
    """Class 0 where the first coordinate is positive."""
    return mx.stack([x[:, 0], -x[:, 0]], axis=1)


def linear_model(w, b=0.0):
    model = nn.Linear(len(w), 2)
    model.update({"weight": mx.array(np.stack([w, -w]).astype(np.float32)), "bias": mx.array([b, -b])})
    return model


@pytest.fixture
def known_key(monkeypatch):
    """The same noise at every run."""
    keys = iter(range(10**6))
    from mlx_bulwark import key_from_seed

    monkeypatch.setattr(module, "random_key", lambda: key_from_seed(next(keys)))


def test_radii_and_abstentions_are_those_of_the_counts(known_key):
    """The model's own votes, recounted, give by SciPy what was returned."""
    seen = []

    def recording(x):
        seen.append(np.array(x[:, 0]))
        return sign(x)

    smooth = Smooth(recording, 2, 0.5)
    found = smooth.certify(np.array([[0.4], [0.02], [-1.0]]), n0=50, n=1000, alpha=0.01, batch_size=300)
    draws = np.concatenate(seen)
    assert len(draws) == 3 * 1050
    for i, x in enumerate((0.4, 0.02, -1.0)):
        # Batches of the next input begin before the last of this one is read: find them by their mean.
        assert found.draws[i] == 1000
        p = stats.beta.ppf(0.01, found.votes[i], 1001 - found.votes[i])
        assert found.lower_bound[i] == pytest.approx(p)
        assert found.prediction[i] == (ABSTAIN if p <= 0.5 else int(x < 0))
        assert found.radius[i] == pytest.approx(max(0.0, 0.5 * stats.norm.ppf(p)) if p > 0.5 else 0.0)
    assert found.prediction.tolist() == [0, ABSTAIN, 1]
    assert (found.invalid == 0).all()


def test_votes_are_those_of_the_noise(known_key):
    found = Smooth(sign, 2, 0.5).certify([[0.3]] * 20, n=20_000, batch_size=20_000)
    deviation = (found.votes - 20_000 * stats.norm.cdf(0.6)) / math.sqrt(
        20_000 * stats.norm.cdf(0.6) * stats.norm.sf(0.6)
    )
    assert np.abs(deviation).max() < 4
    assert 0.4 < deviation.std() < 1.7
    assert len(set(found.votes.tolist())) > 10  # each input has noise of its own


@pytest.mark.slow
def test_a_linear_classifier_is_certified_to_its_true_radius(known_key):
    """1,000 inputs at n = 1e5: at most 5 radii too large at alpha = .001 (with this key), median within 10 %."""
    sigma, rng = 0.5, np.random.default_rng(0)
    true = sigma * rng.uniform(0.25, 3.5, 1000)
    classes = rng.integers(0, 2, 1000)
    first = nn.Linear(3, 1, bias=False)
    w = np.array(first.weight)[0].astype(np.float64)
    plane = rng.standard_normal((1000, 3))
    distance = np.where(classes == 0, true, -true) - plane @ w / np.linalg.norm(w)
    x = (plane + distance[:, None] * w / np.linalg.norm(w)).astype(np.float32)
    model = nn.Sequential(first, sign)
    found = Smooth(model, 2, sigma, exact_first_layer=True).certify(x, n=100_000, batch_size=100_000)
    # 100 votes name the wrong class of the nearest inputs nearly 2 times in 100: then there is no radius
    assert ((found.prediction == classes) | (found.prediction == ABSTAIN)).all()
    assert (found.prediction == ABSTAIN).sum() <= 10
    assert (found.radius > true).sum() <= 5
    assert 0.9 <= np.median(found.radius / true) <= 1


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_many_dimensions_and_a_plane_that_is_not_an_axis(known_key, norm):
    """The true radius of a plane is its L2 distance; in L1 its distance by the largest weight."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal(12)
    x = rng.standard_normal(12)
    x += w * (0.8 - x @ w) / (w @ w)
    found = Smooth(linear_model(w), 2, 0.5, norm=norm).certify(x[None], n=20_000)
    true = 0.8 / np.linalg.norm(w) if norm == "l2" else 0.8 / np.abs(w).max()
    assert found.prediction[0] == 0
    assert 0.5 * true * (norm == "l2") < found.radius[0] <= true


def test_l1_against_exact_overlaps_of_boxes(known_key):
    """A box classifier: its probability under uniform noise is a product of overlaps, in closed form."""
    lam = math.sqrt(3) * 0.4
    low, high = np.array([-0.5, -0.9]), np.array([0.3, 1.1])

    def inside(x):
        hit = ((x >= mx.array(low.astype(np.float32))) & (x <= mx.array(high.astype(np.float32)))).all(axis=1)
        return mx.stack([~hit, hit], axis=1).astype(mx.float32)

    def overlap(x):
        return np.prod(np.clip(np.minimum(high, x + lam) - np.maximum(low, x - lam), 0, None) / (2 * lam))

    points = np.array([[-0.1, 0.1], [0.2, 0.3], [1.2, 0.0], [0.0, 2.0]])
    found = Smooth(inside, 2, 0.4, norm="l1").certify(points, n=50_000, batch_size=50_000)
    for x, prediction, radius, votes in zip(points, found.prediction, found.radius, found.votes, strict=True):
        p = overlap(x)
        if prediction == ABSTAIN:
            assert abs(p - 0.5) < 0.02
            continue
        true = p if prediction == 1 else 1 - p
        assert abs(votes / 50_000 - true) < 4.5 * math.sqrt(true * (1 - true) / 50_000) + 1e-9
        assert 0.97 * 2 * lam * (true - 0.5) - 0.02 < radius <= 2 * lam * (true - 0.5)
        for direction in np.vstack([np.eye(2), -np.eye(2), [[0.5, 0.5], [-0.3, 0.7]]]):
            there = overlap(x + radius * 0.999 * direction)
            assert (there > 0.5) == (prediction == 1)


def test_the_exact_first_layer_has_the_same_votes(known_key):
    """Both ways estimate one probability; W of less than full rank and unequal scales."""
    mx.random.seed(0)
    first, last = nn.Linear(40, 6), nn.Linear(6, 3)
    w = np.array(first.weight) * np.array([[1], [10], [0.1], [1], [1], [1]])
    w[5] = w[0] + w[3]
    first.weight = mx.array(w.astype(np.float32))
    model = nn.Sequential(first, nn.ReLU(), last)
    x = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    n = 20_000
    plain = Smooth(model, 3, 0.7).certify(x, n=n, batch_size=n)
    exact = Smooth(model, 3, 0.7, exact_first_layer=True).certify(x, n=n, batch_size=n)
    assert (plain.prediction == exact.prediction).all()
    p = (plain.votes + exact.votes) / (2 * n)
    assert (np.abs(plain.votes - exact.votes) < 4.5 * np.sqrt(2 * n * p * (1 - p)) + 3).all()
    assert (p < 0.999).any()


def test_exact_first_layer_and_isotropic_noise_are_not_the_same():
    """The trap: noise in the output has the covariance of W."""
    w = np.diag([3.0, 0.1, 1.0])[:2]
    source = Smooth(nn.Sequential(nn.Linear(3, 2)), 2, 0.5, exact_first_layer=True)._source
    source._layers[0].weight = mx.array(w.astype(np.float32))
    source.refresh()
    factor = np.array(source._factor)
    np.testing.assert_allclose(factor.T @ factor, 0.25 * w @ w.T, atol=1e-6)


def test_training_between_two_calls_is_seen(known_key):
    model = linear_model(np.array([1.0, 0.0, 0.0]))
    for exact in (False, True):
        smooth = Smooth(nn.Sequential(model), 2, 0.3, exact_first_layer=exact)
        assert smooth.predict([[1.0, 0.0, 0.0]]).tolist() == [0]
        model.weight *= -1
        assert smooth.predict([[1.0, 0.0, 0.0]]).tolist() == [1]
        model.weight *= -1


def test_nan_is_a_vote_against_every_class(known_key):
    def sometimes(x):
        logits = mx.stack([mx.ones_like(x[:, 0]), mx.zeros_like(x[:, 0])], axis=1)
        return mx.where(x[:, :1] > 1.0, math.nan, logits)

    found = Smooth(sometimes, 2, 1.0).certify([[0.0], [-9.0], [9.0]], n=1000)
    assert found.invalid[0] + found.votes[0] == 1000
    assert 100 < found.invalid[0] < 220
    assert found.radius[0] == pytest.approx(
        stats.norm.ppf(stats.beta.ppf(0.001, found.votes[0], 1001 - found.votes[0]))
    )
    assert found.prediction.tolist() == [0, 0, ABSTAIN]
    assert found.invalid.tolist()[1:] == [0, 1000]
    assert Smooth(sometimes, 2, 1.0).predict([[0.0], [9.0], [1.0]]).tolist() == [0, ABSTAIN, ABSTAIN]


def test_predict_abstains_as_the_binomial_test_says(known_key):
    x = np.linspace(-0.2, 0.2, 21)[:, None]
    found = Smooth(sign, 2, 1.0).predict(x, n=1000, alpha=0.001)
    assert found[0] == 1
    assert found[-1] == 0
    assert found[10] == ABSTAIN
    assert ((found == ABSTAIN) | (found == (x[:, 0] < 0))).all()


# Early ends


def test_looks_keep_the_guarantee(known_key):
    """Violations of 1,000 certificates with 6 looks at alpha = .05: not more than allowed, with a target and without.

    The true class probability is such that radii are exceeded by chance. 80 or more of 1,000 has probability 3e-5.
    """
    true = 0.3
    first = nn.Linear(2, 1)
    first.update({"weight": mx.array([[1.0, 0.0]]), "bias": mx.zeros(1)})
    smooth = Smooth(nn.Sequential(first, sign), 2, 1.0, exact_first_layer=True)
    for target in (None, 0.25):
        found = smooth.certify(
            np.full((1000, 2), true), n0=1, n=640, alpha=0.05, batch_size=640, looks=6, target_radius=target
        )
        wrong = ((found.radius > true) & (found.prediction == 0)) | (found.prediction == 1)
        assert wrong.sum() < 80


def test_ends_early_with_a_target_and_where_it_is_hopeless(known_key):
    smooth = Smooth(sign, 2, 0.5)
    x = [[2.0], [0.52], [0.0], [0.01]]
    found = smooth.certify(x, n=100_000, batch_size=20_000, target_radius=0.5)
    assert found.radius[0] >= 0.5
    assert found.draws[0] == 3125
    assert found.draws[1] > found.draws[0]
    assert found.draws[2] == 3125  # 1/2 is far from what 0.5 needs
    full = smooth.certify(x, n=100_000, batch_size=20_000)
    assert full.draws.tolist() == [100_000] * 4
    with_looks = smooth.certify([[-0.05]], n0=1, n=100_000, batch_size=20_000, looks=8)
    assert with_looks.draws[0] in (100_000, 782, 1563, 3125, 6250, 12_500, 25_000, 50_000)
    assert smooth.predict([[2.0]], n=100_000, looks=[100, 100_000]).tolist() == [0]


def test_a_target_out_of_reach_is_refused():
    smooth = Smooth(sign, 2, 0.5)
    with pytest.raises(ValueError, match=r"\[certify\] n must be at least \d+ to certify target_radius 2"):
        smooth.certify([[1.0]], n=1000, target_radius=2.0)


# Noise


def test_no_counter_serves_twice(monkeypatch):
    """Every batch of every decision, of predict and certify, n0 and n, has blocks of its own under one key."""
    taken = []
    noisy_copies = module.InputNoise.logits

    def recording(self, state, m, key, counter):
        taken.append((tuple(key.tolist()), int(counter[0].item()), self.blocks(m, state)))
        return noisy_copies(self, state, m, key, counter)

    monkeypatch.setattr(module.InputNoise, "logits", recording)
    smooth = Smooth(sign, 2, 0.5)
    x = np.zeros((3, 7), np.float32)
    smooth.certify(x, n0=10, n=1000, batch_size=300, looks=3)
    smooth.predict(x, n=500, batch_size=200)
    assert len({key for key, _, _ in taken}) == 1
    ends = sorted((start, start + blocks) for _, start, blocks in taken)
    assert len(ends) >= 3 * 6
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def test_keys_are_secret_and_fresh():
    a, b = Smooth(sign, 2, 0.5), Smooth(sign, 2, 0.5)
    assert a._key.tolist() != b._key.tolist()
    assert str(a._key.tolist()[0]) not in repr(a)
    for f in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="secret key"):
            f(a)


def test_a_forked_process_has_noise_of_its_own(monkeypatch):
    smooth = Smooth(sign, 2, 0.5)
    before = smooth._key.tolist()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    smooth.predict([[1.0]], n=10)
    assert smooth._key.tolist() != before


def test_counters_end_before_they_repeat():
    smooth = Smooth(sign, 2, 0.5)
    before, smooth._counter = smooth._key.tolist(), (1 << 64) - 1
    smooth.predict([[1.0]], n=10)
    assert smooth._key.tolist() != before


# Models


class Fragile(nn.Module):
    """Has dropout, which would double its outputs, and refuses to be trained."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.9)
        self.inner = nn.Linear(1, 2)

    def __call__(self, x):
        assert not self.training
        return self.dropout(self.inner(x))


def test_modules_run_in_evaluation_mode_and_get_their_own_back():
    model = Fragile()
    model.train()
    model.inner.eval()
    Smooth(model, 2, 0.5).certify([[0.0]], n=10)
    assert model.training
    assert model.dropout.training
    assert not model.inner.training
    with pytest.raises(ValueError, match="must return"):
        Smooth(model, 3, 0.5).certify([[0.0]], n=10)
    assert model.training


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_model_gets_copies_of_the_input_s_dtype(dtype):
    seen = []

    def model(x):
        seen.append((x.dtype, x.shape))
        return sign(x)

    found = Smooth(model, 2, 0.5).certify(mx.ones((1, 2), dtype), n0=8, n=100, batch_size=64)
    assert found.prediction.tolist() == [0]
    assert seen == [(dtype, (8, 2)), (dtype, (64, 2)), (dtype, (36, 2))]


def test_clipping_and_the_grid_belong_to_the_classifier():
    seen = []

    def model(x):
        seen.append(np.array(x))
        return sign(x - 0.5)

    Smooth(model, 2, 5.0, bounds=(0, 1), levels=5).predict([[0.7, 0.1]], n=100)
    assert set(np.unique(seen[0])) == {0, 0.25, 0.5, 0.75, 1}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Smooth(sign, 1, 0.5), "num_classes must"),
        (lambda: Smooth(sign, 2.0, 0.5), "num_classes must"),
        (lambda: Smooth(sign, 2, 0.0), "sigma must"),
        (lambda: Smooth(sign, 2, -1.0), "sigma must"),
        (lambda: Smooth(sign, 2, math.nan), "sigma must"),
        (lambda: Smooth(sign, 2, math.inf), "sigma must"),
        (lambda: Smooth(sign, 2, 0.5, norm="linf"), "norm must"),
        (lambda: Smooth(sign, 2, 0.5, bounds=(1, 0)), "bounds must"),
        (lambda: Smooth(sign, 2, 0.5, bounds=3), "bounds must"),
        (lambda: Smooth(sign, 2, 0.5, levels=16), "levels must come with bounds"),
        (lambda: Smooth(sign, 2, 0.5, bounds=(0, 1), levels=1), "levels must"),
        (lambda: Smooth(sign, 2, 0.5, exact_first_layer=True), "exact_first_layer must"),
        (lambda: Smooth(nn.Sequential(nn.Linear(2, 2)), 2, 0.5, exact_first_layer=True), "fewer outputs than inputs"),
        (
            lambda: Smooth(nn.Sequential(nn.Linear(3, 2)), 2, 0.5, bounds=(0, 1), exact_first_layer=True),
            "neither clipped nor rounded but has bounds",
        ),
        (lambda: Smooth(nn.Sequential(nn.Linear(3, 2)), 2, 0.5, norm="l1", exact_first_layer=True), "has norm='l1'"),
    ],
)
def test_what_cannot_be_smoothed(make, words):
    with pytest.raises(ValueError, match=rf"\[Smooth\] .*{words}"):
        make()


def test_a_model_must_be_callable():
    with pytest.raises(TypeError, match="callable"):
        Smooth(3, 2, 0.5)


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        ([[0.5]], {"n": 0}, "n must"),
        ([[0.5]], {"n": 1.5}, "n must"),
        ([[0.5]], {"n": 2**31}, "n must be at most"),
        ([[0.5]], {"n0": 0}, "n0 must"),
        ([[0.5]], {"batch_size": 0}, "batch_size must"),
        ([[0.5]], {"alpha": 1.0}, "alpha must"),
        ([[0.5]], {"target_radius": 0.0}, "target_radius must"),
        ([0.5], {}, "batch of inputs"),
        (np.ones((1, 1), int), {}, "floating array"),
        (mx.ones((1, 1), mx.int32), {}, "float32, float16 or bfloat16"),
        ([[0.5], [math.nan], [math.inf]], {}, "2 values that are not, first in input 1"),
        ([[0.5], [1.5]], {}, r"within the bounds \(0.0, 1.0\) but has 1 values that are not, first in input 1"),
        ([[-0.01]], {}, "within the bounds"),
    ],
)
def test_wrong_arguments_are_refused_before_a_draw(x, options, words):
    def never(x):
        raise AssertionError("drawn")

    with pytest.raises(ValueError, match=rf"\[certify\] .*{words}"):
        Smooth(never, 2, 0.5, bounds=(0, 1)).certify(x, **options)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda x: mx.zeros((len(x), 3)),
        lambda x: mx.zeros((len(x) + 1, 2)),
        lambda x: mx.zeros(len(x)),
        lambda x: mx.zeros((len(x), 2), mx.int32),
        lambda x: np.zeros((len(x), 2)),
        lambda x: None,
    ],
)
def test_outputs_that_are_no_logits_are_refused(outputs):
    with pytest.raises(ValueError, match=r"\[Smooth\] model must return floating logits of shape \(100, 2\)"):
        Smooth(outputs, 2, 0.5).certify([[0.5]])


def test_no_inputs_have_no_certificates():
    found = Smooth(sign, 2, 0.5).certify(np.zeros((0, 3)))
    assert [len(column) for column in found] == [0] * 6
    assert found.prediction.dtype == np.int64
    assert Smooth(sign, 2, 0.5).predict(np.zeros((0, 3))).shape == (0,)


def test_memory_follows_the_batch_and_not_n():
    model = nn.Sequential(nn.Linear(1000, 10), nn.Linear(10, 2))
    peaks = []
    for n in (4_000, 20_000):
        smooth = Smooth(model, 2, 0.5)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        smooth.certify(np.ones((2, 1000), np.float32), n=n, batch_size=1000)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < 100_000_000  # noise of all 40,000 copies would be 160 MB
