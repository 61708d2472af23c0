"""Every layer of mlx.nn that has parameters has a rule, or is refused with a reason."""

import inspect

import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.nn.layers import distributed
from mlx.utils import tree_flatten
from mlx_bulwark.privacy import refusals, rules
from mlx_bulwark.privacy.gradients import clipped_sums
from mlx_bulwark.privacy.rules_experts import sums_by_expert, sums_by_sorting
from mlx_lm.models import switch_layers
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from models import MODELS, adapted, problem
from oracle import assert_sums_close, numpy64, one_by_one

# How to build each class of mlx.nn that needs arguments.
BUILD = {
    nn.ALiBi: (),
    nn.AvgPool1d: (2,),
    nn.AvgPool2d: (2,),
    nn.AvgPool3d: (2,),
    nn.BatchNorm: (4,),
    nn.Bilinear: (4, 4, 4),
    nn.Conv1d: (4, 4, 3),
    nn.Conv2d: (4, 4, 3),
    nn.Conv3d: (4, 4, 3),
    nn.ConvTranspose1d: (4, 4, 3),
    nn.ConvTranspose2d: (4, 4, 3),
    nn.ConvTranspose3d: (4, 4, 3),
    nn.Embedding: (4, 4),
    nn.GroupNorm: (2, 4),
    nn.GRU: (4, 4),
    nn.InstanceNorm: (4, 1e-5, True),
    nn.LayerNorm: (4,),
    nn.Linear: (4, 4),
    nn.LSTM: (4, 4),
    nn.MaxPool1d: (2,),
    nn.MaxPool2d: (2,),
    nn.MaxPool3d: (2,),
    nn.MultiHeadAttention: (4, 2),
    nn.QQLinear: (64, 64),
    nn.QuantizedEmbedding: (4, 64),
    nn.QuantizedLinear: (64, 4),
    nn.RMSNorm: (4,),
    nn.RNN: (4, 4),
    nn.RoPE: (4,),
    nn.SinusoidalPositionalEncoding: (4,),
    nn.Transformer: (4, 2, 1, 1),
    nn.TransformerEncoder: (1, 4, 2),
    nn.Upsample: (2,),
    distributed.AllToShardedLinear: (4, 4),
    distributed.FullyShardedModule: (nn.Linear(4, 4),),
    distributed.QuantizedAllToShardedLinear: (64, 64),
    distributed.QuantizedShardedToAllLinear: (64, 64),
    distributed.ShardedToAllLinear: (4, 4),
}
# Abstract, or built of the classes above and listed here so that the list is known to be whole.
INNER = {nn.Module, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer}


def classes():
    found = {c for m in (nn, nn.layers, distributed) for _, c in inspect.getmembers(m, inspect.isclass)}
    found |= {
        c for _, m in inspect.getmembers(nn.layers, inspect.ismodule) for _, c in inspect.getmembers(m, inspect.isclass)
    }
    public = {c for c in found if issubclass(c, nn.Module) and not c.__name__.startswith("_")}
    return sorted(public - INNER, key=lambda c: c.__name__)


def build(cls):
    module = cls(*BUILD.get(cls, ()))
    module.unfreeze()
    if cls is nn.QuantizedLinear:  # its integers cannot be trained
        module.freeze(keys=["weight"])
    return module


@pytest.mark.parametrize("cls", classes())
def test_every_layer_with_parameters_is_handled_or_refused_by_name(cls):
    for path, module in build(cls).named_modules():
        own = refusals.own_arrays(module, trainable=True)
        if own:
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            refused = name in refusals.REFUSED or isinstance(module, nn.BatchNorm)
            assert (rules.rule_of(module) is not None) != refused, (path, name)
            if refused:
                assert len(refusals.refusal(module, "ghost")) > 30


def test_the_walk_finds_the_layers():
    found = classes()
    assert len(found) > 60
    assert {nn.Linear, nn.LSTM, distributed.ShardedToAllLinear} <= set(found)
    assert set(BUILD) <= set(found)


@pytest.mark.parametrize("name", rules.RULES)
def test_every_rule_is_of_a_layer_that_exists(name):
    module, cls = name.rsplit(".", 1)
    layer = getattr(__import__(module, fromlist=[cls]), cls)
    assert layer.__module__ + "." + layer.__qualname__ == name


def test_rows_that_are_sorted_by_other_hands_are_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = SwitchLinear(6, 5, 2)

        def __call__(self, x):
            experts = mx.sort(mx.arange(x.shape[0] * x.shape[1]) % 2)
            y = self.experts(x.reshape(-1, 1, 6), experts, sorted_indices=True)
            return y.reshape(x.shape[0], -1)

    model, loss_fn, batch = problem(Own, (5, 6), 3)
    with pytest.raises(bw.PrivacyError, match="must get its rows sorted by mlx_lm"):
        clipped_sums(model, loss_fn, batch, None, 1.0, "flat", {})


def test_both_ways_to_the_sums_of_experts():
    rng = np.random.default_rng(0)
    u, d = (rng.standard_normal((101, 1, n)).astype(np.float32) for n in (7, 5))
    ids = rng.integers(-1, 4, 101).astype(np.int32)
    ids[ids == 2] = 3  # an expert without rows
    expected = np.stack([np.einsum("np,nd->pd", d[ids == e, 0], u[ids == e, 0]) for e in range(4)])
    u[ids < 0] = np.nan
    for f in (sums_by_expert, sums_by_sorting):
        np.testing.assert_allclose(f(mx.array(u), mx.array(d), mx.array(ids), 4), expected, atol=2e-5)


def test_mlx_lm_sorts_as_before_after_a_trace():
    before = switch_layers._gather_sort
    model, loss_fn, batch = problem(*MODELS["experts, sorted"][:2], 3)
    clipped_sums(model, loss_fn, batch, None, 1.0, "flat", {})
    assert switch_layers._gather_sort is before


def sizes(least, most):
    return st.integers(least, most)


@st.composite
def rows_and_linear(draw):
    d, p, shape = draw(sizes(1, 9)), draw(sizes(1, 9)), draw(st.lists(sizes(1, 4), max_size=3))
    bias = draw(st.booleans())
    return lambda: nn.Linear(d, p, bias=bias), (*shape, d)


@st.composite
def space_and_convolution(draw, transposed=False):
    n = draw(sizes(1, 3))
    kernel, stride, padding, dilation = (tuple(draw(sizes(lo, hi)) for _ in range(n)) for lo, hi in GEOMETRY)
    if transposed:
        dilation = (dilation[0],) * n
        padding = tuple(min(p, d * (k - 1) // 2) for p, d, k in zip(padding, dilation, kernel, strict=True))
        space = tuple(draw(sizes(1, 4)) for _ in range(n))
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
        more = {"output_padding": draw(sizes(0, 1)) if min(stride) > 1 else 0}
    else:
        fits = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
        space = tuple(f + draw(sizes(0, 4)) for f in fits)
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
        more = {"groups": draw(st.sampled_from([1, 2, 4]))} if n < 3 else {}
    one = (lambda v: v[0]) if n == 1 else (lambda v: v)
    arguments = {
        "stride": one(stride),
        "padding": one(padding),
        "dilation": dilation[0] if transposed else one(dilation),
    }
    channels, bias = 4 * draw(sizes(1, 3)), draw(st.booleans())
    return lambda: layer(4, channels, one(kernel), **arguments, **more, bias=bias), (*space, 4)


GEOMETRY = ((1, 3), (1, 3), (0, 2), (1, 2))


@st.composite
def steps_and_recurrent(draw):
    cls, d, h, T = (
        draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM])),
        draw(sizes(1, 5)),
        draw(sizes(1, 5)),
        draw(sizes(1, 6)),
    )
    bias = draw(st.booleans())
    return lambda: States(cls(d, h, bias=bias)), (T, d)


class States(nn.Module):
    """All that a recurrent layer gives."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, x):
        y = self.layer(x)
        return mx.concatenate(y, axis=-1) if isinstance(y, tuple) else y


@st.composite
def tokens_and_table(draw):
    tied = draw(st.booleans())
    table, d, T = draw(st.sampled_from([None, LoRAEmbedding, DoRAEmbedding])), draw(sizes(1, 5)), draw(sizes(1, 12))

    def build():
        plain = nn.Embedding(7, d)
        return TiedTable(adapted(table, plain) if table else plain, tied)

    return build, T


class TiedTable(nn.Module):
    def __init__(self, table, tied):
        super().__init__()
        self.table, self.tied = table, tied

    def __call__(self, x):
        y = self.table(x)
        return self.table.as_linear(mx.tanh(y)) if self.tied else y


@st.composite
def rows_and_adapter(draw):
    cls, bits = draw(st.sampled_from([LoRALinear, DoRALinear])), draw(st.sampled_from([None, 4, 8]))
    p, shape = draw(sizes(1, 9)), draw(st.lists(sizes(1, 4), max_size=2))
    d = 32 if bits else draw(sizes(1, 9))
    return lambda: adapted(cls, nn.Linear(d, p), bits), (*shape, d)


@st.composite
def space_and_norm(draw):
    groups, T = draw(sizes(1, 3)), draw(sizes(2, 5))
    dims = 2 * groups
    layer = draw(
        st.sampled_from(
            [
                lambda: nn.LayerNorm(dims),
                lambda: nn.RMSNorm(dims),
                lambda: nn.GroupNorm(groups, dims),
                lambda: nn.GroupNorm(groups, dims, pytorch_compatible=True),
                lambda: nn.InstanceNorm(dims, affine=True),
                lambda: nn.PReLU(dims),
                lambda: nn.PReLU(),
            ]
        )
    )
    return layer, (T, dims)


FAMILIES = {
    "linear": rows_and_linear(),
    "convolution": space_and_convolution(),
    "transposed convolution": space_and_convolution(transposed=True),
    "recurrent": steps_and_recurrent(),
    "table": tokens_and_table(),
    "adapter": rows_and_adapter(),
    "norm": space_and_norm(),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_shape_is_equal_to_a_float64_loop(backend, family):
    @settings(max_examples=4 if backend == "metal-sim" else 25)
    @given(FAMILIES[family], sizes(1, 5), sizes(0, 1000))
    def check(layer, B, seed):
        build, shape = layer
        model, loss_fn, batch = problem(build, shape, B, seed)
        norms, sums, C = one_by_one(model, loss_fn, batch, max_grad_norm=None)
        ours = clipped_sums(model, loss_fn, batch, None, C, "flat", {})
        # 1e-4 of the largest: the backward pass of tiny gradients cancels in float32 in any implementation
        np.testing.assert_allclose(np.sqrt(numpy64(ours.sq_norms)), norms, rtol=1e-4, atol=1e-4 * norms.max())
        assert_sums_close(ours.sums, sums, 1e-4)

    check()


ADAPTERS = ["lora", "lora of 4 bits", "dora", "lora embedding", "lora embedding, tied", "dora embedding, tied"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_dropout_has_one_mask_for_norms_and_gradients(backend, name):
    # With one example and no clipping, our sum is its gradient and our norm must be the norm of it; and both must be
    # what MLX's own gradient is under the same random state.
    model, loss_fn, batch = problem(MODELS[name][0], MODELS[name][1], 1)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m._p_1 = 0.5
    plan = {}
    clipped_sums(model, loss_fn, batch, None, np.inf, "flat", plan)  # the forward passes of the plan draw too
    mx.random.seed(3)
    ours = clipped_sums(model, loss_fn, batch, None, np.inf, "flat", plan)
    mx.random.seed(3)
    grads = nn.value_and_grad(model, lambda *b: loss_fn(model, *b).sum())(*batch)[1]
    plain = {k: numpy64(g) for k, g in tree_flatten(grads)}
    assert_sums_close(ours.sums, dict(plain), 1e-5)
    np.testing.assert_allclose(numpy64(ours.sq_norms), sum((g**2).sum() for g in plain.values()), rtol=1e-4)
    mx.random.seed(4)
    other = clipped_sums(model, loss_fn, batch, None, np.inf, "flat", plan)
    assert abs(other.sq_norms.item() / ours.sq_norms.item() - 1) > 1e-3  # the mask was another


@pytest.mark.parametrize("name", ADAPTERS)
def test_dropout_differs_between_examples(backend, name):
    build, shape, _ = MODELS[name]
    model, loss_fn, (x, _) = problem(build, shape, 1)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m._p_1 = 0.5
    batch = (mx.broadcast_to(x, (16, *x.shape[1:])), mx.ones(16))
    norms = np.array(clipped_sums(model, loss_fn, batch, None, 1.0, "flat", {}).sq_norms)
    assert len(set(norms.tolist())) > 12


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    "name", [*ADAPTERS, "dora of 4 bits", "lstm", "gru", "transposed conv2d", "tied table", "bilinear"]
)
def test_half_precision(backend, name, dtype):
    # the forward and backward pass round to 8 or 11 bits: what is compared is that no rule does worse
    model, loss_fn, (x, scale) = problem(MODELS[name][0], MODELS[name][1], 7)
    low = {"lora_a", "lora_b"}  # mlx-lm keeps its adapters in float32
    model.apply(
        lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a,
        lambda m, k, v: nn.Module.valid_parameter_filter(m, k, v) and k not in low,
    )
    x = x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x
    batch = (x, mx.minimum(scale, 2).astype(dtype))
    norms, sums, _ = one_by_one(model, loss_fn, batch)
    ours = clipped_sums(model, loss_fn, batch, None, 1.0, "flat", {})
    rtol = {mx.float16: 5e-3, mx.bfloat16: 4e-2}[dtype]
    np.testing.assert_allclose(np.sqrt(numpy64(ours.sq_norms)), norms, rtol=rtol)
    assert all(s.dtype == mx.float32 for s in ours.sums.values())
    assert_sums_close(ours.sums, sums, rtol)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_under_compile(backend, name):
    model, loss_fn, batch = problem(MODELS[name][0], MODELS[name][1], 5)
    plans = {}

    def sums(x, scale):
        r = clipped_sums(model, loss_fn, (x, scale), None, 1.0, "flat", plans)
        return r.sums, r.sq_norms

    eager, norms = sums(*batch)
    compiled, compiled_norms = mx.compile(sums)(*batch)
    assert_sums_close(compiled, {k: numpy64(s) for k, s in eager.items()}, 1e-4)
    np.testing.assert_allclose(numpy64(compiled_norms), numpy64(norms), rtol=1e-3)


@pytest.mark.parametrize("name", ["embedding", "tied table", "lora embedding, tied", "dora embedding, tied"])
@pytest.mark.parametrize("dtype", [mx.uint8, mx.int16, mx.uint32, mx.int64])
def test_tokens_of_any_type_and_from_the_end(backend, name, dtype):
    model, loss_fn, (x, scale) = problem(*MODELS[name][:2], 5)
    tokens = np.array(x)
    if dtype in (mx.int16, mx.int64):  # the same row by both of its names in one example
        table = model if name == "embedding" else getattr(model.table, "embedding", model.table)
        tokens[:, ::2], tokens[:, 1] = -1, table.weight.shape[0] - 1
    batch = (mx.array(tokens).astype(dtype), scale)
    norms, sums, C = one_by_one(model, loss_fn, batch, max_grad_norm=None)
    ours = clipped_sums(model, loss_fn, batch, None, C, "flat", {})
    np.testing.assert_allclose(np.sqrt(numpy64(ours.sq_norms)), norms, rtol=1e-4)
    assert_sums_close(ours.sums, sums, 1e-4)


def parts(model, odd):
    """Every second trainable parameter of a model, frozen: the odd ones or the others."""
    paths = [path for path, _ in tree_flatten(model.trainable_parameters())]
    for path in paths[odd::2]:
        owner = model
        *way, name = path.split(".")
        for step in way:
            owner = owner[int(step)] if isinstance(owner, list) else owner[step]
        owner.freeze(keys=[name], recurse=False)
    return model if tree_flatten(model.trainable_parameters()) else None


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_partly_frozen_layers(backend, name, odd):
    build, shape, rtol = MODELS[name]
    model, loss_fn, batch = problem(build, shape, 3)
    if not parts(model, odd):
        return  # it trains one parameter alone
    norms, sums, C = one_by_one(model, loss_fn, batch, max_grad_norm=None)
    ours = clipped_sums(model, loss_fn, batch, None, C, "flat", {})
    np.testing.assert_allclose(np.sqrt(numpy64(ours.sq_norms)), norms, rtol=10 * rtol)
    assert_sums_close(ours.sums, sums, 10 * rtol)
