"""Averages against their closed form; weight perturbation, free training and distillation against loops by hand."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_bulwark.attacks import PGD, CarliniWagnerL2
from mlx_bulwark.training import (
    EMA,
    AdversarialWeightPerturbation,
    FreeAdversarialTraining,
    adversarial_loss,
    distill,
    distillation_loss,
    fit,
    temperature_loss,
)
from scipy import special


def network():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    x = mx.array(rng.uniform(0, 1, (7, 5)).astype(np.float32))
    return network(), x, mx.array(rng.integers(0, 4, 7))


def weights_of(model):
    return {path: np.array(a) for path, a in tree_flatten(model.parameters())}


def copy_of(model):
    other = network()
    other.update(model.parameters())
    return other


# EMA


def test_the_average_is_its_closed_form():
    model, rng, decay = nn.Linear(3, 2), np.random.default_rng(0), 0.9
    path = [rng.standard_normal((2, 3)).astype(np.float32) for _ in range(21)]
    model.weight = mx.array(path[0])
    ema = EMA(model, decay)
    for weight in path[1:]:
        model.weight = mx.array(weight)
        ema.update(model)
    want = decay**20 * path[0] + sum((1 - decay) * decay ** (20 - i) * path[i] for i in range(1, 21))
    with ema.applied(model):
        np.testing.assert_allclose(np.array(model.weight), want, rtol=1e-5, atol=1e-6)
    assert np.array_equal(np.array(model.weight), path[-1])  # its own again
    ema.copy_to(model)
    np.testing.assert_allclose(np.array(model.weight), want, rtol=1e-5, atol=1e-6)


def test_half_precision_does_not_stall_the_average():
    model = nn.Linear(1, 1, bias=False)
    model.weight = mx.ones((1, 1), mx.bfloat16)
    ema = EMA(model, 0.999)
    model.weight = mx.array([[1.5]], mx.bfloat16)
    for _ in range(1000):
        ema.update(model)
    ema.copy_to(model)
    assert model.weight.dtype == mx.bfloat16
    assert model.weight.item() == pytest.approx(1.5 - 0.5 * 0.999**1000, abs=0.005)


def test_running_statistics_are_averaged_and_come_back():
    model = nn.BatchNorm(2)
    ema = EMA(model, 0.5)
    model(mx.array([[0.0, 10.0], [2.0, 30.0]]))
    own = np.array(model.running_mean)
    ema.update(model)
    with ema.applied(model):
        np.testing.assert_allclose(np.array(model.running_mean), own / 2)
    assert np.array_equal(np.array(model.running_mean), own)


def test_an_average_is_of_one_model():
    with pytest.raises(ValueError, match="must have the parameters that the average was made for"):
        EMA(nn.Linear(2, 2)).update(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\)"):
        EMA(nn.Linear(2, 2), 1.0)


# Adversarial weight perturbation


@pytest.mark.parametrize("compiled", [False, True])
def test_weight_perturbation_is_a_loop_by_hand(case, compiled):
    model, x, y = case
    other, rate, gamma = copy_of(model), 0.1, 0.2

    def loss_fn(model, x, y):
        return nn.losses.cross_entropy(model(x), y, reduction="mean")

    optimizer = optim.SGD(rate)
    step = AdversarialWeightPerturbation(model, optimizer, loss_fn, gamma=gamma)
    if compiled:
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]
        step = mx.compile(step, inputs=state, outputs=state)
    weights = {path: a.astype(np.float64) for path, a in weights_of(other).items()}

    def gradient(weights):
        other.load_weights([(path, mx.array(a.astype(np.float32))) for path, a in weights.items()])
        loss, tree = nn.value_and_grad(other, loss_fn)(other, x, y)
        return loss.item(), {path: np.array(g).astype(np.float64) for path, g in tree_flatten(tree)}

    for _ in range(3):
        loss = step(x, y)
        mx.eval(loss, model.state)
        _, ascent = gradient(weights)
        moved = {
            path: w + (gamma * np.linalg.norm(w) * ascent[path] / np.linalg.norm(ascent[path]) if w.ndim > 1 else 0)
            for path, w in weights.items()
        }
        value, descent = gradient(moved)
        weights = {path: w - rate * descent[path] for path, w in weights.items()}
        assert loss.item() == pytest.approx(value, rel=1e-4)
        assert value > gradient(weights)[0]  # the perturbation went uphill
    for path, a in weights_of(model).items():
        np.testing.assert_allclose(a, weights[path], rtol=1e-4, atol=1e-5)


def test_weight_perturbation_costs_two_passes_and_one_update_of_statistics(case):
    _, x, y = case
    model, plain = (nn.Sequential(nn.BatchNorm(5, momentum=0.5), nn.Linear(5, 4)) for _ in range(2))
    calls = []

    def loss_fn(model, x, y):
        calls.append(1)
        return nn.losses.cross_entropy(model(x), y, reduction="mean")

    AdversarialWeightPerturbation(model, optim.SGD(0.1), loss_fn)(x, y)
    assert len(calls) == 2
    plain(x)
    np.testing.assert_allclose(np.array(model.layers[0].running_mean), np.array(plain.layers[0].running_mean))


def test_no_gradient_perturbs_no_weight():
    model = nn.Linear(2, 2)
    before = weights_of(model)
    AdversarialWeightPerturbation(model, optim.SGD(1.0), lambda m, x: 0 * m(x).sum(), gamma=1.0)(mx.ones((3, 2)))
    assert all(np.array_equal(a, before[path]) for path, a in weights_of(model).items())


# Free adversarial training


@pytest.mark.parametrize("compiled", [False, True])
def test_free_training_is_a_loop_by_hand(backend, case, compiled):
    model, x, y = case
    other, eps, rate = copy_of(model), np.float32(0.1), 0.1
    step = FreeAdversarialTraining(model, optim.SGD(rate), float(eps), replays=3, compile=compiled)
    moved = np.zeros(x.shape, np.float32)

    def loss_fn(model, x, y):
        return nn.losses.cross_entropy(model(x), y, reduction="mean")

    for rows in ([0, 1, 2, 3, 4, 5, 6], [3, 2, 1], [6, 5, 4, 3, 2]):
        batch, classes = x[mx.array(rows)], y[mx.array(rows)]
        loss, losses = step(batch, classes), []
        for _ in range(3):
            shift = moved[: len(rows)]
            inputs = np.clip(np.array(batch) + shift, 0, 1)
            value, gradients = nn.value_and_grad(other, loss_fn)(other, mx.array(inputs), classes)
            slope = np.array(mx.grad(lambda z, c=classes: loss_fn(other, z, c))(mx.array(inputs)))
            free = (np.array(batch) + shift == inputs).astype(np.float32)  # no slope where the bounds clip
            moved[: len(rows)] = np.clip(shift + eps * np.sign(slope * free), -eps, eps)
            optim.SGD(rate).update(other, gradients)
            losses.append(value.item())
        assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
        np.testing.assert_allclose(np.array(step.perturbation), moved, atol=1e-6)
    for path, a in weights_of(model).items():
        np.testing.assert_allclose(a, weights_of(other)[path], rtol=1e-4, atol=1e-6)


def test_a_replay_is_one_pass(case):
    _, x, y = case
    calls = []

    class Counted(nn.Linear):
        def __call__(self, x):
            calls.append(1)
            return super().__call__(x)

    FreeAdversarialTraining(Counted(5, 4), optim.SGD(0.1), 0.1, replays=4, compile=False)(x, y)
    assert len(calls) == 4


# Distillation


def test_distillation_is_its_formula(case):
    model, x, y = case
    teacher = np.random.default_rng(1).standard_normal((7, 4)).astype(np.float32)
    logits, T = np.array(model(x)).astype(np.float64), 5.0
    soft = -(special.softmax(teacher / T, axis=1) * special.log_softmax(logits / T, axis=1)).sum(axis=1)
    hard = -special.log_softmax(logits, axis=1)[np.arange(7), np.array(y)]
    at_t = -special.log_softmax(logits / T, axis=1)[np.arange(7), np.array(y)]
    said = mx.array(teacher)
    plain = distillation_loss(model, x, y, said, T, hard_weight=0.3, reduction="none")
    np.testing.assert_allclose(np.array(plain), 0.7 * T**2 * soft + 0.3 * hard, rtol=1e-5)
    defensive = distillation_loss(model, x, y, said, T, kind="defensive", reduction="none")
    np.testing.assert_allclose(np.array(defensive), soft, rtol=1e-5)
    np.testing.assert_allclose(np.array(temperature_loss(model, x, y, T, reduction="none")), at_t, rtol=1e-5)


def test_the_gradient_of_plain_distillation_keeps_its_size():
    """T^2 undoes what T takes: at a large T the gradient by logits is (z - v) / C of centred logits (Hinton, eq. 4)."""
    z, v = mx.array([[1.0, -1.0, 0.0]]), mx.array([[0.5, 0.5, -1.0]])
    y = mx.array([0])
    gradient = mx.grad(lambda z: distillation_loss(lambda x: x, z, y, v, 1000.0))(z)
    np.testing.assert_allclose(np.array(gradient), np.array(z - v) / 3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "both"}, "kind must be 'plain' or 'defensive'"),
        ({"kind": "defensive", "hard_weight": 0.5}, "hard_weight must be 0 where kind is 'defensive'"),
        ({"hard_weight": 2.0}, r"hard_weight must be a number in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature must be a positive, finite number"),
        ({"teacher_logits": mx.zeros((7, 3))}, "teacher_logits must have the shape of the student's"),
    ],
)
def test_wrong_distillation_is_refused(case, settings, says):
    model, x, y = case
    arguments = {"teacher_logits": mx.zeros((7, 4)), "temperature": 2.0} | settings
    with pytest.raises(ValueError, match=says):
        distillation_loss(model, x, y, **arguments)


def two_kinds_of_features(n):
    """One feature that stands against 0.1, and 30 that tell the class together and turn over by it; bounds -1, 1."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, n)
    sign = (2 * y - 1)[:, None]
    strong = 0.3 * sign * np.where(rng.random((n, 1)) < 0.95, 1, -1)
    weak = 0.05 * sign + rng.normal(0, 0.05, (n, 30))
    return np.concatenate([strong, weak], axis=1).astype(np.float32), y.astype(np.int32)


def kept(model, x, y):
    result = PGD(0.1, steps=10, bounds=(-1, 1))(model, mx.array(x), mx.array(y))
    return float((np.array(result.correct) & ~np.array(result.success)).mean())


def test_a_student_of_an_adversarially_trained_teacher_is_robust():
    """By the same plain distillation the student of a plain teacher is not."""
    x, y = two_kinds_of_features(256)
    robust = {}
    for name, eps in (("plain", 0.0), ("adversarial", 0.1)):
        teacher, student = nn.Linear(31, 2), nn.Linear(31, 2)
        fit(
            teacher,
            lambda m, x, y, eps=eps: adversarial_loss(m, x, y, eps, steps=3, bounds=(-1, 1)),
            (x, y),
            optim.Adam(0.05),
            20,
            batch_size=64,
            progress=False,
        )
        distill(teacher, student, 2.0, (x, y), optim.Adam(0.05), 20, batch_size=64, progress=False)
        robust[name] = kept(teacher, x, y), kept(student, x, y)
    assert max(robust["plain"]) < 0.2
    assert min(robust["adversarial"]) > 0.85


def test_defensive_distillation_hides_gradients_and_falls_to_carlini_and_wagner():
    """Student at 1, trained at T: logits T times as large, and gradients of the cross-entropy that vanish."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 256).astype(np.int32)
    x = np.clip(0.5 + 0.2 * (2 * y - 1)[:, None] + rng.normal(0, 0.1, (256, 8)), 0, 1).astype(np.float32)
    T, sizes = 50.0, {}
    for name in ("plain", "distilled"):
        teacher, student = nn.Linear(8, 2), nn.Linear(8, 2)
        at = T if name == "distilled" else 1.0
        settings = {"batch_size": 64, "progress": False}
        fit(teacher, lambda m, x, y, at=at: temperature_loss(m, x, y, at), (x, y), optim.Adam(0.5), 20, **settings)
        distill(teacher, student, at, (x, y), optim.Adam(0.5), 20, kind="defensive", **settings)
        loss = mx.grad(lambda z, m=student: nn.losses.cross_entropy(m(z), mx.array(y), reduction="sum"))
        sizes[name] = np.median(np.abs(np.array(loss(mx.array(x)))).max(axis=1))
    assert sizes["distilled"] < 1e-6 * sizes["plain"]
    found = CarliniWagnerL2(steps=100, binary_search_steps=4, initial_const=1.0, learning_rate=0.05)(
        student, mx.array(x[:32]), mx.array(y[:32])
    )
    assert found.correct.all().item()
    assert found.success.all().item()


def test_distill_leaves_the_teacher_alone(case):
    _, x, y = case
    teacher, student = nn.Sequential(nn.BatchNorm(5), nn.Linear(5, 4)), nn.Linear(5, 4)
    before = weights_of(teacher)
    distill(teacher, student, 3.0, (x, y), optim.SGD(0.1), 1, batch_size=3, progress=False)
    assert all(np.array_equal(a, before[path]) for path, a in weights_of(teacher).items())
    assert teacher.layers[0].training
    with pytest.raises(ValueError, match="student must be another model"):
        distill(student, student, 3.0, (x, y), optim.SGD(0.1), 1)


# The loop


def test_fit_keeps_the_weights_that_resisted_best():
    """After two epochs the steps go uphill and the model is lost; the best epoch comes back."""
    x, y = two_kinds_of_features(256)
    model = nn.Linear(31, 2)
    rate = optim.join_schedules([lambda s: mx.array(0.05), lambda s: mx.array(-5.0)], [8])
    history = fit(
        model,
        lambda m, x, y: adversarial_loss(m, x, y, 0.1, steps=3, bounds=(-1, 1)),
        (x, y),
        optim.Adam(rate),
        20,
        batch_size=64,
        validation=(mx.array(x), mx.array(y)),
        attack=PGD(0.1, steps=10, bounds=(-1, 1)),
        patience=3,
        progress=False,
    )
    assert len(history.robust_accuracy) == history.best_epoch + 4 < 20
    assert history.robust_accuracy[-1] < max(history.robust_accuracy)
    assert history.robust_accuracy[history.best_epoch] == max(history.robust_accuracy)
    assert kept(model, x, y) == pytest.approx(max(history.robust_accuracy), abs=0.02)


@pytest.mark.parametrize("compiled", [False, True])
def test_fit_is_a_loop_by_hand(case, compiled):
    model, x, y = case
    other = copy_of(model)

    def loss_fn(model, x, y):
        return nn.losses.cross_entropy(model(x), y, reduction="mean")

    ema = EMA(model, 0.8)
    average, rng, losses = weights_of(other), np.random.default_rng(3), []
    history = fit(
        model,
        loss_fn,
        (np.array(x), y),
        optim.SGD(0.1),
        2,
        batch_size=3,
        ema=ema,
        seed=3,
        compile=compiled,
        progress=False,
    )
    for _ in range(2):
        order = rng.permutation(7)
        for rows in (order[:3], order[3:6]):
            loss, gradients = nn.value_and_grad(other, loss_fn)(other, x[mx.array(rows)], y[mx.array(rows)])
            optim.SGD(0.1).update(other, gradients)
            average = {path: 0.8 * average[path] + 0.2 * a for path, a in weights_of(other).items()}
            losses.append(loss.item())
    np.testing.assert_allclose(history.losses, np.reshape(losses, (2, 2)).mean(axis=1), rtol=1e-5)
    for path, a in weights_of(model).items():
        np.testing.assert_allclose(a, average[path], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 8}, "at least one batch of 8 rows but has 7"),
        ({"epochs": 0}, "epochs must be an integer >= 1"),
        ({"patience": 1}, "validation must be given"),
        ({"attack": PGD(0.1)}, "validation must be given"),
        ({"data": (mx.zeros((7, 5)), mx.zeros(6))}, "the same number of rows"),
    ],
)
def test_wrong_runs_are_refused(case, settings, says):
    model, x, y = case
    arguments = {"data": (x, y), "epochs": 1, "batch_size": 7} | settings
    with pytest.raises(ValueError, match=says):
        fit(model, lambda m, x, y: m(x).sum(), optimizer=optim.SGD(0.1), **arguments)
