"""What the samplers draw, by chi-square: each such test raises a false alarm once in 10,000 runs (keys are random)."""

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_bulwark.privacy.batches import UnitRows, pack
from mlx_bulwark.privacy.sampling import (
    CyclicPoissonSampler,
    FullSampler,
    PoissonSampler,
    ShuffleSampler,
    choose,
)
from scipy import stats


class Words:
    """Fresh words of a random key, as the engine gives them."""

    def __init__(self):
        self.key, self.counter = bw.random_key(), 0

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
    sampler, words = CyclicPoissonSampler(N, q, b), Words()
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


def test_choose_is_uniform():
    words = Words()
    drawn = [tuple(choose(6, 3, words)) for _ in range(3000)]
    counts = [drawn.count(c) for c in set(drawn)]
    assert len(counts) == 20
    assert usual(chi_square(counts, 150), 19)
    assert choose(3, 5, words).tolist() == [0, 1, 2]
    assert choose(0, 5, words).tolist() == []


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
    ("cycle_length", "says"), [(0, "cycle_length must be a positive"), (1.5, "whole"), (21, "at most 1 / sample_rate")]
)
def test_cycles_refused(cycle_length, says):
    with pytest.raises(ValueError, match=says):
        CyclicPoissonSampler(1000, 0.05, cycle_length)


def test_seeds_are_not_shown():
    sampler = ShuffleSampler(10, 5)
    assert str(sampler.seed.tolist()[0]) not in repr(sampler)
    assert isinstance(sampler.seed, mx.array)
