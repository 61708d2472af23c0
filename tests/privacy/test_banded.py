"""Banded noise: its strategy, its covariance over the very normals, its accounting, and how a run goes on."""

import json
import math
import os

import dp_accounting as dp
import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from mlx_bulwark.privacy import schedules
from mlx_bulwark.privacy.banded import inverse, prefix_error, square_root, strategy, taps
from mlx_bulwark.privacy.events import Banded, CyclicPoisson, Event, Full, Poisson, Shuffle
from scipy.linalg import toeplitz
from scipy.optimize import minimize
from training import engine, no_loss, train

PARAMETERS = {"layers.0.bias": (40,), "layers.0.weight": (40, 6), "layers.1.bias": (3,), "layers.1.weight": (3, 40)}


def matrix(coefficients, T):
    return np.tril(toeplitz(np.concatenate([coefficients, np.zeros(max(0, T - len(coefficients)))])[:T]))


def banded_engine(T=12, bands=4, **changed):
    settings = {"noise": "banded", "steps": T, "batch_size": 8, "sampling": "cyclic_poisson", "cycle_length": 4}
    return engine(**{**settings, "bands": bands, **changed})


def normals(key, T):
    """The normals of each step, [T, parameters], leaves in the order of their paths."""
    out = []
    for t in range(T):
        z = bw.add_gaussian({p: mx.zeros(s) for p, s in PARAMETERS.items()}, 1.0, key, t << 40)
        out.append(np.concatenate([np.array(z[p]).ravel() for p in sorted(PARAMETERS)]))
    return np.array(out, np.float64)


def sorted_moves(moves):
    """`train` orders parameters as the model does: weight before bias."""
    sizes = {
        p: math.prod(PARAMETERS[p]) for layer in (0, 1) for p in (f"layers.{layer}.weight", f"layers.{layer}.bias")
    }
    ends = np.cumsum([0, *sizes.values()])
    pieces = {p: moves[:, a:b] for p, a, b in zip(sizes, ends, ends[1:], strict=False)}
    return np.concatenate([pieces[p] for p in sorted(pieces)], axis=1)


@pytest.mark.parametrize("compiled", [False, True])
def test_released_noise_is_the_inverse_times_the_very_normals(backend, compiled):
    T = 12
    e = banded_engine(T, noise_multiplier=1.5, max_grad_norm=0.2)
    z = normals(e.state["noise"]["key"], T)
    moves = sorted_moves(train(e, T, compiled=compiled, loss=no_loss)) * 8 / (1.5 * 0.2)
    C = matrix(e.event.mechanism.coefficients, T)
    np.testing.assert_allclose(moves, np.linalg.solve(C, z), atol=2e-5)


def test_the_covariance_is_that_of_the_inverse():
    # Whitened by C the noise is standard normal: sum of squares chi-squared, two-sided at 1e-6
    from scipy import stats

    T = 12
    e = banded_engine(T)
    white = matrix(e.event.mechanism.coefficients, T) @ (train(e, T, loss=no_loss) * 8)
    assert 5e-7 < stats.chi2.cdf((white**2).sum(), white.size) < 1 - 5e-7
    r = np.corrcoef(white)
    np.fill_diagonal(r, 0)
    assert abs(r).max() * math.sqrt(white.shape[1]) < 5.5
    # and it is correlated before: what is added over all steps is less than independent noise would be
    ours = np.std((train(banded_engine(T), T, loss=no_loss) * 8).sum(0)) / math.sqrt(T)
    assert ours < 0.85


def test_taps_reproduce_the_noise_to_float32():
    c = strategy(4, 200)
    d = inverse(np.array(c), 200)
    t = taps(c, 200)
    assert abs(d[len(t) :]).sum() <= 2.0**-27 * d[0]
    np.testing.assert_array_equal(d[: len(t)], t)


@pytest.mark.parametrize(("bands", "T"), [(2, 8), (3, 16), (4, 24), (1, 5), (9, 9)])
def test_strategy_is_the_optimum_of_a_dense_search(bands, T):
    prefix = np.tril(np.ones((T, T)))

    def error(tail):
        c = np.concatenate([[1.0], tail])
        B = prefix @ np.linalg.inv(matrix(c, T))
        return math.sqrt((B**2).sum() / T) * np.linalg.norm(c)

    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 20_000}
    starts = (square_root(bands), np.eye(bands)[0] + 0.01) if bands > 1 else ()
    found = [minimize(error, c[1:] / c[0], method="Nelder-Mead", options=options).fun for c in starts]
    dense = min(found, default=error([]))
    ours = np.array(strategy(bands, T))
    assert np.linalg.norm(ours) == pytest.approx(1, abs=1e-12)
    assert prefix_error(ours, T) == pytest.approx(error(ours[1:] / ours[0]), rel=1e-9)
    assert prefix_error(ours, T) == pytest.approx(dense, rel=1e-6)
    assert prefix_error(ours, T) <= prefix_error(square_root(bands), T) * (1 + 1e-12)


def test_strategy_is_close_to_the_best_banded_matrix_of_any_form():
    # All banded matrices with columns of norm at most 1, by a dense float64 search over every entry
    T, bands = 10, 3
    rows, columns = np.nonzero(np.tril(np.ones((T, T))) - np.tril(np.ones((T, T)), -bands))
    prefix = np.tril(np.ones((T, T)))

    def error(entries):
        C = np.zeros((T, T))
        C[rows, columns] = entries
        C /= np.linalg.norm(C, axis=0)
        return (np.linalg.solve(C.T, prefix.T) ** 2).sum() / T

    start = matrix(strategy(bands, T), T)[rows, columns]
    best = math.sqrt(minimize(error, start, method="L-BFGS-B", options={"maxiter": 500}).fun)
    assert best <= prefix_error(np.array(strategy(bands, T)), T) <= 1.05 * best


def test_square_root_coefficients():
    # of 1 / sqrt(1 - x): Fichtenberger, Henzinger and Upadhyay 2023 (arXiv:2202.11205), f(k) = (1 - 1/2k) f(k - 1)
    c = square_root(6)
    np.testing.assert_allclose(c / c[0], [1, 1 / 2, 3 / 8, 5 / 16, 35 / 128, 63 / 256])
    full = matrix(c / c[0], 6)
    np.testing.assert_allclose(full @ full, np.tril(np.ones((6, 6))))


def test_golden_epsilon():
    # Choquette-Choo et al. 2023: ceil(T / b) Poisson-sampled Gaussians of rate b q, not T of rate q (1.8282)
    e = bw.PrivacyEngine(
        10_000, sample_rate=0.01, sampling="cyclic_poisson", cycle_length=8, noise="banded", steps=1000,
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert len(e.event.mechanism.coefficients) == 8
    e._books.steps = 1000
    assert e.epsilon(1e-5) == pytest.approx(6.2284, abs=5e-5)
    theirs = PLDAccountant().compose(dp.PoissonSampledDpEvent(0.08, dp.GaussianDpEvent(1.0)), 125).get_epsilon(1e-5)
    assert e.epsilon(1e-5) == pytest.approx(theirs, rel=1e-9)


def test_calibration():
    e = bw.PrivacyEngine.for_epsilon(
        4.0, 1e-5, 10_000, epochs=10, sample_rate=0.01, sampling="cyclic_poisson", cycle_length=8, noise="banded",
        max_grad_norm=1.0,
    )  # fmt: skip
    e._books.steps = 1000
    assert 3.99 < e.epsilon() <= 4.0


@pytest.mark.parametrize("scheme", [Poisson(0.01), Full(), CyclicPoisson(0.01, 3), Shuffle(10, 5)])
def test_any_other_sampler_gets_the_unamplified_bound(scheme):
    T, c = 20, strategy(4, 20)
    ((rate, sigma, times, _),) = Event(scheme, Banded(2.0, 1.0, c)).releases(0, T)
    assert (rate, times) == (1.0, 1)
    C = matrix(c, T)
    rng = np.random.default_rng(0)
    participations = T if not isinstance(scheme, Shuffle) else 4
    if isinstance(scheme, CyclicPoisson):
        participations = math.ceil(T / 3)
    worst = 0.0
    for _ in range(2000):  # orders and directions of an example's gradients
        when = rng.permutation(T)[:participations]
        signs = rng.choice([-1, 1], participations) if rng.random() < 0.3 else np.ones(participations)
        worst = max(worst, np.linalg.norm(C[:, when] @ signs))
    assert worst <= 2.0 / sigma * (1 + 1e-9)


def test_each_round_of_a_cycle_has_sensitivity_one():
    # participations b steps apart touch disjoint rows: norms add up as of independent Gaussians
    T, b = 21, 5
    C = matrix(strategy(b, T), T)
    for first in range(b):
        columns = C[:, first::b]
        np.testing.assert_allclose(columns.T @ columns, np.diag(np.diag(columns.T @ columns)), atol=1e-15)
        assert np.diag(columns.T @ columns).max() <= 1 + 1e-12


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"max_grad_norm": schedules.constant(1.0)}, "must stay the same in a run"),
        ({"noise_multiplier": schedules.constant(1.0)}, "must stay the same in a run"),
        ({"clipping": "adaptive"}, "must stay the same in a run"),
        ({"steps": None}, "steps must be given"),
        ({"bands": 0}, "bands must"),
        ({"noise": "gaussian"}, "bands must be given with noise='banded' only"),
        ({"noise": "tree", "bands": None}, "noise must be one of"),
        ({"sampling": "poisson", "cycle_length": None, "bands": None}, "bands must be given"),
        ({"noise_key_file": "key"}, "must come with noise='banded' and a ledger"),
    ],
)
def test_refused(more, says):
    with pytest.raises(ValueError, match=says):
        banded_engine(**more)


def test_another_scale_in_mid_run_is_refused():
    e = banded_engine()
    train(e, 2)
    other = Event(e.event.sampling, Banded(1.0, 0.5, e.event.mechanism.coefficients))
    with pytest.raises(bw.PrivacyError, match="must keep its scale"):
        e._books.change_event(other)


def test_other_parameters_in_mid_run_are_refused():
    e = banded_engine()
    train(e, 1, loss=no_loss)
    from mlx_bulwark.privacy.optimizer import ClippedGradients

    with pytest.raises(bw.PrivacyError, match="must stay the same in a run with banded noise"):
        e._release(ClippedGradients(e, {"weight": mx.zeros((2,))}, mx.zeros((0,)), mx.array(0), True))


def test_a_run_goes_on_with_the_same_noise(tmp_path):
    T, files = 10, {"ledger": tmp_path / "ledger", "noise_key_file": tmp_path / "noise.key"}
    first = banded_engine(T, **files)
    assert files["noise_key_file"].stat().st_mode & 0o777 == 0o600
    moves = [train(first, 6, loss=no_loss)]
    key, groups = first.state["noise"]["key"], first._sampler.groups
    first.close()
    second = banded_engine(T, **files)
    assert second.steps == 6
    assert (second._sampler.groups == groups).all()
    assert second._sampling_key.tolist() != first._sampling_key.tolist()
    moves.append(train(second, 4, loss=no_loss, compiled=True))
    noise = sorted_moves(np.concatenate(moves)) * 8
    C = matrix(second.event.mechanism.coefficients, T)
    np.testing.assert_allclose(noise, np.linalg.solve(C, normals(key, T)), atol=2e-5)
    assert [r.steps for r in second.runs] == [10]  # one session, one mechanism
    words = {str(w) for w in key.tolist()}
    assert not any(w in files["ledger"].read_text() for w in words)
    second.save_state(tmp_path / "state.json")
    assert not any(w in (tmp_path / "state.json").read_text() for w in words)


def test_a_run_that_goes_on_has_the_same_parameters(tmp_path):
    from mlx_bulwark.privacy.optimizer import ClippedGradients

    files = {"ledger": tmp_path / "ledger", "noise_key_file": tmp_path / "noise.key"}
    first = banded_engine(10, **files)
    train(first, 2, loss=no_loss)
    first.close()
    assert files["noise_key_file"].stat().st_mode & 0o777 == 0o600
    second = banded_engine(10, **files)
    with pytest.raises(bw.PrivacyError, match="must be those that"):
        second._release(ClippedGradients(second, {"weight": mx.zeros((2,))}, mx.zeros((0,)), mx.array(0), True))


def test_without_its_key_a_run_begins_anew(tmp_path):
    first = banded_engine(10, ledger=tmp_path / "ledger")
    train(first, 5, loss=no_loss)
    first.close()
    second = banded_engine(10, ledger=tmp_path / "ledger")
    train(second, 5, loss=no_loss)
    assert [(r.steps, r.session) for r in second.runs] == [(5, 0), (5, 1)]
    assert second.epsilon(1e-3) == bw.compute_epsilon(1.0, 0.5, 4, 1e-3)  # 2 + 2 rounds, where one run has 3


def test_a_wrong_key_file_is_refused(tmp_path):
    key = tmp_path / "noise.key"
    e = banded_engine(10, ledger=tmp_path / "one", noise_key_file=key)
    train(e, 3, loss=no_loss)
    e.close()
    other = engine(ledger=tmp_path / "two")
    train(other, 2, loss=no_loss)
    other.close()
    with pytest.raises(bw.PrivacyError, match="must be of the run that the ledger ends with"):
        banded_engine(10, ledger=tmp_path / "two", noise_key_file=key)
    os.chmod(key, 0o644)
    with pytest.raises(bw.PrivacyError, match="readable by its owner alone"):
        banded_engine(10, ledger=tmp_path / "one", noise_key_file=key)
    os.chmod(key, 0o600)
    content = json.loads(key.read_text())
    secret = content["key"][0]
    key.write_text(json.dumps({**content, "key": [secret, -1]}))
    with pytest.raises(bw.PrivacyError, match="must be a noise key file") as caught:
        banded_engine(10, ledger=tmp_path / "one", noise_key_file=key)
    assert str(secret) not in str(caught.value)


def test_a_key_file_without_the_steps_of_its_run_is_refused(tmp_path):
    key = tmp_path / "noise.key"
    e = banded_engine(10, ledger=tmp_path / "one", noise_key_file=key)
    e.close()
    e = banded_engine(10, ledger=tmp_path / "one", noise_key_file=key)  # nothing was released
    train(e, 3, loss=no_loss)
    e.close()
    for _ in range(2):  # the refused engine does not hold the ledger
        with pytest.raises(bw.PrivacyError, match="must hold the steps that were taken under"):
            banded_engine(10, ledger=tmp_path / "another", noise_key_file=key)


def test_check_sees_through_the_correlation(backend):
    from training import Net, data, loss_fn

    x, y = data()
    report = banded_engine(20).check(Net(), (mx.array(x[:4]), mx.array(y[:4])), loss_fn)
    assert 0 < report.noise_error < 0.5  # of the smallest leaf: 48 values
