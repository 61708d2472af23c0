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

from benchmarks.dp_models import MAKE, Case, first_rows, sound

SLOW = {"lora": 3}  # rounds: MLX multiplies 4-bit weights on a CPU at a few GFLOP/s, some 20 s a step


def plain_step(case: Case, compiled: bool) -> Callable[[], Any]:
    model, loss_fn, batch = case
    optimizer = optim.SGD(0.01)
    optimizer.init(model.trainable_parameters())
    value_and_grad = nn.value_and_grad(model, lambda model, *batch: loss_fn(model, *batch).mean())

    def step(*batch: mx.array) -> mx.array:
        loss, grads = value_and_grad(model, *batch)
        optimizer.update(model, grads)
        return loss

    state = [model.state, optimizer.state]
    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)
    return lambda: (step(*batch), state)


def private_step(case: Case, compiled: bool) -> Callable[[], Any]:
    model, loss_fn, data = case
    engine = bw.PrivacyEngine(
        100 * case.batch_size, batch_size=case.batch_size, noise_multiplier=1.0, max_grad_norm=1.0
    )
    optimizer = engine.wrap(optim.SGD(0.01))
    optimizer.init(model.trainable_parameters())
    batch = bw.Batch(data, mx.ones((case.batch_size,), mx.bool_), True)
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
        if name != "lora" or bench.peer("mlx_lm"):
            _case(bench, name, lambda make=make: first_rows(make(), 1) if bench.quick else make())


def _case(bench: Any, name: str, make: Callable[[], Case]) -> None:
    bench.check(name, lambda: sound(make()))
    contestants = {"plain": plain_step(make(), False), "private": private_step(make(), False)}
    if name not in SLOW:
        contestants |= {"plain compiled": plain_step(make(), True), "private compiled": private_step(make(), True)}
    times = bench.compare(contestants, rounds=SLOW.get(name))
    peer = "mlx, same step without privacy"
    bench.row(f"{name}/private_over_nonprivate", times.ratio("private", "plain"), "x", peer=peer, better="lower")
    if name not in SLOW:
        compiled = times.ratio("private compiled", "plain compiled")
        bench.row(f"{name}/private_over_nonprivate_compiled", compiled, "x", peer=peer, better="lower")
    bench.row(f"{name}/private_step", times["private"].median * 1e3, "ms", better="lower")
    bench.row(f"{name}/nonprivate_step", times["plain"].median * 1e3, "ms", better="lower")
    steps = 1 if name in SLOW else 3
    private, plain = (bench.peak_memory(f, name, bench.quick, steps=steps) for f in (private_child, plain_child))
    bench.row(f"{name}/peak_memory_ratio", private / plain, "x", peer=peer, better="lower")


def private_child(name: str, quick: bool) -> Callable[[], Any]:
    return private_step(_child_case(name, quick), False)


def plain_child(name: str, quick: bool) -> Callable[[], Any]:
    return plain_step(_child_case(name, quick), False)


def _child_case(name: str, quick: bool) -> Case:
    return first_rows(MAKE[name](), 1) if quick else MAKE[name]()
