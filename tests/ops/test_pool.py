"""Max pooling, against a loop over windows."""

import itertools
import os

import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark import _native
from mlx_bulwark.ops.pool import max_pool_reference

CASES = {
    "1d": ((3, 31, 5), 3),
    "1d one value": ((1, 1, 1), 1),
    "2d": ((4, 8, 10, 33), 2),
    "2d one channel": ((5, 28, 28, 1), 2),
    "2d left over": ((3, 9, 11, 16), (2, 3)),
    "2d large windows": ((2, 33, 31, 17), (16, 31)),
    "2d of one": ((2, 5, 3, 8), 1),
    "3d": ((2, 5, 6, 7, 4), (2, 3, 2)),
    "2d no sample": ((0, 4, 4, 3), 2),
    "2d no channel": ((2, 4, 4, 0), 2),
    "1d many": ((1, 1000003, 1), 3),
}


def image(name, dtype=mx.float32):
    shape, kernel = CASES[name]
    return mx.array(np.random.default_rng(0).standard_normal(shape), mx.float32).astype(dtype), kernel


def loop(x, kernel, dy=None):
    """Largest of each window and, of dy, the gradient: float64, window by window."""
    axes = x.ndim - 2
    kernel = (kernel,) * axes if isinstance(kernel, int) else kernel
    out = [n // k for n, k in zip(x.shape[1:-1], kernel, strict=True)]
    y, dx = np.zeros((len(x), *out, x.shape[-1])), np.zeros(x.shape)
    inside = tuple(range(1, 1 + axes))
    for at in itertools.product(*map(range, out)):
        window = (slice(None), *(slice(a * k, (a + 1) * k) for a, k in zip(at, kernel, strict=True)))
        seen = x[window].astype(np.float64)
        here = (slice(None), *at)
        y[here] = seen.max(axis=inside)
        if dy is not None:
            chosen = seen == seen.max(axis=inside, keepdims=True)
            part = np.expand_dims(dy[here], inside) / chosen.sum(axis=inside, keepdims=True)
            dx[window] = chosen * part
    return y, dx


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", [name for name in CASES if name != "1d many"])
def test_pools_against_a_loop(backend, name, dtype):
    x, kernel = image(name, dtype)
    y = bw.max_pool(x, kernel)
    want, _ = loop(np.array(x.astype(mx.float32)), kernel)
    assert (y.shape, y.dtype) == (want.shape, dtype)
    assert np.array_equal(np.array(y.astype(mx.float32)), want)


def test_many_windows():
    x, kernel = image("1d many")
    with _native.using("native"):
        y, dx = bw.max_pool(x, kernel), mx.grad(lambda a: bw.max_pool(a, kernel).sum())(x)
    whole = np.array(x).reshape(-1)[: 1000003 // 3 * 3].reshape(-1, 3)
    assert np.array_equal(np.array(y).reshape(-1), whole.max(1))
    assert np.array_equal(np.array(dx).reshape(-1)[: whole.size].reshape(-1, 3), whole == whole.max(1, keepdims=True))
    assert dx.reshape(-1)[-1] == 0


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("1d many", "2d no channel", "2d no sample")])
def test_gradients_against_a_loop(backend, name):
    x, kernel = image(name)
    x = mx.round(4 * x)  # many ties
    dy = np.random.default_rng(1).standard_normal(loop(np.array(x), kernel)[0].shape).astype(np.float32)
    dx = mx.grad(lambda a: (bw.max_pool(a, kernel) * mx.array(dy)).sum())(x)
    assert dx.shape == x.shape
    np.testing.assert_allclose(np.array(dx), loop(np.array(x), kernel, dy)[1], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_values(data):
    """NaN and inf as NumPy has them, forward and backward; a bad window harms no other."""
    kernel = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    shape = tuple(k * data.draw(st.integers(1, 3)) + data.draw(st.integers(0, k - 1)) for k in kernel)
    channels = data.draw(st.sampled_from([1, 3, 16, 19]))
    size = 2 * shape[0] * shape[1] * channels
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, 1e-42, np.inf, -np.inf, np.nan])
    drawn = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    few = np.array(data.draw(st.lists(values, min_size=1, max_size=8)), np.float32)
    x = drawn.choice(few, size).reshape(2, *shape, channels)
    with _native.using("native"), np.errstate(all="ignore"):
        y, back = mx.vjp(lambda a: bw.max_pool(a, kernel), [mx.array(x)], [mx.ones(loop(x, kernel)[0].shape)])
        want, dx = loop(x, kernel, np.ones(loop(x, kernel)[0].shape))
    tiny = np.abs(want) < 1e-38  # MLX and NumPy may take numbers this small for zero
    assert np.array_equal(np.array(y[0])[~tiny], want.astype(np.float32)[~tiny], equal_nan=True)
    if not (np.abs(x[x != 0]) < 1e-38).any():
        np.testing.assert_allclose(np.array(back[0]), dx, rtol=1e-6)


def test_views(backend):
    x, kernel = image("2d")
    for view in (x[::2], x[:, ::-1], x.swapaxes(1, 2), mx.broadcast_to(x[:1], x.shape)):
        assert np.array_equal(np.array(bw.max_pool(view, kernel)), loop(np.array(view), kernel)[0])


@pytest.mark.parametrize("name", ["1d", "2d left over", "3d"])
def test_transformations(backend, name):
    x, kernel = image(name)
    plain = bw.max_pool(x, kernel)
    assert mx.array_equal(mx.compile(lambda a: bw.max_pool(a, kernel))(x), plain)
    mapped = mx.vmap(lambda a: bw.max_pool(a, kernel))(mx.stack([x, 2 * x]))
    assert mx.array_equal(mapped[1], 2 * plain)
    tangent = mx.random.normal(x.shape)
    _, moved = mx.jvp(lambda a: bw.max_pool(a, kernel), [x], [tangent])
    _, want = mx.jvp(lambda a: max_pool_reference(a, kernel), [x], [tangent])
    assert mx.allclose(moved[0], want[0], atol=1e-6)

    def second(pool):
        first = mx.grad(lambda a: pool(mx.sin(a), kernel).square().sum())
        return mx.grad(lambda a: first(a).square().sum())(x)

    assert mx.allclose(second(bw.max_pool), second(max_pool_reference), rtol=1e-4, atol=1e-5)
    both = mx.compile(lambda a: (bw.max_pool(a, 1), bw.max_pool(a, kernel)))(x)  # are not taken for the same
    assert mx.array_equal(both[0], x)
    assert mx.array_equal(both[1], plain)


def test_as_mlx_s_layer(backend):
    x, _ = image("2d")
    layer = nn.MaxPool2d(2)
    assert mx.array_equal(bw.max_pool(x, 2), layer(x))
    ties = mx.round(x)
    ours, theirs = (mx.grad(lambda a, f=f: f(a).square().sum())(ties) for f in (lambda a: bw.max_pool(a, 2), layer))
    assert mx.allclose(ours, theirs, rtol=1e-6)


def test_threads_do_not_change_bits():
    x = mx.random.normal((33, 28, 28, 19))
    found = []
    with _native.using("native"):
        try:
            for n in (1, 3):
                _native.ext.set_num_threads(n)
                found.append(mx.grad(lambda a: bw.max_pool(a, 2).square().sum())(x))
                mx.eval(found)
        finally:
            _native.ext.set_num_threads(os.cpu_count())
    assert mx.array_equal(*found)


@pytest.mark.parametrize(
    ("shape", "dtype", "kernel", "words"),
    [
        ((2, 4), mx.float32, 2, "x must be float32, float16 or bfloat16 with 1, 2 or 3 axes of space"),
        ((2, 4, 4, 1), mx.int32, 2, "x must be float32, float16 or bfloat16"),
        ((2, 4, 4, 1), mx.float32, (2,), "kernel_size must be 2 positive whole numbers"),
        ((2, 4, 4, 1), mx.float32, 0, "kernel_size must be 2 positive whole numbers"),
        ((2, 4, 4, 1), mx.float32, (2, 5), "x must reach over the kernel"),
    ],
)
def test_bad_arguments(shape, dtype, kernel, words):
    with pytest.raises(ValueError, match=rf"\[max_pool\] {words}"):
        bw.max_pool(mx.zeros(shape, dtype), kernel)
