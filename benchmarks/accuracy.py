"""Test accuracy of private training against Opacus: same data, model, initial weights and hyperparameters, five seeds.

What differs is each side's own Poisson draws and noise, so that the two means differ by chance too: the standard error
of the difference is printed beside it.
"""

import warnings
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
from mlx.utils import tree_flatten
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEEDS, STEPS, BATCH, EPSILON, DELTA, CLIP, LEARNING_RATE = 5, 100, 256, 3.0, 1e-5, 1.0, 0.5


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 16, pytorch_compatible=True)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm2 = nn.GroupNorm(4, 32, pytorch_compatible=True)
        self.linear = nn.Linear(512, 10)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.norm1(self.conv1(x)))
        x = nn.MaxPool2d(2)(nn.relu(self.norm2(self.conv2(x))))
        return self.linear(x.reshape(x.shape[0], -1))


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y, reduction="none")


def digits(seed: int) -> Any:
    x, y = load_digits(return_X_y=True)
    x = (x / 16 - 0.3).astype(np.float32).reshape(-1, 8, 8, 1)
    return train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)


def ours(model: CNN, data: Any, noise_multiplier: float) -> float:
    x, x_test, y, y_test = data
    engine = bw.PrivacyEngine(
        len(x), batch_size=BATCH, noise_multiplier=noise_multiplier, max_grad_norm=CLIP, steps=STEPS
    )
    optimizer = engine.wrap(optim.SGD(LEARNING_RATE))
    loss_and_grad = engine.value_and_grad(model, loss_fn)
    for batch in engine.batches((x, y)):
        _, grads = loss_and_grad(model, batch)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
    return float((np.array(model(mx.array(x_test)).argmax(axis=1)) == y_test).mean())


def twin(weights: dict[str, Any], torch: Any) -> Any:
    """The same network in torch, with the same weights."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.GroupNorm(4, 16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.GroupNorm(4, 32),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(512, 10),
    )
    for i, layer in ((0, "conv1"), (1, "norm1"), (3, "conv2"), (4, "norm2"), (8, "linear")):
        w, b = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        if layer.startswith("conv"):
            w = w.transpose(0, 3, 1, 2)
        if layer == "linear":  # rows of [H, W, C] here, of [C, H, W] there
            w = w.reshape(10, 4, 4, 32).transpose(0, 3, 1, 2).reshape(10, 512)
        model[i].weight.data, model[i].bias.data = torch.tensor(w.copy()), torch.tensor(b)
    return model


def same_norms(model: CNN, other: Any, data: Any, torch: Any, opacus: Any) -> bool:
    """Per-sample gradient norms agree, or the two would not train alike.

    Images that reach torch with channels last in memory (a transposed numpy array) make Opacus 1.6.0 return zeros for
    the second convolution's weight, without a word: hence reshape, and this check.
    """
    x, y = data[0][:32], data[2][:32]
    engine = bw.PrivacyEngine(len(data[0]), batch_size=BATCH, noise_multiplier=1.0, max_grad_norm=CLIP)
    _, grads = engine.value_and_grad(model, loss_fn)(model, mx.array(x), mx.array(y))
    wrapped = opacus.GradSampleModule(other)
    torch.nn.functional.cross_entropy(wrapped(torch.tensor(x.reshape(-1, 1, 8, 8))), torch.tensor(y)).backward()
    square = sum((p.grad_sample.reshape(32, -1) ** 2).sum(1) for p in wrapped.parameters())
    return np.allclose(np.array(grads.norms), np.sqrt(square.numpy()), rtol=1e-4)


def theirs(model: Any, data: Any, noise_multiplier: float, torch: Any, opacus: Any) -> float:
    x, x_test, y, y_test = data
    x, x_test = (torch.tensor(a.reshape(-1, 1, 8, 8)) for a in (x, x_test))
    y, y_test = torch.tensor(y), torch.tensor(y_test)
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
    mine, peers = [], []
    for seed in range(1 if bench.quick else SEEDS):
        data = digits(seed)
        noise_multiplier = bw.find_noise_multiplier(EPSILON, DELTA, BATCH / len(data[0]), STEPS)
        mx.random.seed(seed)
        model = CNN()
        weights = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
        bench.check("digits_cnn", same_norms(model, twin(weights, torch), data, torch, opacus))
        mine.append(ours(model, data, noise_multiplier))
        peers.append(theirs(twin(weights, torch), data, noise_multiplier, torch, opacus))
        print(f"  seed {seed}: {mine[-1]:.3f}, Opacus {peers[-1]:.3f}", flush=True)
    a, b = np.array(mine) * 100, np.array(peers) * 100
    peer = f"Opacus {opacus.__version__}, same hyperparameters"
    bench.row("digits_cnn/mean_accuracy", a.mean(), "%", better="higher")
    bench.row("digits_cnn/opacus_mean_accuracy", b.mean(), "%", peer=peer, better="higher")
    bench.row("digits_cnn/mean_less_opacus", a.mean() - b.mean(), "points", peer=peer, better="higher")
    if len(a) > 1:
        error = float(np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))
        bench.row("digits_cnn/standard_error_of_difference", error, "points", better="lower")
