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
