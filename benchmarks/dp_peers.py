"""Private steps of the peers on the architectures of `dp_models`, each against its own step without privacy.

Opacus with hooks and with ghost clipping, JAX-Privacy, and the vmap(grad) that an MLX user would write. Read beside
`dp_step`: the same layers, sizes and batches.
"""

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from benchmarks.dp_models import MAKE, VOCABULARY, Case, first_rows
from benchmarks.dp_step import plain_step, private_step

Step = Callable[[], Any]
ROUNDS = 3  # some of them take seconds a step


def run(bench: Any) -> None:
    for name in _TORCH:
        for peer in (_opacus, _jax_privacy, _vmap):
            peer(bench, name)


def _rows(bench: Any, name: str, peer: str, plain: Step, private: dict[str, Step], rounds: int = ROUNDS) -> None:
    times = bench.compare({"plain": plain, **private}, rounds=1 if bench.quick else rounds)
    for metric in private:
        bench.row(f"{name}/{metric}_over_nonprivate", times.ratio(metric, "plain"), "x", peer=peer, better="lower")


# torch


def _opacus(bench: Any, name: str) -> None:
    torch, opacus = bench.peer("torch"), bench.peer("opacus")
    if not torch or not opacus or name not in _TORCH:
        return
    warnings.filterwarnings("ignore", message=".*(Full backward hook|Secure RNG|Optimal order).*")
    bench.check(name, lambda: _opacus_is_right(torch, opacus, name))
    private = {f"opacus_{mode}": _opacus_step(torch, opacus, name, mode) for mode in ("hooks", "ghost")}
    _rows(bench, name, f"Opacus {opacus.__version__}, over torch", _torch_step(torch, name), private)


def _torch_batch(torch: Any, name: str) -> tuple[Any, Any]:
    x, y = (np.array(a) for a in MAKE[name]().batch)
    x = x.transpose(0, 3, 1, 2).copy() if x.ndim == 4 else x
    return torch.tensor(x if x.dtype == np.float32 else x.astype(np.int64)), torch.tensor(y.astype(np.int64))


def _torch_step(torch: Any, name: str) -> Step:
    model, (x, y) = _TORCH[name](torch), _torch_batch(torch, name)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _opacus_step(torch: Any, opacus: Any, name: str, mode: str) -> Step:
    model, (x, y) = _TORCH[name](torch), _torch_batch(torch, name)
    made = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.01),
        criterion=torch.nn.CrossEntropyLoss(),
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x)),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    model, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else torch.nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def _opacus_is_right(torch: Any, opacus: Any, name: str) -> bool:
    """Per-sample gradients by its hooks are those of a one-by-one loop."""
    model, (x, y) = _TORCH[name](torch), _torch_batch(torch, name)
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    loss = torch.nn.CrossEntropyLoss(reduction="sum")
    loss(wrapped(x[:2]), y[:2]).backward()
    together = [p.grad_sample[1].clone() for p in wrapped.parameters()]
    alone = torch.autograd.grad(loss(model(x[1:2]), y[1:2]), list(model.parameters()))
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(together, alone, strict=True))


def _torch_mlp(torch: Any) -> Any:
    n = torch.nn
    return n.Sequential(n.Linear(784, 1024), n.ReLU(), n.Linear(1024, 1024), n.ReLU(), n.Linear(1024, 10))


def _torch_cnn(torch: Any) -> Any:
    n = torch.nn
    widths = (3, 32, 64, 128, 128)
    blocks = [layer for a, b in pairwise(widths) for layer in (n.Conv2d(a, b, 3, padding=1), n.ReLU(), n.MaxPool2d(2))]
    return n.Sequential(*blocks, n.Flatten(), n.Linear(512, 10))


def _torch_transformer(torch: Any) -> Any:
    """Attention from Linear layers: torch's own MultiheadAttention is none that Opacus takes."""
    n = torch.nn

    class Layer(n.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln1, self.ln2 = n.LayerNorm(512), n.LayerNorm(512)
            self.query, self.key, self.value, self.out = (n.Linear(512, 512, bias=False) for _ in range(4))
            self.linear1, self.linear2 = n.Linear(512, 2048), n.Linear(2048, 512)

        def forward(self, x: Any) -> Any:
            y = self.ln1(x)
            q, k, v = (f(y).unflatten(-1, (8, 64)).transpose(1, 2) for f in (self.query, self.key, self.value))
            y = n.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.out(y)
            return x + self.linear2(n.functional.relu(self.linear1(self.ln2(x))))

    class Transformer(n.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = n.Embedding(VOCABULARY, 512)
            self.layers = n.Sequential(*(Layer() for _ in range(4)))
            self.ln = n.LayerNorm(512)
            self.linear = n.Linear(512, 10)

        def forward(self, tokens: Any) -> Any:
            return self.linear(self.ln(self.layers(self.embedding(tokens))).mean(1))

    return Transformer()


_TORCH = {"mlp": _torch_mlp, "cnn": _torch_cnn, "transformer": _torch_transformer}


# JAX


def _jax_privacy(bench: Any, name: str) -> None:
    if name not in _JAX:
        return
    jax, jax_privacy = bench.peer("jax"), bench.peer("jax_privacy")
    if not jax or not jax_privacy:
        return
    parameters, forward = _JAX[name](jax)
    x, y = (np.array(a) for a in MAKE[name]().batch)

    def loss(parameters: Any, batch: Any) -> Any:
        logits = forward(parameters, batch[0])
        return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], axis=1).mean()

    noise = jax_privacy.noise_addition.gaussian_privatizer(stddev=1.0, prng_key=jax.random.key(0))

    bench.check(name, lambda: _jax_is_right(jax, jax_privacy, loss, parameters, (x[:4], y[:4])))

    def private(microbatch_size: int | None) -> Step:
        clipped = jax_privacy.clipped_grad(loss, l2_clip_norm=1.0, microbatch_size=microbatch_size)

        @jax.jit
        def step(parameters: Any, state: Any) -> Any:
            sums, state = noise.update(clipped(parameters, (x, y)), state)
            return jax.tree.map(lambda p, g: p - 0.01 * g / len(x), parameters, sums), state

        return lambda: _finish(jax, step(parameters, state))

    @jax.jit
    def plain(parameters: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 0.01 * g, parameters, jax.grad(loss)(parameters, (x, y)))

    state = noise.init(parameters)
    # one at a time is the quicker way for large layers on a CPU, all at once for small ones: both are shown
    steps = {"jax_privacy": private(None), "jax_privacy_one_by_one": private(1)}
    peer = f"JAX-Privacy {jax_privacy.__version__}, over JAX"
    _rows(bench, name, peer, lambda: _finish(jax, plain(parameters)), steps)


def _jax_is_right(jax: Any, jax_privacy: Any, loss: Any, parameters: Any, batch: Any) -> bool:
    """Without clipping its sum is the gradient of the sum."""
    sums = jax_privacy.clipped_grad(loss, l2_clip_norm=1e9)(parameters, batch)
    wanted = jax.grad(lambda p: len(batch[0]) * loss(p, batch))(parameters)
    pairs = zip(jax.tree.leaves(sums), jax.tree.leaves(wanted), strict=True)
    return all(np.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)


def _finish(jax: Any, result: Any) -> None:
    jax.block_until_ready(result)


def _jax_mlp(jax: Any) -> Any:
    sizes = (784, 1024, 1024, 10)
    keys = jax.random.split(jax.random.key(0), 3)
    weights = [
        (jax.random.normal(k, (a, b)) / a**0.5, jax.numpy.zeros(b))
        for k, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]

    def forward(weights: Any, x: Any) -> Any:
        for w, b in weights[:-1]:
            x = jax.nn.relu(x @ w + b)
        return x @ weights[-1][0] + weights[-1][1]

    return weights, forward


def _jax_cnn(jax: Any) -> Any:
    widths = (3, 32, 64, 128, 128)
    keys = jax.random.split(jax.random.key(0), 5)
    convs = [
        jax.random.normal(k, (3, 3, a, b)) / (9 * a) ** 0.5 for k, a, b in zip(keys, widths, widths[1:], strict=False)
    ]
    weights = [(w, jax.numpy.zeros(w.shape[-1])) for w in convs]
    weights.append((jax.random.normal(keys[4], (512, 10)) / 512**0.5, jax.numpy.zeros(10)))

    def forward(weights: Any, x: Any) -> Any:
        for w, b in weights[:-1]:
            x = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.lax.reduce_window(jax.nn.relu(x + b), -np.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return x.reshape(len(x), -1) @ weights[-1][0] + weights[-1][1]

    return weights, forward


_JAX = {"mlp": _jax_mlp, "cnn": _jax_cnn}


# MLX without us


def _vmap(bench: Any, name: str) -> None:
    """On a few examples: its time grows with them, and it takes seconds. Convolutions and 4-bit weights it refuses."""
    if name not in _VMAP:
        return
    case = MAKE[name]()
    few = first_rows(case, _VMAP[name])
    small = f"{name}_batch_{_VMAP[name]}"
    bench.check(small, lambda: _same(few))
    steps = {"mlx_vmap_grad": _vmap_step(few), "private": private_step(few, False)}
    _rows(bench, small, "mlx, same step without privacy", plain_step(few, False), steps)


def _per_sample(case: Case) -> Callable[[], Any]:
    model, loss_fn, batch = case

    def one(parameters: Any, *row: mx.array) -> mx.array:
        model.update(parameters)
        return loss_fn(model, *(a[None] for a in row)).sum()

    per_sample = mx.vmap(mx.grad(one), in_axes=(None, *(0 for _ in batch)))
    parameters = model.trainable_parameters()

    def gradients() -> Any:
        return per_sample(parameters, *batch)

    def restored() -> Any:
        try:
            return gradients()
        finally:
            model.update(parameters)

    return restored


def _vmap_step(case: Case) -> Step:
    gradients = _per_sample(case)
    optimizer = optim.SGD(0.01)
    optimizer.init(case.model.trainable_parameters())

    def step() -> Any:
        tree = gradients()
        flat = [g.reshape(g.shape[0], -1) for g in _leaves(tree)]
        norms = mx.sqrt(sum(g.square().sum(axis=1) for g in flat))
        factors = mx.minimum(1.0, 1.0 / (norms + 1e-6))
        noised = tree_map(lambda g: _noised_mean(g, factors), tree)
        return optimizer.apply_gradients(noised, case.model.trainable_parameters())

    return step


def _noised_mean(g: mx.array, factors: mx.array) -> mx.array:
    clipped = (factors @ g.reshape(g.shape[0], -1)).reshape(g.shape[1:])
    return (clipped + mx.random.normal(clipped.shape)) / g.shape[0]


def _leaves(tree: Any) -> list[mx.array]:
    return [a for _, a in tree_flatten(tree)]


def _same(case: Case) -> bool:
    """vmap(grad) computes the gradients of a one-by-one loop, but for a ReLU at 0 that rounding puts on either side."""
    tree = _per_sample(case)()
    grad = nn.value_and_grad(case.model, lambda model, *row: case.loss_fn(model, *row).sum())
    for b in range(2):
        _, alone = grad(case.model, *(a[b : b + 1] for a in case.batch))
        for x, y in zip(_leaves(tree), _leaves(alone), strict=True):
            if mx.linalg.norm(x[b] - y).item() > 1e-3 * mx.linalg.norm(y).item() + 1e-5:
                return False
    return True


_VMAP = {"mlp": 16, "transformer": 4}
