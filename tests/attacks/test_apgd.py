"""APGD against the published schedule written in NumPy, float64, one input at a time."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_bulwark.attacks import APGD, PGD, cross_entropy, dlr, dlr_targeted, margin
from mlx_bulwark.attacks.apgd import checkpoints, likely_classes
from scipy import special

RNG = np.random.default_rng(0)
W1, W2 = RNG.standard_normal((16, 8)), 2 * RNG.standard_normal((5, 16))
X = RNG.random((20, 8)).astype(np.float32)


def model(x):
    return mx.tanh(x @ mx.array(W1.T.astype(np.float32))) @ mx.array(W2.T.astype(np.float32))


Y = np.array(mx.argmax(model(mx.array(X)), axis=1))


def loss_and_gradient(x, y):
    h = np.tanh(W1 @ x)
    z = W2 @ h
    p = special.softmax(z)
    return -special.log_softmax(z)[y], W1.T @ ((W2.T @ (p - np.eye(5)[y])) * (1 - h**2)), z.argmax()


def into(norm, x, origin, eps):
    """The ball, then the box."""
    moved = x - origin
    if norm == "linf":
        return np.clip(origin + np.clip(moved, -eps, eps), 0, 1)
    return np.clip(origin + moved * min(1, eps / max(np.linalg.norm(moved), 1e-300)), 0, 1)


def published(norm, origin, y, eps, steps):
    """The loss of the best point after all steps from the input itself; None as soon as a step fools the model."""
    x = old = best = origin
    loss, grad, _ = loss_and_gradient(x, y)
    best_loss, best_grad, losses, lengths = loss, grad, [loss], 2 * eps
    p, window, last, halved, before = 0.22, 0.22, 0, True, loss
    for k in range(1, steps + 1):
        direction = np.sign(grad) if norm == "linf" else grad / np.linalg.norm(grad)
        z = into(norm, x + lengths * direction, origin, eps)
        a = 0.75 if k > 1 else 1.0
        x, old = into(norm, x + a * (z - x) + (1 - a) * (x - old), origin, eps), x
        loss, grad, found = loss_and_gradient(x, y)
        losses.append(loss)
        if found != y:
            return None
        if loss > best_loss:
            best, best_loss, best_grad = x, loss, grad
        if k == int(np.ceil(p * steps - 1e-9)) and k < steps:
            improved = sum(losses[j] > losses[j - 1] for j in range(last + 1, k + 1))
            halve = improved <= 0.75 * (k - last) or (not halved and before >= best_loss)
            if halve:
                lengths, x, grad = lengths / 2, best, best_grad
            halved, before, last = halve, best_loss, k
            window = max(window - 0.03, 0.06)
            p += window
    return best_loss


def test_checkpoints_are_those_of_the_paper():
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(checkpoints(50)) == [11, 21, 29, 35, 40, 44, 47, 50]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [40, 100])
def test_same_points_as_the_published_schedule(norm, steps):
    eps = {"linf": 0.06, "l2": 0.2}[norm]
    attack = APGD(eps, norm=norm, steps=steps, random_start=False)
    found, queries = attack._perturb(model, attack._task(mx.array(X), mx.array(Y), None), mx.random.key(0))
    losses = np.array(cross_entropy(model(found), mx.array(Y)))
    classes = np.array(mx.argmax(model(found), axis=1))
    stood = 0
    for i, (x, y) in enumerate(zip(X.astype(np.float64), Y, strict=True)):
        want = published(norm, x, y, eps, steps)
        if want is None:
            assert classes[i] != y
            assert queries[i] <= steps + 1
        else:
            stood += 1
            assert classes[i] == y
            assert queries[i] == steps + 1
            assert losses[i] == pytest.approx(want, rel=2e-3)
    assert 5 < stood < 20


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("options", [{}, {"loss": "dlr"}, {"target_classes": 3}])
def test_one_by_one_is_the_same(norm, options):
    """Inputs that are done leave the batch, and nobody notices."""
    eps = {"linf": 0.05, "l2": 0.15, "l1": 0.4}[norm]
    attack = APGD(eps, norm=norm, steps=30, random_start=False, **options)
    together = attack(model, mx.array(X), mx.array(Y))
    alone = [attack(model, mx.array(X[i : i + 1]), mx.array(Y[i : i + 1])) for i in range(20)]
    assert 0 < together.success.sum().item() < 20
    assert together.success.tolist() == [a.success.item() for a in alone]
    assert together.queries.tolist() == [a.queries.item() for a in alone]
    assert np.allclose(together.adversarial, np.concatenate([a.adversarial for a in alone]), atol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_not_weaker_than_pgd(norm):
    """On the whole: it finds no fewer than PGD of as many steps."""
    eps = {"linf": 0.05, "l2": 0.15}[norm]
    found = [a(eps, norm=norm, steps=50)(model, mx.array(X), mx.array(Y)).success.sum().item() for a in (APGD, PGD)]
    assert found[0] >= found[1] > 0


def test_targets_and_restarts():
    targets = mx.array((Y + 1) % 5)
    counts = []
    for loss in ("cross_entropy", "dlr", "margin"):
        attack = APGD(1.0, steps=20, restarts=2, targeted=True, loss=loss)
        result = attack(model, mx.array(X), mx.array(Y), targets=targets)
        reached = mx.argmax(model(result.adversarial), axis=1) == targets
        assert (reached == result.success).all().item()
        counts.append(result.success.sum().item())
    assert min(counts) > 5


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("attack", [PGD, APGD])
def test_a_loss_of_ones_own(attack, targeted):
    """A function that is the margin does what the margin does, and not what cross-entropy does."""
    goal = {"targets": mx.array((Y + 1) % 5)} if targeted else {}
    own, named, other = (
        attack(1.0, norm="l2", steps=8, loss=loss, targeted=targeted)(model, mx.array(X), mx.array(Y), **goal)
        for loss in (lambda z, y: margin(z, y), "margin", "cross_entropy")
    )
    assert all((a == b).all().item() for a, b in zip(own, named, strict=True))
    assert not (own.adversarial == other.adversarial).all().item()


def test_compiled_is_the_same():
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
    y = mx.argmax(module(mx.array(X)), axis=1)
    for attack in (PGD, APGD):
        results = [attack(0.1, steps=12, compile=c)(module, mx.array(X), y) for c in (True, False)]
        assert results[0].success.tolist() == results[1].success.tolist()
        assert mx.allclose(results[0].adversarial, results[1].adversarial, atol=1e-3).item()
        assert results[0].success.any().item()


def test_trained_weights_are_seen_by_the_same_attack():
    module, attack = nn.Linear(8, 3), PGD(0.3, steps=3)
    for _ in range(2):
        y = mx.argmax(module(mx.array(X)), axis=1)
        result = attack(module, mx.array(X), y)
        fooled = mx.argmax(module(result.adversarial), axis=1) != y
        assert (fooled == result.success).all().item()
        module.update({"weight": -module.weight, "bias": module.bias})


def test_losses_are_their_formulas():
    z, y, t = RNG.standard_normal((50, 6)), RNG.integers(0, 6, 50), RNG.integers(0, 6, 50)
    i, s = np.arange(50), np.sort(z, axis=1)
    other = np.where(np.eye(6, dtype=bool)[y], -np.inf, z).max(1)
    arrays = mx.array(z.astype(np.float32)), mx.array(y)
    assert np.allclose(cross_entropy(*arrays), -special.log_softmax(z, axis=1)[i, y], atol=1e-5)
    assert np.allclose(margin(*arrays), other - z[i, y], atol=1e-5)
    assert np.allclose(dlr(*arrays), (other - z[i, y]) / (s[:, -1] - s[:, -3]), rtol=1e-4)
    scale = s[:, -1] - (s[:, -3] + s[:, -4]) / 2
    assert np.allclose(dlr_targeted(*arrays, mx.array(t)), (z[i, t] - z[i, y]) / scale, rtol=1e-4, atol=1e-5)


def test_cross_entropy_has_a_gradient_where_the_class_is_certain():
    """1 - p of 1e-26 is nothing beside 1, and its gradient is right all the same."""
    z = mx.array([[80.0, 20.0, 10.0]])
    grad = np.array(mx.grad(lambda z: cross_entropy(z, mx.array([0])).sum())(z), np.float64)
    assert np.allclose(grad[0] / np.exp(-60.0), [-1 - np.exp(-10), 1, np.exp(-10)], rtol=1e-4)


def test_all_logits_below_zero():
    """The class is masked by -inf, so that the best other one is found."""
    assert margin(mx.array([[-5.0, -9.0, -7.0]]), mx.array([0])).item() == -2


def test_likely_classes_are_the_others_in_order():
    z, y = RNG.standard_normal((10, 6)).astype(np.float32), RNG.integers(0, 6, 10)
    ranked = np.stack([np.array(c) for c in likely_classes(mx.array(z), mx.array(y), 9)], axis=1)
    for row, own, found in zip(z, y, ranked, strict=True):
        assert found.tolist() == [k for k in np.argsort(-row) if k != own]
