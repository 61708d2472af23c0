"""One training step, private and not: same model, batch, optimizer, MLX and BLAS on both sides.

Timed: losses, gradients and update of one physical batch from arrays in memory, evaluated to the end. The private side
adds per-sample norms, clipping, weighted sums, noise and the books. Both sides run eager, and both compiled.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
from mlx_bulwark.demo import CNN

BATCH = 256


class MLP(nn.Module):
    """784-1024-1024-10."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(784, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 10)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y, reduction="none")


def mlp() -> tuple[nn.Module, mx.array, mx.array]:
    mx.random.seed(0)
    rng = np.random.default_rng(0)
    model = MLP()
    x = mx.array(rng.standard_normal((BATCH, 784)).astype(np.float32))
    y = mx.array(rng.integers(0, 10, BATCH))
    mx.eval(model.parameters(), x, y)
    return model, x, y


def demo_cnn() -> tuple[nn.Module, mx.array, mx.array]:
    mx.random.seed(0)
    rng = np.random.default_rng(0)
    model = CNN(8)
    x = mx.array(rng.standard_normal((BATCH, 8, 8, 1)).astype(np.float32))
    y = mx.array(rng.integers(0, 10, BATCH))
    mx.eval(model.parameters(), x, y)
    return model, x, y


def plain_step(make: Callable[[], Any], compiled: bool) -> Callable[[], Any]:
    model, x, y = make()
    optimizer = optim.SGD(0.01)
    optimizer.init(model.trainable_parameters())
    value_and_grad = nn.value_and_grad(model, lambda model, x, y: loss_fn(model, x, y).mean())

    def step(x: mx.array, y: mx.array) -> mx.array:
        loss, grads = value_and_grad(model, x, y)
        optimizer.update(model, grads)
        return loss

    state = [model.state, optimizer.state]
    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)
    return lambda: (step(x, y), state)


def private_step(make: Callable[[], Any], compiled: bool) -> Callable[[], Any]:
    model, x, y = make()
    engine = bw.PrivacyEngine(100 * BATCH, batch_size=BATCH, noise_multiplier=1.0, max_grad_norm=1.0)
    optimizer = engine.wrap(optim.SGD(0.01))
    optimizer.init(model.trainable_parameters())
    batch = bw.Batch((x, y), mx.ones((BATCH,), mx.bool_), True)
    state = [model.state, optimizer.state, engine.state]
    if compiled:
        step = engine.compiled_step(model, optimizer, loss_fn)
        return lambda: (step(batch), state)
    loss_and_grad = engine.value_and_grad(model, loss_fn)

    def eager() -> Any:
        losses, grads = loss_and_grad(model, batch)
        optimizer.update(model, grads)
        return losses, state

    return eager


def run(bench: Any) -> None:
    for name, make in MAKE.items():
        _case(bench, name, make)


def _case(bench: Any, name: str, make: Callable[[], Any]) -> None:
    bench.check(name, lambda: _sound(make))
    times = bench.compare(
        {
            "plain": plain_step(make, False),
            "private": private_step(make, False),
            "plain compiled": plain_step(make, True),
            "private compiled": private_step(make, True),
        }
    )
    peer = "mlx, same step without privacy"
    bench.row(f"{name}/private_over_nonprivate", times.ratio("private", "plain"), "x", peer=peer, better="lower")
    compiled = times.ratio("private compiled", "plain compiled")
    bench.row(f"{name}/private_over_nonprivate_compiled", compiled, "x", peer=peer, better="lower")
    bench.row(f"{name}/private_step", times["private"].median * 1e3, "ms", better="lower")
    bench.row(f"{name}/nonprivate_step", times["plain"].median * 1e3, "ms", better="lower")
    private, plain = (bench.peak_memory(f, name) for f in (private_child, plain_child))
    bench.row(f"{name}/peak_memory_ratio", private / plain, "x", peer=peer, better="lower")


MAKE = {"mlp": mlp, "demo_cnn": demo_cnn}


def private_child(name: str) -> Callable[[], Any]:
    return private_step(MAKE[name], False)


def plain_child(name: str) -> Callable[[], Any]:
    return plain_step(MAKE[name], False)


def _sound(make: Callable[[], Any]) -> None:
    model, x, y = make()
    engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
    engine.check(model, (x[:8], y[:8]), loss_fn)
