import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from scipy import stats


def engine(N=1000, batch_size=100, **more):
    return bw.PrivacyEngine(N, batch_size=batch_size, noise_multiplier=1.0, max_grad_norm=1.0, **more)


def drawn(batches):
    """Lists of example numbers, one for each logical batch."""
    logical, current = [], []
    for b in batches:
        current += np.array(b.data[0])[np.array(b.mask)].tolist()
        if b.last:
            logical.append(current)
            current = []
    assert not current
    return logical


def test_every_draw_is_whole_and_in_pieces(backend):
    e = engine()
    ids = np.arange(1000)
    batches = e.batches(ids, steps=40, microbatch_size=32)
    sizes = [(b.data[0].shape, b.mask.shape) for b in batches]
    assert set(sizes) == {((32,), (32,))}
    assert len(batches) == 40
    logical = drawn(e.batches(ids, steps=40, microbatch_size=32))
    assert len(logical) == 40
    assert max(len(d) for d in logical) > 64
    assert all(len(set(d)) == len(d) for d in logical)


def test_draws_are_poisson(backend):
    # Each of the three tests below raises a false alarm once in 10,000 runs (the key is random).
    N, q, steps = 500, 0.1, 400
    logical = drawn(engine(N, N * q).batches(np.arange(N), steps=steps))
    counts = np.zeros(N)
    for d in logical:
        counts[d] += 1
    sizes = np.array([len(d) for d in logical])
    chi2 = ((counts - steps * q) ** 2).sum() / (steps * q * (1 - q))
    assert stats.chi2.cdf(chi2, N) == pytest.approx(0.5, abs=0.49995)  # every example is drawn alike
    spread = ((sizes - N * q) ** 2).sum() / (N * q * (1 - q))
    assert stats.chi2.cdf(spread, steps) == pytest.approx(0.5, abs=0.49995)  # sizes are binomial, not fixed
    member = np.array([0 in d for d in logical], float)
    other = np.array([1 in d for d in logical], float)
    r = np.corrcoef(member, other)[0, 1] * np.sqrt(steps)
    assert abs(r) < 3.9  # one example's part says nothing of another's


def test_draws_never_repeat(backend):
    e = engine()
    a, b = drawn(e.batches(np.arange(1000), steps=2)), drawn(e.batches(np.arange(1000), steps=2))
    c = drawn(engine().batches(np.arange(1000), steps=2))
    assert len({tuple(d) for d in [*a, *b, *c]}) == 6


def test_empty_draws_are_steps(backend):
    e = engine(10, 0.01)
    batches = list(e.batches((np.ones((10, 2)), np.arange(10)), steps=20))
    assert len(batches) == 20
    assert all(b.last for b in batches)
    assert sum(int(b.mask.sum()) for b in batches) < 5


def test_sample_rate_one_takes_all(backend):
    logical = drawn(engine(10, 10).batches(mx.arange(10), steps=3, microbatch_size=4))
    assert logical == [list(range(10))] * 3


def test_takes_numpy_and_mlx_of_any_type(backend):
    x, y = np.arange(1000 * 6, dtype=np.float64).reshape(1000, 2, 3)[:, ::-1], mx.arange(1000)
    for b in engine().batches((x, y), steps=2):
        rows = np.array(b.data[1])
        np.testing.assert_array_equal(np.array(b.data[0]), x[rows].astype(np.float32))


def test_planned_steps_are_the_default(backend):
    e = engine(steps=7)
    assert len(e.batches(np.arange(1000))) == 7


def test_refused(backend):
    with pytest.raises(ValueError, match=r"\[batches\] data\[1\] must have 1000 rows but has 999"):
        engine().batches((np.zeros(1000), np.zeros(999)), steps=1)
    with pytest.raises(ValueError, match=r"steps must"):
        engine().batches(np.zeros(1000))
    with pytest.raises(ValueError, match=r"microbatch_size must"):
        engine().batches(np.zeros(1000), steps=1, microbatch_size=-1)
    (batch,) = engine().batches(np.zeros(1000), steps=1)
    with pytest.raises(TypeError, match="passed whole"):
        _ = [*batch]


# Units of several rows


def people(seed=0):
    """Rows of 40 people, who have 1 to 9 each and stand in no order."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 10, 40)
    ids = rng.permutation(np.repeat(np.arange(40), counts))
    return np.array([f"person {i:02d}" for i in ids]), counts


def logical_units(batches, ids):
    """For each logical batch, rows by person; every physical batch must hold people whole."""
    logical, current = [], {}
    for b in batches:
        mask, numbers = np.array(b.mask), np.array(b.units)
        rows = np.array(b.data[0])[mask]
        assert ((numbers >= 0) & (numbers < len(mask))).all()
        of_number = {}
        for row, number in zip(rows, numbers[mask], strict=True):
            of_number.setdefault(number, []).append(int(row))
        people = {}
        for mine in of_number.values():
            (person,) = set(ids[mine])
            people[person] = mine
        assert len(people) == len(of_number)
        assert not set(people) & set(current)
        current.update(people)
        if b.last:
            logical.append(current)
            current = {}
    assert not current
    return logical


@pytest.mark.parametrize("sampling", [{}, {"sampling": "shuffle"}, {"sampling": "cyclic_poisson", "cycle_length": 3}])
def test_people_are_drawn_whole_and_bounded(sampling):
    ids, counts = people()
    e = engine(40, 10, **sampling)
    batches = e.batches(np.arange(len(ids)), units=ids, max_rows_per_unit=4, steps=30, microbatch_size=17)
    assert {b.mask.shape for b in batches} == {(17,)}
    seen = np.zeros(40)
    for drawn in logical_units(batches, ids):
        for person, rows in drawn.items():
            i = int(person[-2:])
            seen[i] += 1
            assert len(rows) == len(set(rows)) == min(4, counts[i])
    assert (seen > 0).all()
    assert e.adjacency.endswith("one unit (all its rows)") or "zeros" in e.adjacency


def test_people_are_drawn_by_a_coin_each_whatever_they_have(backend):
    # chi-square over people, two-sided: a false alarm once in 10,000 runs; the number of rows has no say
    ids, counts = people()
    steps, q = 400, 0.25
    batches = engine(40, 10).batches(np.arange(len(ids)), units=ids, max_rows_per_unit=3, steps=steps)
    seen, rows = np.zeros(40), np.zeros(len(ids))
    for drawn in logical_units(batches, ids):
        for person, mine in drawn.items():
            seen[int(person[-2:])] += 1
            rows[mine] += 1
    chi2 = ((seen - steps * q) ** 2).sum() / (steps * q * (1 - q))
    assert stats.chi2.cdf(chi2, 40) == pytest.approx(0.5, abs=0.49995)
    # and the rows of a person are chosen alike: fixed margins leave (n - 1) degrees of freedom a person
    total, degrees = 0.0, 0
    for i in range(40):
        mine = rows[ids == f"person {i:02d}"]
        if counts[i] > 3:
            p = 3 / counts[i]
            total += ((mine - seen[i] * p) ** 2).sum() / (seen[i] * p * (1 - p)) * (1 - 1 / counts[i])
            degrees += counts[i] - 1
    assert stats.chi2.cdf(total, degrees) == pytest.approx(0.5, abs=0.49995)


def test_copies_are_of_one_unit(backend):
    x = np.arange(1000, dtype=np.float32)[:, None]
    calls = []

    def augment(x, y):
        calls.append(x.shape)
        fraction = (mx.arange(len(x)) + 50 * len(calls)) % 4096 / 8192  # exact beside 999 in float32: no two are equal
        return x + fraction[:, None], y

    e = engine(1000, 20)
    batches = e.batches((x, x[:, 0]), steps=10, augment=augment, multiplicity=4, microbatch_size=50)
    for b in batches:
        mask, numbers = np.array(b.mask), np.array(b.units)[np.array(b.mask)]
        copies, original = np.array(b.data[0])[mask, 0], np.array(b.data[1])[mask]
        assert mask.sum() % 4 == 0
        assert (numbers == np.repeat(np.arange(len(numbers) // 4), 4)).all()
        assert (np.floor(copies) == original).all()
        assert len(set(copies)) == len(copies)
        assert len(set(original)) == len(original) // 4
    assert set(calls) == {(50, 1)}
    assert e.adjacency == "add or remove one example"


def test_copies_of_peoples_rows(backend):
    ids, _ = people()
    batches = engine(40, 10).batches(
        np.arange(len(ids)), units=ids, max_rows_per_unit=3, augment=lambda x: x, multiplicity=2, steps=5
    )
    for b in batches:
        numbers, rows = np.array(b.units)[np.array(b.mask)], np.array(b.data[0])[np.array(b.mask)]
        for number in set(numbers):
            mine = rows[numbers == number]
            assert len(mine) <= 6
            assert len(set(ids[mine])) == 1
            assert sorted(mine) == sorted([*set(mine), *set(mine)])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"units": np.zeros(1000)}, "max_rows_per_unit must be at least 1"),
        ({"units": np.zeros(1000), "max_rows_per_unit": 0}, "max_rows_per_unit must be at least 1"),
        ({"units": np.zeros(1000), "max_rows_per_unit": 2}, "must have 1000 different ids, .* but has 1"),
        ({"units": np.zeros(999), "max_rows_per_unit": 2}, r"units must have shape \[1000\]"),
        ({"max_rows_per_unit": 2}, "max_rows_per_unit must come with units"),
        ({"multiplicity": 2}, "multiplicity must be"),
        ({"multiplicity": 0, "augment": lambda x: x}, "multiplicity must be"),
        ({"unit_reduction": "max"}, "unit_reduction must be"),
        (
            {"units": np.arange(1000), "max_rows_per_unit": 9, "microbatch_size": 8},
            "must hold the 9 rows that one unit",
        ),
    ],
)
def test_units_refused(more, says):
    with pytest.raises(ValueError, match=says):
        engine().batches(np.zeros(1000), steps=1, **more)


def test_an_augmentation_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"augment must return arrays of 136 rows but result 0 has shape \[68\]"):
        next(iter(engine().batches(np.zeros(1000), steps=1, augment=lambda x: x[::2], microbatch_size=136)))
