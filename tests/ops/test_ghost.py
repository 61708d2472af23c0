import itertools
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark import _native

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
METHODS = ["auto", "gram", "direct"]
NAN, INF = float("nan"), float("inf")
# Sizes that take the simulator seconds, and what it runs in their place.
SIMULATED = {1030: 161, 330: 97, 70: 34, 27: 13, 25: 11}


def rand(shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def np64(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def bits(x):
    x = np.array(x)
    return x.shape, x.tobytes()


def lists(a):
    return a if isinstance(a, list) else [a]


def rows64(a):
    a = np64(a)
    return a.reshape(a.shape[0], int(np.prod(a.shape[1:-1])), a.shape[-1])


def linear64(x, dy, mask=None):
    """Every sample's gradients of weight and bias, one row after another, in float64."""
    xs, dys = [rows64(a) for a in lists(x)], [rows64(a) for a in lists(dy)]
    masks = (
        [np.array(m).reshape(len(m), u.shape[1]) for m, u in zip(lists(mask), xs, strict=True)]
        if mask is not None
        else None
    )
    B, d, p = xs[0].shape[0], xs[0].shape[2], dys[0].shape[2]
    weight, bias = np.zeros((B, p, d)), np.zeros((B, p))
    for i, (u, g) in enumerate(zip(xs, dys, strict=True)):
        for b, t in itertools.product(range(B), range(u.shape[1])):
            if masks is None or masks[i][b, t]:
                weight[b] += np.outer(g[b, t], u[b, t])
                bias[b] += g[b, t]
    return weight, bias


def by_unit64(grads, segments, units):
    if segments is None:
        return grads
    out = np.zeros((units, *grads.shape[1:]))
    for b, s in enumerate(np.array(segments)):
        if 0 <= s < units:
            out[s] += grads[b]
    return out


def squares(*grads):
    return sum(np.square(g).sum(tuple(range(1, g.ndim))) for g in grads)


def assert_linear(x, dy, rtol=2e-5, mask=None, segments=None, units=None):
    """All three ops against float64."""
    given = {"mask": mask, "segments": segments, "num_segments": units}
    weight, bias = linear64(x, dy, mask)
    f = np.random.default_rng(5).standard_normal(len(weight)).astype(np.float32)
    unit_weight, unit_bias = (by_unit64(g, segments, units or len(g)) for g in (weight, bias))
    for method in METHODS:
        for with_bias, want in ((False, squares(unit_weight)), (True, squares(unit_weight, unit_bias))):
            got = bw.linear_sq_norms(x, dy, bias=with_bias, method=method, **given)
            assert got.dtype == mx.float32
            # a Gram sum is as exact as its terms, whose sum of magnitudes bounds the sum
            np.testing.assert_allclose(np64(got), want, rtol=rtol, atol=rtol * want.max(initial=0.0))
    scale = max(1e-30, abs(unit_weight).max(initial=0.0))
    got = bw.linear_sample_grads(x, dy, bias=True, **given)
    np.testing.assert_allclose(np64(got.weight), unit_weight, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(
        np64(got.bias), unit_bias, rtol=rtol, atol=rtol * max(1e-30, abs(unit_bias).max(initial=0))
    )
    assert bw.linear_sample_grads(x, dy, **given).bias is None
    got = bw.linear_clipped_sum(x, dy, mx.array(f), bias=True, mask=mask)
    want = np.tensordot(f.astype(np.float64), weight, 1)
    np.testing.assert_allclose(np64(got.weight), want, rtol=rtol, atol=3 * rtol * len(f) * scale)
    want = f.astype(np.float64) @ bias
    np.testing.assert_allclose(
        np64(got.bias), want, rtol=rtol, atol=3 * rtol * len(f) * max(1, abs(bias).max(initial=0))
    )


# Rows, d and p around the sizes at which tiles end.
SHAPES = [
    (3, (), 5, 4),
    (3, (1,), 31, 33),
    (2, (7,), 1, 1),
    (4, (31,), 33, 3),
    (2, (64,), 16, 40),
    (2, (65,), 17, 9),
    (1, (129, 3), 5, 6),
    (2, (330,), 20, 8),
    (2, (3,), 600, 300),
    (1, (1030,), 3, 2),
    (0, (4,), 3, 2),
    (3, (0,), 3, 2),
    (3, (4,), 0, 2),
    (3, (4,), 2, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(backend, shape, dtype):
    B, T, d, p = shape
    T = tuple(SIMULATED.get(t, t) for t in T) if backend == "metal-sim" else T
    assert_linear(rand((B, *T, d), dtype), rand((B, *T, p), dtype, 1))


def test_linear_of_mixed_types(backend):
    assert_linear(rand((3, 7, 5), mx.float16), rand((3, 7, 4), mx.float32, 1))
    assert_linear(rand((3, 7, 5)), rand((3, 7, 4), mx.bfloat16, 1))


def test_layouts(backend):
    x, dy = rand((5, 7, 3)), rand((4, 7, 3), seed=1)
    assert_linear(x.transpose(2, 1, 0), dy.transpose(2, 1, 0))
    assert_linear(rand((3, 14, 5))[:, ::2], rand((3, 7, 9), seed=1)[..., 2:6])
    assert_linear(mx.broadcast_to(rand((1, 7, 5)), (3, 7, 5)), rand((3, 7, 4), seed=1))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_calls_are_joined(backend, dtype):
    lengths = (70, 1, 9)
    x = [rand((3, t, 6), dtype, i) for i, t in enumerate(lengths)]
    dy = [rand((3, t, 4), dtype, 10 + i) for i, t in enumerate(lengths)]
    assert_linear(x, dy)
    joined = mx.concatenate(x, axis=1), mx.concatenate(dy, axis=1)
    np.testing.assert_allclose(np64(bw.linear_sq_norms(x, dy)), np64(bw.linear_sq_norms(*joined)), rtol=1e-5)


MASKS = {
    "prefix": lambda b, t: np.arange(t) < 1 + 3 * b,
    "scattered": lambda b, t: np.arange(t) % (b + 2) != 0,
    "none": lambda b, t: np.zeros(t, bool),
    "all": lambda b, t: np.ones(t, bool),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks(backend, kind):
    mask = np.stack([MASKS[kind](b, 20) for b in range(4)])
    x, dy = np.array(rand((4, 20, 5))), np.array(rand((4, 20, 3), seed=1))
    x[~mask], dy[~mask] = NAN, INF  # whatever they hold
    assert_linear(mx.array(x), mx.array(dy), mask=mx.array(mask))


SEGMENTS = {
    "pairs": ([0, 0, 1, 1, 2, 2, 3, 3], 4),
    "unsorted": ([2, 0, 2, 1, 0, 2, 2, 1], 3),
    "one": ([0] * 8, 1),
    "left out": ([0, -1, 1, 7, 0, 2**31 - 1, -(2**31), 1], 3),  # and one unit is empty
    "by default as many as samples": ([5, 5, 0, 1, 5, 7, 6, 6], None),
}


@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize("kind", SEGMENTS)
def test_segments(backend, kind, rows):
    ids, units = SEGMENTS[kind]
    x, dy = rand((8, rows, 6)), rand((8, rows, 5), seed=1)
    assert_linear(x, dy, segments=mx.array(ids), units=units)
    mask = mx.array(np.random.default_rng(2).random((8, rows)) < 0.6)
    assert_linear([x, x[:, :1]], [dy, dy[:, :1]], mask=[mask, mask[:, :1]], segments=mx.array(ids), units=units)


def test_cross_terms_between_rows_count(backend):
    x, dy = mx.ones((2, 1, 3)), mx.ones((2, 1, 2))
    both = mx.array([0, 0])
    assert bw.linear_sq_norms(x, dy).tolist() == [6, 6]
    assert bw.linear_sq_norms(x, dy, segments=both, num_segments=1).tolist() == [24]
    opposite = mx.array([1.0, -1.0]).reshape(2, 1, 1)
    assert bw.linear_sq_norms(x, dy * opposite, segments=both, num_segments=1).tolist() == [0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_bad_values_stay_in_their_sample(backend, method, value):
    for where in ("x", "dy"):
        for rows in (1, 70):
            x, dy = np.array(rand((4, rows, 5))), np.array(rand((4, rows, 3), seed=1))
            good = np64(bw.linear_sq_norms(mx.array(x), mx.array(dy), method=method))
            (x if where == "x" else dy)[2, -1, 1] = value
            got = np64(bw.linear_sq_norms(mx.array(x), mx.array(dy), method=method))
            assert not np.isfinite(got[2])
            np.testing.assert_array_equal(np.delete(got, 2), np.delete(good, 2))
            got = np64(bw.linear_sq_norms(mx.array(x), mx.array(dy), segments=mx.array([0, 0, 1, 2]), method=method))
            assert np.isfinite(got).tolist() == [True, False, True, True]
            f = mx.array([0.5, 1.0, 0.0, 2.0])
            assert np.isfinite(np64(bw.linear_clipped_sum(mx.array(x), mx.array(dy), f).weight)).all()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_large_and_small_values(backend, scale):
    x, dy = rand((3, 9, 5)) * scale, rand((3, 9, 4), seed=1) / scale
    want = squares(linear64(x, dy)[0])
    for method in METHODS:
        np.testing.assert_allclose(np64(bw.linear_sq_norms(x, dy, method=method)), want, rtol=1e-4)
    overflown = bw.linear_sq_norms(rand((1, 2, 3)) * 1e15, rand((1, 2, 3)) * 1e15)
    assert overflown.item() == INF


def test_gradients_that_cancel_are_not_negative(backend):
    x = mx.concatenate([rand((2, 40, 8)), rand((2, 40, 8))], axis=1)
    dy = mx.concatenate([rand((2, 40, 8), seed=1), -rand((2, 40, 8), seed=1)], axis=1)
    norms = np64(bw.linear_sq_norms(x, dy, method="gram"))
    assert (norms >= 0).all()
    np.testing.assert_allclose(norms, 0, atol=1e-2)


CONVOLUTIONS = {
    "1d": ((9, 4), 5, 3, {}),
    "1d strided": ((11, 4), 5, 3, {"stride": 2, "padding": 1}),
    "1d dilated": ((11, 2), 3, 3, {"dilation": 2, "padding": 3}),
    "2d": ((7, 6, 3), 4, 3, {"padding": 1}),
    "2d all": ((9, 8, 4), 6, (3, 2), {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)}),
    "2d groups": ((6, 5, 4), 6, 3, {"groups": 2, "padding": 1}),
    "2d depthwise": ((6, 5, 4), 8, 3, {"groups": 4, "stride": 2}),
    "2d wide": ((5, 5, 70), 20, 3, {"padding": 2}),
    "2d one position": ((5, 5, 3), 4, 5, {}),
    "2d many positions": ((27, 25, 2), 3, 2, {}),
    "3d": ((4, 5, 3, 2), 3, (2, 3, 2), {"padding": (1, 0, 1), "stride": (1, 2, 1)}),
    "3d dilated groups": ((5, 5, 5, 4), 4, 2, {"groups": 2, "dilation": (1, 2, 3), "padding": 1}),
}
FORWARD = {1: mx.conv1d, 2: mx.conv2d, 3: mx.conv3d}
TRANSPOSED = {1: mx.conv_transpose1d, 2: mx.conv_transpose2d, 3: mx.conv_transpose3d}


def convolution64(x, dy, shape, options):
    """Every sample's gradient, one position and kernel offset after another, in float64."""
    x, dy = np64(x), np64(dy)
    axes = x.ndim - 2
    options = {k: (v,) * axes if isinstance(v, int) and k != "groups" else v for k, v in options.items()}
    stride, padding, dilation = (
        options.get(k, (d,) * axes) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    groups = options.get("groups", 1)
    grads = np.zeros((len(x), *shape))
    p, c = shape[0] // groups, shape[-1]
    for at in np.ndindex(dy.shape[1:-1]):
        for k in np.ndindex(shape[1:-1]):
            i = tuple(a * s - q + o * d for a, s, q, o, d in zip(at, stride, padding, k, dilation, strict=True))
            if not all(0 <= j < n for j, n in zip(i, x.shape[1:-1], strict=True)):
                continue
            for g in range(groups):
                out, inn = slice(g * p, (g + 1) * p), slice(g * c, (g + 1) * c)
                u, e = x[(slice(None), *i, inn)], dy[(slice(None), *at, out)]
                grads[(slice(None), out, *k)] += e[:, :, None] * u[:, None]
    return grads


def assert_convolution(x, dy, kernel, options, want, bias, segments=None, transposed=False):
    given = {**options, "transposed": transposed, "segments": segments}
    units = by_unit64(want, segments, len(want)), by_unit64(bias, segments, len(bias))
    for method in METHODS:
        got = bw.conv_sq_norms(x, dy, kernel, method=method, **given)
        np.testing.assert_allclose(np64(got), squares(units[0]), rtol=1e-4)
        got = bw.conv_sq_norms(x, dy, kernel, method=method, bias=True, **given)
        np.testing.assert_allclose(np64(got), squares(*units), rtol=1e-4)
    got = bw.conv_sample_grads(x, dy, kernel, bias=True, **given)
    np.testing.assert_allclose(np64(got.weight), units[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np64(got.bias), units[1], rtol=1e-4, atol=1e-4)
    f = np.random.default_rng(3).standard_normal(len(want)).astype(np.float32)
    got = bw.conv_clipped_sum(x, dy, mx.array(f), kernel, bias=True, transposed=transposed, **options)
    np.testing.assert_allclose(np64(got.weight), np.tensordot(f, want, 1), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(np64(got.bias), np.tensordot(f, bias, 1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("segments", [None, [1, 0, 1]])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(backend, name, segments):
    shape, p, kernel, options = CONVOLUTIONS[name]
    shape = tuple(SIMULATED.get(n, n) for n in shape) if backend == "metal-sim" else shape
    axes = len(shape) - 1
    sizes = (kernel,) * axes if isinstance(kernel, int) else kernel
    x = rand((3, *shape))
    weight = rand((p, *sizes, shape[-1] // options.get("groups", 1)))
    # MLX has 3D convolutions without groups only: shapes come from the formula
    each = (
        (v,) * axes if isinstance(v, int) else v
        for v in (options.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
    )
    out = [(n + 2 * q - e * (k - 1) - 1) // s + 1 for n, k, s, q, e in zip(shape[:-1], sizes, *each, strict=True)]
    dy = rand((3, *out, p), seed=1)
    want = convolution64(x, dy, weight.shape, options)
    bias = np64(dy).reshape(3, -1, p).sum(1)
    assert_convolution(x, dy, kernel, options, want, bias, None if segments is None else mx.array(segments))
    if segments is None and not (axes == 3 and "groups" in options):  # and MLX agrees

        def loss(w):
            return (FORWARD[axes](x, w, **options) * dy).sum()

        np.testing.assert_allclose(np64(mx.grad(loss)(weight)), want.sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["1d", "1d strided", "2d", "2d all", "3d"])
def test_transposed_convolutions(backend, name):
    shape, p, kernel, options = CONVOLUTIONS[name]
    axes = len(shape) - 1
    sizes = (kernel,) * axes if isinstance(kernel, int) else kernel
    x, weight = rand((3, *shape)), rand((p, *sizes, shape[-1]))

    def f(w, x):
        return TRANSPOSED[axes](x, w, **options)

    dy = rand(f(weight, x).shape, seed=1)
    want = np.stack(
        [np64(mx.grad(lambda w, b=b: (f(w, x[b : b + 1]) * dy[b : b + 1]).sum())(weight)) for b in range(3)]
    )
    assert_convolution(x, dy, kernel, options, want, np64(dy).reshape(3, -1, p).sum(1), transposed=True)


def test_transposed_convolution_with_groups(backend):
    x, weight = rand((3, 6, 4)), rand((6, 3, 2))

    def f(w, x):
        return mx.conv_transpose1d(x, w, stride=2, padding=1, groups=2)

    dy = rand(f(weight, x).shape, seed=1)
    # the two groups one beside the other, since MLX has no gradient of grouped transposed convolutions
    want = np.zeros((3, 6, 3, 2))
    for b, g in itertools.product(range(3), range(2)):
        one = slice(b, b + 1)

        def loss(w, one=one, g=g):
            y = mx.conv_transpose1d(x[one, :, 2 * g : 2 * g + 2], w, stride=2, padding=1)
            return (y * dy[one, :, 3 * g : 3 * g + 3]).sum()

        want[b, 3 * g : 3 * g + 3] = np64(mx.grad(loss)(weight[3 * g : 3 * g + 3]))
    options = {"stride": 2, "padding": 1, "groups": 2}
    assert_convolution(x, dy, 3, options, want, np64(dy).sum(1), transposed=True)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_convolutions_in_half_precision(backend, dtype):
    x, dy = rand((3, 6, 5, 4), dtype), rand((3, 6, 5, 3), dtype, 1)
    want = convolution64(x, dy, (3, 3, 3, 4), {"padding": 1})
    assert_convolution(x, dy, 3, {"padding": 1}, want, np64(dy).reshape(3, -1, 3).sum(1))


def test_convolution_called_twice(backend):
    x, dy = [rand((2, 6, 3)), rand((2, 9, 3), seed=1)], [rand((2, 6, 4), seed=2), rand((2, 9, 4), seed=3)]
    want = sum(convolution64(a, d, (4, 3, 3), {"padding": 1}) for a, d in zip(x, dy, strict=True))
    bias = sum(np64(d).sum(1) for d in dy)
    assert_convolution(x, dy, 3, {"padding": 1}, want, bias)


def embedding64(tokens, dy, vocabulary, mask=None):
    grads = np.zeros((len(lists(tokens)[0]), vocabulary, lists(dy)[0].shape[-1]))
    for i, (t, d) in enumerate(zip(lists(tokens), lists(dy), strict=True)):
        t, d = np.array(t), np64(d)
        for at in np.ndindex(t.shape):
            if t[at] >= 0 and (mask is None or np.array(lists(mask)[i])[at]):
                grads[at[0], t[at]] += d[at]
    return grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 7, 5), (2, 3, 4, 6), (4, 1, 1), (2, 300, 3), (2, 9, 1100), (0, 4, 3), (3, 0, 3), (3, 4)]
)
def test_embedding(backend, shape, dtype):
    tokens = mx.array(np.random.default_rng(0).integers(0, 11, shape[:-1]))
    dy = rand(shape, dtype)
    want = embedding64(tokens, dy, 11)
    np.testing.assert_allclose(np64(bw.embedding_sq_norms(tokens, dy)), squares(want), rtol=2e-5)
    f = rand((shape[0],), seed=3)
    got = bw.embedding_clipped_sum(tokens, dy, f, 11)
    np.testing.assert_allclose(np64(got), np.tensordot(np64(f), want, 1), rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("kind", SEGMENTS)
def test_embedding_of_units(backend, kind):
    ids, units = SEGMENTS[kind]
    rng = np.random.default_rng(0)
    tokens = [mx.array(rng.integers(-1, 5, (8, 6))), mx.array(rng.integers(0, 5, (8,)))]
    dy = [rand((8, 6, 3)), rand((8, 3), seed=1)]
    mask = [mx.array(rng.random((8, 6)) < 0.7), mx.array(rng.random(8) < 0.7)]
    for use, pad in ((None, None), (mask, 2)):
        kept = [np.ones(t.shape, bool) if use is None else np.array(m) for t, m in zip(tokens, mask, strict=True)]
        kept = [k & (np.array(t) != (-7 if pad is None else pad)) for k, t in zip(kept, tokens, strict=True)]
        want = by_unit64(embedding64(tokens, dy, 5, kept), ids, units or 8)
        got = bw.embedding_sq_norms(tokens, dy, mask=use, padding_index=pad, segments=mx.array(ids), num_segments=units)
        np.testing.assert_allclose(np64(got), squares(want), rtol=1e-5)


def test_embedding_with_bad_values(backend):
    tokens, dy = mx.array([[1, 2, 1], [1, 1, 1], [0, 2, 2]]), np.array(rand((3, 3, 4)))
    good = np64(bw.embedding_sq_norms(tokens, mx.array(dy)))
    dy[1, 2, 0] = NAN
    got = np64(bw.embedding_sq_norms(tokens, mx.array(dy)))
    assert np.isnan(got[1])
    np.testing.assert_array_equal(got[[0, 2]], good[[0, 2]])
    sums = bw.embedding_clipped_sum(tokens, mx.array(dy), mx.array([1.0, 0.0, 0.5]), 3)
    assert np.isfinite(np.array(sums)).all()
    mask = mx.array([[True, True, True], [True, True, False], [True, True, True]])
    assert np.isfinite(np.array(bw.embedding_sq_norms(tokens, mx.array(dy), mask=mask))).all()


@pytest.mark.parametrize("kind", [None, *SEGMENTS])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_tied_weights(backend, kind, dtype):
    ids, units = SEGMENTS[kind] if kind else (None, None)
    segments = None if ids is None else mx.array(ids)
    tokens = mx.array(np.random.default_rng(0).integers(-1, 9, (8, 70)))
    dy, x, dy_linear = rand((8, 70, 5), dtype), rand((8, 3, 5), dtype, 1), rand((8, 3, 9), dtype, 2)
    e = by_unit64(embedding64(tokens, dy, 9), ids, units or 8)
    w = by_unit64(linear64(x, dy_linear)[0], ids, units or 8)
    got = bw.embedding_linear_products(tokens, dy, x, dy_linear, segments=segments, num_segments=units)
    np.testing.assert_allclose(np64(got), (e * w).sum((1, 2)), rtol=1e-4, atol=1e-4)
    x, dy_linear = [x, x[:, :2]], [dy_linear, dy_linear[:, 1:]]
    w += by_unit64(linear64(x[1], dy_linear[1])[0], ids, units or 8)
    got = bw.embedding_linear_products(tokens, dy, x, dy_linear, segments=segments, num_segments=units)
    np.testing.assert_allclose(np64(got), (e * w).sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_vmap(backend):
    x, dy = rand((2, 3, 4, 5)), rand((2, 3, 4, 2), seed=1)
    out = mx.vmap(bw.linear_sq_norms)(x, dy)
    np.testing.assert_allclose(np64(out), [squares(linear64(x[i], dy[i])[0]) for i in range(2)], rtol=1e-5)
    out = mx.vmap(lambda x, d: bw.conv_sq_norms(x, d, 1, bias=True), in_axes=(0, None))(x, dy[0])
    want = [squares(*linear64(x[i], dy[0])) for i in range(2)]
    np.testing.assert_allclose(np64(out), want, rtol=1e-5)
    out = mx.vmap(lambda f: bw.linear_clipped_sum(x[0], dy[0], f).weight)(mx.eye(3))
    np.testing.assert_allclose(np64(out), linear64(x[0], dy[0])[0], rtol=1e-5, atol=1e-6)


def test_vmap_of_one_side_of_a_lookup(backend):
    tokens, dy = mx.array([[1, 0, 1], [2, 2, -1]], mx.int32), rand((2, 2, 3, 4))
    factors = mx.array([[0.0, 1.0], [0.5, 0.0]])
    x, dy_linear = rand((2, 3, 4), seed=1), rand((2, 3, 5), seed=2)
    for f, batch in (
        (lambda d: bw.embedding_sq_norms(tokens, d, padding_index=0), dy),
        (lambda t: bw.embedding_sq_norms(t, dy[0]), mx.stack([tokens, tokens[::-1]])),
        (lambda f: bw.embedding_clipped_sum(tokens, dy[0], f, 5), factors),
        (lambda d: bw.embedding_linear_products(tokens, d, x, dy_linear), dy),
    ):
        np.testing.assert_allclose(np64(mx.vmap(f)(batch)), [np64(f(each)) for each in batch], rtol=1e-5, atol=1e-6)


def test_grad(backend):
    x, dy, s = rand((3, 4, 5)), rand((3, 4, 2), seed=1), mx.array([0, 1, 0])

    def built(x, dy):
        g = dy.swapaxes(1, 2) @ x
        return (mx.stack([g[0] + g[2], g[1]]).square().sum((1, 2)) * mx.array([1.0, -2.0])).sum()

    def ghost(x, dy):
        return (bw.linear_sq_norms(x, dy, segments=s, num_segments=2) * mx.array([1.0, -2.0])).sum()

    for got, want in zip(mx.grad(ghost, (0, 1))(x, dy), mx.grad(built, (0, 1))(x, dy), strict=True):
        np.testing.assert_allclose(np64(got), np64(want), rtol=1e-4, atol=1e-4)


def test_compile(backend):
    x, dy = rand((3, 4, 5)), rand((3, 4, 2), seed=1)

    def f(x, dy):
        norms = [bw.linear_sq_norms(x, dy, method=m, bias=b) for m in METHODS for b in (False, True)]
        return norms, bw.linear_sample_grads(x, dy).weight, bw.conv_sample_grads(x, dy, 1).weight

    norms, a, b = mx.compile(f)(x, dy)
    weight, bias = linear64(x, dy)
    for i, n in enumerate(norms):
        np.testing.assert_allclose(np64(n), squares(weight, bias) if i % 2 else squares(weight), rtol=1e-5)
    np.testing.assert_allclose(np64(a), weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np64(b)[:, :, 0], weight, rtol=1e-5, atol=1e-6)


def everything():
    x, dy, s = rand((5, 150, 90)), rand((5, 150, 70), seed=1), mx.array([0, 1, 0, 2, 1])
    for method in METHODS:
        yield bw.linear_sq_norms(x, dy, method=method, bias=True)
        yield bw.linear_sq_norms(x, dy, method=method, segments=s)
    yield from bw.linear_sample_grads(x, dy, bias=True)
    yield from bw.linear_clipped_sum(x, dy, mx.ones((5,)), bias=True)
    image, out = rand((5, 12, 12, 8)), rand((5, 12, 12, 6), seed=1)
    yield bw.conv_sq_norms(image, out, 3, padding=1)
    yield from bw.conv_clipped_sum(image, out, mx.ones((5,)), 3, padding=1, bias=True)
    tokens = mx.array(np.random.default_rng(0).integers(0, 40, (5, 150)))
    yield bw.embedding_sq_norms(tokens, x, segments=s)
    yield bw.embedding_clipped_sum(tokens, x, mx.ones((5,)), 70)
    yield bw.embedding_linear_products(tokens, x, x, dy)


def test_threads_do_not_change_bits():
    got = []
    with _native.using("native"):
        try:
            for n in (1, 2, 3, 7):
                _native.ext.set_num_threads(n)
                got.append([bits(x) for x in everything()])
        finally:
            _native.ext.set_num_threads(os.cpu_count())
    assert all(g == got[0] for g in got)


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_instruction_sets_without_a_blas(isa):
    """Values again, in a process that is held to one instruction set and to the family's own product."""
    code = """
import sys
sys.modules["scipy_openblas32"] = None  # as if it were not installed
import mlx_bulwark as bw
assert not bw._native.ext.has_blas() and "scipy-openblas32" in bw.backend().reason, bw.backend()
import pytest
names = "test_linear or test_masks or test_segments or test_convolutions or test_embedding or test_tied or test_bad"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:], "-k", names]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, __file__, str(Path(__file__).with_name("test_convolve.py"))],
        env={**os.environ, "BULWARK_ISA": isa, "BULWARK_TEST_BACKENDS": "native"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the BLAS of a package is Linux's")
def test_blas_is_loaded():
    with _native.using("native"):
        assert _native.ext.has_blas()
        assert not _native.ext.load_blas("/nowhere/libblas.so", "")
        assert _native.ext.has_blas()


@settings(max_examples=60)
@given(
    batch=st.integers(0, 6),
    rows=st.integers(0, 70),
    d=st.integers(1, 40),
    p=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_methods_agree(backend, batch, rows, d, p, seed):
    rng = np.random.default_rng(seed)
    x, dy = rand((batch, rows, d), seed=seed), rand((batch, rows, p), seed=seed + 100)
    mask, ids = mx.array(rng.random((batch, rows)) < 0.7), mx.array(rng.integers(-1, 3, batch).astype(np.int32))
    given = {"mask": mask, "segments": ids, "num_segments": 3, "bias": bool(seed % 2)}
    gram, direct = (np64(bw.linear_sq_norms(x, dy, method=m, **given)) for m in ("gram", "direct"))
    np.testing.assert_allclose(gram, direct, rtol=1e-4, atol=1e-4)
    grads = bw.linear_sample_grads(x, dy, **given)
    built = bw.sample_sq_norms([g for g in grads if g is not None])
    np.testing.assert_allclose(direct, np64(built), rtol=1e-5, atol=1e-6)


def test_bad_arguments(backend):
    x, dy = mx.zeros((2, 3, 4)), mx.zeros((2, 3, 5))
    tokens = mx.zeros((2, 3), mx.int32)
    for call, says in [
        (lambda: bw.linear_sq_norms(x[0, 0], dy), r"\[linear_sq_norms\] x must have shape \[B, ..., d\]"),
        (lambda: bw.linear_sq_norms(x, dy[:, :2]), r"dy must have shape \[2, 3, p\] but has shape \[2, 2, 5\]"),
        (lambda: bw.linear_sq_norms([x, x[..., :3]], [dy, dy]), r"x\[1\] must have shape \[B, ..., d\]"),
        (lambda: bw.linear_sq_norms([x, x], [dy]), "x and dy must be as many but are 2 and 1"),
        (lambda: bw.linear_sq_norms([], []), "x and dy must be as many but are 0 and 0"),
        (lambda: bw.linear_sq_norms(x.astype(mx.int32), dy), "x must be float32, float16 or bfloat16 but has dtype"),
        (lambda: bw.linear_sq_norms(x, dy, method="ghost"), "method must be one of auto, gram, direct but is 'ghost'"),
        (lambda: bw.linear_sq_norms(x, dy, mask=mx.ones((2, 3))), "mask must have shape .* and dtype bool"),
        (lambda: bw.linear_sq_norms(x, dy, mask=mx.ones((2,), mx.bool_)), "mask must have shape"),
        (lambda: bw.linear_sq_norms(x, dy, segments=mx.zeros((3,), mx.int32)), r"segments must have shape \[2\]"),
        (lambda: bw.linear_sq_norms(x, dy, segments=mx.zeros((2,))), "integer dtype but has shape .*float32"),
        (lambda: bw.linear_sq_norms(x, dy, num_segments=3), "segments must be given with num_segments"),
        (lambda: bw.linear_clipped_sum(x, dy, mx.ones((3,))), r"factors must have shape \[2\] and dtype float32"),
        (lambda: bw.embedding_sq_norms(x, dy), "tokens must have shape .* integer dtype but .*float32"),
        (lambda: bw.embedding_sq_norms(tokens, dy[:1]), r"dy must have shape \[2, 3, 5\] and dtype float32"),
        (lambda: bw.embedding_linear_products(tokens, dy, x, dy), r"x must have shape \[2, ..., 5\]"),
        (lambda: bw.conv_sq_norms(x, dy, 2), r"dy must have shape \[2, 2, 5\] for x of shape \[2, 3, 4\]"),
        (lambda: bw.conv_sq_norms(x, dy, (1, 1)), "kernel_size must be 1 positive whole numbers but is"),
        (lambda: bw.conv_sq_norms(x, dy, 1, groups=3), "groups must divide the channels 4 and 5 but is 3"),
        (lambda: bw.conv_sq_norms(x[0], dy[0], 1), "x must have 1, 2 or 3 axes of space"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_layers_of_mlx(backend):
    """A convolution and a transposed one of mlx.nn, against their own gradients."""
    for layer, x in (
        (nn.Conv2d(3, 4, 3, 2, 1), rand((2, 7, 7, 3))),
        (nn.ConvTranspose2d(3, 4, 3, 2, 1), rand((2, 4, 4, 3))),
    ):
        dy = rand(layer(x).shape, seed=1)

        def loss(params, x, dy, layer=layer):
            layer.update(params)
            return (layer(x) * dy).sum()

        each = [mx.grad(loss)(layer.parameters(), x[b : b + 1], dy[b : b + 1]) for b in range(2)]
        want = [sum(np.square(np64(g)).sum() for g in grads.values()) for grads in each]
        transposed = isinstance(layer, nn.ConvTranspose2d)
        got = bw.conv_sq_norms(x, dy, 3, stride=2, padding=1, transposed=transposed, bias=True)
        np.testing.assert_allclose(np64(got), want, rtol=1e-4)
