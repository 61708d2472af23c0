"""The ensemble: the pointwise worst case of its attacks, and what it costs."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_bulwark.attacks import PGD, AutoAttack

RNG = np.random.default_rng(0)
W1, W2 = RNG.standard_normal((24, 36)) / 3, RNG.standard_normal((5, 24))
X = mx.array(RNG.random((30, 6, 6, 1)).astype(np.float32))


def network(classes):
    def model(x):
        hidden = mx.tanh(x.reshape(len(x), -1) @ mx.array(W1.T.astype(np.float32)).astype(x.dtype))
        return hidden @ mx.array(W2[:classes].T.astype(np.float32)).astype(x.dtype)

    return model


def few(attack, classes, monkeypatch):
    """The ensemble with few steps and queries."""
    members = attack.attacks(classes)
    for name, member in members.items():
        if name == "square":
            member.queries = 50
        else:
            member.steps = 15
    monkeypatch.setattr(attack, "attacks", lambda classes: members)
    return attack


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (5, ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
        (2, ["apgd-ce", "apgd-margin", "fab-t", "square"]),
    ],
)
def test_worst_case_of_its_attacks(classes, names, monkeypatch):
    model = network(classes)
    y = mx.argmax(model(X), axis=1)
    attack = few(AutoAttack(0.06), classes, monkeypatch)
    members = attack.attacks(classes)
    assert list(members) == names
    together = np.array(attack(model, X, y).success)
    alone = {name: np.array(member(model, X, y).success) for name, member in members.items()}
    assert 0 < together.sum() < 30
    for name, success in alone.items():
        if name != "square":  # it draws by the place in the batch, which changes as others leave
            assert (together >= success).all(), name


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_inside_the_ball(norm, dtype, monkeypatch):
    model, x = network(5), X.astype(dtype)
    y = mx.argmax(model(x), axis=1)
    eps = mx.array(np.linspace(0, {"linf": 0.1, "l2": 0.4, "l1": 2.0}[norm], 30, dtype=np.float32))
    result = few(AutoAttack(eps, norm=norm), 5, monkeypatch)(model, x, y)
    wide = np.array(result.adversarial.astype(mx.float32), np.float64)
    moved = abs(wide - np.array(x.astype(mx.float32))).reshape(30, -1)
    length = {"linf": moved.max(1), "l2": np.sqrt((moved**2).sum(1)), "l1": moved.sum(1)}[norm]
    assert result.adversarial.dtype == dtype
    assert (length <= np.array(eps) + 1e-6).all()
    assert wide.min() >= 0
    assert wide.max() <= 1
    fooled = mx.argmax(model(result.adversarial), axis=1) != y
    assert (fooled == result.success).all().item()
    assert 0 < result.success.sum().item() < 30


def test_attacks_stop_when_nothing_stands(monkeypatch):
    """The first attack fools all: each input costs what it took, and the other three cost nothing."""
    model = network(5)
    y = mx.argmax(model(X), axis=1)
    attack = few(AutoAttack(1.0), 5, monkeypatch)
    result = attack(model, X, y)
    assert result.success.all().item()
    assert result.queries.max().item() <= 1 + 16 + 1 + 1


def test_masked_gradients_do_not_save_a_model(monkeypatch):
    """Logits so large that the gradient of the cross-entropy is 0: PGD fails, the ensemble does not."""

    def masked(x):
        return 1e4 * network(5)(x)

    y = mx.argmax(masked(X), axis=1)
    assert PGD(0.2, steps=10, random_start=False)(masked, X, y).success.mean().item() < 0.2
    assert few(AutoAttack(0.2), 5, monkeypatch)(masked, X, y).success.mean().item() > 0.9


def test_refused():
    with pytest.raises(ValueError, match="version must be 'standard'"):
        AutoAttack(0.1, version="rand")
    with pytest.raises(ValueError, match="eps must be"):
        AutoAttack(None)
