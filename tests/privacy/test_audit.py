"""Audits: the bound against exact arithmetic, correct engines, planted bugs, attacks.

Noise keys come from the operating system, so that what counts an audit's outcome can fail by chance: rates of false
alarms stand beside the tests; together they are below 1 in 1000.
"""

import json
import math
import sys
from fractions import Fraction

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_bulwark.cli import main
from mlx_bulwark.privacy import audit_engine, audit_privacy, one_run_epsilon
from mlx_bulwark.privacy.audit import _attack, _likelihood_ratios
from mlx_bulwark.privacy.one_run import one_run_bounds, p_value, plan_guesses
from scipy import stats


def white_box(epsilon, delta, canaries, steps=1, **options):
    engine = bw.PrivacyEngine.for_epsilon(epsilon, delta, canaries, steps=steps, sample_rate=1.0, max_grad_norm=0.7)
    return audit_engine(engine, canaries=canaries, progress=False, **options)


def exact_p_value(m, r, v, odds, delta):
    """Theorem 5.2 word by word in rational numbers; e^epsilon is the fraction odds."""
    q = Fraction(odds) / (1 + Fraction(odds))
    pmf = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    beta = sum(pmf[v:])
    alpha = max((sum(pmf[max(0, v - i) : v]) / i for i in range(1, m + 1)), default=Fraction(0))
    return float(min(1, beta + 2 * m * Fraction(delta) * alpha))


@pytest.mark.parametrize("odds", [1, 3, Fraction(7, 4), 200])
@pytest.mark.parametrize(("m", "r", "v"), [(1, 1, 1), (1, 1, 0), (40, 17, 0), (40, 31, 25), (60, 60, 60), (60, 33, 32)])
def test_p_value_is_that_of_the_theorem(odds, m, r, v):
    for delta in (0, 1e-5, 0.01):
        exact = exact_p_value(m, r, v, odds, delta)
        assert p_value(m, r, v, math.log(odds), delta) == pytest.approx(exact, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("m", "r", "delta"), [(1000, 100, 1e-5), (50, 50, 0.0), (1000003, 2000, 1e-8)])
def test_bound_is_where_the_p_value_passes_the_significance(m, r, delta):
    for v in (r, r - 1, int(0.9 * r), int(0.7 * r)):
        epsilon = one_run_epsilon(m, r, v, delta, 0.95)
        assert epsilon > 0
        assert p_value(m, r, v, epsilon, delta) <= 0.05 < p_value(m, r, v, epsilon + 1e-6, delta)
    assert one_run_epsilon(m, r, r // 2, delta, 0.95) == 0
    assert one_run_epsilon(m, r, 0, delta, 0.95) == 0


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_confidence_is_kept_by_the_worst_guesser_exactly(epsilon, delta):
    # Randomised response that tells the truth with probability delta besides: all its guesses count, no chance here.
    m = 200
    truth = delta + (1 - delta) / (1 + math.exp(-epsilon))
    wrong = sum(stats.binom.pmf(v, m, truth) for v in range(m + 1) if one_run_epsilon(m, m, v, delta, 0.95) > epsilon)
    assert wrong <= 0.05
    if delta == 0:  # the bound is exact there: one more count would be too much
        first = next(v for v in range(m + 1) if one_run_epsilon(m, m, v, 0.0, 0.95) > epsilon)
        assert stats.binom.sf(first - 2, m, truth) > 0.05


def test_choosing_among_numbers_of_guesses_keeps_the_confidence():
    # 1000 audits of a Laplace mechanism, seeded; the share of wrong bounds is at most 5 %, without sharing it is more.
    rng, m, wrong, wrong_alone = np.random.default_rng(1), 512, 0, 0
    for _ in range(1000):
        included = rng.random(m) < 0.5
        order = np.argsort(included + rng.laplace(size=m))
        p = []
        for up, down in plan_guesses(m, None):
            correct = included[order[m - up :]].sum() + (~included[order[:down]]).sum()
            p.append(p_value(m, up + down, int(correct), 1.0, 0.0))
        wrong += min(p) < 0.05 / len(p)
        wrong_alone += min(p) < 0.05
    assert wrong <= 50
    assert wrong_alone > wrong


def test_plan_of_guesses():
    assert plan_guesses(1000, None) == [(8, 7), (16, 15), (31, 31), (63, 62), (125, 125), (250, 250), (450, 450)]
    assert plan_guesses(10, None) == [(1, 0), (1, 1), (3, 2), (5, 4)]
    assert plan_guesses(1000, 33) == [(17, 16)]
    assert plan_guesses(1000, (20, 0)) == [(20, 0)]
    for bad in (0, 1001, (0, 0), (-1, 5), (600, 401)):
        with pytest.raises(ValueError, match="guesses must be from 1"):
            plan_guesses(1000, bad)


def test_guesses_are_the_extremes_and_ties_do_not_look_at_the_coins():
    included = np.array([True, False] * 50)
    (bound,) = one_run_bounds(included * 1.0, included, 0.0, 0.95, (10, 20))
    assert (bound.included_guesses, bound.excluded_guesses, bound.correct, bound.guesses) == (10, 20, 30, 30)
    assert bound.epsilon == bound.ceiling
    (bound,) = one_run_bounds(np.zeros(100), included, 0.0, 0.95, 100)
    assert bound.correct == 50


def test_twenty_correct_runs_at_epsilon_8():
    # At least 18 of 20 bounds reach 2.0: one run misses it with probability 0.002, three of 20 with 1e-5. The bound
    # exceeds 8 never, since 1000 canaries cannot show more than 5.3.
    reports = [white_box(8.0, 1e-5, 1000, steps=4, compiled=i % 2 == 0) for i in range(20)]
    assert sum(r.epsilon >= 2.0 for r in reports) >= 18
    assert not any(r.violated for r in reports)
    assert all(7.9 < r.accounted_epsilon <= 8.0 for r in reports)
    assert all(r.ceiling < 5.3 for r in reports)


def test_correct_runs_where_the_canaries_could_show_more_than_is_accounted():
    # 20 audits at epsilon 1, of which 20000 canaries could show 8; a wrong bound has a probability far below 5 %, the
    # theorem being loose for Gaussian noise.
    reports = [white_box(1.0, 1e-6, 20_000, guesses=1000) for _ in range(20)]
    assert all(0 < r.epsilon < 1.0 < 5 < r.ceiling for r in reports)


@pytest.mark.parametrize("compiled", [True, False])
def test_scores_without_noise_are_the_coins(compiled):
    engine = bw.PrivacyEngine(333, sample_rate=1.0, noise_multiplier=0.0, max_grad_norm=2.5, delta=1e-5)
    report = audit_engine(engine, canaries=301, steps=3, compiled=compiled, seed=0, progress=False)
    np.testing.assert_allclose(report.scores, report.included, atol=1e-4)  # float32, and 1e-6 under 10 in the clip
    assert 100 < report.included.sum() < 200
    assert report.accounted_epsilon == math.inf
    assert report.epsilon == report.ceiling > 3
    assert report.attack.auc == 1
    assert engine.steps == 3


def test_noise_of_the_scores_is_that_of_the_engine():
    # Standard deviation over 2000 canaries, 5 standard errors: 1 in 1.7 million.
    engine = bw.PrivacyEngine(2000, sample_rate=1.0, noise_multiplier=3.0, max_grad_norm=0.1, delta=1e-5)
    report = audit_engine(engine, canaries=2000, steps=5, progress=False)
    spread = (report.scores - report.included).std()
    assert spread == pytest.approx(3.0 / math.sqrt(5), rel=5 / math.sqrt(4000))


@pytest.mark.parametrize("compiled", [True, False])
def test_sampled_batches_beside_a_model_of_the_users(compiled):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((300, 6)).astype(np.float32), rng.integers(0, 3, 300)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    before = np.array(model.layers[0].weight)
    engine = bw.PrivacyEngine(600, sample_rate=0.25, noise_multiplier=0.0, max_grad_norm=1.0, steps=40, delta=1e-5)
    report = audit_engine(engine, model, cross_entropy, (x, y), canaries=200, compiled=compiled, progress=False)
    assert np.abs(np.array(model.layers[0].weight) - before).max() > 0
    assert (report.scores[~report.included] == 0).all()
    drawn = report.scores[report.included] * 40 * 0.25  # how often each canary was drawn
    np.testing.assert_allclose(drawn, drawn.round(), atol=1e-3)
    assert 8 < drawn.mean() < 12
    assert drawn.std() > 1


def cross_entropy(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="none")


def plant(monkeypatch, name, broken):
    """Replace an op in every module of the engine that uses it."""
    places = [m for n, m in sys.modules.items() if n.startswith("mlx_bulwark.privacy") and hasattr(m, name)]
    assert places
    for module in places:
        monkeypatch.setattr(module, name, broken(getattr(module, name)))


def scaled_noise(factor):
    return lambda add: lambda x, sigma, *rest, **more: add(x, sigma * factor, *rest, **more)


@pytest.mark.parametrize("compiled", [True, False])
def test_noise_divided_by_the_batch_size_is_caught(monkeypatch, compiled):
    # Nearly no noise is left: every guess is right, and the bound is the ceiling.
    plant(monkeypatch, "add_gaussian", scaled_noise(1 / 1000))
    report = white_box(4.0, 1e-5, 1000, compiled=compiled, seed=0)
    assert report.epsilon == report.ceiling > 5
    assert report.violated
    assert "REFUTED" in str(report)


def test_noise_divided_by_the_batch_size_is_caught_at_epsilon_8(monkeypatch):
    plant(monkeypatch, "add_gaussian", scaled_noise(1 / 20_000))
    report = white_box(8.0, 1e-7, 20_000, guesses=18_000, seed=0)
    assert report.epsilon > 8.5
    assert report.violated


def test_half_noise_is_caught(monkeypatch):
    # The bound is 3.41 with a standard deviation of 0.12 in simulations of the mechanism: missed with probability 2e-4.
    plant(monkeypatch, "add_gaussian", scaled_noise(0.5))
    assert white_box(3.0, 1e-8, 300_000, guesses=2048).violated


def test_missing_clip_is_caught(monkeypatch):
    def no_clip(clip_factors):
        def factors(sq_norms, *rest):
            clipped, refused = clip_factors(sq_norms, *rest)
            return (clipped > 0).astype(clipped.dtype), refused

        return factors

    plant(monkeypatch, "clip_factors", no_clip)
    assert white_box(4.0, 1e-5, 1000).violated


def memorising_train(engine_of, steps=60, learning_rate=0.01):
    def train(data):
        mx.random.seed(0)
        model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 2))
        if engine_of is None:
            optimizer = optim.Adam(learning_rate)
            grad = nn.value_and_grad(model, lambda *b: cross_entropy(model, *b).mean())
            for _ in range(steps):
                optimizer.update(model, grad(*map(mx.array, data))[1])
                mx.eval(model.state, optimizer.state)
            return model, None
        engine = engine_of(len(data[0]))
        optimizer = engine.wrap(optim.Adam(learning_rate))
        step = engine.compiled_step(model, optimizer, cross_entropy)
        for batch in engine.batches(data):
            mx.eval(step(batch), model.state, optimizer.state, engine.state)
        return model, engine

    return train


def labelled(n, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 20)).astype(np.float32), rng.integers(0, 2, n)


@pytest.mark.parametrize("shadow_models", [0, 4])
def test_training_without_privacy_is_shown_to_leak(shadow_models):
    report = audit_privacy(
        memorising_train(None),
        labelled(100, 1),
        labelled(200, 2),
        cross_entropy,
        delta=1e-5,
        seed=3,
        shadow_models=shadow_models,
        progress=False,
    )
    assert report.epsilon > (1.4 if shadow_models else 0.8)
    assert report.accounted_epsilon == math.inf
    assert not report.violated
    assert report.attack.auc > 0.8
    assert report.attack.method == ("likelihood ratio" if shadow_models else "loss")


def test_claiming_privacy_for_a_training_that_has_none_is_caught():
    def train(data):
        model, _ = memorising_train(None)(data)
        return model, bw.PrivacyEngine(len(data[0]), sample_rate=0.1, noise_multiplier=1, max_grad_norm=1, delta=1e-5)

    report = audit_privacy(train, labelled(100, 1), labelled(200, 2), cross_entropy, seed=3, progress=False)
    assert report.accounted_epsilon == 0  # an engine that charged nothing
    assert report.violated


def test_private_training_of_the_users_is_not_refuted():
    # Seeded coins; epsilon 2 and 200 canaries that can show 3: a false alarm has a probability below 5 %, and in fact
    # far below, since losses of one model tell little.
    def engine_of(n):
        return bw.PrivacyEngine.for_epsilon(2.0, 1e-5, n, steps=10, batch_size=50, max_grad_norm=1.0)

    report = audit_privacy(
        memorising_train(engine_of), labelled(100, 1), labelled(200, 2), cross_entropy, seed=3, progress=False
    )
    assert report.epsilon < 1.0 < report.accounted_epsilon <= 2.0 < report.ceiling
    assert not report.violated


def test_attack_figures_are_those_of_scikit_learn_and_scipy():
    from sklearn.metrics import roc_auc_score, roc_curve

    rng = np.random.default_rng(5)
    included = rng.random(2000) < 0.5
    scores = np.round(included * 1.5 + rng.standard_normal(2000), 1)  # with ties
    attack = _attack("loss", scores, included, 1e-5, 0.95)
    assert attack.auc == pytest.approx(roc_auc_score(included, scores), abs=1e-12)
    fpr, tpr, _ = roc_curve(included, scores, drop_intermediate=False)
    for point in attack.points:
        assert point.true_positive_rate == pytest.approx(tpr[fpr <= point.false_positive_rate].max(), abs=1e-12)
        found = round(point.true_positive_rate * included.sum())
        interval = stats.binomtest(found, int(included.sum())).proportion_ci(0.95, "exact")
        assert (point.low, point.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert 0 < attack.epsilon < 3


def test_attack_bound_of_independent_trials_keeps_its_confidence():
    # Randomised response at epsilon 1, 300 audits, seeded: at most 5 % of the bounds may be wrong.
    rng, wrong = np.random.default_rng(6), 0
    for _ in range(300):
        included = rng.random(500) < 0.5
        answers = np.where(rng.random(500) < 1 / (1 + math.exp(-1)), included, ~included)
        wrong += _attack("loss", answers.astype(float), included, 0.0, 0.95).epsilon > 1
    assert wrong <= 15


def test_likelihood_ratios_find_members_that_losses_alone_do_not():
    # Canaries of very different difficulty, each 1.0 easier where it took part.
    rng = np.random.default_rng(7)
    hard = np.exp(rng.uniform(-2, 2, 1000))
    coins = [rng.random(1000) < 0.5 for _ in range(8)]
    coins += [~c for c in coins]
    member = rng.random(1000) < 0.5

    def losses(c):
        return hard * np.exp(-0.5 * c + 0.1 * rng.standard_normal(1000))

    ratios = _likelihood_ratios(losses(member), [losses(c) for c in coins], coins)
    assert _attack("", ratios, member, 0.0, 0.95).auc > 0.95
    assert _attack("", -losses(member), member, 0.0, 0.95).auc < 0.7


def test_report_is_written_and_drawn(tmp_path):
    report = white_box(8.0, 1e-5, 64)
    report.write_json(tmp_path / "audit.json")
    figures = json.loads((tmp_path / "audit.json").read_text())
    assert figures["epsilon"] == report.epsilon
    assert figures["canaries"] == len(figures["scores"]) == len(figures["included"]) == 64
    assert figures["violated"] is False
    report.plot(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert "64 canaries can prove" in str(report)
    engine = bw.PrivacyEngine(64, sample_rate=1.0, noise_multiplier=0.0, max_grad_norm=1.0, delta=1e-5)
    unbounded = audit_engine(engine, canaries=64, steps=1, progress=False)
    assert unbounded.to_dict()["accounted_epsilon"] is None
    unbounded.plot(tmp_path / "audit.png")


def test_arguments():
    engine = bw.PrivacyEngine(100, sample_rate=1.0, noise_multiplier=1.0, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="steps given here"):
        audit_engine(engine, canaries=100, delta=1e-5)
    with pytest.raises(ValueError, match="delta must be given"):
        audit_engine(engine, canaries=100, steps=1)
    with pytest.raises(ValueError, match="dataset_size of at least 101"):
        audit_engine(engine, canaries=101, steps=1, delta=1e-5)
    with pytest.raises(ValueError, match="at least 10"):
        audit_engine(engine, canaries=9, steps=1, delta=1e-5)
    with pytest.raises(ValueError, match="given together"):
        audit_engine(engine, nn.Linear(2, 2), canaries=100, steps=1, delta=1e-5)
    with pytest.raises(ValueError, match="confidence must be in"):
        audit_engine(engine, canaries=100, steps=1, delta=1e-5, confidence=1.0)
    with pytest.raises(ValueError, match="delta must be in"):
        audit_engine(engine, canaries=100, steps=1, delta=1.0)
    assert engine.steps == 0
    audit_engine(engine, canaries=100, steps=1, delta=1e-5, progress=False)
    with pytest.raises(ValueError, match="fresh"):
        audit_engine(engine, canaries=100, steps=1, delta=1e-5)
    unclipped = bw.PrivacyEngine(100, sample_rate=1.0, noise_multiplier=0.0, max_grad_norm=math.inf)
    with pytest.raises(ValueError, match="must clip"):
        audit_engine(unclipped, canaries=100, steps=1, delta=1e-5)
    for bad in ({"canaries": 10, "guesses": 5, "correct": 6}, {"canaries": 4, "guesses": 5, "correct": 3}):
        with pytest.raises(ValueError, match="ascending"):
            one_run_epsilon(**bad, delta=0.0)

    def train(data):
        return nn.Linear(20, 2), None

    with pytest.raises(ValueError, match="form of data"):
        audit_privacy(train, labelled(9, 0), labelled(20, 0)[0], cross_entropy, delta=1e-5)
    with pytest.raises(ValueError, match="even"):
        audit_privacy(train, labelled(9, 0), labelled(20, 0), cross_entropy, delta=1e-5, shadow_models=3)
    with pytest.raises(ValueError, match="one number of rows"):
        audit_privacy(train, (np.zeros(3), np.zeros(4)), (np.zeros(3), np.zeros(3)), cross_entropy, delta=1e-5)
    with pytest.raises(ValueError, match="delta must be given"):
        audit_privacy(train, labelled(9, 0), labelled(20, 0), cross_entropy)
    with pytest.raises(ValueError, match="20 of 20 are not"):
        audit_privacy(train, labelled(9, 0), labelled(20, 0), lambda m, x, y: x.sum(1) * mx.nan, delta=1e-5)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mlx-bulwark", "audit-privacy", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


def test_command_audits_the_engine(monkeypatch, capsys, tmp_path):
    figures, picture = tmp_path / "audit.json", tmp_path / "audit.png"
    options = ("--epsilon", 8, "--canaries", 1000, "--steps", 2, "--json", figures, "--plot", picture)
    assert command(monkeypatch, *options) == 0
    out = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert f"epsilon >= {found['epsilon']:.2f} with 95 % confidence at delta 1e-05" in out
    assert "accounted     epsilon <= 8.00" in out
    assert "not an estimate of epsilon" in out
    assert picture.stat().st_size > 10_000


def test_command_audits_a_script_and_says_by_its_exit_code_what_it_found(monkeypatch, capsys, tmp_path):
    script = tmp_path / "training.py"
    script.write_text(
        """
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim, mlx_bulwark as bw, numpy as np

rng = np.random.default_rng(0)
x, y = rng.standard_normal((300, 20)).astype(np.float32), rng.integers(0, 2, 300)
data, canaries = (x[:100], y[:100]), (x[100:], y[100:])

def loss_fn(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="none")

def train(data):  # claims a privacy that it does not have
    mx.random.seed(0)
    model, optimizer = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 2)), optim.Adam(0.01)
    grad = nn.value_and_grad(model, lambda *b: loss_fn(model, *b).mean())
    for _ in range(60):
        optimizer.update(model, grad(*map(mx.array, data))[1])
    return model, bw.PrivacyEngine(len(data[0]), sample_rate=0.1, noise_multiplier=1.0, max_grad_norm=1.0)
"""
    )
    assert command(monkeypatch, script, "--seed", 1) == 3
    assert "REFUTED" in capsys.readouterr().out
    script.write_text("data = train = None")
    assert command(monkeypatch, script) == 2
    assert "has no canaries and no loss_fn" in capsys.readouterr().err


def test_command_refuses_what_it_cannot_use(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, "--canaries", 5) == 2
    assert "[audit_engine] canaries must be at least 10 but is 5" in capsys.readouterr().err
    assert command(monkeypatch, tmp_path / "nowhere.py") == 2
    assert command(monkeypatch, "--canaries", 20, "--steps", 1, "--json", tmp_path / "a" / "b.json") == 1
    assert "cannot be written: No such file" in capsys.readouterr().err
