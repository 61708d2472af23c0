"""One-by-one float64 loop over examples: what per-sample norms and clipped sums must equal."""

from contextlib import ExitStack
from itertools import product
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRASwitchLinear


def numpy64(a):
    return np.array(a.astype(mx.float32) if a.dtype in (mx.float16, mx.bfloat16) else a).astype(np.float64)


def convolution(layer, x):
    """A convolution as a sum of matrix products over the kernel's offsets: MLX has few of them in float64."""
    n, groups = x.ndim - 2, getattr(layer, "groups", 1)
    geometry = (layer.stride, layer.padding, getattr(layer, "dilation", 1))
    stride, padding, dilation = ((a,) * n if isinstance(a, int) else a for a in geometry)
    x = mx.pad(x, [(0, 0), *((p, p) for p in padding), (0, 0)])
    kernel = layer.weight.shape[1:-1]
    out = [(x.shape[1 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(n)]
    parts = []
    for xs, w in zip(mx.split(x, groups, axis=-1), mx.split(layer.weight, groups, axis=0), strict=True):
        y = 0
        for at in product(*map(range, kernel)):
            window = tuple(
                slice(a * d, a * d + (o - 1) * s + 1, s) for a, d, o, s in zip(at, dilation, out, stride, strict=True)
            )
            y = y + xs[(slice(None), *window)] @ w[(slice(None), *at)].T
        parts.append(y)
    y = mx.concatenate(parts, axis=-1)
    return y + layer.bias if "bias" in layer else y


def transposed_convolution(layer, x):
    """A transposed convolution, each offset of the kernel adding to the positions it reaches."""
    n = x.ndim - 2
    names = ("stride", "padding", "dilation", "output_padding")
    stride, padding, dilation, more = ((v,) * n if isinstance(v := getattr(layer, a), int) else v for a in names)
    kernel, space = layer.weight.shape[1:-1], x.shape[1:-1]
    full = [
        (s - 1) * t + d * (k - 1) + 1 + o for s, t, d, k, o in zip(space, stride, dilation, kernel, more, strict=True)
    ]
    y = mx.zeros((x.shape[0], *full, layer.weight.shape[0]), x.dtype)
    for at in product(*map(range, kernel)):
        reached = tuple(
            slice(a * d, a * d + (s - 1) * t + 1, t) for a, d, s, t in zip(at, dilation, space, stride, strict=True)
        )
        y = y.at[(slice(None), *reached)].add(x @ layer.weight[(slice(None), *at)].T)
    y = y[(slice(None), *(slice(p, f - p) for p, f in zip(padding, full, strict=True)))]
    return y + layer.bias if "bias" in layer else y


def dequantized(layer, rows=slice(None)):
    """Weight of a quantized layer in the precision of its scales."""
    scales = layer.scales[rows]
    ones, zeros = mx.ones(scales.shape), mx.zeros(scales.shape)
    integers = mx.dequantize(layer.weight[rows], ones, zeros, group_size=layer.group_size, bits=layer.bits)
    integers = integers.reshape(*scales.shape, -1).astype(scales.dtype)
    return (integers * scales[..., None] + layer.biases[rows][..., None]).flatten(-2)


def quantized_linear(layer, x):
    y = x @ dequantized(layer).T
    return y + layer.bias if "bias" in layer else y


def switch_linear(layer, x, experts, sorted_indices=False):
    weight = layer.weight if isinstance(layer, SwitchLinear) else dequantized(layer)
    y = x @ weight[experts].swapaxes(-1, -2)
    return y + layer.bias[experts][..., None, :] if "bias" in layer else y


def lora_switch_linear(layer, x, experts, sorted_indices=False):
    A, B = (a[experts].swapaxes(-1, -2) for a in (layer.lora_a, layer.lora_b))
    return layer.linear(x, experts) + layer.scale * (x @ A @ B)


# What MLX has not, or only in part, in float64.
FLOAT64 = {
    nn.Conv1d: {"__call__": convolution},
    nn.Conv2d: {"__call__": convolution},
    nn.Conv3d: {"__call__": convolution},
    nn.ConvTranspose1d: {"__call__": transposed_convolution},
    nn.ConvTranspose2d: {"__call__": transposed_convolution},
    nn.ConvTranspose3d: {"__call__": transposed_convolution},
    nn.QuantizedLinear: {"__call__": quantized_linear},
    nn.QuantizedEmbedding: {"__call__": dequantized, "as_linear": lambda e, x: x @ dequantized(e).T},
    SwitchLinear: {"__call__": switch_linear},
    QuantizedSwitchLinear: {"__call__": switch_linear},
    LoRASwitchLinear: {"__call__": lora_switch_linear},
    DoRALinear: {
        "_dequantized_weight": lambda d: dequantized(d.linear) if "scales" in d.linear else d.linear.weight,
    },
}


def one_by_one_grads(model, loss_fn, batch):
    """Gradients by path, a dict for each example, by B separate backward passes of the model in float64."""
    with ExitStack() as stack:
        for cls, methods in FLOAT64.items():
            for name, method in methods.items():
                stack.enter_context(mock.patch.object(cls, name, method))
        return _one_by_one_grads(model, loss_fn, batch)


def float64(a):
    return a.astype(mx.float64) if mx.issubdtype(a.dtype, mx.floating) else a


def _one_by_one_grads(model, loss_fn, batch):
    weights = tree_flatten(model.parameters())
    model.apply(float64)
    cast = tree_map(float64, batch)
    try:
        grad = nn.value_and_grad(model, lambda *x: loss_fn(model, *x).sum())
        rows = [tuple(a[b : b + 1] for a in cast) for b in range(batch[0].shape[0])]
        return [{k: numpy64(g) for k, g in tree_flatten(grad(*row)[1])} for row in rows]
    finally:
        model.load_weights(weights)


def one_by_one(model, loss_fn, batch, max_grad_norm=1.0, clipping="flat"):
    """Norms [B] and clipped sums by path, from gradients one by one.

    max_grad_norm None: the median norm, so that half the examples are clipped.
    """
    grads = one_by_one_grads(model, loss_fn, batch)
    norms = np.sqrt([sum((g**2).sum() for g in example.values()) for example in grads])
    C = ((len(norms) and float(np.median(norms))) or 1.0) if max_grad_norm is None else max_grad_norm
    factors = C / (norms + 0.01) if clipping == "automatic" else np.minimum(1.0, C / (norms + 1e-6))
    sums = {
        path: sum((f * example[path] for f, example in zip(factors, grads, strict=True)), np.zeros(p.shape))
        for path, p in tree_flatten(model.trainable_parameters())
    }
    return norms, sums, C


def assert_sums_close(ours, expected, rtol):
    # a layer in two places of the tree: MLX gives the whole gradient to the last one, zeros to the others
    assert set(ours) <= set(expected)
    assert not any(expected.pop(k).any() for k in set(expected) - set(ours))
    scale = np.sqrt(sum((s**2).sum() for s in expected.values()))
    for k, s in expected.items():
        assert ours[k].shape == s.shape, k
        assert np.abs(numpy64(ours[k]) - s).max(initial=0.0) <= rtol * scale, k
