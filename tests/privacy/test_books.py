"""Compositions, schedules, the budget's stop, and the saved state."""

import itertools
import json
import math

import dp_accounting as dp
import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from mlx_bulwark.privacy import schedules
from mlx_bulwark.privacy.events import Event, Gaussian, Poisson, Release, Run, composed_epsilon
from scipy import stats
from training import N, Net, data, engine, flat, loss_fn, no_loss, train

Q = 16 / N


def by_dp_accounting(accountant, *parts):
    """Epsilon at 1e-5 of (sample_rate, noise_multiplier, steps)..."""
    theirs = {"pld": PLDAccountant, "rdp": RdpAccountant}[accountant]()
    for rate, sigma, steps in parts:
        theirs.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)), steps)
    return theirs.get_epsilon(1e-5)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_heterogeneous_composition(accountant):
    parts = [(0.02, 1.3, 300), (0.05, 2.0, 100), (0.02, 0.9, 17)]
    ours = composed_epsilon(tuple(Release(*p) for p in parts), 1e-5, accountant)
    assert ours == pytest.approx(by_dp_accounting(accountant, *parts), rel=1e-9)


def test_many_noise_multipliers_are_accounted_tightly_and_not_below():
    sigmas = np.linspace(1.0, 2.0, 24)
    ours = composed_epsilon(tuple(Release(0.02, s, 1) for s in sigmas), 1e-5, "pld")
    # the truth lies between two compositions of six levels, one with more noise everywhere and one with less
    levels = sigmas.reshape(6, 4)
    low = by_dp_accounting("pld", *((0.02, s, 4) for s in levels.max(1)))
    high = by_dp_accounting("pld", *((0.02, s, 4) for s in levels.min(1)))
    assert low < ours < high * 1.005


def test_schedules_have_their_values():
    assert [schedules.constant(2.0)(n) for n in (0, 5)] == [2.0, 2.0]
    assert schedules.exponential(2.0, 0.9)(7) == pytest.approx(2 * 0.9**7)
    assert [schedules.step(1.0, 0.1, 3)(n) for n in (0, 2, 3, 6)] == pytest.approx([1, 1, 0.1, 0.01])
    cosine = schedules.cosine(3.0, 1.0, 8)
    assert [cosine(n) for n in (0, 2, 4, 8, 100)] == pytest.approx([3, 2 + math.sqrt(0.5), 2, 1, 1])


@pytest.mark.parametrize("compiled", [False, True])
def test_scheduled_noise_is_what_is_accounted(backend, compiled):
    # Gradients are zero: a move is noise over the expected batch size. Two-sided at 1e-5 over both halves.
    sigma, norm = schedules.step(1.0, 3.0, 15), schedules.step(0.5, 0.4, 10)
    e = engine(noise_multiplier=sigma, max_grad_norm=norm)
    moves = train(e, 30, compiled=compiled, loss=no_loss, microbatch_size=20) * 16
    for n in (0, 9, 10, 14, 15, 29):
        std = sigma(n) * norm(n)
        assert stats.chi2.cdf((moves[n] ** 2).sum() / std**2, moves.shape[1]) == pytest.approx(0.5, abs=0.5 - 5e-6)
    r = np.corrcoef(moves)
    np.fill_diagonal(r, 0)
    assert abs(r).max() * np.sqrt(moves.shape[1]) < 5.5
    rate = e.sample_rate
    assert [(r.event.mechanism.noise_multiplier, r.event.mechanism.max_grad_norm, r.steps) for r in e.runs] == [
        (1.0, 0.5, 10),
        (1.0, 0.2, 5),
        (3.0, 0.2, 5),
        (3.0, pytest.approx(0.08), 10),
    ]
    assert e.epsilon(1e-5) == pytest.approx(by_dp_accounting("pld", (rate, 1.0, 15), (rate, 3.0, 15)), rel=1e-9)


@pytest.mark.parametrize(("sampling", "cycle"), [("shuffle", None), ("cyclic_poisson", 4)])
def test_a_schedule_spends_the_least_noise_of_each_round(sampling, cycle):
    # every order in which an example may take part: no composition of its own steps spends more, and one as much
    from mlx_bulwark.privacy.events import composed_epsilon, releases_of
    from mlx_bulwark.privacy.plan import make_plan

    def sigma(n):
        return [1.0, 3.0, 2.0, 1.5, 4.0, 2.5][n % 6]

    plan = make_plan(
        64, batch_size=16, noise_multiplier=sigma, max_grad_norm=1.0, sampling=sampling, cycle_length=cycle
    )
    runs, T = plan.runs(0, 10), 10
    assert len(runs) == T
    found = releases_of(runs)
    assert sum(r.times for r in found) == 3  # rounds of 4, 4 and 2 steps
    least = sorted(s for s, times in ((r.noise_multiplier, r.times) for r in found) for _ in range(times))
    assert least == [1.0, 1.0, 1.5]
    ours = composed_epsilon(found, 1e-4, "rdp")
    rounds = [range(0, 4), range(4, 8), range(8, 10)]
    orders = itertools.product(*rounds) if sampling == "shuffle" else [range(g, T, 4) for g in range(4)]
    rate = found[0].sample_rate
    for steps in orders:
        one = tuple(found[0]._replace(sample_rate=rate, noise_multiplier=sigma(t), times=1) for t in steps)
        assert composed_epsilon(one, 1e-4, "rdp") <= ours * (1 + 1e-9)
    each_alone = tuple(r for n, run in enumerate(runs) for r in run.event.releases(n, 1))
    assert ours < 0.8 * composed_epsilon(each_alone, 1e-4, "rdp")
    assert releases_of(plan.runs(0, 4)) == (found[0]._replace(noise_multiplier=1.0, times=1),)


def test_a_constant_schedule_spends_what_no_schedule_does():
    for sampling, cycle in (("shuffle", None), ("cyclic_poisson", 4)):
        kind = {"batch_size": 16, "max_grad_norm": 1.0, "sampling": sampling, "cycle_length": cycle, "delta": 1e-3}
        spent = []
        for sigma in (1.5, schedules.step(1.5, 1.0 + 1e-15, 3)):
            e = bw.PrivacyEngine(64, noise_multiplier=sigma, **kind)
            train(e, 10)
            spent.append(e.epsilon())
        assert spent[0] == pytest.approx(spent[1], rel=1e-6)


def test_a_clip_schedule_clips(backend):
    e = engine(batch_size=N, noise_multiplier=0.0, max_grad_norm=schedules.step(1e-2, 0.5, 1))
    moves = train(e, 3, rate=1e-6)  # the gradients stay what they are, longer than the clipping norms
    lengths = np.linalg.norm(moves, axis=1)
    np.testing.assert_allclose(lengths[1:] / lengths[:-1], 0.5, rtol=1e-2)


def test_compiled_step_does_not_retrace_for_a_schedule():
    traces = []

    def counted(model, x, y):
        traces.append(1)
        return loss_fn(model, x, y)

    train(engine(noise_multiplier=schedules.exponential(1.0, 1.01)), 2, compiled=True, loss=counted, microbatch_size=N)
    once = len(traces)
    train(engine(noise_multiplier=schedules.exponential(1.0, 1.01)), 9, compiled=True, loss=counted, microbatch_size=N)
    assert len(traces) == 2 * once


def test_a_users_compiled_step_cannot_follow_a_schedule(backend):
    import mlx.optimizers as optim

    for more in ({"noise_multiplier": schedules.constant(1.0)}, {"target_epsilon": 3.0, "delta": 1e-3}):
        e = engine(**more)
        model, optimizer = Net(), e.wrap(optim.SGD(0.1))
        f, (x, y) = e.value_and_grad(model, loss_fn), data()
        state = [model.state, e.state]

        def update(x, y, model=model, optimizer=optimizer, f=f):
            optimizer.update(model, f(model, x, y)[1])

        step = mx.compile(update, inputs=state, outputs=state)
        with pytest.raises(bw.PrivacyError, match="where there is a schedule"):
            step(mx.array(x), mx.array(y))


def test_the_target_stops_before_anything_is_spent(backend):
    e = engine(target_epsilon=3.0, delta=1e-3)
    affordable = bw.find_steps(3.0, 1e-3, Q, 1.0)
    assert len(e.batches(data())) == affordable
    moves = train(e)
    assert len(moves) == affordable == e.steps
    spent, counter, f = (
        e.epsilon(),
        e.state["noise"]["counter"].tolist(),
        bw.compute_epsilon(1.0, Q, affordable + 1, 1e-3),
    )
    assert spent <= 3.0 < f
    for compiled in (False, True):
        with pytest.raises(bw.PrivacyError, match=r"within the target 3 at delta 0.001 but step \d+ would pass it"):
            train(e, 1, compiled=compiled)
    assert (e.steps, e.epsilon(), e.state["noise"]["counter"].tolist()) == (affordable, spent, counter)


def test_the_target_holds_under_a_schedule():
    e = engine(noise_multiplier=schedules.exponential(3.0, 0.97), target_epsilon=2.0, delta=1e-3)
    steps = len(e.batches(data()))
    train(e)
    assert e.steps == steps
    assert e.epsilon() <= 2.0
    with pytest.raises(bw.PrivacyError, match="would pass it"):
        train(e, 1)
    longer = [(Q, 3.0 * 0.97**n, 1) for n in range(steps + 1)]
    assert composed_epsilon(tuple(Release(*p) for p in longer), 1e-3, "pld") > 2.0


def test_calibration_of_a_run():
    by_steps = bw.PrivacyEngine.for_epsilon(2.0, 1e-4, N, steps=20, sample_rate=Q, max_grad_norm=1.0)
    by_epochs = bw.PrivacyEngine.for_epsilon(2.0, 1e-4, N, epochs=5, sample_rate=Q, max_grad_norm=1.0)
    assert by_steps.noise_multiplier == by_epochs.noise_multiplier
    assert by_epochs.planned_steps == 20
    e = bw.PrivacyEngine.for_epsilon(
        2.0, 1e-4, N, steps=20, noise_schedule=schedules.exponential(1.0, 0.95), sample_rate=Q, max_grad_norm=1.0
    )
    train(e)
    assert 1.99 < e.epsilon() <= 2.0
    assert len(e.runs) == 20
    steps = bw.PrivacyEngine.for_epsilon(
        2.0, 1e-4, N, noise_multiplier=1.0, sample_rate=Q, max_grad_norm=1.0
    ).planned_steps
    assert steps == bw.find_steps(2.0, 1e-4, Q, 1.0)


def test_state_continues_the_budget_and_holds_no_key(tmp_path):
    path = tmp_path / "engine.json"
    e = engine()
    train(e, 7)
    e.save_state(path)
    text = path.read_text()
    assert json.loads(text)["steps"] == 7
    assert not any(str(word) in text for word in e.state["noise"]["key"].tolist())
    assert "key" not in text
    resumed = engine(noise_multiplier=2.0)
    fresh = resumed.state["noise"]["key"].tolist()
    resumed.load_state(path)
    assert resumed.state["noise"]["key"].tolist() == fresh != e.state["noise"]["key"].tolist()
    assert (resumed.steps, resumed.epsilon(1e-3)) == (7, e.epsilon(1e-3))
    train(resumed, 4, compiled=True)
    assert resumed.runs == (
        Run(Event(Poisson(Q), Gaussian(1.0, 1.0)), 7),
        Run(Event(Poisson(Q), Gaussian(2.0, 1.0)), 4, 1),
    )
    assert resumed.epsilon(1e-3) == composed_epsilon((Release(Q, 1.0, 7), Release(Q, 2.0, 4)), 1e-3, "pld")


def test_a_schedule_goes_on_where_the_state_ended(tmp_path):
    sigma = schedules.exponential(1.0, 1.1)
    e = engine(noise_multiplier=sigma)
    train(e, 3)
    e.save_state(tmp_path / "engine.json")
    resumed = engine(noise_multiplier=sigma)
    resumed.load_state(tmp_path / "engine.json")
    assert resumed.noise_multiplier == sigma(3)
    assert resumed.state["noise_std"].item() == pytest.approx(sigma(3))


def test_the_planned_steps_count_those_of_the_state(tmp_path):
    e = engine(steps=5)
    train(e, 3)
    e.save_state(tmp_path / "engine.json")
    resumed = engine(steps=5)
    resumed.load_state(tmp_path / "engine.json")
    assert len(resumed.batches(data())) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(dataset_size=65), "dataset_size must be 65"),
        (lambda c: c.update(steps=2), "do not add up"),
        (lambda c: c.update(version=2), "version 1"),
        (lambda c: c.pop("runs"), "must be a saved engine state"),
        (lambda c: c["runs"][0].update(noise_multiplier=-1), "must be a saved engine state"),
        (lambda c: c["runs"][0].update(noise_multiplier=None), "must be a saved engine state"),
        (lambda c: c["runs"][0].update(sampling="shuffled?"), "must be a saved engine state"),
        (lambda c: c["runs"][0].update(sample_rate=float("nan")), "must be a saved engine state"),
    ],
)
def test_a_changed_state_is_refused(tmp_path, change, says):
    path = tmp_path / "engine.json"
    e = engine()
    train(e, 3)
    e.save_state(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(bw.PrivacyError, match=says):
        engine().load_state(path)
    e.save_state(path)
    with pytest.raises(bw.PrivacyError, match="taken no step"):
        e.load_state(path)


def test_steps_of_a_users_compiled_step_are_saved(tmp_path):
    import mlx.optimizers as optim

    e = engine()
    model, optimizer = Net(), e.wrap(optim.SGD(0.1))
    f, (x, y) = e.value_and_grad(model, loss_fn), data()
    state = [model.state, e.state]

    def update(x, y):
        optimizer.update(model, f(model, x, y)[1])

    optimizer.init(model.trainable_parameters())
    step = mx.compile(update, inputs=state, outputs=state)
    for _ in range(3):
        step(mx.array(x), mx.array(y))
        mx.eval(state)
    assert e.steps == 3
    e.save_state(tmp_path / "engine.json")
    assert json.loads((tmp_path / "engine.json").read_text())["steps"] == 3
    assert np.isfinite(flat(model)).all()


def test_float32_rounds_to_the_safe_side():
    rng = np.random.default_rng(0)
    for sigma, norm in rng.uniform(0.1, 3, (200, 2)):
        e = engine(noise_multiplier=sigma, max_grad_norm=norm)
        assert e.state["noise_std"].item() >= sigma * norm
        assert e.state["max_grad_norm"].item() <= norm


@pytest.mark.parametrize("delta", [1 / N, 0.1])
def test_a_delta_that_promises_nothing_is_warned_of(delta):
    with pytest.warns(UserWarning, match=r"not below 1 / 64"):
        engine(delta=delta)
    with pytest.warns(UserWarning, match=r"not below 1 / 64"):
        engine().epsilon(delta)
    engine(delta=0.99 / N).epsilon()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"target_epsilon": 1.0}, "delta must be given"),
        ({"target_epsilon": 0.0, "delta": 1e-5}, "epsilon must be positive"),
        ({"delta": 0.0}, "delta must be in"),
        ({"noise_multiplier": schedules.constant(0.0)}, "noise_multiplier must"),
        ({"max_grad_norm": schedules.constant(-1.0)}, "max_grad_norm must"),
    ],
)
def test_refused(more, says):
    with pytest.raises(ValueError, match=says):
        engine(**more)


def test_a_schedule_that_goes_wrong_stops_the_run():
    e = engine(noise_multiplier=lambda n: 1.0 - n / 2)
    with pytest.raises(ValueError, match="noise_multiplier must"):
        train(e, 3)
    assert e.steps == 2
