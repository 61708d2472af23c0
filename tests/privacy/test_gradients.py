import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_bulwark.privacy.gradients import clipped_sums
from oracle import assert_sums_close, numpy64, one_by_one


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


class Pool(nn.Module):
    def __call__(self, x):
        return x.reshape(x.shape[0], -1)


def bias_only():
    layer = nn.Linear(6, 5)
    layer.freeze(keys=["weight"], recurse=False)
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
    "group norm": (lambda: nn.GroupNorm(2, 4), IMAGE, 1e-5),
    "group norm of torch": (lambda: nn.GroupNorm(2, 4, pytorch_compatible=True), IMAGE, 1e-5),
    "generic": (lambda: Sequence(nn.Linear(6, 6), Scale(6)), STEPS, 1e-5),
    "generic of two inputs": (Pairs, STEPS, 1e-5),
    "generic with a shared input": (Masked, STEPS, 1e-5),
    "instance norm": (lambda: nn.InstanceNorm(4, affine=True), IMAGE, 1e-5),
    "prelu": (lambda: Sequence(nn.Linear(6, 5), nn.PReLU()), STEPS, 1e-5),
    "generic twice": (lambda: Twice(Scale(6)), STEPS, 1e-5),
    "generic lstm": (States, STEPS, 1e-5),
    "generic gru": (lambda: nn.GRU(6, 4), STEPS, 1e-5),
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

    return model, loss_fn, (x, scale), rtol


@pytest.mark.parametrize("B", [0, 1, 7, 64])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_a_float64_loop(backend, name, B):
    model, loss_fn, batch, rtol = make(name, B)
    norms, sums, C = one_by_one(model, loss_fn, batch, max_grad_norm=None)
    ours = clipped_sums(model, loss_fn, batch, None, C, "flat", {})
    np.testing.assert_allclose(np.sqrt(numpy64(ours.sq_norms)), norms, rtol=rtol)
    assert_sums_close(ours.sums, sums, rtol)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_clipping_modes(backend, clipping):
    model, loss_fn, batch, rtol = make("mlp", 7)
    _, sums, _ = one_by_one(model, loss_fn, batch, 0.5, clipping)
    assert_sums_close(clipped_sums(model, loss_fn, batch, None, 0.5, clipping, {}).sums, sums, rtol)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "embedding", "layer norm", "generic"])
def test_half_precision_models(backend, name, dtype):
    # the forward and backward pass round to 8 or 11 bits: what is compared is that no rule does worse
    model, loss_fn, (x, scale), _ = make(name, 7)
    model.apply(lambda a: a.astype(dtype))
    x = x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x
    batch = (x, mx.minimum(scale, 2).astype(dtype))
    norms, sums, _ = one_by_one(model, loss_fn, batch)
    ours = clipped_sums(model, loss_fn, batch, None, 1.0, "flat", {})
    rtol = {mx.float16: 5e-3, mx.bfloat16: 4e-2}[dtype]
    np.testing.assert_allclose(np.sqrt(numpy64(ours.sq_norms)), norms, rtol=rtol)
    assert all(s.dtype == mx.float32 for s in ours.sums.values())
    assert_sums_close(ours.sums, sums, rtol)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["mlp", "linear over steps, gram", "conv2d", "layer norm", "group norm", "generic", "cnn"]
)
def test_a_bad_example_harms_no_other(backend, name, value):
    model, loss_fn, (x, scale), _ = make(name, 7)
    bad = np.array(x)
    bad[3].flat[0] = value
    good = mx.array(np.where(np.arange(7).reshape(-1, *[1] * (x.ndim - 1)) == 3, 0, np.array(x)))
    ours = clipped_sums(model, loss_fn, (mx.array(bad), scale), None, 1.0, "flat", {})
    mask = mx.arange(7) != 3
    without = clipped_sums(model, loss_fn, (good, scale), mask, 1.0, "flat", {})
    assert ours.num_refused.item() == 1
    assert without.num_refused.item() == 0
    for k, s in without.sums.items():
        assert (np.array(ours.sums[k]) == np.array(s)).all(), k


def test_padding_adds_exactly_nothing(backend):
    model, loss_fn, (x, scale), _ = make("cnn", 7)
    padded = (mx.concatenate([x, x[:2] * 1e3]), mx.concatenate([scale, scale[:2]]))
    mask = mx.arange(9) < 7
    ours = clipped_sums(model, loss_fn, padded, mask, 1.0, "flat", {})
    zeros = clipped_sums(model, loss_fn, (padded[0] * mask.reshape(-1, 1, 1, 1), padded[1]), mask, 1.0, "flat", {})
    alone = clipped_sums(model, loss_fn, (x, scale), None, 1.0, "flat", {})
    for k, s in ours.sums.items():
        assert (np.array(s) == np.array(zeros.sums[k])).all(), k  # whatever padding holds, the bits are the same
        np.testing.assert_allclose(np.array(s), np.array(alone.sums[k]), rtol=1e-4, atol=1e-6)
    empty = clipped_sums(model, loss_fn, padded, mx.zeros(9, mx.bool_), 1.0, "flat", {})
    assert all((np.array(s) == 0).all() for s in empty.sums.values())


def test_no_clipping_is_the_plain_sum(backend):
    model, loss_fn, batch, _ = make("cnn", 7)
    ours = clipped_sums(model, loss_fn, batch, None, float("inf"), "flat", {})
    from mlx.utils import tree_flatten

    plain = dict(tree_flatten(nn.value_and_grad(model, lambda *b: loss_fn(model, *b).sum())(*batch)[1]))
    assert_sums_close(ours.sums, {k: numpy64(g) for k, g in plain.items()}, 1e-4)


def test_an_unused_layer_gets_zeros(backend):
    model = Sequence(nn.Linear(6, 3))
    model.unused = nn.Linear(2, 2)
    ours = clipped_sums(model, lambda m, x: m(x).sum(axis=1), (mx.ones((4, 6)),), None, 1.0, "flat", {})
    assert (np.array(ours.sums["unused.weight"]) == 0).all()
    assert ours.sums["unused.bias"].shape == (2,)


def test_works_under_compile(backend):
    model, loss_fn, batch, _ = make("cnn", 7)
    plans = {}

    def sums(x, scale):
        return clipped_sums(model, loss_fn, (x, scale), None, 1.0, "flat", plans).sums

    eager = sums(*batch)
    compiled = mx.compile(sums)(*batch)
    assert_sums_close(compiled, {k: numpy64(s) for k, s in eager.items()}, 1e-5)


def engine():
    return bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=1.0)


X = mx.ones((4, 6))


class Uses(nn.Module):
    """Applies f(layer, x)."""

    def __init__(self, f, layer=None):
        super().__init__()
        self.layer = layer or nn.Linear(6, 6)
        self.f = f

    def __call__(self, x):
        return self.f(self.layer, x)


def rows(model, x):
    return model(x).reshape(x.shape[0], -1).sum(axis=1)


REFUSED = {
    "scalar loss": (nn.Linear(6, 6), lambda m, x: m(x).sum(), "one loss an example"),
    "wrong losses": (nn.Linear(6, 6), lambda m, x: m(x).sum(axis=0), "one loss an example"),
    "weight outside": (Uses(lambda f, x: f(x) @ f.weight), rows, "layer.weight|outside"),
    "transposed outside": (Uses(lambda f, x: f(x) @ f.weight.T), rows, "layer.weight"),
    "sum outside": (Uses(lambda f, x: f(x) + mx.sum(f.weight)), rows, "outside"),
    "decay in the loss": (
        nn.Linear(6, 6),
        lambda m, x: rows(m, x) + sum(p.square().sum() for p in m.parameters().values()),
        "outside",
    ),
    "tied": (Uses(lambda f, x: f.as_linear(f(x[:, 0].astype(mx.int32))), nn.Embedding(6, 6)), rows, "outside"),
    "folded batch": (Uses(lambda f, x: f(x.reshape(-1, 3)).reshape(4, -1), nn.Linear(3, 6)), rows, "layer.*batch"),
    "transposed batch": (Uses(lambda f, x: f(x.T), nn.Linear(4, 6)), rows, "batch"),
    "batch norm": (Sequence(nn.BatchNorm(6), nn.Linear(6, 6)), rows, "layers.0.*GroupNorm"),
    "no parameters": (nn.ReLU(), rows, "trainable"),
    "generic with dropout": (
        type("Noisy", (Scale,), {"__call__": lambda s, x: nn.Dropout(0.5)(x) * s.gain})(6),
        rows,
        "random",
    ),
    "generic with convolution": (
        type("Root", (Scale,), {"__call__": lambda s, x: mx.conv1d(x[:, :, None], s.gain.reshape(2, 3, 1))})(6),
        rows,
        "Root.*vmap",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_guarantee_is_refused(backend, case):
    model, loss_fn, says = REFUSED[case]
    before = model.parameters()
    with pytest.raises(bw.PrivacyError, match=f"(?s){says}"):
        engine().value_and_grad(model, loss_fn)(model, X)
    # and the model is left as it was
    assert str(before) == str(model.parameters())


def test_sizes_that_coincide_are_not_taken_for_the_batch(backend):
    # as many positions as examples: the layer's own output has the batch's size and is not per example
    model, loss_fn, (x, scale), rtol = make("embedding of positions", 7)
    norms, *_ = one_by_one(model, loss_fn, (x, scale))
    assert x.shape == (7, 7)
    ours = clipped_sums(model, loss_fn, (x, scale), None, 1.0, "flat", {})
    np.testing.assert_allclose(np.sqrt(numpy64(ours.sq_norms)), norms, rtol=rtol)


def test_dropout_between_layers_is_its_own_for_each_example(backend):
    model = Sequence(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x = mx.broadcast_to(mx.ones((1, 6)), (32, 6))
    ours = clipped_sums(model, lambda m, x: m(x)[:, 0], (x,), None, 1.0, "flat", {})
    assert len(set(np.array(ours.sq_norms).tolist())) > 16
