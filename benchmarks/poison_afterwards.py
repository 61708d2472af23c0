"""What becomes of a backdoor: with the poison found and taken out, under private and under adversarial training.

Rows are the share of triggered test images that get the target's class, and the accuracy on clean ones; 5 % of the
digits are poisoned, one seed. `benchmarks/poison.py` has the data, the network and the poison, and tells how results
are kept.
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
from mlx_bulwark import poison
from mlx_bulwark.poison import attacks

from benchmarks.poison import control, mnist_is_here, remembered, share_of, split, trained, trained_cell
from benchmarks.training import Network, madry

EPSILONS, DELTA, NORM = (1.0, 3.0, 8.0), 1e-5, 1.0
STEPS, BATCH = 150, 256
RADIUS = 0.1  # of adversarial training


def run(bench):
    if bench.quick or not mnist_is_here():
        return
    for name in ("badnets", "blended"):
        afterwards(bench, name, percent=5, seed=0)


def afterwards(bench, name, percent, seed):
    """Success of a backdoor and accuracy, each way to train."""
    data, case = split(seed), f"{name}_{percent}pct"
    clean = remembered(f"control_{seed}", lambda: share_of(control(seed), data.test_x, data.test_y))
    bench.check(case, 0 <= clean <= 1)
    bench.row(f"{case}/accuracy_clean", 100 * clean, "%", better="higher")
    for way, make in ways(data, trained_cell(name, percent, seed), seed).items():
        success, accuracy = remembered(f"{case}_{way}", make)
        bench.row(f"{case}/success_{way}", 100 * success, "%", better="lower")
        bench.row(f"{case}/accuracy_{way}", 100 * accuracy, "%", better="higher")


def ways(data, cell, seed):
    """Functions that train and return success and accuracy."""
    x, y = cell.poisoned.x, cell.poisoned.y

    def figures(model):
        success = attacks.attack_success_rate(model, data.test_x, data.test_y, cell.poisoned)
        return [success, share_of(model, data.test_x, data.test_y)]

    def removed():
        kept = np.setdiff1d(np.arange(len(y)), poison.scan(cell.model, x, y).suspects)
        return figures(trained(x[kept], y[kept], seed))

    return {
        "trained": lambda: figures(cell.model),
        "removed": removed,
        "adversarial_training": lambda: figures(trained(x, y, seed, loss=madry(RADIUS))),
    } | {f"dp_epsilon_{e:g}": lambda e=e: figures(trained_privately(x, y, seed, e)) for e in EPSILONS}


def trained_privately(x, y, seed, epsilon):
    mx.random.seed(seed)
    model = Network()
    engine = bw.PrivacyEngine.for_epsilon(
        epsilon, DELTA, len(x), steps=STEPS, batch_size=BATCH, max_grad_norm=NORM, accountant="rdp"
    )
    optimizer = engine.wrap(optim.Adam(2e-3))
    step = engine.compiled_step(model, optimizer, each)
    for batch in engine.batches((x, y.astype(np.int32))):
        mx.eval(step(batch), model.state, optimizer.state, engine.state)
    return model


def each(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="none")
