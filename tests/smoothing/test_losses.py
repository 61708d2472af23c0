"""Losses against NumPy and one-by-one loops, and what training with them certifies."""

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx_bulwark.smoothing import (
    DenoisedClassifier,
    Smooth,
    certify_dataset,
    consistency_loss,
    denoising_loss,
    gaussian_augmentation_loss,
    macer_loss,
    smooth_adv_loss,
)
from scipy import special, stats

SIGMA = 0.4
ALL = {
    "gaussian": gaussian_augmentation_loss,
    "smooth_adv": lambda *a, **o: smooth_adv_loss(*a, epsilon=0.5, **o),
    "macer": macer_loss,
    "consistency": consistency_loss,
}


@pytest.fixture
def case():
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((7, 5)).astype(np.float32))
    return model, x, mx.argmax(model(x), axis=1).astype(mx.int32)


def noisy_logits(model, x, copies, key, shift=0.0):
    noise = np.array(mx.random.normal((copies, *x.shape), key=key))
    inputs = np.array(x) + shift + SIGMA * noise
    return np.stack([np.array(model(mx.array(i.astype(np.float32)))) for i in inputs]).astype(np.float64)


def own(log_p, y):
    return log_p[:, np.arange(len(y)), np.array(y)]


def test_gaussian_augmentation_is_cross_entropy_on_the_copies(case):
    model, x, y = case
    key = mx.random.key(3)
    log_p = special.log_softmax(noisy_logits(model, x, 4, key), axis=-1)
    loss = gaussian_augmentation_loss(model, x, y, SIGMA, copies=4, key=key)
    assert loss.item() == pytest.approx(-own(log_p, y).mean(), rel=1e-5)


def test_consistency_is_its_formula(case):
    model, x, y = case
    key = mx.random.key(3)
    log_p = special.log_softmax(noisy_logits(model, x, 3, key), axis=-1)
    mean = np.exp(log_p).mean(0)
    divergence = np.mean([stats.entropy(mean, np.exp(p), axis=1) for p in log_p])
    expected = -own(log_p, y).mean() + 7 * divergence + 0.3 * stats.entropy(mean, axis=1).mean()
    loss = consistency_loss(model, x, y, SIGMA, copies=3, weight=7, entropy_weight=0.3, key=key)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_macer_is_its_formula(case):
    model, x, y = case
    y = mx.where(mx.arange(7) == 2, (y + 1) % 3, y)  # one is wrong, and adds no radius
    key = mx.random.key(3)
    logits = noisy_logits(model, x, 16, key)
    classification = -np.log(own(special.softmax(logits, axis=-1), y).mean(0))
    mean = special.softmax(2 * logits, axis=-1).mean(0)
    total = 0.0
    for row, c in enumerate(np.array(y)):
        rival = max(mean[row, k] for k in range(3) if k != c)
        gap = stats.norm.ppf(mean[row, c]) - stats.norm.ppf(rival)
        total += classification[row] + (5 * SIGMA / 2 * (1.5 - gap) if 0 < gap < 1.5 else 0)
    loss = macer_loss(model, x, y, SIGMA, copies=16, weight=5, gamma=1.5, beta=2, key=key)
    assert loss.item() == pytest.approx(total / 7, rel=1e-4)


def test_smooth_adv_goes_uphill_and_stays_in_the_ball(case):
    model, x, y = case
    key = mx.random.key(3)
    seen = []

    def recording(inputs):
        seen.append(inputs)
        return model(inputs)

    losses = [
        smooth_adv_loss(recording, x, y, SIGMA, epsilon=e, steps=3, copies=4, key=key).item() for e in (0.0, 0.3, 0.9)
    ]
    plain = gaussian_augmentation_loss(model, x, y, SIGMA, copies=4, key=key)
    assert losses[0] == pytest.approx(plain.item(), rel=1e-5)
    assert losses[0] < losses[1] < losses[2]
    noise = SIGMA * mx.random.normal((4, *x.shape), key=key)
    shifts = np.array(seen[-1].reshape(4, *x.shape) - noise - x)
    np.testing.assert_allclose(shifts[0], shifts[3], atol=1e-5)  # one shift for all copies
    lengths = np.linalg.norm(shifts[0], axis=1)
    assert (lengths <= 0.9 + 1e-4).all()
    assert (lengths > 0.5).any()
    expected = -own(special.log_softmax(noisy_logits(model, x, 4, key, shifts[0]), axis=-1), y).mean()
    assert losses[2] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [n if n == "gaussian" else pytest.param(n, marks=pytest.mark.slow) for n in ALL],  # compilers take seconds
)
def test_losses_train_compiled_as_they_do_plain(name, case):
    model, x, y = case
    weights = model.parameters()
    after = []
    for compiled in (False, True):
        model.update(weights)
        mx.random.seed(5)
        optimizer = optim.SGD(0.1)
        loss_and_grad = nn.value_and_grad(model, lambda m, x, y: ALL[name](m, x, y, SIGMA))

        def step(x, y, loss_and_grad=loss_and_grad, optimizer=optimizer):
            loss, gradients = loss_and_grad(model, x, y)
            optimizer.update(model, gradients)
            return loss

        state = [model.state, optimizer.state, mx.random.state]
        run = mx.compile(step, inputs=state, outputs=state) if compiled else step
        losses = []
        for _ in range(3):
            losses.append(run(x, y))
            mx.eval(state, losses)
        after.append([loss.item() for loss in losses])
        assert all(map(math.isfinite, after[-1]))
        assert len(set(after[-1])) == 3  # fresh noise in every step
    np.testing.assert_allclose(after[0], after[1], rtol=1e-3)


def test_macer_has_finite_gradients_where_everything_is_certain(case):
    _, x, y = case
    model = nn.Linear(5, 3)
    model.update({"weight": mx.zeros((3, 5)), "bias": mx.array([100.0, 0.0, 0.0])})
    loss, gradients = nn.value_and_grad(model, macer_loss)(model, x, mx.zeros_like(y), SIGMA)
    assert math.isfinite(loss.item())
    assert bool(mx.isfinite(gradients["weight"]).all())


def test_denoising(case):
    model, x, _ = case
    denoiser = nn.Linear(5, 5)
    denoiser.update({"weight": mx.eye(5), "bias": mx.zeros(5)})
    key = mx.random.key(1)
    noise = SIGMA * np.array(mx.random.normal((2, *x.shape), key=key), np.float64)
    loss = denoising_loss(denoiser, x, SIGMA, copies=2, key=key)
    assert loss.item() == pytest.approx((noise**2).mean(), rel=1e-5)
    labels = np.array(model(x)).argmax(1)
    log_p = special.log_softmax(noisy_logits(model, x, 2, key), axis=-1)
    stability = denoising_loss(denoiser, x, SIGMA, classifier=model, copies=2, key=key)
    assert stability.item() == pytest.approx(-own(log_p, labels).mean(), rel=1e-5)
    both = DenoisedClassifier(denoiser, model)
    assert bool(mx.allclose(both(x), model(x), atol=1e-6))
    before = [np.array(p) for _, p in nn.utils.tree_flatten(model.parameters())]
    optimizer = optim.SGD(0.1)
    gradients = nn.value_and_grad(both, lambda m: denoising_loss(m.denoiser, x, SIGMA, classifier=m.classifier))(both)
    optimizer.update(both, gradients[1])
    after = [np.array(p) for _, p in nn.utils.tree_flatten(model.parameters())]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert not bool((denoiser.weight == mx.eye(5)).all())


@pytest.mark.parametrize("name", ALL)
def test_wrong_arguments_are_refused(name, case):
    model, x, y = case
    for arguments, options, words in [
        ((x, y, 0.0), {}, "sigma must"),
        ((x, y, math.nan), {}, "sigma must"),
        ((x, y, SIGMA), {"copies": 0}, "copies must"),
        ((x[0], y, SIGMA), {}, "x must"),
        ((y, y, SIGMA), {}, "x must"),
        ((x, y[:3], SIGMA), {}, "y must be 7 integers"),
        ((x, x[:, 0], SIGMA), {}, "y must be 7 integers"),
    ]:
        with pytest.raises(ValueError, match=rf"\[\w+_loss\] {words}"):
            ALL[name](model, *arguments, **options)


def test_wrong_weights_are_refused(case):
    model, x, y = case
    for f in (
        lambda: smooth_adv_loss(model, x, y, SIGMA, epsilon=-1.0),
        lambda: smooth_adv_loss(model, x, y, SIGMA, epsilon=1.0, steps=0),
        lambda: macer_loss(model, x, y, SIGMA, weight=math.inf),
        lambda: consistency_loss(model, x, y, SIGMA, copies=1),
        lambda: consistency_loss(model, x, y, SIGMA, entropy_weight=-1.0),
        lambda: denoising_loss(lambda x: x[:, :2], x, SIGMA),
    ):
        with pytest.raises(ValueError, match=r"\[\w+_loss\] \w+ must"):
            f()


def digits():
    """Handwritten digits, pixels in [0, 1], in a random order."""
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)


def test_a_trained_denoiser_certifies_a_classifier_that_stays_as_it_is():
    x, y = digits()
    mx.random.seed(0)
    classifier = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    fit(classifier, lambda m, x, y: nn.losses.cross_entropy(m(x), y, reduction="mean"), x[:1300], y[:1300], epochs=20)
    denoiser = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    fit(denoiser, lambda m, x, y: denoising_loss(m, x, 0.5, classifier=classifier), x[:1300], y[:1300], epochs=20)
    accuracy = []
    for model in (classifier, DenoisedClassifier(denoiser, classifier)):
        table = certify_dataset(Smooth(model, 10, 0.5), x[1300:1400], y[1300:1400], n=500, progress=False)
        accuracy.append(table.certified_accuracy([0.0, 0.5]))
    assert (accuracy[1] >= accuracy[0] + 0.1).all(), accuracy  # 85 and 32 %, without the denoiser 60 and 0 %


@pytest.mark.slow
def test_each_method_certifies_more_than_plain_training():
    """Handwritten digits at r = 0.5, sigma = 0.5, in units of a pixel's range."""
    x, y = digits()
    train, test = slice(0, 1300), slice(1300, 1500)
    methods = {
        "plain": lambda m, x, y: nn.losses.cross_entropy(m(x), y, reduction="mean"),
        "gaussian": lambda m, x, y: gaussian_augmentation_loss(m, x, y, 0.5),
        "smooth_adv": lambda m, x, y: smooth_adv_loss(m, x, y, 0.5, epsilon=0.5),
        "macer": lambda m, x, y: macer_loss(m, x, y, 0.5, copies=8, weight=6.0),
        "consistency": lambda m, x, y: consistency_loss(m, x, y, 0.5, weight=1.0),
    }
    certified = {}
    for name, loss_fn in methods.items():
        mx.random.seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        fit(model, loss_fn, x[train], y[train], epochs=20)
        table = certify_dataset(Smooth(model, 10, 0.5), x[test], y[test], n=1000, progress=False)
        certified[name] = float(table.certified_accuracy(0.5))
    assert all(certified[name] >= certified["plain"] + 0.1 for name in methods if name != "plain"), certified


def fit(model, loss_fn, x, y, epochs):
    optimizer = optim.Adam(2e-3)
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    def step(x, y):
        loss, gradients = loss_and_grad(model, x, y)
        optimizer.update(model, gradients)
        return loss

    state = [model.state, optimizer.state, mx.random.state]
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for i in range(0, len(x) - 99, 100):
            batch = order[i : i + 100]
            step(mx.array(x[batch]), mx.array(y[batch]))
            mx.eval(state)
