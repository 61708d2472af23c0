"""Robust accuracy, its worst case, and the flags of models whose gradients are planted to mislead."""

import json
from io import StringIO

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx_bulwark.attacks import FGSM, PGD, Square, accuracy_over_eps, cross_entropy, robust_accuracy
from mlx_bulwark.training import adversarial_loss, fit
from rich.console import Console

RNG = np.random.default_rng(0)
B, D, C = 60, 16, 3
WEIGHT = RNG.standard_normal((D, C)).astype(np.float32)
X = RNG.random((B, D), dtype=np.float32)
Z = X @ WEIGHT - (np.full(D, 0.5, np.float32) @ WEIGHT)
CLEAR = np.sort(Z, 1)[:, -1] - np.sort(Z, 1)[:, -2] > 0.3
X, Z = X[CLEAR], Z[CLEAR]
Y = Z.argmax(1)
DATA = X, Y


def plain(x):
    return (x - 0.5) @ mx.array(WEIGHT)


def huge(x):
    return 1e5 * plain(x)


def rounded(x):
    return plain(mx.round(x * 16) / 16)


@mx.custom_function
def misled(x):
    return x


@misled.vjp
def misled_vjp(primals, cotangents, outputs):
    return mx.random.normal(primals.shape, key=mx.random.key(int(abs(primals).sum().item() * 1e4)))


def shattered(x):
    return plain(misled(x))


def noisy(x):
    return plain(x) + 0.01 * mx.random.normal((len(x), C))


def probabilities(x):
    return mx.softmax(plain(x), axis=1)


@mx.custom_function
def hidden(x):
    return x


@hidden.vjp
def hidden_vjp(*_):
    raise RuntimeError("no derivative")


def undifferentiable(x):
    return plain(hidden(x))


def flags_of(model, **options):
    report = robust_accuracy(model, DATA, [PGD(0.1, steps=10)], **options)
    return {flag.name: flag.reason for flag in report.flags}


def test_a_plain_model_has_no_flags():
    assert flags_of(plain) == {}
    report = robust_accuracy(plain, DATA, [PGD(0.1, steps=10), Square(0.1, queries=100)], batch_size=17)
    assert report.flags == ()


@pytest.mark.parametrize(
    ("model", "wanted", "words"),
    [
        (huge, {"zero_gradients", "unbounded_fails"}, "cross-entropy is 0"),
        (rounded, {"zero_gradients", "unbounded_fails", "black_box_stronger"}, "200 queries of Square"),
        (shattered, {"black_box_stronger"}, "masked"),
        (noisy, {"randomized"}, "EOT"),
        (probabilities, {"probabilities"}, "give logits"),
        (undifferentiable, {"no_gradients"}, "cannot be computed"),
    ],
    ids=["huge", "rounded", "shattered", "noisy", "probabilities", "undifferentiable"],
)
def test_planted_models_are_flagged(model, wanted, words):
    attacks = [Square(0.1, queries=20)] if model is undifferentiable else [PGD(0.1, steps=10)]
    flags = {flag.name: flag.reason for flag in robust_accuracy(model, DATA, attacks).flags}
    assert wanted <= set(flags), flags
    assert any(words in reason for reason in flags.values())


def test_attacks_are_compared_with_each_other():
    report = robust_accuracy(rounded, DATA, [PGD(0.1, steps=10), Square(0.1, queries=300)])
    assert "Square fools" in next(f.reason for f in report.flags if f.name == "black_box_stronger")


def test_inputs_of_another_unit_are_flagged():
    report = robust_accuracy(plain, DATA, [PGD(8.0, steps=5, bounds=(0, 255))])
    assert "bounds" in {flag.name for flag in report.flags}


def test_figures_against_attacks_one_by_one():
    y = Y.copy()
    y[::5] = (y[::5] + 1) % C
    attacks = {"strong": PGD(0.2, steps=10), "weak": FGSM(0.1), "wide": PGD(0.4, norm="l2", steps=10)}
    report = robust_accuracy(plain, (X, y), attacks, batch_size=7, checks=False)
    correct = np.array(plain(mx.array(X)).argmax(axis=1)) == y
    fooled = [np.array(a(plain, mx.array(X), mx.array(y)).success) for a in attacks.values()]
    # A batch is attacked from the same random starts whatever its size, so only single steps agree to the bit.
    assert (report.fooled[1] == fooled[1]).all()
    assert (report.correct == correct).all()
    assert report.clean_accuracy == correct.mean()
    standing = correct & ~report.fooled.any(axis=0)
    assert report.robust_accuracy == standing.mean()
    assert report.attack_success_rate == pytest.approx(1 - standing.sum() / correct.sum())
    for summary, mask in zip(report.attacks, report.fooled, strict=True):
        assert summary.robust_accuracy == (correct & ~mask).mean()
        assert summary.attack_success_rate == pytest.approx(mask.sum() / correct.sum())
        assert mask.any()
        assert summary.mean_distance <= attacks[summary.name].eps + 1e-6
    assert report.robust_accuracy <= min(a.robust_accuracy for a in report.attacks)
    assert not report.fooled[:, ~correct].any()


def test_radius_of_each_input():
    eps = np.linspace(0, 0.2, len(X), dtype=np.float32)
    report = robust_accuracy(plain, DATA, [FGSM(mx.array(eps))], batch_size=9, checks=False)
    whole = FGSM(mx.array(eps))(plain, mx.array(X), mx.array(Y))
    assert (report.fooled[0] == np.array(whole.success)).all()


def test_table_json_and_names():
    report = robust_accuracy(plain, DATA, [PGD(0.1, steps=5), PGD(0.05, steps=5)], checks=False)
    assert [a.name for a in report.attacks] == ["PGD", "PGD 2"]
    figures = json.loads(report.to_json())
    assert figures["robust_accuracy"] == report.robust_accuracy
    assert figures["attacks"][1]["eps"] == 0.05
    out = StringIO()
    Console(file=out, width=120).print(report.table())
    assert "worst case" in out.getvalue()
    assert f"{report.robust_accuracy:.4f}" in out.getvalue()


def test_sweep_and_picture(tmp_path):
    sweep = accuracy_over_eps(plain, DATA, lambda e: [PGD(e, steps=5)], [0.2, 0.0, 0.05], checks=False)
    accuracy = sweep.accuracy()
    assert list(accuracy) == [0.0, 0.05, 0.2]
    assert accuracy[0.0] == 1.0
    assert list(accuracy.values()) == sorted(accuracy.values(), reverse=True)
    assert accuracy[0.2] < accuracy[0.05]
    sweep.plot(tmp_path / "robust.png")
    assert matplotlib.image.imread(tmp_path / "robust.png").size > 1000
    assert [run["eps"] for run in json.loads(sweep.to_json())["runs"]] == [0.0, 0.05, 0.2]


def test_nothing_correct():
    report = robust_accuracy(plain, (X, (Y + 1) % C), [FGSM(0.1)])
    assert (report.clean_accuracy, report.robust_accuracy, report.attack_success_rate) == (0, 0, None)
    json.loads(report.to_json())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robust_accuracy(plain, DATA, []), "attacks must have an attack"),
        (lambda: robust_accuracy(plain, DATA, [plain]), "attacks must be attacks"),
        (lambda: robust_accuracy(plain, DATA, [PGD(0.1, targeted=True)]), "attacks must be untargeted"),
        (lambda: robust_accuracy(plain, (X, Y[:3]), [FGSM(0.1)]), r"data must have inputs \[B, ...\]"),
        (lambda: robust_accuracy(plain, X, [FGSM(0.1)]), "data must"),
        (lambda: robust_accuracy(plain, (X[:0], Y[:0]), [FGSM(0.1)]), "B >= 1"),
        (lambda: robust_accuracy(plain, DATA, [FGSM(0.1)], batch_size=0), "batch_size must be"),
        (lambda: robust_accuracy(plain, (X + 1, Y), [FGSM(0.1)]), "within the bounds"),
        (lambda: robust_accuracy(lambda x: x[:, 0], DATA, [FGSM(0.1)]), "model must return logits"),
        (lambda: robust_accuracy(plain, DATA, [FGSM(mx.array([0.1]))]), "one radius an input"),
        (lambda: accuracy_over_eps(plain, DATA, lambda e: [FGSM(e)], []), "eps must have a radius"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def trained(loss, epochs=15):
    """A perceptron on scikit-learn's digits, and those that it has not seen."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = (digits.data[order] / 16).astype(np.float32), digits.target[order].astype(np.int32)
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    fit(model, loss, (x[:1500], y[:1500]), optim.Adam(3e-3), epochs, batch_size=50, progress=False)
    model.eval()
    return model, (x[1500:], y[1500:])


@pytest.mark.parametrize(
    "loss",
    [lambda m, x, y: cross_entropy(m(x), y).mean(), lambda m, x, y: adversarial_loss(m, x, y, 0.1, steps=3)],
    ids=["plain", "adversarial"],
)
def test_trained_models_have_no_flags(loss):
    """No false alarms, in balls from nearly none to all of them fooled."""
    model, data = trained(loss)
    for norm, eps in (("linf", 0.02), ("linf", 0.1), ("linf", 0.3), ("l2", 0.5)):
        report = robust_accuracy(model, data, [PGD(eps, norm=norm, steps=20), Square(eps, norm=norm, queries=200)])
        assert report.clean_accuracy > 0.9
        assert report.flags == (), (norm, eps)


@mx.custom_function
def turned_inside(x):
    return x


@turned_inside.vjp
def turned_inside_vjp(primals, cotangents, outputs):
    """The gradient on the data, which come in sixteenths; its opposite anywhere else, where the first step ends."""
    x = primals if isinstance(primals, mx.array) else primals[0]
    on_data = (mx.abs(x * 16 - mx.round(x * 16)) < 1e-4).all(axis=1, keepdims=True)
    cotangent = cotangents if isinstance(cotangents, mx.array) else cotangents[0]
    return mx.where(on_data, cotangent, -cotangent)


def test_more_steps_that_do_worse_are_flagged():
    """One step from the input fools; each further step turns back."""
    x = np.round(X * 16).astype(np.float32) / 16
    y = np.array(plain(mx.array(x)).argmax(axis=1))
    report = robust_accuracy(lambda a: plain(turned_inside(a)), (x, y), [PGD(0.2, steps=10)])
    reasons = {flag.name: flag.reason for flag in report.flags}
    assert "one step fools" in reasons["more_steps_weaker"]
    assert "more than 50 steps" in reasons["more_steps_weaker"]
    assert "more_steps_weaker" not in {f.name for f in robust_accuracy(plain, (x, y), [PGD(0.2, steps=10)]).flags}
