"""The models that private and plain steps are timed on, each with one batch."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
from mlx_bulwark.demo import CNN

CLASSES, VOCABULARY = 10, 2048


class Case(NamedTuple):
    """A model, its per-example loss and a batch."""

    model: nn.Module
    loss_fn: Callable[..., mx.array]
    batch: tuple[mx.array, ...]

    @property
    def batch_size(self) -> int:
        return int(self.batch[0].shape[0])


class MLP(nn.Module):
    """784-1024-1024-10."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(784, 1024), nn.Linear(1024, 1024), nn.Linear(1024, CLASSES)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


class CifarCNN(nn.Module):
    """Four convolutions on 32 x 32 x 3, halved by pooling after each."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.linear = nn.Linear(512, CLASSES)

    def __call__(self, x: mx.array) -> mx.array:
        for conv in self.convs:
            x = nn.MaxPool2d(2)(nn.relu(conv(x)))
        return self.linear(x.reshape(x.shape[0], -1))


class Transformer(nn.Module):
    """Encoder of four layers, d = 512, that classifies token sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 512)
        self.encoder = nn.TransformerEncoder(4, 512, 8, 2048, norm_first=True)
        self.linear = nn.Linear(512, CLASSES)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.linear(self.encoder(self.embedding(tokens), None).mean(axis=1))


def classify(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    """Cross entropy of each example, [B]."""
    return nn.losses.cross_entropy(model(x), y, reduction="none")


def next_token(model: nn.Module, tokens: mx.array) -> mx.array:
    """Mean cross entropy of each example's next tokens, [B]."""
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(axis=1)


def mlp() -> Case:
    return _images(MLP, (256, 784))


def demo_cnn() -> Case:
    return _images(lambda: CNN(8), (256, 8, 8, 1))


def cnn() -> Case:
    return _images(CifarCNN, (64, 32, 32, 3))


def transformer(batch_size: int = 16) -> Case:
    mx.random.seed(0)
    rng = np.random.default_rng(0)
    batch = (mx.array(rng.integers(0, VOCABULARY, (batch_size, 128))), mx.array(rng.integers(0, CLASSES, batch_size)))
    return _evaluated(Case(Transformer(), classify, batch))


def lora() -> Case:
    """Llama of mlx-lm with 4-bit weights and LoRA of rank 8 on every linear layer of its two blocks."""
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(0)
    arguments = ModelArgs(
        model_type="llama",
        hidden_size=512,
        num_hidden_layers=2,
        intermediate_size=1408,
        num_attention_heads=8,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
    )
    model = Model(arguments)
    nn.quantize(model, group_size=64, bits=4)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    tokens = mx.array(np.random.default_rng(0).integers(0, VOCABULARY, (8, 257)))
    return _evaluated(Case(model, next_token, (tokens,)))


MAKE: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "demo_cnn": demo_cnn,
    "cnn": cnn,
    "transformer": transformer,
    "lora": lora,
}


def first_rows(case: Case, rows: int) -> Case:
    """The same with a smaller batch."""
    return case._replace(batch=tuple(a[:rows] for a in case.batch))


def sound(case: Case) -> None:
    """Private gradients agree with a one-by-one loop on a few examples."""
    engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)
    engine.check(case.model, first_rows(case, 3).batch, case.loss_fn)


def _images(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Case:
    mx.random.seed(0)
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal(shape).astype(np.float32))
    return _evaluated(Case(make(), classify, (x, mx.array(rng.integers(0, CLASSES, shape[0])))))


def _evaluated(case: Case) -> Case:
    mx.eval(case.model.parameters(), case.batch)
    return case
