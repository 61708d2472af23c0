"""Test accuracy of private training against Opacus: same data, model, initial weights and hyperparameters, five seeds.

What differs is each side's own Poisson draws and noise, so that the two means differ by chance too: the standard error
of the difference is printed beside it.
"""

import warnings
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
from mlx.utils import tree_flatten
from mlx_bulwark.demo import CNN
from mlx_bulwark.demo.data import DATASETS, Split, load
from mlx_bulwark.demo.model import accuracy, loss_fn

SEEDS, STEPS, BATCH, EPSILON, DELTA, CLIP, LEARNING_RATE = 5, 100, 256, 3.0, 1e-5, 1.0, 0.5


def build(name: str, data: Split) -> CNN:
    spec = DATASETS[name]
    return CNN(data.side, spec.channels, spec.kernel_size, spec.stride)


def ours(model: CNN, data: Split, noise_multiplier: float) -> float:
    engine = bw.PrivacyEngine(
        len(data.images), batch_size=BATCH, noise_multiplier=noise_multiplier, max_grad_norm=CLIP, steps=STEPS
    )
    optimizer = engine.wrap(optim.SGD(LEARNING_RATE))
    loss_and_grad = engine.value_and_grad(model, loss_fn)
    for batch in engine.batches((data.images, data.labels)):
        _, grads = loss_and_grad(model, batch)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
    return accuracy(model, data.test_images, data.test_labels)


def twin(model: CNN, torch: Any) -> Any:
    """The same network in torch, with the same weights."""
    (first, kernel, _, _), second = model.conv1.weight.shape, model.conv2.weight.shape[0]
    weights = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    side = round((weights["linear.weight"].shape[1] // second) ** 0.5)
    other = torch.nn.Sequential(
        torch.nn.Conv2d(1, first, kernel, stride=model.conv1.stride, padding=kernel // 2),
        torch.nn.MaxPool2d(2),
        torch.nn.GroupNorm(4, first),
        torch.nn.ReLU(),
        torch.nn.Conv2d(first, second, 3),
        torch.nn.GroupNorm(4, second),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(second * side * side, 10),
    )
    for i, layer in ((0, "conv1"), (2, "norm1"), (4, "conv2"), (5, "norm2"), (8, "linear")):
        w, b = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        if layer.startswith("conv"):
            w = w.transpose(0, 3, 1, 2)
        if layer == "linear":  # rows of [H, W, C] here, of [C, H, W] there
            w = w.reshape(10, side, side, second).transpose(0, 3, 1, 2).reshape(10, -1)
        other[i].weight.data, other[i].bias.data = torch.tensor(w.copy()), torch.tensor(b)
    return other


def channels_first(images: Any, torch: Any) -> Any:
    """Images [N, side, side, 1] as torch wants them.

    Images that reach torch with channels last in memory (a transposed numpy array) make Opacus 1.6.0 return zeros for
    the second convolution's weight, without a word: hence reshape, and the comparison of norms.
    """
    return torch.tensor(images.reshape(len(images), 1, *images.shape[1:3]))


def same_norms(model: CNN, other: Any, data: Split, torch: Any, opacus: Any) -> bool:
    """Per-sample gradient norms agree, or the two would not train alike."""
    x, y = data.images[:32], data.labels[:32]
    engine = bw.PrivacyEngine(len(data.images), batch_size=BATCH, noise_multiplier=1.0, max_grad_norm=CLIP)
    _, grads = engine.value_and_grad(model, loss_fn)(model, mx.array(x), mx.array(y))
    wrapped = opacus.GradSampleModule(other)
    torch.nn.functional.cross_entropy(wrapped(channels_first(x, torch)), torch.tensor(y).long()).backward()
    square = sum((p.grad_sample.reshape(32, -1) ** 2).sum(1) for p in wrapped.parameters())
    return np.allclose(np.array(grads.norms), np.sqrt(square.numpy()), rtol=1e-4)


def theirs(model: Any, data: Split, noise_multiplier: float, torch: Any, opacus: Any) -> float:
    x, x_test = channels_first(data.images, torch), channels_first(data.test_images, torch)
    y, y_test = torch.tensor(data.labels).long(), torch.tensor(data.test_labels).long()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    engine = opacus.PrivacyEngine()
    # Opacus' own loader samples at 1 / number of batches: with the exact rate both sides draw alike
    model, optimizer, _ = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=noise_multiplier, max_grad_norm=CLIP
    )
    optimizer.expected_batch_size = BATCH
    generator, rate = torch.Generator().manual_seed(int(np.random.SeedSequence().entropy % 2**63)), BATCH / len(x)
    for _ in range(STEPS):
        chosen = torch.rand(len(x), generator=generator) < rate
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(x_test).argmax(1) == y_test).float().mean())


def run(bench: Any) -> None:
    torch, opacus = bench.peer("torch"), bench.peer("opacus")
    if not torch or not opacus:
        return
    warnings.filterwarnings("ignore", message=".*(Full backward hook|Secure RNG).*")
    for name in DATASETS:
        _case(bench, name, torch, opacus)


def _case(bench: Any, name: str, torch: Any, opacus: Any) -> None:
    mine, peers = [], []
    for seed in range(1 if bench.quick else SEEDS):
        data = load(name, seed)
        noise_multiplier = bw.find_noise_multiplier(EPSILON, DELTA, BATCH / len(data.images), STEPS)
        mx.random.seed(seed)
        model = build(name, data)
        other = twin(model, torch)
        bench.check(f"{name}_cnn", same_norms(model, twin(model, torch), data, torch, opacus))
        mine.append(ours(model, data, noise_multiplier))
        peers.append(theirs(other, data, noise_multiplier, torch, opacus))
        print(f"  {name}, seed {seed}: {mine[-1]:.3f}, Opacus {peers[-1]:.3f}", flush=True)
    a, b = np.array(mine) * 100, np.array(peers) * 100
    peer = f"Opacus {opacus.__version__}, same hyperparameters"
    bench.row(f"{name}_cnn/mean_accuracy", a.mean(), "%", better="higher")
    bench.row(f"{name}_cnn/opacus_mean_accuracy", b.mean(), "%", peer=peer, better="higher")
    bench.row(f"{name}_cnn/mean_less_opacus", a.mean() - b.mean(), "points", peer=peer, better="higher")
    if len(a) > 1:
        error = float(np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))
        bench.row(f"{name}_cnn/standard_error_of_difference", error, "points", better="lower")
