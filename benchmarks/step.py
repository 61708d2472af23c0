"""Projected steps of attacks, on batches of images [128, 3, 32, 32], and PGD as a whole.

Steps stand against their plain-MLX reference, compiled, and the projection onto the L1 ball and the box by sorting. PGD
stands against bare forward and backward passes of the same model, as many as it has steps, and against peers that take
as many steps on torch with the same weights, threads and BLAS: on the MNIST network that the package `ccexam` ships,
where the convolutions of MLX and torch decide, and on a perceptron 784-1024-1024-10. All 40 steps
are taken: no input is done early. Ours judges the inputs before and after, which bare passes do not.
"""

import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
from mlx_bulwark.attacks import PGD
from mlx_bulwark.ops import step

from benchmarks import smooth_peers as peers

SHAPE, BOUNDS = (128, 3, 32, 32), (0, 1)
IMAGES, EPS = 100, 1e-4
STEPS = 40  # of PGD here and in Foolbox, where nothing else is said


def run(bench):
    limit = mx.set_cache_limit(4 << 30)
    rng = np.random.default_rng(0)
    x, origin = (mx.array(rng.random(SHAPE, np.float32)) for _ in range(2))
    grad = mx.array(rng.standard_normal(SHAPE, np.float32))
    try:
        for norm, eps in (("linf", 0.03), ("l2", 0.5)):
            reference = mx.compile(
                lambda x, g, o, e=eps, n=norm: step.projected_step_reference(x, g, o, e, e, n, BOUNDS)
            )
            case, inputs = f"projected_step_{norm}", (x, grad, origin)
            contestants = {
                "ours": lambda i=inputs, e=eps, n=norm: bw.projected_step(*i, e, e, n, BOUNDS),
                "reference": lambda i=inputs, f=reference: f(*i),
            }
            report(bench, case, contestants, "vs_compiled_reference", "plain MLX ops, compiled")
        contestants = {
            "ours": lambda: bw.projected_step(x, grad, origin, 12.0, 12.0, "l1", BOUNDS),
            "reference": lambda: by_sorting(x, grad, origin, 12.0),
        }
        report(bench, "projected_step_l1", contestants, "vs_sort", "sorting in MLX")
        if (data := peers.packaged_data()) is not None:
            x = peers.images(data, IMAGES)
            torch = bench.peer("torch")
            pgd(bench, "pgd", peers.cnn(data), torch and peers.torch_cnn(torch, data), x, 2 if bench.quick else STEPS)
            perceptron = peers.mlp()
            twin = torch and torch_mlp(torch, perceptron)
            pgd(bench, "pgd_mlp", Flat(perceptron), twin, x, 5 if bench.quick else STEPS)
    finally:
        mx.set_cache_limit(limit)


def report(bench, case, contestants, metric, peer):
    bench.check(case, lambda: mx.allclose(contestants["ours"](), contestants["reference"](), atol=2e-5).item())
    times = bench.compare(contestants)
    bench.row(f"{case}/time", times["ours"].median * 1e6, "us", better="lower")
    bench.row(f"{case}/{metric}", times.ratio("reference", "ours"), "x", peer=peer, better="higher")


def by_sorting(x, grad, origin, eps):
    """The threshold from the sorted places where the sum bends, and the slopes between them."""
    x, g, o = (a.reshape(len(a), -1) for a in (x, grad, origin))
    moved = x - o + eps * g / mx.abs(g).sum(1, keepdims=True)
    room, size = mx.where(moved < 0, o, 1 - o), mx.abs(moved)
    places = mx.concatenate([size, mx.maximum(size - room, 0)], axis=1)
    order = mx.argsort(-places, axis=1)
    places = mx.take_along_axis(places, order, axis=1)
    slope = mx.cumsum(mx.where(order < size.shape[1], 1.0, -1.0), axis=1)
    sums = mx.cumsum(slope[:, :-1] * (places[:, :-1] - places[:, 1:]), axis=1)
    at = mx.argmax(sums > eps, axis=1, keepdims=True)
    excess = mx.take_along_axis(sums, at, axis=1) - eps
    threshold = mx.take_along_axis(places, at + 1, axis=1) + excess / mx.take_along_axis(slope, at, axis=1)
    left = mx.minimum(mx.maximum(size - threshold, 0), room)
    return mx.clip(o + mx.sign(moved) * left, 0, 1).reshape(SHAPE)


class Flat(nn.Module):
    """A perceptron of images."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __call__(self, x):
        return self.model(x.reshape(len(x), -1))


def torch_mlp(torch, model):
    """The perceptron with the same weights."""
    layers = [torch.nn.Flatten()]
    for layer in model.layers:
        if isinstance(layer, nn.Linear):
            twin = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
            twin.weight.data = torch.from_numpy(np.array(layer.weight).copy())
            twin.bias.data = torch.from_numpy(np.array(layer.bias).copy())
            layers += [twin, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).eval()


def pgd(bench, case, model, twin, x, steps):
    """Linf PGD of so many steps from a random start, without an early end."""
    images, alpha = mx.array(x), EPS / 4
    near = bw.random_start(images, EPS, "linf", BOUNDS, seed=0)  # plain zeros around digits are faster to pool
    y = mx.argmax(model(images), axis=1)
    attack = PGD(EPS, steps=steps, alpha=alpha, early_stop=False)
    gradient = mx.grad(lambda z: nn.losses.cross_entropy(model(z), y, reduction="sum"))

    def bare():
        with bw.faster_convolutions(model):
            for _ in range(steps):
                mx.eval(gradient(near))

    contestants = {"ours": lambda: attack(model, images, y), "bare": bare}
    if twin is not None:
        contestants |= torch_attacks(bench, twin, x, np.array(y), steps, alpha)
    bench.check(case, lambda: [within_the_ball(n, f(), x, steps) for n, f in contestants.items() if n != "bare"])
    times = bench.compare(contestants)
    bench.row(f"{case}/time_a_step", times["ours"].median / steps * 1e3, "ms", better="lower")
    few = {name: contestants[name] for name in ("ours", "bare")}  # a few per cent want more rounds than peers are given
    ratio = bench.compare(few, rounds=3 if bench.quick else 31).ratio("ours", "bare")
    bench.row(f"{case}/over_bare_passes", ratio, "x", peer="forward and backward", better="lower")
    for name in contestants:
        if name not in ("ours", "bare"):
            bench.row(f"{case}/vs_{name}", times.ratio(name, "ours"), "x", peer=name, better="higher")


def torch_attacks(bench, twin, x, y, steps, alpha):
    """The peers' attacks as functions without arguments."""
    torch, found = bench.peer("torch"), {}
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    images, labels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(y.astype(np.int64))
    if foolbox := bench.peer("foolbox"):
        wrapped = foolbox.PyTorchModel(twin, bounds=BOUNDS, device="cpu")
        linf = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=steps)
        found["foolbox"] = lambda: linf(wrapped, images, labels, epsilons=EPS)[1].numpy()
    if torchattacks := bench.peer("torchattacks"):
        other = torchattacks.PGD(twin, eps=EPS, alpha=alpha, steps=steps)
        found["torchattacks"] = lambda: other(images, labels).detach().numpy()
    if bench.peer("art"):
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

        classifier = PyTorchClassifier(
            twin, torch.nn.CrossEntropyLoss(), (1, 28, 28), 10, clip_values=BOUNDS, device_type="cpu"
        )
        options = {"max_iter": steps, "num_random_init": 1, "batch_size": len(x), "verbose": False}
        third = ProjectedGradientDescentPyTorch(classifier, eps=EPS, eps_step=alpha, **options)
        found["art"] = lambda: third.generate(images.numpy(), y)
    return found


def within_the_ball(name, result, x, steps):
    """Every side moved, and no further than it may; ours returns only what fooled the model, and counts its passes."""
    if name == "ours":
        assert (result.queries == steps + 2).all().item()
        assert result.distances.max().item() <= EPS + 1e-6
        return
    moved = np.abs(result.transpose(0, 2, 3, 1) - x).max()
    assert EPS / 2 < moved <= EPS * 1.01, (name, moved)
