"""Models that the per-sample gradients are tried on, and their batches and losses."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import gemma2
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear


class Sequence(nn.Module):
    """The layers one after the other, then a fixed random projection to one number a position."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = list(layers)

    def __call__(self, x):
        for f in self.layers:
            x = f(x)
        return x


class Scale(nn.Module):
    """A layer without a rule."""

    def __init__(self, n):
        super().__init__()
        self.gain = mx.random.normal((n,))
        self.shift = mx.random.normal((n,))

    def __call__(self, x):
        return mx.tanh(x * self.gain) + self.shift


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, x):
        return self.layer(mx.tanh(self.layer(x)))


class Shared(nn.Module):
    """One layer in two places of the tree."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.blocks = [nn.Linear(6, 6), self.a]

    def __call__(self, x):
        return self.blocks[0](self.blocks[1](self.a(x)))


class Positions(nn.Module):
    """A layer that sees no batch axis."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 6)
        self.positions = nn.Embedding(7, 6)

    def __call__(self, x):
        return self.tokens(x) + self.positions(mx.arange(x.shape[1]))


class States(nn.Module):
    """Both outputs of an LSTM."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(6, 4)

    def __call__(self, x):
        hidden, memory = self.cell(x)
        return hidden + memory[:, ::-1]


class First(nn.Module):
    """The first of several outputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)[0]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(1, 6, 2)

    def __call__(self, x):
        return self.encoder(x, None)


class Pairs(nn.Module):
    """A layer of two inputs."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(6, 6, 3)

    def __call__(self, x):
        return self.bilinear(x, mx.sin(x))


class Masked(nn.Module):
    """A layer without a rule that takes an array without a batch axis too."""

    def __init__(self):
        super().__init__()
        self.scale = Scale(6)
        self.scale.__class__ = type("MaskedScale", (Scale,), {"__call__": lambda s, x, mask: x * s.gain * mask})

    def __call__(self, x):
        return self.scale(x, mx.arange(6) % 2)


class Gate(nn.Module):
    """A layer without a rule, of whose outputs one is no number and one takes no gradient."""

    def __init__(self):
        super().__init__()
        self.gain = mx.random.normal((6, 4))

    def __call__(self, x):
        scores = mx.softmax(x @ self.gain, axis=-1)
        best = mx.stop_gradient(mx.argsort(-scores, axis=-1)[..., :2])
        return best, mx.stop_gradient(scores.sum(axis=-1)), mx.take_along_axis(scores, best, axis=-1)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def __call__(self, x):
        best, total, scores = self.gate(x)
        return scores * (1 + best) + total[..., None]


class Tied(nn.Module):
    """One table for tokens and logits."""

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.norm = nn.RMSNorm(6)

    def __call__(self, x):
        return self.table.as_linear(self.norm(self.table(x)))


class AsLinear(nn.Module):
    """A table that is only multiplied by."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def __call__(self, x):
        return self.table.as_linear(x)


class Resumed(nn.Module):
    """A recurrent layer that starts from a state, and goes on from where it ended."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, x):
        y = self.layer(x[:, 2:], hidden=mx.sin(x[:, 0, :4]))
        return self.layer(x[:, :3], mx.cos(y[:, -1]))


class ResumedStates(nn.Module):
    """The same of an LSTM."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(6, 4)

    def __call__(self, x):
        h, c = self.layer(x[:, 2:], hidden=mx.sin(x[:, 0, :4]), cell=x[:, 0, :4])
        return mx.concatenate(self.layer(x[:, :3], h[:, -1], c[:, -1]), axis=1)


class Once(nn.Module):
    """A recurrent layer over a sequence of its own that sees no batch axis."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, x):
        return x[..., :4] * self.layer(mx.sin(mx.arange(30).reshape(5, 6).astype(x.dtype)))


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(6, 2, 1, 1, 8, dropout=0.0)
        self.alibi = nn.ALiBi()

    def __call__(self, x):
        return self.transformer(x, mx.cos(x[:, ::-1]), None, None, None)


class Routed(nn.Module):
    """Four experts, of which every row has its two best, as mlx-lm's mixtures have them."""

    def __init__(self, d=32, bias=False, **adapters):
        super().__init__()
        self.router = nn.Linear(d, 4)
        self.experts = SwitchGLU(d, 32, 4, bias=bias)
        if bias:
            for layer in (self.experts.up_proj, self.experts.down_proj):
                layer.bias = mx.random.normal(layer.bias.shape)
        for name, bits in adapters.items():
            self.experts[name] = adapted(LoRASwitchLinear, self.experts[name], bits)

    def __call__(self, x):
        scores = self.router(x)
        best = mx.stop_gradient(mx.argsort(-scores.astype(mx.float32), axis=-1)[..., :2])
        weights = mx.softmax(mx.take_along_axis(scores, best, axis=-1), axis=-1)
        return (self.experts(x, best) * weights[..., None]).sum(axis=-2)


class Pool(nn.Module):
    def __call__(self, x):
        return x.reshape(x.shape[0], -1)


def bias_only():
    layer = nn.Linear(6, 5)
    layer.freeze(keys=["weight"], recurse=False)
    return layer


def adapted(adapter, plain, bits=None, **train):
    """An adapter over a plain or quantized layer, with weights that are not zero."""
    layer = adapter.from_base(plain.to_quantized(group_size=32, bits=bits) if bits else plain, r=3, scale=1.5)
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape)
    layer.freeze(keys=[k for k, on in train.items() if not on], recurse=False)
    return layer


def quantized(bits, **train):
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 5), group_size=32, bits=bits)
    layer.unfreeze(keys=[k for k, on in train.items() if on], recurse=False)
    return layer


def frozen_first():
    model = Sequence(nn.Linear(6, 8), nn.Linear(8, 4))
    model.layers[0].freeze()
    return model


IMAGE, GRID, SERIES, ROWS, STEPS = (9, 9, 4), (6, 5, 4), (11, 4), (6,), (5, 6)
# name: (model, shape of one example or the number of tokens, rtol)
MODELS = {
    "linear": (lambda: nn.Linear(6, 5), ROWS, 1e-5),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), ROWS, 1e-5),
    "linear over steps, direct": (lambda: nn.Linear(6, 5), STEPS, 1e-5),
    "linear over steps, gram": (lambda: nn.Linear(40, 50), (3, 40), 1e-5),
    "linear over a grid": (lambda: nn.Linear(4, 3), GRID, 1e-5),
    "linear twice": (lambda: Twice(nn.Linear(6, 6)), ROWS, 1e-5),
    "linear twice over steps": (lambda: Twice(nn.Linear(6, 6)), STEPS, 1e-5),
    "linear shared": (Shared, ROWS, 1e-5),
    "bias only": (bias_only, ROWS, 1e-5),
    "frozen first": (frozen_first, ROWS, 1e-5),
    "mlp": (lambda: Sequence(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), ROWS, 1e-5),
    "conv1d": (lambda: nn.Conv1d(4, 5, 3, stride=2, padding=1), SERIES, 1e-4),
    "conv1d dilated": (lambda: nn.Conv1d(4, 5, 3, dilation=2, bias=False), SERIES, 1e-4),
    "conv2d": (lambda: nn.Conv2d(4, 5, 3, padding=1), IMAGE, 1e-4),
    "conv2d strided": (lambda: nn.Conv2d(4, 5, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 2)), IMAGE, 1e-4),
    "conv2d gram": (lambda: nn.Conv2d(4, 40, 3, stride=3), IMAGE, 1e-4),
    "conv2d twice": (lambda: Twice(nn.Conv2d(4, 4, 3, padding=1)), IMAGE, 1e-4),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), IMAGE, 1e-4),
    "conv2d grouped gram": (lambda: nn.Conv2d(4, 60, 3, stride=3, groups=2), IMAGE, 1e-4),
    "conv1d depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4), SERIES, 1e-4),
    "conv2d one position": (lambda: nn.Conv2d(4, 6, 9), IMAGE, 1e-4),
    "embedding": (lambda: nn.Embedding(20, 6), 9, 1e-5),
    "embedding of positions": (Positions, 7, 1e-5),
    "layer norm": (lambda: Sequence(nn.LayerNorm(6), nn.Linear(6, 3)), STEPS, 1e-5),
    "rms norm": (lambda: Sequence(nn.RMSNorm(6), nn.Linear(6, 3)), STEPS, 1e-5),
    "rms norm of gemma": (lambda: Sequence(gemma2.RMSNorm(6), nn.Linear(6, 3)), STEPS, 1e-5),
    "group norm": (lambda: nn.GroupNorm(2, 4), IMAGE, 1e-5),
    "group norm of torch": (lambda: nn.GroupNorm(2, 4, pytorch_compatible=True), IMAGE, 1e-5),
    "generic": (lambda: Sequence(nn.Linear(6, 6), Scale(6)), STEPS, 1e-5),
    "generic with a shared input": (Masked, STEPS, 1e-5),
    "generic with a stopped output": (Gated, STEPS, 1e-5),
    "generic twice": (lambda: Twice(Scale(6)), STEPS, 1e-5),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=1), (4, 5, 3, 2), 1e-4),
    "conv3d gram": (lambda: nn.Conv3d(2, 30, 2, stride=2, bias=False), (4, 5, 3, 2), 1e-4),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 5, 3, stride=2, padding=1, dilation=2), SERIES, 1e-4),
    "transposed conv1d gram": (lambda: nn.ConvTranspose1d(4, 70, 3, output_padding=1, stride=2), SERIES, 1e-4),
    "transposed conv1d, much padding": (lambda: nn.ConvTranspose1d(4, 2, 3, padding=1, output_padding=2), SERIES, 1e-4),
    "transposed conv2d": (
        lambda: nn.ConvTranspose2d(4, 3, (3, 2), stride=(1, 2), padding=(2, 1), output_padding=(0, 1), bias=False),
        GRID,
        1e-4,
    ),
    "transposed conv2d twice": (lambda: Twice(nn.ConvTranspose2d(4, 4, 3, padding=1)), GRID, 1e-4),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=(2, 1, 2), padding=1), (4, 3, 3, 2), 1e-4),
    "bilinear": (Pairs, ROWS, 1e-5),
    "bilinear over steps": (Pairs, STEPS, 1e-5),
    "table of logits": (lambda: AsLinear(nn.Embedding(30, 6)), STEPS, 1e-5),
    "tied table": (lambda: Tied(nn.Embedding(7, 6)), 9, 1e-5),
    "instance norm": (lambda: nn.InstanceNorm(4, affine=True), IMAGE, 1e-5),
    "prelu": (lambda: Sequence(nn.Linear(6, 5), nn.PReLU()), STEPS, 1e-5),
    "prelu of channels": (lambda: Sequence(nn.Linear(6, 5), nn.PReLU(5)), STEPS, 1e-5),
    "rnn": (lambda: nn.RNN(6, 4), STEPS, 1e-5),
    "rnn gram": (lambda: nn.RNN(6, 40), (2, 6), 1e-5),
    "rnn without bias": (lambda: nn.RNN(6, 4, bias=False, nonlinearity=nn.relu), STEPS, 1e-5),
    "rnn resumed": (lambda: Resumed(nn.RNN(6, 4)), STEPS, 1e-5),
    "rnn of many rows": (lambda: nn.RNN(6, 4), (3, 5, 6), 1e-5),
    "rnn without a batch": (lambda: Once(nn.RNN(6, 4)), STEPS, 1e-5),
    "lstm": (States, STEPS, 1e-5),
    "lstm without bias": (lambda: First(nn.LSTM(6, 4, bias=False)), STEPS, 1e-5),
    "lstm resumed": (ResumedStates, STEPS, 1e-5),
    "gru": (lambda: nn.GRU(6, 4), STEPS, 1e-5),
    "gru without bias": (lambda: nn.GRU(6, 4, bias=False), STEPS, 1e-5),
    "gru resumed": (lambda: Resumed(nn.GRU(6, 4)), STEPS, 1e-5),
    "gru without a batch": (lambda: Once(nn.GRU(6, 4)), STEPS, 1e-5),
    "quantized under linear": (lambda: Sequence(nn.Linear(6, 64), quantized(4)), STEPS, 1e-5),
    "quantized, all trained": (lambda: quantized(4, scales=True, biases=True, bias=True), (64,), 1e-5),
    "quantized, all trained over steps": (lambda: quantized(8, scales=True, biases=True, bias=True), (3, 64), 1e-5),
    "lora": (lambda: adapted(LoRALinear, nn.Linear(6, 5)), STEPS, 1e-5),
    "lora gram": (lambda: adapted(LoRALinear, nn.Linear(60, 50)), (2, 60), 1e-5),
    "lora of 4 bits": (lambda: adapted(LoRALinear, nn.Linear(64, 32, bias=False), 4), (3, 64), 1e-5),
    "lora of 8 bits, twice": (lambda: Twice(adapted(LoRALinear, nn.Linear(64, 64), 8)), (64,), 1e-5),
    "lora, B alone": (lambda: adapted(LoRALinear, nn.Linear(6, 5), lora_a=False), STEPS, 1e-5),
    "lora with its layer": (lambda: LoRALinear.from_base(nn.Linear(6, 5), r=2), STEPS, 1e-5),
    "dora": (lambda: adapted(DoRALinear, nn.Linear(6, 5)), STEPS, 1e-5),
    "dora of 4 bits": (lambda: adapted(DoRALinear, nn.Linear(64, 32), 4), (3, 64), 1e-5),
    "dora, m alone": (lambda: adapted(DoRALinear, nn.Linear(6, 5), lora_a=False, lora_b=False), STEPS, 1e-5),
    "lora embedding": (lambda: adapted(LoRAEmbedding, nn.Embedding(20, 6)), 9, 1e-5),
    "lora embedding of 4 bits": (lambda: adapted(LoRAEmbedding, nn.Embedding(20, 32), 4), 9, 1e-5),
    "lora embedding, tied": (lambda: Tied(adapted(LoRAEmbedding, nn.Embedding(20, 6))), 9, 1e-5),
    "lora embedding of logits": (lambda: AsLinear(adapted(LoRAEmbedding, nn.Embedding(20, 6))), STEPS, 1e-5),
    "dora embedding": (lambda: adapted(DoRAEmbedding, nn.Embedding(20, 6)), 9, 1e-5),
    "dora embedding, tied": (lambda: Tied(adapted(DoRAEmbedding, nn.Embedding(20, 6))), 9, 1e-5),
    "dora embedding of logits": (lambda: AsLinear(adapted(DoRAEmbedding, nn.Embedding(20, 6))), STEPS, 1e-5),
    "experts": (Routed, (4, 32), 1e-5),  # so few rows that mlx-lm does not sort them
    "experts, sorted": (Routed, (30, 32), 1e-5),
    "experts with biases, sorted": (lambda: Routed(bias=True), (30, 32), 1e-5),
    "experts twice": (lambda: Twice(Routed()), (5, 32), 1e-5),
    "lora of experts": (lambda: Routed(up_proj=None, down_proj=None), (4, 32), 1e-5),
    "lora of experts of 4 bits, sorted": (lambda: Routed(up_proj=4, down_proj=4), (30, 32), 1e-5),
    "transformer": (Translator, STEPS, 1e-5),
    "attention": (Encoder, STEPS, 1e-5),
    "cnn": (
        lambda: Sequence(
            nn.Conv2d(4, 8, 3, stride=2),
            nn.GroupNorm(2, 8, pytorch_compatible=True),
            nn.ReLU(),
            Pool(),
            nn.Linear(128, 3),
        ),
        IMAGE,
        1e-4,
    ),
}


def make(name, B, seed=0):
    build, shape, rtol = MODELS[name]
    return *problem(build, shape, B, seed), rtol


def problem(build, shape, B, seed=0):
    """A model, a loss of it and a batch: x of this shape an example or of so many tokens, and weights of examples."""
    mx.random.seed(seed)
    model = build()
    rng = np.random.default_rng(seed + 1)
    if isinstance(shape, int):
        x = mx.array(rng.integers(0, 5, (B, shape)))  # tokens repeat within an example
    else:
        x = mx.array(rng.standard_normal((B, *shape)).astype(np.float32))
    weights = mx.array(rng.standard_normal(4096).astype(np.float32))
    scale = mx.array(rng.lognormal(sigma=1.5, size=B).astype(np.float32))  # norms on both sides of the clip

    def loss_fn(model, x, scale):
        y = model(x)
        y = y.reshape(y.shape[0], -1)
        return scale * (mx.sin(y) * weights[: y.shape[1]].astype(y.dtype)).sum(axis=1)

    return model, loss_fn, (x, scale)
