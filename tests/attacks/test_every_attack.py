"""What holds for each attack: the ball and the bounds in the dtype of the input, and the edges of its arguments."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    AutoAttack,
    CarliniWagnerL2,
    DeepFool,
    HopSkipJump,
    Square,
    Transfer,
    UniversalPatch,
)
from mlx_bulwark.attacks.base import SIZES

B, C, SHAPE = 24, 5, (2, 2, 3)
WEIGHT = np.random.default_rng(0).standard_normal((12, C)).astype(np.float32)
VALUES = np.random.default_rng(1).random((B, *SHAPE)).astype(np.float32)
VALUES[::3, 0] = 0.0  # as the ground of digits: on the bounds themselves
VALUES[1::3, 1] = 1.0
X = mx.array(VALUES)


def flat(x):
    return x.reshape(len(x), -1)


def linear(x):
    return (flat(x) - 0.5).astype(x.dtype) @ mx.array(WEIGHT).astype(x.dtype)


Y = mx.argmax(linear(X), axis=1).astype(mx.int32)


class ShortAutoAttack(AutoAttack):
    """The ensemble with few steps of each member."""

    def attacks(self, classes):
        members = super().attacks(classes)
        for member in members.values():
            for setting in ("steps", "queries"):
                if hasattr(member, setting):
                    setattr(member, setting, 5)
            member.target_classes = min(2, classes - 1)
        return members


ATTACKS = {
    "fgsm": (FGSM, ("linf", "l2", "l1"), {}),
    "pgd": (PGD, ("linf", "l2", "l1"), {"steps": 5, "restarts": 2}),
    "momentum": (PGD, ("linf", "l2", "l1"), {"steps": 5, "momentum": 0.9}),
    "apgd": (APGD, ("linf", "l2", "l1"), {"steps": 8}),
    "carlini_wagner": (
        lambda eps, norm, **o: CarliniWagnerL2(eps, **o),
        ("l2",),
        {"steps": 30, "binary_search_steps": 3, "initial_const": 1.0},
    ),
    "deepfool": (DeepFool, ("linf", "l2"), {"candidates": 3}),
    "fab": (FAB, ("linf", "l2", "l1"), {"steps": 5, "target_classes": 2}),
    "square": (Square, ("linf", "l2", "l1"), {"queries": 40}),
    "hop_skip_jump": (HopSkipJump, ("linf", "l2"), {"queries": 150, "initial_estimates": 20}),
    "transfer": (
        lambda eps, norm, **o: Transfer(PGD(eps, norm=norm, **o), lambda x: 2 * linear(x)),
        ("linf", "l2", "l1"),
        {"steps": 5},
    ),
    "autoattack": (ShortAutoAttack, ("linf", "l2", "l1"), {}),
}
RADIUS = {"linf": 0.2, "l2": 0.5, "l1": 1.5}
EVERY = pytest.mark.parametrize("name", ATTACKS)


def attack_of(name, eps, norm=None):
    make, norms, options = ATTACKS[name]
    return make(eps, norm=norm or norms[0], **options)


CASES = [(name, norm) for name, (_, norms, _) in ATTACKS.items() for norm in norms]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_in_the_ball_and_the_bounds_after_the_cast(name, norm, dtype):
    """A radius for each input, from 0 on; judged in float64 by what the arrays of the input's dtype hold."""
    x = X.astype(dtype)
    y = mx.argmax(linear(x), axis=1)
    eps = np.linspace(0, RADIUS[norm], B, dtype=np.float32)
    result = attack_of(name, mx.array(eps), norm)(linear, x, y)
    assert result.adversarial.dtype == dtype
    found, origin = (np.array(a.astype(mx.float32), np.float64).reshape(B, -1) for a in (result.adversarial, x))
    moved = abs(found - origin)
    length = {"linf": moved.max(1), "l2": np.sqrt((moved**2).sum(1)), "l1": moved.sum(1)}[norm]
    assert (length <= eps + 1e-6).all()
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6
    assert np.allclose(length, result.distances, atol=1e-5)
    fooled = np.array(mx.argmax(linear(result.adversarial), axis=1) != y)
    assert (fooled == np.array(result.success)).all()
    assert (length[~fooled] == 0).all()
    assert fooled.sum() > 1
    assert not fooled[0]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_inputs_that_are_done_are_asked_for_no_more(name, norm):
    """Most fall at once. The model is asked for what is told, and for what fills a batch up to few sizes."""
    asked = []

    def counting(x):
        asked.append(len(x))
        return linear(x)

    eps = np.where(np.arange(B) < B // 4, 1e-6, 50 * RADIUS[norm]).astype(np.float32)
    result = attack_of(name, mx.array(eps), norm)(counting, X, Y)
    told = result.queries.sum().item()
    assert result.success.sum().item() >= B // 2
    assert told <= sum(asked) <= told + len(asked) * (B // SIZES - 1)


@EVERY
def test_radius_0(name):
    result = attack_of(name, 0.0)(linear, X, Y)
    assert (result.adversarial == X).all().item()
    assert not result.success.any().item()
    assert (result.distances == 0).all().item()
    assert (result.queries == 1).all().item()


@EVERY
def test_radii_of_other_inputs_are_refused(name):
    with pytest.raises(ValueError, match=rf"eps must have one radius an input, {B}, but has 3"):
        attack_of(name, mx.array([0.1, 0.2, 0.3]))(linear, X, Y)
    for eps in (-0.1, float("nan"), mx.array([-0.1] * B)):
        with pytest.raises(ValueError, match="eps must be"):
            attack_of(name, eps)


@EVERY
def test_one_class_is_refused(name):
    with pytest.raises(ValueError, match="2 classes or more but has 1"):
        attack_of(name, 0.1)(lambda x: linear(x)[:, :1], X, 0 * Y)


@EVERY
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_inputs_out_of_the_bounds_are_refused(name, value):
    x = mx.array(X)
    x[5, 0, 1, 2] = value
    with pytest.raises(ValueError, match=r"within the bounds .* but has 1 inputs that are not, first input 5"):
        attack_of(name, 0.1)(linear, x, Y)


@EVERY
@pytest.mark.parametrize("label", [-1, C])
def test_labels_out_of_range_are_refused(name, label):
    y = mx.array(Y)
    y[3] = label
    with pytest.raises(ValueError, match=r"y must be in \[0, 5\) but has labels from"):
        attack_of(name, 0.1)(linear, X, y)


@EVERY
@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm(8)], ids=["dropout", "batch_norm"])
def test_training_mode_is_refused(name, layer):
    """In evaluation mode it is attacked, and its running statistics stay what they were."""
    mx.random.seed(0)
    model = nn.Sequential(flat, nn.Linear(12, 8), layer, nn.ReLU(), nn.Linear(8, C))
    model.train()
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        attack_of(name, 0.1)(model, X, Y)
    model.eval()
    before = [np.array(a) for a in (layer.running_mean, layer.running_var)] if isinstance(layer, nn.BatchNorm) else []
    result = attack_of(name, 10.0)(model, X, mx.argmax(model(X), axis=1))
    assert result.correct.all().item()
    after = [layer.running_mean, layer.running_var] if before else []
    assert all((a == np.array(b)).all() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm(12)], ids=["dropout", "batch_norm"])
def test_a_surrogate_in_training_mode_is_refused(layer):
    surrogate = nn.Sequential(flat, layer, nn.Linear(12, C))
    surrogate.eval()
    attack = Transfer(FGSM(0.1), surrogate)
    attack(linear, X, Y)
    surrogate.train()
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        attack(linear, X, Y)
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        Transfer(FGSM(0.1), surrogate)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm(12)], ids=["dropout", "batch_norm"])
def test_patches_refuse_training_mode(layer):
    model = nn.Sequential(flat, layer, nn.Linear(12, C))
    patch = UniversalPatch((1, 1), steps=1)
    for call in (patch.fit, patch.evaluate):
        with pytest.raises(ValueError, match="model must be in evaluation mode"):
            call(model, X, Y)
    model.eval()
    assert patch.fit(model, X, Y).evaluate(model, X, Y).adversarial.shape == X.shape
