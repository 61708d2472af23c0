"""What robust training is worth: MNIST at L-infinity 0.2 under the whole of AutoAttack; defensive distillation falls.

5000 images of MNIST: 4000 for training, each also moved by a pixel in eight directions, the last 200 of the others for
the ensemble, each model with the weights of its last step. An input counts as kept when no attack breaks it (pointwise
worst case). The network is convolutional, as matrix products: 4 x 4 of stride 2 to 16 and 32 channels, then 100 units.
Minutes, nearly all of them its passes.
"""

import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_bulwark import training
from mlx_bulwark.attacks import PGD, AutoAttack, CarliniWagnerL2, cross_entropy

from benchmarks import smooth_peers as peers

SECONDS = 1800.0  # AutoAttack on networks that resist it
EPS, STEPS = 0.2, 7
TEMPERATURE = 40.0
BATCH = 100


class Convolution(nn.Module):
    """4 x 4, stride 2, padding 1: blocks of 2 x 2 become channels, and four neighbours are joined."""

    def __init__(self, channels, outputs):
        super().__init__()
        self.linear = nn.Linear(16 * channels, outputs)

    def __call__(self, x):
        x = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)
        return self.linear(mx.concatenate([x[:, :-1, :-1], x[:, :-1, 1:], x[:, 1:, :-1], x[:, 1:, 1:]], axis=-1))


class Network(nn.Module):
    """Images [b, 28, 28, 1] in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Convolution(1, 16), Convolution(16, 32)
        self.hidden, self.out = nn.Linear(49 * 32, 100), nn.Linear(100, 10)

    def __call__(self, x):
        x = nn.relu(self.second(nn.relu(self.first(x))))
        return self.out(nn.relu(self.hidden(x.reshape(len(x), -1))))


def run(bench):
    data = peers.packaged_data()
    if data is None:
        return
    images, labels = data.mnist_images()
    order = np.random.default_rng(0).permutation(len(images))
    x, y = (images[order][..., None] / 255).astype(np.float32), labels[order].astype(np.int32)
    distillation(bench, x.reshape(len(x), -1), y)
    robust_training(bench, x, y)


def plain(model, x, y):
    return cross_entropy(model(x), y).mean()


def madry(eps):
    return lambda m, x, y: training.adversarial_loss(m, x, y, eps, steps=STEPS)


def trades(eps):
    return lambda m, x, y: training.trades_loss(m, x, y, eps, steps=STEPS)


def fitted(model, loss, x, y, epochs, rate=1e-3):
    optimizer = optim.Adam(optim.cosine_decay(rate, epochs * (len(x) // BATCH), rate / 20))
    training.fit(model, loss, (x, y), optimizer, epochs, batch_size=BATCH, progress=sys.stderr.isatty())
    model.eval()
    return model


def robust_training(bench, x, y):
    rows, epochs, inputs = (500, 1, 20) if bench.quick else (4000, 8, 200)
    x_test, y_test = mx.array(x[-inputs:]), mx.array(y[-inputs:])
    moves = [(0, 0)] if bench.quick else [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    x, y = np.concatenate([np.roll(x[:rows], move, (1, 2)) for move in moves]), np.tile(y[:rows], len(moves))
    mx.random.seed(0)
    start = fitted(Network(), plain, x, y, 1)
    report(bench, "plain", start, x_test, y_test)
    for name, loss in (("madry", madry), ("trades", trades)):
        model = Network()
        model.update(start.parameters())
        fitted(model, loss(EPS / 2), x, y, 1)
        fitted(model, loss(EPS), x, y, epochs, 2e-3)
        report(bench, name, model, x_test, y_test)


def report(bench, name, model, x, y):
    case, attack = f"mnist_{name}", PGD(EPS, steps=10) if bench.quick else AutoAttack(EPS)
    found = attack(model, x, y)
    bench.check(case, mx.abs(found.adversarial - x).max().item() <= EPS + 1e-6)
    bench.check(case, (mx.clip(found.adversarial, 0, 1) == found.adversarial).all().item())
    kept = mx.logical_and(found.correct, mx.logical_not(found.success))
    bench.check(case, mx.array_equal(kept, mx.argmax(model(found.adversarial), axis=1) == y).item())
    bench.row(f"{case}/accuracy", 100 * found.correct.astype(mx.float32).mean().item(), "%", better="higher")
    better = "lower" if name == "plain" else "higher"
    bench.row(f"{case}/robust_accuracy", 100 * kept.astype(mx.float32).mean().item(), "%", better=better)


def perceptron():
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def distillation(bench, x, y):
    """Defensive distillation hides its gradients from cross-entropy, and not from Carlini and Wagner."""
    rows, epochs, inputs = (1000, 4, 20) if bench.quick else (4000, 60, 100)
    mx.random.seed(0)
    data = x[:rows], y[:rows]
    teacher = fitted(perceptron(), lambda m, x, y: training.temperature_loss(m, x, y, TEMPERATURE), *data, epochs, 5e-3)
    student = perceptron()
    training.distill(
        teacher,
        student,
        TEMPERATURE,
        data,
        optim.Adam(5e-3),
        epochs,
        kind="defensive",
        batch_size=BATCH,
        progress=False,
    )
    student.eval()
    x_test, y_test = mx.array(x[-inputs:]), mx.array(y[-inputs:])
    gradient = mx.grad(lambda z: cross_entropy(student(z), y_test).sum())(x_test)
    vanished = np.array(mx.abs(gradient).max(axis=1) == 0)
    by_pgd = PGD(EPS, steps=40)(student, x_test, y_test)
    by_cw = CarliniWagnerL2(steps=100, binary_search_steps=5, initial_const=0.1, learning_rate=0.05)(
        student, x_test, y_test
    )
    correct = np.array(by_pgd.correct)
    case = "defensive_distillation"
    bench.check(case, np.array(by_cw.success)[correct].mean() >= 0.9)
    bench.row(f"{case}/accuracy", 100 * correct.mean(), "%", better="higher")
    bench.row(f"{case}/zero_gradients", 100 * vanished.mean(), "%", better="lower")
    for name, found in (("pgd", by_pgd), ("carlini_wagner", by_cw)):
        kept = correct & ~np.array(found.success)
        bench.row(f"{case}/kept_under_{name}", 100 * kept.mean(), "%", better="higher")
    distances = np.array(by_cw.distances)[np.array(by_cw.success)]
    bench.row(f"{case}/carlini_wagner_mean_l2", float(distances.mean()), "", better="higher")
