import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_bulwark.privacy.gradients import clipped_sums
from models import MODELS, Scale, Sequence, make
from oracle import assert_sums_close, numpy64, one_by_one


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
        "weight decay",
    ),
    "tied by hand": (
        Uses(lambda f, x: f(x[:, 0].astype(mx.int32)) @ f.weight.T, nn.Embedding(6, 6)),
        rows,
        "layer.weight",
    ),
    "checkpoint": (Uses(lambda f, x: nn.utils.checkpoint(f)(x)), rows, "layer.weight.*checkpoint"),
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
