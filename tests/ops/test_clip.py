import os
import subprocess
import sys

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_bulwark import _native
from mlx_bulwark.ops import clip

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
SIZES = [0, 1, 31, 33, 1000003]
RTOL = 1e-5  # of a norm, and of the sum of absolute contributions
NAN, INF = float("nan"), float("inf")
KEY = bw.key_from_seed(7)
# Sizes that take the simulator seconds, and what it runs in their place.
SIMULATED = {1000003: 20003, 2100000: 210000, 100003: 10003, 40001: 4001, 3000: 1003, 2000: 1001, 71: 7, 70: 7}
TINIEST = 2.0**-126  # the least normal float32: GPUs take what is smaller for 0


def sized(backend, shape):
    return tuple(SIMULATED.get(n, n) for n in shape) if backend == "metal-sim" else shape


def rand(shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def np64(x):
    with np.errstate(invalid="ignore"):  # a signaling NaN is as good as any other
        return np.array(x.astype(mx.float32)).astype(np.float64)


def bits(x):
    x = np.array(x)
    return x.shape, x.tobytes()


def norms64(leaves):
    """Squared norms, one sample after another, in float64."""
    leaves = [np64(g) for g in leaves]
    return np.array([sum((g[b] ** 2).sum() for g in leaves) for b in range(len(leaves[0]))])


def factors64(sq_norms, c, mode="flat"):
    n = np.sqrt(sq_norms)
    return c / (n + 0.01) if mode == "automatic" else np.minimum(1, c / (n + 1e-6))


def sum64(g, factors):
    """The sum, one sample after another, in float64, and the scale of its rounding errors."""
    g, f = np64(g), np64(factors)
    total, scale = np.zeros(g.shape[1:]), np.zeros(g.shape[1:])
    for b in range(len(f)):
        if f[b]:
            total += f[b] * g[b]
            scale += abs(f[b] * g[b])
    return total, scale


def assert_sum(out, g, factors):
    total, scale = sum64(g, factors)
    assert out.dtype == mx.float32
    assert out.shape == total.shape
    error = abs(np64(out) - total)
    assert (error <= RTOL * scale).all(), (error / np.maximum(scale, 1e-300)).max()


def assert_clipped(leaves, c=2.0, mode="flat", mask=None):
    """All four ops on finite leaves, against float64."""
    want = norms64(leaves)
    norms = bw.sample_sq_norms(leaves)
    assert norms.dtype == mx.float32
    assert norms.shape == (leaves[0].shape[0],)
    np.testing.assert_allclose(np64(norms), want, rtol=RTOL)
    factors, refused = bw.clip_factors(norms, c, mode, mask)
    assert refused.dtype == mx.int32
    assert refused.item() == 0
    kept = 1 if mask is None else np.array(mask)
    np.testing.assert_allclose(np64(factors), factors64(want, c, mode) * kept, rtol=RTOL)
    sums = bw.clipped_sum(leaves, factors)
    for out, g in zip(sums, leaves, strict=True):
        assert_sum(out, g, factors)
    fused, found = bw.clip_and_sum(leaves, c, mode, mask)
    assert bits(found.sq_norms) == bits(norms)
    assert bits(found.factors) == bits(factors)
    assert found.num_refused.item() == 0
    assert [bits(a) for a in fused] == [bits(a) for a in sums]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(backend, dtype, size):
    assert_clipped([rand(sized(backend, (3, size)), dtype)])


@pytest.mark.parametrize("batch", [0, 1, 7, 64])
@pytest.mark.parametrize("mode", ["flat", "automatic"])
def test_batches(backend, batch, mode):
    mask = mx.array(np.arange(batch) % 3 != 1)
    assert_clipped([rand((batch, 31)), rand((batch, 4, 5, 3), mx.bfloat16, 1), rand((batch,), seed=2)], 2.0, mode, mask)


LAYOUTS = {
    "few columns, large batch": [(40001, 3)],
    "one column, large batch": [(100003,)],
    "columns just below the split": [(71, 65535)],
    "columns just above the split": [(71, 65536)],
    "rows larger than a group": [(3, 2100000)],
    "many tiny leaves": [(9, 1 + i % 7) for i in range(300)],
    "many leaves, long and short": [(3, n) for n in (3000, 1, 700, 0, 9001, 4, 330, 12288, 7, 5, 6, 31, 0)],
    "mixed": [(33, 5121), (33, 0), (33, 2, 3), (33, 10240)],
    "split batch, many leaves": [(2000, 17), (2000, 5, 41), (2000,)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    assert_clipped([rand(sized(backend, s), DTYPES[i % 3], i) for i, s in enumerate(LAYOUTS[layout])])


def test_transformations_of_many_leaves(backend):
    """So many that the sums come out of one flat array."""
    leaves = [rand((5, *([3] * (i % 3)), 1 + i % 4), seed=i) for i in range(60)]
    f, n = mx.abs(rand((5,), seed=1)), mx.array([[0, 0], [9999, 0]], mx.uint32)
    weights = [rand(g.shape[1:], seed=i) for i, g in enumerate(leaves)]

    def loss(leaves, f):
        return sum((a * w).sum() for a, w in zip(bw.clipped_sum(leaves, f), weights, strict=True))

    dg, df = mx.grad(loss, argnums=(0, 1))(leaves, f)
    for d, w in zip(dg, weights, strict=True):
        np.testing.assert_allclose(np64(d), np.multiply.outer(np64(f), np64(w)), rtol=1e-5)
    want = sum((np64(g) * np64(w)).reshape(5, -1).sum(1) for g, w in zip(leaves, weights, strict=True))
    np.testing.assert_allclose(np64(df), want, rtol=1e-4, atol=1e-4)
    stacked = [mx.stack([g, g + 1]) for g in leaves]
    for op in (
        lambda leaves, n: bw.clipped_sum(leaves, f, 2.0, KEY, n),
        lambda leaves, n: bw.clip_and_sum(leaves, 3.0, "automatic", f > 0.5, 2.0, KEY, n)[0],
    ):
        out = mx.vmap(op)(stacked, n)
        for i in range(2):
            for a, b in zip(out, op([g[i] for g in stacked], n[i]), strict=True):
                np.testing.assert_allclose(np64(a[i]), np64(b), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="counter must be batched under vmap"):
        mx.eval(mx.vmap(lambda leaves: bw.clipped_sum(leaves, f, 1.0, KEY, 0))(stacked))
    compiled = mx.compile(lambda leaves, f: bw.clipped_sum(leaves, f), shapeless=True)
    for batch in (5, 2, 4):
        sums = compiled([g[:batch] for g in leaves], f[:batch])
        for a, g in zip(sums, leaves, strict=True):
            assert_sum(a, g[:batch], f[:batch])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.0])
def test_equal_values_do_not_drift(backend, dtype, value):
    g = mx.full(sized(backend, (2, 1000003)), value, dtype)
    np.testing.assert_allclose(np64(bw.sample_sq_norms(g)), norms64([g]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_every_16_bit_value(backend, dtype):
    g = mx.array(np.arange(65536, dtype=np.uint16)).view(dtype)
    value = np64(g)
    if backend in ("metal", "metal-sim"):
        value[abs(value) < TINIEST] = 0
    got = np64(bw.clipped_sum(g[None], mx.ones((1,))))
    np.testing.assert_array_equal(got, value)  # also NaN and infinity: a factor that is not 0 hides nothing
    finite = np.isfinite(value) & (abs(value) < 1e18) & (abs(value) > 1e-18)
    np.testing.assert_allclose(np64(bw.sample_sq_norms(g[:, None]))[finite], value[finite] ** 2, rtol=1e-7)


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 3e38])
def test_refused_sample_leaves_the_others_bit_identical(backend, poison):
    leaves = [rand((7, 1031)), rand((7, 4, 3), mx.bfloat16, 1)]
    mask = mx.arange(7) != 3
    clean, _ = bw.clip_and_sum(leaves, 1.0, mask=mask)
    norms = bw.sample_sq_norms(leaves)
    others = mx.array([0, 1, 2, 4, 5, 6])
    for leaf in (0, 1):
        bad = list(leaves)
        bad[leaf] = mx.array(leaves[leaf])
        bad[leaf][3, 2] = poison
        sums, found = bw.clip_and_sum(bad, 1.0)
        assert found.num_refused.item() == 1
        assert found.factors[3].item() == 0
        assert bits(found.sq_norms[others]) == bits(norms[others])
        assert [bits(a) for a in sums] == [bits(a) for a in clean]
        assert [bits(a) for a in bw.clipped_sum(bad, found.factors)] == [bits(a) for a in clean]
        sums, masked = bw.clip_and_sum(bad, 1.0, mask=mask)
        assert masked.num_refused.item() == 0
        assert [bits(a) for a in sums] == [bits(a) for a in clean]


@pytest.mark.parametrize("mode", ["flat", "automatic"])
def test_factors(backend, mode):
    sq = mx.array([0.0, 1e-30, 0.25, 4.0, 1e30, -1.0, NAN, INF, -INF, 9.0, NAN])
    mask = mx.array([True] * 9 + [False] * 2)
    factors, refused = bw.clip_factors(sq, 1.5, mode, mask)
    want = factors64(np.maximum(np64(sq[:6]), 0), 1.5, mode)
    np.testing.assert_allclose(np64(factors), [*want, 0, 0, 0, 0, 0], rtol=1e-6)
    assert refused.item() == 3
    assert bits(bw.clip_factors(sq, mx.array(1.5), mode, mask).factors) == bits(factors)


def test_infinite_bound_recovers_the_plain_sum(backend):
    g = rand((6, 4, 33))
    sums, found = bw.clip_and_sum(g, INF)
    assert found.factors.tolist() == [1.0] * 6
    assert_sum(sums, g, mx.ones((6,)))
    assert bw.clip_factors(mx.array([0.0, 4.0, NAN]), mx.array(INF)).factors.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1e3, 1e15])
def test_huge_and_tiny_values(backend, scale):
    if backend in ("metal", "metal-sim"):
        scale = max(scale, 1e-16)  # smaller ones have squares below TINIEST
    g = rand((5, 999)) * scale
    np.testing.assert_allclose(np64(bw.sample_sq_norms(g)), norms64([g]), rtol=RTOL)
    sums, found = bw.clip_and_sum(g, scale)
    np.testing.assert_allclose(np64(found.factors), factors64(norms64([g]), scale), rtol=RTOL)
    assert_sum(sums, g, found.factors)


def test_overflowing_norm_is_refused(backend):
    g = mx.array([[3e19, 0.0], [1.0, 2.0]])
    sums, found = bw.clip_and_sum(g, 10.0)
    assert found.sq_norms.tolist() == [INF, 5.0]
    assert found.num_refused.item() == 1
    assert sums.tolist() == [1.0, 2.0]


def test_any_factor(backend):
    g, f = rand((5, 77)), mx.array([-2.0, 0.0, 1e20, 0.5, -0.0])
    assert_sum(bw.clipped_sum(g, f), g, f)
    assert np.isnan(np.array(bw.clipped_sum(g, mx.array([NAN, 1.0, 1.0, 1.0, 1.0])))).all()


def test_trees_keep_their_form(backend):
    a, b, c = rand((3, 4)), rand((3, 2, 5), mx.float16, 1), rand((3,), seed=2)
    tree = {"layers": [{"weight": a}, (b, c)], "empty": {}}
    sums, found = bw.clip_and_sum(tree, 1.0)
    again = bw.clipped_sum(tree, found.factors)
    for out in (sums, again):
        assert out.keys() == tree.keys()
        assert type(out["layers"][1]) is tuple
        assert_sum(out["layers"][0]["weight"], a, found.factors)
        assert_sum(out["layers"][1][0], b, found.factors)
        assert_sum(out["layers"][1][1], c, found.factors)
    assert isinstance(bw.clipped_sum(a, found.factors), mx.array)


VIEWS = {
    "transposed": lambda x: x.transpose(2, 0, 1),
    "strided": lambda x: x[::2, 1::2],
    "offset": lambda x: x[2:5],
    "broadcast": lambda x: mx.broadcast_to(x[:1], (5, 6, 4)),
    "reversed": lambda x: x[::-1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_non_contiguous(backend, view):
    v = VIEWS[view](rand((6, 6, 4)))
    assert_clipped([v, rand((v.shape[0], 3), seed=1)])
    f = mx.broadcast_to(mx.array(0.5), v.shape[:1])
    assert_sum(bw.clipped_sum(v, f), v, f)


def test_empty(backend):
    assert bw.sample_sq_norms([mx.zeros((0, 5)), mx.zeros((0, 2, 3))]).shape == (0,)
    assert bw.clipped_sum(mx.zeros((0, 5)), mx.zeros((0,))).tolist() == [0] * 5
    assert bw.sample_sq_norms(mx.zeros((3, 0))).tolist() == [0] * 3
    assert bw.clipped_sum(mx.zeros((3, 0)), mx.ones((3,))).shape == (0,)
    sums, found = bw.clip_and_sum([mx.zeros((0, 5)), mx.zeros((0, 0))], 1.0, mask=mx.zeros((0,), mx.bool_))
    assert sums[0].tolist() == [0] * 5
    assert sums[1].shape == (0,)
    assert found.num_refused.item() == 0
    assert mx.compile(lambda g: bw.clip_and_sum(g, 1.0))(mx.zeros((0, 5)))[0].tolist() == [0] * 5


def test_compile(backend):
    leaves, mask = [rand((5, 33)), rand((5, 4, 3), seed=1)], mx.arange(5) != 2

    def step(leaves, c, mask):
        factors, _ = bw.clip_factors(bw.sample_sq_norms(leaves), c, "flat", mask)
        return bw.clipped_sum(leaves, factors), *bw.clip_and_sum(leaves, c, "flat", mask)

    compiled = mx.compile(step)
    for c in (1.0, 3.0, INF):
        composed, fused, found = compiled(leaves, mx.array(c), mask)
        want = factors64(norms64(leaves), c) * np.array(mask)
        np.testing.assert_allclose(np64(found.factors), want, rtol=RTOL)
        for i, g in enumerate(leaves):
            assert_sum(composed[i], g, found.factors)
            assert_sum(fused[i], g, found.factors)
    twice = mx.compile(lambda g: bw.sample_sq_norms(g) + bw.sample_sq_norms(g))
    np.testing.assert_allclose(np64(twice(leaves[0])), 2 * norms64(leaves[:1]), rtol=1e-6)


def test_compile_tells_modes_and_masks_apart(backend):
    g, mask = rand((4, 9)), mx.array([True, False, True, True])
    runs = [("flat", None), ("automatic", None), ("flat", mask)]
    compiled = mx.compile(lambda g, c: [bw.clip_and_sum(g, c, mode, m)[0] for mode, m in runs])
    for out, (mode, m) in zip(compiled(g, mx.array(0.5)), runs, strict=True):
        kept = 1 if m is None else np.array(m)
        want = (factors64(norms64([g]), 0.5, mode) * kept) @ np64(g)
        np.testing.assert_allclose(np64(out), want, rtol=1e-5, atol=1e-6)


def test_shapeless_compile(backend):
    norms = mx.compile(lambda g: bw.sample_sq_norms([g]), shapeless=True)
    sums = mx.compile(bw.clipped_sum, shapeless=True)
    fused = mx.compile(lambda g: bw.clip_and_sum(g, 1.0)[0], shapeless=True)
    for batch in (3, 64, 5):
        g, f = rand((batch, 99)), mx.abs(rand((batch,), seed=1))
        np.testing.assert_allclose(np64(norms(g)), norms64([g]), rtol=1e-6)
        assert_sum(sums(g, f), g, f)
        assert_sum(fused(g), g, mx.array(factors64(norms64([g]), 1.0).astype(np.float32)))


def test_vmap_of_norms_or_of_the_mask_alone(backend):
    norms = mx.array([[0.25, 4.0, float("inf")], [9.0, float("nan"), 1.0]])
    masks = mx.array([[True, False, True], [False, True, True]])
    for f, batch in (
        (lambda n: bw.clip_factors(n, 1.0, mask=masks[0]), norms),
        (lambda m: bw.clip_factors(norms[1], 1.0, mask=m), masks),
    ):
        out, refused = mx.vmap(f)(batch)
        for i, each in enumerate(batch):
            assert out[i].tolist() == f(each).factors.tolist()
            assert refused[i].item() == f(each).num_refused.item()


def test_vmap(backend):
    x, f = rand((3, 4, 7)), mx.abs(rand((3, 4), seed=1))
    out = mx.vmap(bw.sample_sq_norms)(x)
    np.testing.assert_allclose(np64(out), (np64(x) ** 2).sum(2), rtol=1e-6)
    out = mx.vmap(bw.sample_sq_norms, in_axes=2)(x)
    np.testing.assert_allclose(np64(out), (np64(x) ** 2).sum(1).T, rtol=1e-6)
    out = mx.vmap(bw.clipped_sum, in_axes=(None, 0))(x[0], f)
    np.testing.assert_allclose(np64(out), np64(f) @ np64(x[0]), rtol=1e-5, atol=1e-6)
    out = mx.vmap(mx.vmap(bw.sample_sq_norms))(x[None])
    np.testing.assert_allclose(np64(out)[0], (np64(x) ** 2).sum(2), rtol=1e-6)
    out = mx.vmap(mx.compile(bw.clipped_sum))(x, f)
    np.testing.assert_allclose(np64(out), np.einsum("vb,vbp->vp", np64(f), np64(x)), rtol=1e-5, atol=1e-6)
    sums, found = mx.vmap(lambda g, c: bw.clip_and_sum(g, c, "automatic"))(x, mx.array([1.0, 2.0, 3.0]))
    for i in range(3):
        want = factors64(norms64([x[i]]), i + 1.0, "automatic")
        np.testing.assert_allclose(np64(found.factors[i]), want, rtol=1e-6)
        np.testing.assert_allclose(np64(sums[i]), want @ np64(x[i]), rtol=1e-5, atol=1e-6)


def test_grad(backend):
    g, f, w = rand((4, 7)), mx.abs(rand((4,), seed=1)), rand((7,), seed=2)
    dg, df = mx.grad(lambda g, f: (bw.clipped_sum(g, f) * w).sum(), argnums=(0, 1))(g, f)
    np.testing.assert_allclose(np64(dg), np.outer(np64(f), np64(w)), rtol=1e-5)
    np.testing.assert_allclose(np64(df), np64(g) @ np64(w), rtol=1e-5, atol=1e-5)
    d = mx.grad(lambda g: bw.sample_sq_norms([g, g]).sum())(g)
    np.testing.assert_allclose(np64(d), 4 * np64(g), rtol=1e-6)
    dd = mx.grad(lambda g: mx.grad(lambda g: bw.sample_sq_norms(g).sum())(g).sum())(g)
    np.testing.assert_allclose(np64(dd), np.full((4, 7), 2.0), rtol=1e-6)
    _, (t,) = mx.jvp(bw.sample_sq_norms, [g], [mx.ones_like(g)])
    np.testing.assert_allclose(np64(t), 2 * np64(g).sum(1), rtol=1e-4, atol=1e-5)
    for h in (
        mx.compile(mx.grad(lambda g: (bw.clipped_sum(g, f) * w).sum())),
        mx.grad(mx.compile(lambda g: (bw.clipped_sum(g * 1.0, f) * w).sum())),
    ):
        np.testing.assert_allclose(np64(h(g)), np.outer(np64(f), np64(w)), rtol=1e-5)


def test_grad_of_large_leaves(backend):
    g = rand((2, 3001))
    d = mx.grad(lambda g: (bw.sample_sq_norms(g) * mx.array([1.0, -3.0])).sum())(g)
    np.testing.assert_allclose(np64(d), np64(g) * [[2.0], [-6.0]], rtol=1e-6)
    f, w = rand((3001,)), mx.array([1.0, -3.0])
    d = mx.grad(lambda g: (bw.clipped_sum(g, f) * w).sum())(g.T)
    np.testing.assert_allclose(np64(d), np.outer(np64(f), np64(w)), rtol=1e-6)


def test_grad_through_the_clip(backend):
    g, w, h = rand((3, 5)), rand((5,), seed=1), 1e-4

    def loss64(g):
        return (factors64((g**2).sum(1), 1.0, "automatic") @ g) @ np64(w)

    want = np.zeros((3, 5))
    for i in np.ndindex(3, 5):
        step = np.zeros((3, 5))
        step[i] = h
        want[i] = (loss64(np64(g) + step) - loss64(np64(g) - step)) / (2 * h)
    got = mx.grad(lambda g: (bw.clip_and_sum(g, 1.0, "automatic")[0] * w).sum())(g)
    np.testing.assert_allclose(np64(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("c", "mode"), [(INF, "flat"), (1.0, "flat"), (0.5, "automatic")])
def test_grad_through_the_clip_of_small_gradients(backend, c, mode):
    g, w = mx.array([[0.0, 0.0], [0.3, -0.4]]), mx.array([2.0, 3.0])
    got = np64(mx.grad(lambda g: (bw.clip_and_sum(g, c, mode)[0] * w).sum())(g))
    np.testing.assert_allclose(got[0], np64(w) * (50 if mode == "automatic" else 1), rtol=1e-5)
    if mode == "flat":
        np.testing.assert_allclose(got[1], np64(w), rtol=1e-6)
    assert np.isfinite(got).all()


def test_bound_that_is_not_a_number_is_loud(backend):
    assert np.isnan(np.array(bw.clip_factors(mx.array([0.0, 4.0]), mx.array(NAN)).factors)).all()
    assert np.isnan(np.array(bw.clip_and_sum(mx.ones((2, 3)), mx.array(NAN))[0])).all()


def test_nan_reaches_no_derivative(backend):
    g = mx.array([[1.0, 2.0], [NAN, INF]])
    dg, df = mx.grad(lambda g, f: bw.clipped_sum(g, f).sum(), argnums=(0, 1))(g, mx.array([0.5, 0.0]))
    assert dg.tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert df.tolist() == [3.0, 0.0]


def test_streams(backend):
    s = mx.new_stream(mx.cpu)
    x = rand((5, 9))
    norms = bw.sample_sq_norms(x, stream=s)
    np.testing.assert_allclose(np64(norms + bw.sample_sq_norms(x, stream=mx.cpu)), 2 * norms64([x]), rtol=1e-6)
    factors = bw.clip_factors(norms, 1.0, stream=s).factors
    with mx.stream(s):
        sums, found = bw.clip_and_sum(x, 1.0)
    assert bits(found.factors) == bits(factors)
    assert_sum(sums, x, factors)
    assert_sum(bw.clipped_sum(x, factors, stream=s), x, factors)


def noisy_leaves():
    return [
        rand((5, 5121)),
        rand((5, 0), seed=1),
        rand((5, 3, 2), mx.float16, 2),
        rand((5,), seed=3),
        rand((5, 641), seed=4),
    ]


@pytest.mark.parametrize("sigma", [0.0, 1e-3, 2.5])
@pytest.mark.parametrize("shapes", [None, [(0, 1000), (0, 3)], [(3000, 7), (3000, 330)], [(70, 70001)]])
def test_noise_is_that_of_add_gaussian(backend, sigma, shapes):
    leaves = [rand(sized(backend, s), seed=i) for i, s in enumerate(shapes)] if shapes else noisy_leaves()
    counter = mx.array([2**32 - 40, 5], mx.uint32)  # the low word overflows on the way
    plain, found = bw.clip_and_sum(leaves, 1.0)
    want = [bits(a) for a in bw.add_gaussian(plain, sigma, KEY, counter)]
    assert [bits(a) for a in bw.clipped_sum(leaves, found.factors, sigma, KEY, counter)] == want
    fused, again = bw.clip_and_sum(leaves, 1.0, sigma=mx.array(sigma), key=KEY, counter=2**32 - 40 + (5 << 32))
    assert [bits(a) for a in fused] == want
    assert [bits(a) for a in again] == [bits(a) for a in found]
    assert sigma == 0 or bits(fused[0]) != bits(plain[0])


def test_noise_of_zero_gradients(backend):
    """Mean and standard deviation within 5 standard errors: false alarm in 1 of 1e6 runs, were the key not fixed."""
    n = 200000
    sums, found = bw.clip_and_sum(mx.zeros((4, n)), 1.0, sigma=3.0, key=KEY, counter=0)
    assert found.factors.tolist() == [1.0] * 4
    z = np64(sums) / 3
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs(z.std() - 1) < 5 / np.sqrt(2 * n)


def test_compiled_noise_takes_key_counter_and_sigma_as_inputs(backend):
    g, f = mx.zeros((3, 300)), mx.ones((3,))
    step = mx.compile(
        lambda g, s, k, n: (bw.clipped_sum(g, f, s, k, n), bw.clip_and_sum(g, 1.0, "flat", None, s, k, n)[0])
    )
    counters = [mx.array([n, 0], mx.uint32) for n in (0, 32, 0)]
    first, second, again = (step(g, mx.array(2.0), KEY, n) for n in counters)
    assert (np.array(first[0]) != np.array(second[0])).all()
    for a, b, n in ((first, again, 0), (second, second, 32)):
        want = np64(bw.gaussian((300,), 2.0, KEY, n))
        for x in (*a, *b):
            np.testing.assert_allclose(np64(x), want, rtol=1e-6)
    other = step(g, mx.array(2.0), bw.key_from_seed(8), counters[0])
    assert (np.array(first[0]) != np.array(other[0])).all()


def test_vmap_never_repeats_noise(backend):
    x, f, n = rand((2, 4, 90)), mx.ones((4,)), mx.array([[0, 0], [32, 0]], mx.uint32)
    for op in (
        lambda g, n: bw.clipped_sum(g, f, 1.0, KEY, n),
        lambda g, n: bw.clip_and_sum(g, INF, "flat", None, 1.0, KEY, n)[0],
    ):
        with pytest.raises(ValueError, match="counter must be batched under vmap"):
            mx.eval(mx.vmap(lambda g, op=op: op(g, n[0]))(x))
        out = mx.vmap(op)(x, n)
        for i in range(2):
            np.testing.assert_allclose(np64(out[i]), np64(op(x[i], n[i])), rtol=1e-5, atol=1e-5)
        dg = mx.vmap(mx.grad(lambda g, n, op=op: op(g, n).sum()))(x, n)
        np.testing.assert_allclose(np64(dg), 1, rtol=1e-5)


def test_grad_through_the_noise(backend):
    g, f = rand((4, 7)), mx.abs(rand((4,), seed=1))
    dg, ds = mx.grad(lambda g, s: bw.clipped_sum(g, f, s, KEY, 3).sum(), argnums=(0, 1))(g, mx.array(2.0))
    np.testing.assert_allclose(np64(dg), np.outer(np64(f), np.ones(7)), rtol=1e-5)
    np.testing.assert_allclose(np64(ds), np64(bw.gaussian((7,), 1.0, KEY, 3)).sum(), rtol=1e-5)


def test_bad_noise(backend):
    g, f = mx.zeros((2, 3)), mx.ones((2,))
    for noise, says in [
        ((1.0,), r"\[clipped_sum\] sigma, key and counter must be given together but key and counter is None"),
        ((1.0, KEY), "but counter is None"),
        ((None, KEY, 0), "but sigma is None"),
        ((-1.0, KEY, 0), r"\[clipped_sum\] sigma must be"),
        ((NAN, KEY, 0), "sigma must be"),
        ((1.0, mx.zeros((4,), mx.uint32), 0), "key must be"),
        ((1.0, KEY, -1), "counter must"),
        ((1.0, KEY, 2**64 - 31), "counter must"),
    ]:
        with pytest.raises(ValueError, match=says):
            bw.clipped_sum(g, f, *noise)
        with pytest.raises(ValueError, match=says.replace("clipped_sum", "clip_and_sum")):
            bw.clip_and_sum(g, 1.0, "flat", None, *noise)
    assert np.isnan(np.array(bw.clipped_sum(g, f, mx.array(-1.0), KEY, 0))).all()


def everything():
    mixed = [rand((37, 70001)), rand((37, 100), mx.float16, 1), rand((37,), mx.bfloat16, 2)]
    for leaves in (mixed, [rand((5003, 7), seed=3)], [rand((70, 3), seed=i) for i in range(200)]):
        sums, found = bw.clip_and_sum(leaves, 1.0)
        yield from (*sums, found.sq_norms, found.factors)
        yield from bw.clip_and_sum(leaves, 1.0, sigma=1.0, key=KEY, counter=0)[0]
        yield from bw.clipped_sum(leaves, found.factors)
        yield bw.sample_sq_norms(leaves)


def test_threads_do_not_change_bits():
    _native.use("native")
    got = []
    try:
        for n in (1, 2, 3, 7):
            _native.ext.set_num_threads(n)
            got.append([bits(x) for x in everything()])
    finally:
        _native.ext.set_num_threads(os.cpu_count())
        _native.use_from_environment()
    assert all(g == got[0] for g in got)


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_instruction_sets(isa):
    """Sizes, layouts and values again, in a process that is held to one instruction set."""
    tests = "test_sizes or test_layouts or test_every or test_equal or test_refused or test_threads"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests],
        env={**os.environ, "BULWARK_ISA": isa, "BULWARK_TEST_BACKENDS": "native"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


shapes = st.lists(st.lists(st.integers(0, 40), max_size=2), min_size=1, max_size=4)
property_test = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("mode", ["flat", "automatic"])
@property_test
@given(
    shapes=shapes, batch=st.integers(0, 9), seed=st.integers(0, 99), c=st.floats(1e-3, 1e3), scale=st.floats(1e-6, 1e6)
)
def test_clipped_contribution_is_bounded(backend, mode, shapes, batch, seed, c, scale):
    leaves = [rand((batch, *s), seed=seed + i) * scale for i, s in enumerate(shapes)]
    _, found = bw.clip_and_sum(leaves, c, mode)
    for b in range(batch):
        alone = bw.clipped_sum([g[b : b + 1] for g in leaves], found.factors[b : b + 1])
        assert np.sqrt(sum((np64(x) ** 2).sum() for x in alone)) <= c * (1 + 1e-6)


@property_test
@given(shapes=shapes, batch=st.integers(0, 9), seed=st.integers(0, 99), power=st.integers(-20, 20))
def test_homogeneity(backend, shapes, batch, seed, power):
    """Scaling by a power of two is exact."""
    leaves, k = [rand((batch, *s), seed=seed + i) for i, s in enumerate(shapes)], 2.0**power
    norms, factors = bw.sample_sq_norms(leaves), mx.abs(rand((batch,), seed=seed))
    assert bits(bw.sample_sq_norms([g * k for g in leaves])) == bits(norms * k**2)
    for a, b in zip(bw.clipped_sum(leaves, factors * k), bw.clipped_sum(leaves, factors), strict=True):
        assert bits(a) == bits(b * k)


@property_test
@given(shapes=shapes, order=st.permutations(range(8)), seed=st.integers(0, 99))
def test_permutation_of_samples(backend, shapes, order, seed):
    leaves, order = [rand((8, *s), seed=seed + i) for i, s in enumerate(shapes)], mx.array(order)
    _, found = bw.clip_and_sum(leaves, 1.0)
    sums, moved = bw.clip_and_sum([g[order] for g in leaves], 1.0)
    assert bits(moved.sq_norms) == bits(found.sq_norms[order])
    assert bits(moved.factors) == bits(found.factors[order])
    for a, g in zip(sums, leaves, strict=True):
        assert_sum(a, g, found.factors)


OPS = [bw.sample_sq_norms, lambda g: bw.clipped_sum(g, mx.ones((2,))), lambda g: bw.clip_and_sum(g, 1.0)]


@pytest.mark.parametrize("op", OPS)
def test_bad_trees(backend, op):
    for grads, says in [
        ([], "grads must hold at least one array but has none"),
        ({"a": mx.zeros((2, 3)), "b": mx.zeros((3, 3))}, r"grads.b must have shape \[2, ...\] but has shape \[3, 3\]"),
        (mx.array(1.0), r"grads must have shape \[B, ...\] but has shape \[\]"),
        (mx.zeros((2, 3), mx.int32), "grads must be float32, float16 or bfloat16 but has dtype mlx.core.int32"),
        ([[1.0]], "grads.0.0 must be an array but is float"),
    ]:
        with pytest.raises(ValueError, match=r"^\[\w+\] " + says):
            op(grads)


def test_bad_arguments(backend):
    g, n = mx.zeros((2, 3)), mx.zeros((2,))
    for call, says in [
        (lambda: bw.clipped_sum(g, mx.ones((3,))), r"\[clipped_sum\] factors must have shape \[2\] and dtype float32"),
        (lambda: bw.clipped_sum(g, mx.ones((2,), mx.int32)), "dtype float32 but has shape .* and dtype mlx.core.int32"),
        (lambda: bw.clip_factors(g, 1.0), r"\[clip_factors\] sq_norms must have shape \[B\] but has shape \[2, 3\]"),
        (lambda: bw.clip_factors(n, 0.0), "max_grad_norm must be positive but is 0.0"),
        (lambda: bw.clip_factors(n, NAN), "must be positive but is nan"),
        (lambda: bw.clip_factors(n, INF, "automatic"), "must be positive and finite but is inf"),
        (lambda: bw.clip_and_sum(g, -1.0), r"\[clip_and_sum\] max_grad_norm must be positive"),
        (lambda: bw.clip_and_sum(g, mx.ones((2,))), r"must be a scalar but has shape \[2\]"),
        (lambda: bw.clip_and_sum(g, 1.0, "ghost"), "mode must be one of flat, automatic but is 'ghost'"),
        (lambda: bw.clip_and_sum(g, 1.0, mask=mx.ones((2,))), r"mask must have shape \[2\] and dtype bool but has"),
        (lambda: bw.clip_factors(n, 1.0, mask=mx.ones((3,), mx.bool_)), r"mask must have shape \[2\]"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_long_sums_of_the_reference():
    x = mx.full((3, 250001), 1 / 3)
    np.testing.assert_allclose(np64(clip._row_sums(x)), np64(x).sum(1), rtol=1e-6)
    np.testing.assert_allclose(np64(clip._sum_of_rows(x.T)), np64(x).sum(1), rtol=RTOL)
