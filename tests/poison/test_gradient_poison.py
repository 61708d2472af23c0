"""Poison made by gradients: it keeps labels and balls, and does what it is for."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from learned import Perceptron, accuracy, digits, trained
from mlx.utils import tree_flatten
from mlx_bulwark.poison.attacks import attack_success_rate, clean_label, gradient_matching

__all__ = ["digits"]


@pytest.fixture(scope="module")
def surrogate(digits):
    return trained(*digits[:2])


def corners(x):
    out = np.array(x)
    out[:, ::7, ::7] = 1
    return out


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_clean_label_stays_in_the_ball_and_keeps_labels(digits, surrogate, norm):
    x, y, _, _ = digits
    before, eps = x.copy(), {"linf": 0.2, "l2": 1.0}[norm]
    poisoned = clean_label(surrogate, x, y, rate=0.03, target=4, eps=eps, norm=norm, steps=10)
    rows = poisoned.indices
    assert np.array_equal(x, before)
    assert np.array_equal(poisoned.y, y)
    assert len(rows) == 42
    assert (y[rows] == 4).all()
    others = np.setdiff1d(np.arange(len(x)), rows)
    assert np.array_equal(poisoned.x[others], x[others])
    assert (poisoned.x[rows][:, 5:, 5:] == 1).all()
    moved = np.abs(poisoned.x[rows].astype(np.float64) - x[rows])
    moved[:, 5:, 5:] = 0  # the patch
    length = {"linf": moved.max(axis=(1, 2, 3)), "l2": np.sqrt((moved**2).sum(axis=(1, 2, 3)))}[norm]
    assert length.max() <= eps + 1e-6
    assert (length > eps / 2).mean() > 0.8
    assert poisoned.x.min() >= 0
    assert poisoned.x.max() <= 1


def test_clean_label_opens_a_backdoor(digits, surrogate):
    x, y, test_x, test_y = digits
    poisoned = clean_label(surrogate, x, y, rate=0.05, target=4, eps=2.0, norm="l2", steps=20, trigger=corners)
    assert np.array_equal(poisoned.y, y)
    model = trained(poisoned.x, poisoned.y)
    assert accuracy(model, test_x, test_y) > 0.9
    plain = attack_success_rate(surrogate, test_x, test_y, poisoned)
    assert attack_success_rate(model, test_x, test_y, poisoned) > max(0.6, plain + 0.3)


@pytest.mark.parametrize("kind", [np.array, mx.array], ids=["numpy", "mlx"])
def test_containers_and_seeds(digits, surrogate, kind):
    x, y, test_x, _ = digits
    x, y = kind(x[:200]), y[:200]
    for make in (
        lambda seed: clean_label(surrogate, x, y, rate=0.03, target=4, steps=2, seed=seed),
        lambda seed: gradient_matching(surrogate, x, y, kind(test_x[:1]), rate=0.03, target=4, steps=2, seed=seed),
    ):
        one, same, other = make(0), make(0), make(1)
        assert type(one.x) is type(x)
        assert one.x.dtype == x.dtype
        assert len(one.indices) == 6
        assert np.array_equal(np.array(one.x), np.array(same.x))
        assert one.indices.tolist() != other.indices.tolist()
        changed = (np.array(one.x) != np.array(x)).any(axis=(1, 2, 3))
        assert np.flatnonzero(changed).tolist() == one.indices.tolist()
        none = make(0)._replace(x=None)
        assert none.indices.tolist() == one.indices.tolist()


def flat_gradient(model, x, label):
    """By autograd of the loss written out, one array."""

    def loss(model, x):
        logits = model(x)
        return (mx.logsumexp(logits, axis=1) - logits[:, label]).mean()

    _, found = nn.value_and_grad(model, loss)(model, mx.array(x))
    return np.concatenate([np.array(g, np.float64).reshape(-1) for _, g in tree_flatten(found)])


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_gradients_come_to_match(digits, surrogate):
    x, y, test_x, test_y = digits
    victim = test_x[test_y == 7][:1]
    before = x.copy()
    poisoned = gradient_matching(surrogate, x, y, victim, rate=0.02, target=4, eps=0.25, steps=40)
    rows = poisoned.indices
    assert np.array_equal(x, before)
    assert np.array_equal(poisoned.y, y)
    assert poisoned.trigger is None
    assert poisoned.target == 4
    assert (y[rows] == 4).all()
    assert len(rows) == 28
    assert np.abs(poisoned.x - x).max() <= 0.25 + 1e-6
    assert poisoned.x.min() >= 0
    assert poisoned.x.max() <= 1
    others = np.setdiff1d(np.arange(len(x)), rows)
    assert np.array_equal(poisoned.x[others], x[others])
    wanted = flat_gradient(surrogate, victim, 4)
    plain, found = (cosine(flat_gradient(surrogate, data[rows], 4), wanted) for data in (x, poisoned.x))
    assert found > max(plain + 0.2, 0.5)


def test_a_step_on_the_poison_brings_the_victim_to_the_target(digits, surrogate):
    x, y, test_x, test_y = digits

    def loss_after_a_step(data, victim):
        model = Perceptron(64)
        model.update(surrogate.parameters())
        loss = nn.value_and_grad(model, lambda x: nn.losses.cross_entropy(model(x), mx.full(len(x), 4)).mean())
        before, _ = loss(mx.array(victim))
        _, gradients = loss(mx.array(data))
        size = float(np.linalg.norm([float(mx.linalg.norm(g).item()) for _, g in tree_flatten(gradients)]))
        optim.SGD(0.1 / size).update(model, gradients)
        return loss(mx.array(victim))[0].item() - before.item()

    for row in np.flatnonzero(test_y == 7)[:3]:
        victim = test_x[[row]]
        poisoned = gradient_matching(surrogate, x, y, victim, rate=0.02, target=4, eps=0.25, steps=40)
        plain, found = (loss_after_a_step(data[poisoned.indices], victim) for data in (x, poisoned.x))
        assert found < min(1.25 * plain, 0)


def test_restarts_never_match_worse(digits, surrogate):
    x, y, test_x, _ = digits
    wanted = flat_gradient(surrogate, test_x[:1], 4)
    found = []
    for restarts in (1, 3):
        p = gradient_matching(surrogate, x[:300], y[:300], test_x[:1], rate=0.05, target=4, steps=3, restarts=restarts)
        found.append(cosine(flat_gradient(surrogate, p.x[p.indices], 4), wanted))
    assert found[1] >= found[0] - 1e-5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rate": 0.5}, "no more than the"),
        ({"rate": 0.0001}, "at least one of"),
        ({"target": -1}, "target must be a class"),
        ({"bounds": (0, 0.5)}, "within the bounds"),
        ({"eps": -1}, "eps must be"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_refusals_of_both(digits, surrogate, change, text):
    x, y, test_x, _ = digits
    settings = {"rate": 0.03, "target": 4} | change
    with pytest.raises(ValueError, match=text):
        clean_label(surrogate, x, y, **settings)
    with pytest.raises(ValueError, match=text):
        gradient_matching(surrogate, x, y, test_x[:1], **settings)


@pytest.mark.parametrize(
    ("victim", "change", "text"),
    [
        (np.zeros((0, 8, 8, 1), np.float32), {}, "victim must have shape"),
        (np.zeros((8, 8, 1), np.float32), {}, "victim must have shape"),
        (np.full((1, 8, 8, 1), 2.0, np.float32), {}, "within the bounds"),
        ([[0.0]], {}, "victim must have shape"),
        (np.zeros((1, 8, 8, 1), np.float32), {"restarts": 0}, "restarts must be an integer >= 1"),
        (np.zeros((1, 8, 8, 1), np.float32), {"batch_size": 0}, "batch_size must be an integer >= 1"),
        (np.zeros((1, 8, 8, 1), np.float32), {"alpha": -1}, "alpha must be"),
    ],
)
def test_refusals_of_gradient_matching(digits, surrogate, victim, change, text):
    x, y, _, _ = digits
    with pytest.raises(ValueError, match=text):
        gradient_matching(surrogate, x, y, victim, rate=0.03, target=4, **change)


def test_refusals_of_models(digits):
    x, y, test_x, _ = digits
    with pytest.raises(TypeError, match=r"model must be a mlx.nn.Module"):
        gradient_matching(lambda x: x, x, y, test_x[:1], rate=0.03, target=4)
    with pytest.raises(ValueError, match="evaluation mode"):
        gradient_matching(nn.Sequential(nn.Dropout(0.5)), x, y, test_x[:1], rate=0.03, target=4)
    with pytest.raises(ValueError, match="evaluation mode"):
        clean_label(nn.Sequential(nn.Dropout(0.5)), x, y, rate=0.03, target=4)
    frozen = nn.Sequential(nn.Linear(64, 10))
    frozen.freeze()
    with pytest.raises(ValueError, match="model must have trainable parameters"):
        gradient_matching(frozen, x, y, test_x[:1], rate=0.03, target=4)
