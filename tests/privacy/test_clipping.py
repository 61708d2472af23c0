import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_bulwark.privacy.clipping import AdaptiveClipping, make_clipping
from mlx_bulwark.privacy.gradients import clipped_sums
from mlx_bulwark.privacy.rules import rule_of
from mlx_bulwark.privacy.taps import find_sites
from oracle import assert_sums_close, one_by_one_grads
from scipy import stats


class Net(nn.Module):
    """Layers with built and with unbuilt gradients, one of them frozen in part, one never used."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.layers = [nn.Linear(8, 12), nn.Linear(12, 3)]
        self.layers[0].freeze(keys=["bias"])
        self.unused = nn.Linear(2, 2)

    def __call__(self, x):
        return self.layers[1](mx.tanh(self.layers[0](self.norm(self.embed(x)))))


def loss_fn(model, x, scale):
    return scale * mx.sin(model(x)).reshape(x.shape[0], -1).sum(axis=1)


def make(B=9, seed=0):
    mx.random.seed(seed)
    rng = np.random.default_rng(seed)
    x = mx.array(rng.integers(0, 11, (B, 5)))
    return Net(), (x, mx.array(rng.lognormal(sigma=1.5, size=B).astype(np.float32)))


LAYERS = {"embed": 0.4, "norm": 2.0, "layers.0": 0.05, "layers.1": 1.0, "unused": 1.0}
GROUPS = {"*.bias": 0.3, "layers.*": 0.7, "embed.weight": 5.0, "*": 0.2}
# name: (clipping, max_grad_norm, group of a path, norm of a group)
MODES = {
    "flat": ("flat", 0.5, lambda path: "", lambda group: 0.5),
    "automatic": ("automatic", 0.5, lambda path: "", lambda group: 0.5),
    "per layer": ("per_layer", 0.5, lambda path: path.rpartition(".")[0], lambda group: 0.5 / math.sqrt(5)),
    "per layer, given": ("per_layer", LAYERS, lambda path: path.rpartition(".")[0], LAYERS.get),
    "per group": (
        "per_group",
        GROUPS,
        lambda path: (
            "*.bias"
            if path.endswith("bias")
            else "layers.*"
            if path.startswith("layers.")
            else "embed.weight"
            if path == "embed.weight"
            else "*"
        ),
        GROUPS.get,
    ),
}


def expected(model, batch, mode, skip=()):
    """Clipped sums from gradients one by one, and the norm of each unit's part."""
    clipping, _, group_of, norm_of = MODES[mode]
    sums = {k: np.zeros(p.shape) for k, p in tree_flatten(model.trainable_parameters())}
    parts = []
    for b, grads in enumerate(one_by_one_grads(model, loss_fn, batch)):
        part = 0.0
        for group in {group_of(k) for k in grads}:
            mine = [k for k in grads if group_of(k) == group]
            norm = math.sqrt(sum((grads[k] ** 2).sum() for k in mine))
            C = norm_of(group)
            f = 0.0 if b in skip else C / (norm + 0.01) if clipping == "automatic" else min(1.0, C / (norm + 1e-6))
            part += (f * norm) ** 2
            for k in mine:
                sums[k] += f * grads[k]
        parts.append(math.sqrt(part))
    return sums, np.array(parts)


def ours(model, batch, mode, mask=None):
    clipping, norm = make_clipping(*MODES[mode][:2], 1.0, 100.0)
    return clipped_sums(model, loss_fn, batch, mask, norm, clipping, {})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("B", [0, 1, 9])
def test_equal_to_a_float64_loop(backend, mode, B):
    model, batch = make(B)
    sums, parts = expected(model, batch, mode)
    assert_sums_close(ours(model, batch, mode).sums, sums, 1e-5)
    _, norm = make_clipping(*MODES[mode][:2], 1.0, 100.0)
    assert (parts <= norm).all()
    assert not B or parts.max() > norm / 3  # and some are clipped


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_unit_is_left_out(backend, mode):
    model, (x, scale) = make()
    nan = mx.array([math.nan if b in (2, 5) else s for b, s in enumerate(scale.tolist())])
    got = ours(model, (x, nan), mode)
    sums, _ = expected(model, (x, scale), mode, skip=(2, 5))
    assert got.num_refused.item() == 2
    assert_sums_close(got.sums, sums, 1e-5)


@pytest.mark.parametrize("mode", ["per layer", "per group"])
def test_a_unit_refused_in_one_group_is_refused_in_all(backend, mode):
    # the norms of one group are NaN for one unit: what the other groups have of it must not be released
    clipping, norm = make_clipping(*MODES[mode][:2], 1.0, 100.0)
    groups = clipping.groups(find_sites(make()[0], rule_of))
    norms = [mx.array([1.0, math.nan if i == 1 else 4.0, math.inf if i == 2 else 9.0]) for i in range(len(groups))]
    got = clipping.factors(groups, norms, norm, mx.array([True, True, True]))
    assert [(f[1:] == 0).all().item() for f in got.by_group] == [True] * len(groups)
    assert all((f[0] > 0).item() for f in got.by_group)
    assert got.num_refused.item() == 2
    padded = clipping.factors(groups, norms, norm, mx.array([True, False, True]))
    assert padded.num_refused.item() == 1


@pytest.mark.parametrize("mode", MODES)
def test_padding_adds_exactly_nothing(backend, mode):
    model, (x, scale) = make(12)
    mask = mx.arange(12) < 9
    got = ours(model, (x, scale), mode, mask)
    poisoned = ours(model, (x, mx.where(mask, scale, math.nan)), mode, mask)
    alone = ours(model, (x[:9], scale[:9]), mode)
    for k in got.sums:
        np.testing.assert_array_equal(np.array(got.sums[k]), np.array(poisoned.sums[k]))
        np.testing.assert_allclose(np.array(got.sums[k]), np.array(alone.sums[k]), rtol=1e-4, atol=1e-6)
    assert poisoned.num_refused.item() == 0


def engine(clipping="flat", max_grad_norm=1.0, noise_multiplier=1.0, N=64, batch_size=64, **more):
    return bw.PrivacyEngine(
        N,
        batch_size=batch_size,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        **more,
    )


@pytest.mark.parametrize(
    ("clipping", "norm", "most"),
    [
        ("flat", 0.7, 0.7),
        ("automatic", 0.7, 0.7),
        ("per_layer", 0.7, 0.7),
        ("per_layer", LAYERS, math.sqrt(0.16 + 4 + 0.0025 + 1 + 1)),
        ("per_group", {"*": 3.0, "x": 4.0}, 5.0),
    ],
)
def test_sensitivity(clipping, norm, most):
    e = engine(clipping, norm, noise_multiplier=1.3)
    assert e.sensitivity.add_or_remove_one == pytest.approx(most, rel=1e-12)
    assert e.sensitivity.replace_one == pytest.approx(2 * most, rel=1e-12)
    assert e.max_grad_norm == pytest.approx(most, rel=1e-12)
    assert e.state["noise_std"].item() == pytest.approx(1.3 * most, rel=1e-6)


@pytest.mark.parametrize("mode", ["per layer", "per layer, given", "per group"])
def test_the_noise_is_that_of_the_sensitivity(backend, mode):
    # two-sided at 1e-5
    model, batch = make(64)
    model.apply(lambda a: mx.zeros_like(a) if mx.issubdtype(a.dtype, mx.floating) else a)
    e = engine(*MODES[mode][:2], noise_multiplier=1.7)
    optimizer, f = e.wrap(optim.SGD(1.0)), e.value_and_grad(model, lambda *a: 0 * loss_fn(*a))
    _, grads = f(model, *batch)
    optimizer.update(model, grads)
    noise = np.concatenate([np.array(p).ravel() for _, p in tree_flatten(model.trainable_parameters())]) * 64
    noise /= 1.7 * e.sensitivity.add_or_remove_one
    assert stats.chi2.cdf((noise**2).sum(), noise.size) == pytest.approx(0.5, abs=0.5 - 5e-6)


def test_check_knows_the_groups(backend):
    model, batch = make()
    for mode in MODES:
        report = engine(*MODES[mode][:2]).check(model, batch, loss_fn)
        assert report.sum_error < 1e-4


# Adaptive clipping


def run_adaptive(e, norms, steps, compiled=False):
    """Clipping norms over the steps of examples whose gradients have these norms."""
    model = nn.Linear(1, 1, bias=False)
    x = np.asarray(norms, np.float32)[:, None]

    def loss(model, x):
        return model(x)[:, 0]

    optimizer, seen = e.wrap(optim.SGD(0.0)), [e.max_grad_norm]
    f = e.compiled_step(model, optimizer, loss) if compiled else None
    g = e.value_and_grad(model, loss)
    for b in e.batches(x, steps=steps, microbatch_size=24):
        if f:
            mx.eval(f(b), model.state, optimizer.state, e.state)
        else:
            optimizer.update(model, g(model, b)[1])
        if b.last:
            seen.append(e.max_grad_norm)
    return np.array(seen)


@pytest.mark.parametrize("compiled", [False, True])
def test_without_noise_the_norm_moves_as_published(backend, compiled):
    norms = np.linspace(0.01, 4, 64)
    e = engine(AdaptiveClipping(0.3, 0.5), 0.3, noise_multiplier=0.0)
    seen = run_adaptive(e, norms, 40, compiled)
    C = [0.3]
    for _ in range(40):  # algorithm 1 of the paper
        C.append(C[-1] * math.exp(-0.5 * ((norms <= C[-1]).mean() - 0.3)))
    np.testing.assert_allclose(seen, C, rtol=1e-5)
    assert np.quantile(norms, 0.25) < C[-1] < np.quantile(norms, 0.35)


@pytest.mark.parametrize("compiled", [False, True])
def test_with_noise_the_norm_finds_its_quantile(backend, compiled):
    # At rest the logarithm of C has a standard deviation of 0.012: 20 % are 15 of them.
    norms = np.random.default_rng(0).lognormal(sigma=1.0, size=256)
    e = engine(AdaptiveClipping(0.5, 0.2, count_noise=6.0), 10.0, noise_multiplier=1.0, N=256, batch_size=256)
    seen = run_adaptive(e, norms, 60, compiled)
    assert seen[-10:].mean() == pytest.approx(np.median(norms), rel=0.2)
    assert e.state["noise_std"].item() >= 1.0 * e.sensitivity.add_or_remove_one * (1 - 1e-7)


def test_adaptive_noise_spends_what_the_engine_says():
    # theorem 1, and the same by composition in dp-accounting: two Gaussians, of C and of 1/2
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    z, count_noise = 1.1, 2.0
    e = engine(AdaptiveClipping(count_noise=count_noise), 0.3, noise_multiplier=z)
    on_sums = e.state["noise_std"].item() / 0.3
    assert on_sums == pytest.approx((z**-2 - (2 * count_noise) ** -2) ** -0.5, rel=1e-6)
    both = dp.ComposedDpEvent([dp.GaussianDpEvent(on_sums), dp.GaussianDpEvent(2 * count_noise)])
    epsilon = PLDAccountant().compose(both).get_epsilon(1e-5)
    assert epsilon == pytest.approx(bw.compute_epsilon(z, 1.0, 1, 1e-5), rel=1e-3)


def test_the_count_has_its_noise(backend):
    # From the moves of C under a rate so small that the count's noise is all: two-sided at 1e-5.
    norms = np.full(64, 1.0)
    e = engine(AdaptiveClipping(1.0, 1e-3, count_noise=9.0), 2.0, noise_multiplier=1.0)
    moves = np.diff(np.log(run_adaptive(e, norms, 120))) / -1e-3 * 64 / 9.0
    # C in float32 moves in steps of 6e-8: in these units 4e-4 of the deviation
    assert stats.chi2.cdf((moves**2).sum(), 120) == pytest.approx(0.5, abs=0.5 - 5e-6)


def test_padding_counts_as_neither_above_nor_below(backend):
    # physical batches of 24 with padding; without noise C must move exactly as with one full batch
    norms = np.linspace(0.01, 4, 64)
    a = run_adaptive(engine(AdaptiveClipping(0.5, 0.5), 0.5, 0.0), norms, 5)
    e = engine(AdaptiveClipping(0.5, 0.5), 0.5, 0.0)
    model, optimizer = nn.Linear(1, 1, bias=False), e.wrap(optim.SGD(0.0))
    g, b = e.value_and_grad(model, lambda m, x: m(x)[:, 0]), [e.max_grad_norm]
    for _ in range(5):
        optimizer.update(model, g(model, mx.array(norms.astype(np.float32)[:, None]))[1])
        b.append(e.max_grad_norm)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    # an empty draw says nothing: the share counts as one half
    f = engine(AdaptiveClipping(0.5, 0.5), 0.5, 0.0)
    optimizer = f.wrap(optim.SGD(0.0))
    optimizer.update(model, f.value_and_grad(model, lambda m, x: m(x)[:, 0])(model, mx.zeros((0, 1)))[1])
    assert f.max_grad_norm == pytest.approx(0.5, rel=1e-6)


def test_a_dead_model_does_not_bring_the_norm_to_zero(backend):
    e = engine(AdaptiveClipping(0.5, 5.0), 1.0, noise_multiplier=1.0)
    seen = run_adaptive(e, np.zeros(64), 40)
    assert seen[-1] >= 1e-6 * (1 - 1e-6)
    assert np.isfinite(seen).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_schedule_of_noise_goes_with_an_adaptive_norm(backend, compiled):
    def schedule(step):
        return 1.0 + 0.5 * step

    rule = AdaptiveClipping(count_noise=4.0)
    e = engine(rule, 0.5, noise_multiplier=schedule)
    seen = run_adaptive(e, np.linspace(0.1, 4, 64), 5, compiled)
    assert len(set(seen)) == 6
    z = schedule(5)
    assert e.noise_multiplier == z
    assert e.state["noise_std"].item() == pytest.approx(seen[-1] * (z**-2 - 8.0**-2) ** -0.5, rel=1e-6)
    with pytest.raises(ValueError, match="count_noise must be more than"):  # the schedule has come to twice its noise
        run_adaptive(e, np.linspace(0.1, 4, 64), 20, compiled)


def test_a_resumed_run_keeps_the_norm_that_was_found(tmp_path):
    e = engine("adaptive", 0.1)
    found = run_adaptive(e, np.linspace(1, 4, 64), 5)[-1]
    assert found > 0.12
    e.save_state(tmp_path / "engine.json")
    resumed = engine("adaptive", 0.1)
    resumed.load_state(tmp_path / "engine.json")
    assert resumed.max_grad_norm == found
    assert resumed.state["noise_std"].item() == e.state["noise_std"].item()
    flat = engine("flat", 0.1)
    flat.load_state(tmp_path / "engine.json")
    assert flat.max_grad_norm == 0.1


@pytest.mark.parametrize(
    ("clipping", "norm", "says"),
    [
        ("hard", 1.0, "clipping must be one of 'flat'"),
        ("flat", {"*": 1.0}, "max_grad_norm must be a mapping"),
        ("adaptive", {"*": 1.0}, "max_grad_norm must be a mapping"),
        ("per_group", 1.0, "max_grad_norm must be a mapping"),
        ("per_group", {"*": 0.0}, "max_grad_norm must be positive"),
        ("per_group", {"a": 1.0, "b": -1.0}, "max_grad_norm must be positive"),
        ("per_group", {}, "max_grad_norm must be positive"),
        ("per_layer", math.inf, "max_grad_norm must be positive"),
        (AdaptiveClipping(count_noise=0.5), 1.0, "count_noise must be more than"),
    ],
)
def test_refused(clipping, norm, says):
    with pytest.raises(ValueError, match=says):
        engine(clipping, norm)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"target_quantile": 1.1}, "target_quantile must"),
        ({"learning_rate": 0.0}, "learning_rate must"),
        ({"count_noise": -1.0}, "count_noise must"),
    ],
)
def test_adaptive_refused(more, says):
    with pytest.raises(ValueError, match=says):
        AdaptiveClipping(**more)


@pytest.mark.parametrize(
    ("clipping", "norm", "says"),
    [
        ("per_layer", {"embed": 1.0}, "must cover every trainable parameter but has no layer for norm.weight"),
        ("per_layer", {**LAYERS, "layers.7": 1.0}, r"names \['layers.7'\]"),
        ("per_group", {"embed.*": 1.0}, "has no group for norm"),
        ("per_group", {"*": 1.0, "heads.*": 1.0}, r"names \['heads"),
    ],
)
def test_groups_that_do_not_fit_the_model(backend, clipping, norm, says):
    model, batch = make()
    with pytest.raises(bw.PrivacyError, match=says):
        engine(clipping, norm).value_and_grad(model, loss_fn)(model, *batch)
