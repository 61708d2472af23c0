"""What the samplers draw, by chi-square: under other keys each such test would fail once in 10,000 runs."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_bulwark.privacy import sampling
from mlx_bulwark.privacy.batches import UnitRows, pack
from mlx_bulwark.privacy.sampling import (
    CyclicPoissonSampler,
    FullSampler,
    PoissonSampler,
    ShuffleSampler,
)
from scipy import stats


def engine(N=1000, batch_size=50, **more):
    more = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **more}
    return bw.PrivacyEngine(N, batch_size=batch_size, **more)


class Words:
    """Fresh words of a key, as the engine gives them."""

    def __init__(self):
        self.key, self.counter = sampling.random_key(), 0

    def __call__(self, n):
        words = bw.random_bits((n,), self.key, self.counter, domain="poisson")
        self.counter += bw.bit_blocks_used((n,))
        return words


def usual(statistic, degrees):
    """Tell whether a chi-square statistic lies within both tails of 1 / 20,000."""
    return 5e-5 < stats.chi2.cdf(statistic, degrees) < 1 - 5e-5


def chi_square(counts, expected):
    return ((np.asarray(counts) - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("N", [0, 1, 31, 33, 1009])
@pytest.mark.parametrize("q", [1e-9, 0.01, 0.5, 1 - 1e-9, 1.0])
def test_poisson_of_any_size(backend, N, q):
    units = PoissonSampler(N, q).draw(0, Words())
    assert units.dtype == np.int64
    assert (np.diff(units) > 0).all()
    assert ((units >= 0) & (units < N)).all()
    assert len(units) == (N if q > 0.9 else 0) or q in (0.01, 0.5)


def test_cyclic_groups_are_a_fixed_uniform_partition():
    N, b = 3000, 8
    sampler = CyclicPoissonSampler(N, 0.05, b)
    assert usual(chi_square(np.bincount(sampler.groups, minlength=b), N / b), b - 1)
    assert (sampler.groups == CyclicPoissonSampler(N, 0.05, b, sampler.seed).groups).all()
    assert (sampler.groups != CyclicPoissonSampler(N, 0.05, b).groups).any()
    # a unit more leaves the others where they are: the partition is as private as its definition
    assert (CyclicPoissonSampler(N + 1, 0.05, b, sampler.seed).groups[:N] == sampler.groups).all()
    # neighbours do not choose together
    pairs = np.bincount(sampler.groups[:-1:2] * b + sampler.groups[1::2], minlength=b * b)
    assert usual(chi_square(pairs, N / 2 / b**2), b**2 - 1)


def test_cyclic_draws_from_its_group_at_b_times_the_rate():
    N, q, b, T = 400, 0.05, 8, 1600
    sampler, words = CyclicPoissonSampler(N, b * q, b), Words()
    counts, sizes = np.zeros(N), []
    for t in range(T):
        units = sampler.draw(t, words)
        assert (sampler.groups[units] == t % b).all()
        counts[units] += 1
        sizes.append((len(units), (sampler.groups == t % b).sum()))
    p, n = b * q, T / b
    assert usual((((counts - n * p) ** 2) / (n * p * (1 - p))).sum(), N)
    sizes = np.array(sizes)
    assert usual(((sizes[:, 0] - sizes[:, 1] * p) ** 2 / (sizes[:, 1] * p * (1 - p))).sum(), T)
    assert stats.norm.cdf(abs(sizes[:, 0].mean() - N * q) / np.sqrt(N * q * (1 - p) / T)) < 1 - 5e-5


def test_shuffle_is_a_permutation_an_epoch():
    sampler = ShuffleSampler(103, 10)
    assert sampler.steps_per_epoch == 11
    epochs = [np.concatenate([sampler.draw(11 * e + i, None) for i in range(11)]) for e in range(3)]
    assert all((np.sort(e) == np.arange(103)).all() for e in epochs)
    assert (epochs[0] != epochs[1]).any()
    assert [len(sampler.draw(i, None)) for i in range(9, 12)] == [10, 3, 10]
    # a resumed run goes on within the epoch, and so does one that goes back
    again = ShuffleSampler(103, 10, sampler.seed)
    assert all((again.draw(t, None) == sampler.draw(t, None)).all() for t in (15, 3, 16))


def test_shuffles_are_uniform():
    # every unit at every place, and every order of four, alike
    n, epochs = 12, 2000
    sampler = ShuffleSampler(n, n)
    orders = np.array([sampler.draw(e, None) for e in range(epochs)])
    places = np.array([np.bincount(orders[:, i], minlength=n) for i in range(n)])
    # with both margins fixed the sum is (n - 1) / n of a chi-square table's, on (n - 1)^2 degrees of freedom
    assert usual(chi_square(places, epochs / n) * (n - 1) / n, (n - 1) ** 2)
    four = [tuple(o[o < 4]) for o in orders]
    counts = list({p: four.count(p) for p in set(four)}.values())
    assert len(counts) == 24
    assert usual(chi_square(counts, epochs / 24), 23)


def test_rows_of_units_are_chosen_uniformly():
    words, rows = Words(), UnitRows(["b", "a", "b", "b", "c", "b", "b"], 7, 2)
    seen = []
    for _ in range(2000):
        chosen, counts = rows.choose(np.array([0, 1, 2]), words)
        assert counts.tolist() == [1, 2, 1]
        assert (chosen[0], chosen[3]) == (1, 4)
        seen.append(tuple(chosen[1:3]))
    counts = [seen.count(c) for c in set(seen)]
    assert len(counts) == 10
    assert usual(chi_square(counts, 200), 9)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 4), st.data())
def test_no_unit_gives_more_rows_than_it_may(ids, max_rows, data):
    rows = UnitRows(ids, len(ids), max_rows)
    names, sizes = np.unique(ids, return_counts=True)
    units = np.array(sorted(data.draw(st.sets(st.integers(0, len(names) - 1)))), np.int64)
    chosen, counts = rows.choose(units, Words())
    assert counts.tolist() == np.minimum(sizes[units], max_rows).tolist()
    assert len(set(chosen.tolist())) == len(chosen)
    assert (np.array(ids)[chosen] == np.repeat(names[units], counts)).all()


@given(st.lists(st.integers(1, 7), max_size=60), st.integers(7, 30))
def test_pieces_hold_whole_units(counts, capacity):
    counts = np.array(counts, np.int64)
    pieces = pack(counts, capacity)
    assert [u for a, b in pieces for u in range(a, b)] == list(range(len(counts)))
    assert all(counts[a:b].sum() <= capacity for a, b in pieces)
    assert len(pieces) <= 1 or all(b > a for a, b in pieces)
    assert all(counts[a : b + 1].sum() > capacity for a, b in pieces[:-1])  # and none is smaller than it must be


def test_full_is_everybody():
    assert FullSampler(5).draw(3, None).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"sampling": "poison"}, "sampling must be one of 'poisson'"),
        ({"sampling": "cyclic_poisson"}, "cycle_length must be given"),
        ({"cycle_length": 4}, "cycle_length must be given"),
        ({"sampling": "cyclic_poisson", "cycle_length": 0}, "cycle_length must be a positive"),
        ({"sampling": "cyclic_poisson", "cycle_length": 1.5}, "cycle_length must be a positive whole"),
        ({"sampling": "cyclic_poisson", "cycle_length": 21}, "cycle_length must be at most 1 / sample_rate = 20"),
        ({"sampling": "shuffle", "batch_size": 50.5}, "batch_size must be a whole number"),
        ({"sampling": "shuffle", "batch_size": 0.001}, "batch_size must be a whole number"),
        ({"sampling": "full"}, "sample_rate must be 1"),
        ({"batch_size": None}, "sample_rate or batch_size"),
    ],
)
def test_refused(more, says):
    with pytest.raises(ValueError, match=says):
        engine(**more)


def test_seeds_are_not_shown():
    sampler = ShuffleSampler(10, 5)
    assert str(sampler.seed.tolist()[0]) not in repr(sampler)
    assert isinstance(sampler.seed, mx.array)


# Engines


def test_shuffled_epochs_are_unsampled_gaussians():
    # published value of dp-accounting 0.6: sigma = 1, ten epochs, delta = 1e-5
    e = engine(sampling="shuffle")
    e._books.steps = 200
    assert e.epsilon(1e-5) == pytest.approx(17.8566, abs=1e-4)
    assert e.adjacency == "replace one example by zeros (zero-out)"
    e._books.steps = 181  # an epoch begun is an epoch spent
    assert e.epsilon(1e-5) == pytest.approx(17.8566, abs=1e-4)
    e._books.steps = 180
    assert e.epsilon(1e-5) < 17


def test_shuffling_is_accounted_under_zero_out_adjacency():
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    theirs = PLDAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_SPECIAL)
    theirs.compose(dp.SelfComposedDpEvent(dp.GaussianDpEvent(3.0), 7))
    e = engine(sampling="shuffle", noise_multiplier=3.0)
    e._books.steps = 140
    assert e.epsilon(1e-6) == pytest.approx(theirs.get_epsilon(1e-6), rel=1e-4)


def test_cyclic_poisson_is_accounted_by_group():
    # published value of dp-accounting 0.6: sigma = 1, q = 0.01, 1000 steps, 8 groups, delta = 1e-5
    e = bw.PrivacyEngine(
        10_000, sample_rate=0.01, sampling="cyclic_poisson", cycle_length=8, noise_multiplier=1.0, max_grad_norm=1.0
    )
    e._books.steps = 1000
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.08, dp.GaussianDpEvent(1.0)), 125)
    assert e.epsilon(1e-5) == pytest.approx(PLDAccountant().compose(event).get_epsilon(1e-5), rel=1e-6)
    assert e.epsilon(1e-5) == pytest.approx(6.2284, abs=1e-3)


def test_full_batches_are_unsampled():
    e = bw.PrivacyEngine(100, sampling="full", noise_multiplier=2.0, max_grad_norm=1.0)
    assert e.expected_batch_size == 100
    e._books.steps = 4
    assert e.epsilon(1e-5) == bw.compute_epsilon(2.0, 1.0, 4, 1e-5)


@pytest.mark.parametrize("more", [{"sampling": "shuffle"}, {"sampling": "cyclic_poisson", "cycle_length": 8}])
def test_calibration_knows_the_scheme(more):
    e = bw.PrivacyEngine.for_epsilon(4.0, 1e-5, 1000, steps=50, batch_size=50, max_grad_norm=1.0, **more)
    e._books.steps = 50
    assert 3.99 < e.epsilon() <= 4.0


def test_a_run_across_epochs_counts_both():
    # ten steps from the middle of one epoch to that of the next, at another noise: an example may be in two of them
    from mlx_bulwark.privacy.events import Event, Gaussian, Release, Run, Shuffle, releases_of

    a, b = (Event(Shuffle(10, 10), Gaussian(s, 1.0)) for s in (1.0, 2.0))
    assert releases_of([Run(a, 5), Run(b, 10, 1), Run(a, 5, 2)]) == (Release(1.0, 1.0, 2), Release(1.0, 2.0, 2))
    assert releases_of([Run(a, 5), Run(b, 10), Run(a, 5)]) == (Release(1.0, 1.0, 2),)  # each epoch its least noise
    assert releases_of([Run(a, 20)]) == (Release(1.0, 1.0, 2),)
    assert releases_of([Run(a, 0), Run(b, 10)]) == (Release(1.0, 2.0, 1),)


def train(e, batches, model, compiled):
    optimizer = e.wrap(optim.SGD(0.0))
    step, f = e.compiled_step(model, optimizer, square), e.value_and_grad(model, square)
    for b in batches:
        if compiled:
            mx.eval(step(b), model.state, optimizer.state, e.state)
        else:
            optimizer.update(model, f(model, b)[1])
        yield b


def square(model, x):
    return model(x)[:, 0] ** 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("more", [{"sampling": "shuffle"}, {"sampling": "cyclic_poisson", "cycle_length": 4}])
def test_the_engine_draws_its_scheme(backend, compiled, more):
    N = 103
    e, model = engine(N, 10, **more), nn.Linear(1, 1)
    logical, current = [], []
    for b in train(e, e.batches(np.arange(N, dtype=np.float32)[:, None], steps=26, microbatch_size=6), model, compiled):
        current += np.array(b.data[0])[np.array(b.mask), 0].astype(int).tolist()
        if b.last:
            logical.append(current)
            current = []
    assert e.steps == len(logical) == 26
    for t, drawn in enumerate(logical):
        assert drawn == sorted(set(drawn)) or "cycle_length" not in more
        if "cycle_length" in more:
            assert (e._sampler.groups[drawn] == t % 4).all()
        elif t % 11 == 10:
            assert sorted(i for d in logical[t - 10 : t + 1] for i in d) == list(range(N))


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_not_the_scheme_is_refused(backend, compiled):
    e, model = engine(20, 10, sampling="shuffle"), nn.Linear(1, 1)
    x = np.zeros((20, 1), np.float32)
    ahead = list(e.batches(x, steps=3))
    for _ in train(e, e.batches(x, steps=1), model, compiled):
        pass
    with pytest.raises(bw.PrivacyError, match=r"batch must be that of step 1, .* but is that of step 0: Shuffle"):
        list(train(e, ahead, model, compiled))
    for _ in train(e, ahead[1:], model, compiled):
        pass
    assert e.steps == 3
    with pytest.raises(bw.PrivacyError, match="an array of your own"):
        e.value_and_grad(model, square)(model, mx.array(x))


def test_a_broken_off_loop_goes_on_where_it_stopped():
    e, model = engine(40, 10, sampling="shuffle"), nn.Linear(1, 1)
    x, seen = np.arange(40, dtype=np.float32)[:, None], []
    for stop in (2, 2):  # a batch that was drawn and not used is drawn again
        for i, b in enumerate(e.batches(x, steps=4)):
            if i == stop:
                break
            seen += np.array(b.data[0])[np.array(b.mask), 0].tolist()
            list(train(e, [b], model, False))
    assert sorted(seen) == x[:, 0].tolist()


def test_a_resumed_run_is_accounted_with_its_new_order(tmp_path):
    # seven steps of an epoch of ten, then eight of another order: an example may be in one of the first, in one of the
    # three that end the epoch, and in one of the five after it
    x, model = np.zeros((100, 1), np.float32), nn.Linear(1, 1)
    e = engine(100, 10, sampling="shuffle")
    list(train(e, e.batches(x, steps=7), model, False))
    e.save_state(tmp_path / "engine.json")
    resumed = engine(100, 10, sampling="shuffle")
    resumed.load_state(tmp_path / "engine.json")
    list(train(resumed, resumed.batches(x, steps=8), model, False))
    assert resumed.steps == 15
    assert resumed.epsilon(1e-5) == bw.compute_epsilon(1.0, 1.0, 3, 1e-5)
    whole = engine(100, 10, sampling="shuffle")
    list(train(whole, whole.batches(x, steps=15), model, False))
    assert whole.epsilon(1e-5) == bw.compute_epsilon(1.0, 1.0, 2, 1e-5)
