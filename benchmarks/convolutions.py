"""Convolutions and max pools of small images on the CPU, forward and backward, beside MLX's own and torch's.

Backward is the gradient of the sum of squares with respect to every input. torch has its tensors as it likes them best,
channels last.
"""

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np

CONVOLUTIONS = {  # x, weight; 3 x 3 kernels, one pixel of padding
    "conv_28x28x1_to_32": ((100, 28, 28, 1), (32, 3, 3, 1)),
    "conv_14x14x32_to_64": ((100, 14, 14, 32), (64, 3, 3, 32)),
    "conv_32x32x64_to_64": ((32, 32, 32, 64), (64, 3, 3, 64)),
}
POOLS = {"max_pool_28x28x32": (100, 28, 28, 32), "max_pool_14x14x64": (100, 14, 14, 64)}


def run(bench):
    for case, (shape, weight) in CONVOLUTIONS.items():
        small = (8, *shape[1:]) if bench.quick else shape
        measured(bench, case, convolutions(bench), [normals(small, 0), normals(weight, 1)])
    for case, shape in POOLS.items():
        measured(bench, case, pools(bench), [normals((8, *shape[1:]) if bench.quick else shape, 0)])


def normals(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def convolutions(bench):
    functions = {
        "ours": lambda x, w: bw.convolve(x, w, padding=1),
        "MLX": lambda x, w: mx.conv_general(x, w, padding=1),
    }
    if torch := bench.peer("torch"):
        functions["torch"] = lambda x, w: torch.nn.functional.conv2d(x, w, padding=1)
    return functions


def pools(bench):
    def plain(x):
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))  # as nn.MaxPool2d has it

    functions = {"ours": lambda x: bw.max_pool(x, 2), "MLX": plain}
    if torch := bench.peer("torch"):
        functions["torch"] = lambda x: torch.nn.functional.max_pool2d(x, 2)
    return functions


def measured(bench, case, functions, values):
    """Rows of one layer; what the contestants return is laid out as ours is."""
    arrays = [mx.array(v) for v in values]
    forward, backward = {}, {}
    for name, f in functions.items():
        if name == "torch":
            forward[name], backward[name] = of_torch(bench.peer("torch"), f, values)
            continue
        forward[name], backward[name] = of_mlx(f, arrays)
    for of, contestants in ((case, forward), (f"{case}_backward", backward)):
        bench.check(of, lambda c=contestants: all(close(c["ours"](), f()) for f in c.values()))
        times = bench.compare(contestants)
        bench.row(f"{of}/time", times["ours"].median * 1e3, "ms", better="lower")
        for name in [n for n in contestants if n != "ours"]:
            bench.row(f"{of}/vs_{name.lower()}", times.ratio(name, "ours"), "x", peer=name, better="higher")


def of_mlx(f, arrays):
    plain, gradients = mx.compile(f), mx.compile(mx.grad(lambda a: f(*a).square().sum()))
    return lambda: [plain(*arrays)], lambda: gradients(arrays)


def of_torch(torch, f, values):
    tensors = [torch.from_numpy(v.transpose(0, 3, 1, 2)) for v in values]  # channels last in memory
    wanted = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]

    def forward():
        with torch.no_grad():
            return [f(*tensors).permute(0, 2, 3, 1)]

    def backward():
        return [g.permute(0, 2, 3, 1) for g in torch.autograd.grad(f(*wanted).square().sum(), wanted)]

    return forward, backward


def close(ours, theirs):
    pairs = [(np.array(a), np.array(b)) for a, b in zip(ours, theirs, strict=True)]
    return all(abs(a - b).max() <= 1e-5 * abs(a).max() for a, b in pairs)
