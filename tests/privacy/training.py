"""A small private run for tests of what happens around the steps."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
from mlx.utils import tree_flatten

N = 64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(6, 40), nn.Linear(40, 3)]

    def __call__(self, x):
        return self.layers[1](nn.relu(self.layers[0](x)))


def loss_fn(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="none")


def no_loss(model, x, y):
    return 0 * loss_fn(model, x, y)


def data(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, 6)).astype(np.float32), rng.integers(0, 3, N)


def engine(**changed):
    settings = {"batch_size": 16, "noise_multiplier": 1.0, "max_grad_norm": 1.0, **changed}
    return bw.PrivacyEngine(N, **settings)


def flat(model):
    return np.concatenate([np.array(p).ravel() for _, p in tree_flatten(model.parameters())]).astype(np.float64)


def train(e, steps=None, *, compiled=False, loss=loss_fn, rate=1.0, microbatch_size=None):
    """Take steps from parameters of zero; return what each of them moved, [steps, parameters]."""
    mx.random.seed(0)
    model, optimizer = Net(), e.wrap(optim.SGD(rate))
    model.apply(mx.zeros_like)
    f = e.value_and_grad(model, loss)
    step = e.compiled_step(model, optimizer, loss) if compiled else None
    moves, before = [], flat(model)
    for b in e.batches(data(), steps=steps, microbatch_size=microbatch_size):
        if step is not None:
            mx.eval(step(b), model.state, optimizer.state, e.state)
        else:
            optimizer.update(model, f(model, b)[1])
        if b.last:
            after = flat(model)
            moves.append(before - after)
            before = after
    return np.array(moves)
