"""Convolutions, against sums over windows in float64."""

import itertools
import os

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_bulwark import _native
from mlx_bulwark.ops.ghost import convolve_reference

CASES = {
    "1d": ((3, 17, 6), (4, 5, 6), {}),
    "1d dilated groups": ((2, 33, 6), (4, 3, 3), {"dilation": 4, "groups": 2, "padding": 2}),
    "2d": ((2, 9, 8, 4), (6, 3, 2, 4), {"stride": (2, 1), "padding": (1, 2)}),
    "2d one channel": ((5, 28, 28, 1), (32, 3, 3, 1), {"padding": 1}),
    "2d one by one": ((2, 5, 7, 33), (31, 1, 1, 33), {}),
    "2d a group a channel": ((2, 9, 9, 8), (8, 3, 3, 1), {"groups": 8, "padding": 1}),
    "2d padded past the kernel": ((1, 2, 2, 3), (2, 2, 2, 3), {"padding": 3, "stride": 2}),
    "2d many": ((31, 14, 14, 16), (24, 3, 3, 16), {"padding": 1}),
    "2d many, odd": ((11, 13, 15, 33), (37, 3, 3, 33), {"padding": (0, 1)}),
    "2d many, padded past the kernel": ((7, 6, 9, 17), (65, 3, 3, 17), {"padding": 4}),
    "2d many of one column": ((33, 31, 1, 16), (16, 3, 3, 16), {"padding": 1}),
    "2d to one channel": ((3, 28, 28, 32), (1, 3, 3, 32), {"padding": 1}),
    "2d to few, dilated": ((2, 11, 14, 19), (3, 3, 2, 19), {"padding": 2, "dilation": (2, 3), "stride": (1, 2)}),
    "2d of few, dilated": ((2, 11, 14, 3), (37, 3, 4, 3), {"padding": 2, "dilation": (2, 3), "stride": (2, 1)}),
    "3d": ((2, 5, 6, 7, 2), (3, 2, 3, 2, 2), {"padding": 1, "stride": (1, 2, 1), "dilation": (2, 1, 1)}),
    "no sample": ((0, 5, 5, 2), (3, 3, 3, 2), {}),
}


def arrays(name, dtype=mx.float32):
    shape, weight, how = CASES[name]
    rng = np.random.default_rng(0)
    made = [mx.array(rng.standard_normal(s), mx.float32).astype(dtype) for s in (shape, weight, weight[:1])]
    return (*made, how)


def float64(x, weight, bias, stride=1, padding=0, dilation=1, groups=1):
    x, weight, bias = (np.array(a.astype(mx.float32), np.float64) for a in (x, weight, bias))
    axes = x.ndim - 2
    stride, padding, dilation = ((v,) * axes if isinstance(v, int) else v for v in (stride, padding, dilation))
    x = np.pad(x, [(0, 0), *((p, p) for p in padding), (0, 0)])
    kernel, of, n = weight.shape[1:-1], weight.shape[0] // groups, weight.shape[-1]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    out = [(s - r) // t + 1 for s, r, t in zip(x.shape[1:-1], reach, stride, strict=True)]
    y = np.zeros((len(x), *out, len(weight)))
    for at in itertools.product(*map(range, out)):
        window = tuple(slice(a * t, a * t + r, d) for a, t, r, d in zip(at, stride, reach, dilation, strict=True))
        seen = x[(slice(None), *window)]
        for g in range(groups):
            w = weight[g * of : (g + 1) * of].reshape(of, -1)
            y[(slice(None), *at, slice(g * of, (g + 1) * of))] = (
                seen[..., g * n : (g + 1) * n].reshape(len(x), w.shape[1]) @ w.T
            )
    return y + bias


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_convolutions_against_float64(backend, name, dtype):
    x, weight, bias, how = arrays(name, dtype)
    y = bw.convolve(x, weight, bias, **how)
    want = float64(x, weight, bias, **how)
    assert (y.shape, y.dtype) == (want.shape, dtype)
    size = abs(want).max(initial=1)
    assert abs(np.array(y.astype(mx.float32)) - want).max(initial=0) < {mx.float32: 2e-6}.get(dtype, 2e-2) * size


@pytest.mark.parametrize("name", [name for name in CASES if name != "no sample"])  # MLX has no gradient of it
def test_gradients(name):
    """On the CPU alone: elsewhere the gradients are MLX's own."""
    x, weight, bias, how = arrays(name)

    def loss(f):
        return lambda *a: (f(*a, **how) * mx.arange(1, weight.shape[0] + 1)).square().sum()

    both = bw.convolve, convolve_reference
    with _native.using("native"):
        ours, theirs = (mx.grad(loss(f), argnums=(0, 1, 2))(x, weight, bias) for f in both)
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            assert mx.abs(a - b).max() < 3e-6 * mx.abs(b).max()
        assert mx.array_equal(mx.grad(loss(bw.convolve))(x, weight, bias), ours[0])


@pytest.mark.parametrize("name", ["1d dilated groups", "2d", "2d padded past the kernel"])
def test_gradients_of_gradients(name):
    x, weight, bias, how = arrays(name)

    def second(f):
        first = mx.grad(lambda a, w: mx.sigmoid(f(a, w, bias, **how)).sum(), argnums=(0, 1))
        return mx.grad(lambda a, w: sum(g.square().sum() for g in first(a, w)), argnums=(0, 1))(x, weight)

    with _native.using("native"):
        for a, b in zip(second(bw.convolve), second(convolve_reference), strict=True):
            assert mx.abs(a - b).max() < 3e-6 * mx.abs(b).max()


@pytest.mark.parametrize("name", ["1d", "2d", "2d a group a channel", "3d"])
def test_transformations(backend, name):
    x, weight, bias, how = arrays(name)
    plain = bw.convolve(x, weight, bias, **how)
    assert mx.allclose(mx.compile(lambda a: bw.convolve(a, weight, bias, **how))(x), plain, atol=1e-4)
    mapped = mx.vmap(lambda a: bw.convolve(a, weight, bias, **how))(mx.stack([x, 2 * x]))
    assert mx.allclose(mapped[0], plain, atol=1e-4)
    other = mx.compile(lambda a: (bw.convolve(a, weight, bias, **how), bw.convolve(a, weight, **how)))(x)
    assert mx.allclose(other[0] - bias, other[1], atol=1e-4)


def test_parameters_tell_ops_apart(backend):
    x, weight, _, _ = arrays("2d many")
    a, b = mx.compile(lambda z: (bw.convolve(z, weight, padding=2, dilation=2), bw.convolve(z, weight, padding=1)))(x)
    assert a.shape == b.shape
    assert not mx.allclose(a, b)


def test_layouts(backend):
    x, weight, bias, how = arrays("2d many")
    turned, swapped = mx.array(np.array(x).transpose(0, 3, 1, 2)), mx.array(np.array(weight).transpose(3, 1, 2, 0))
    ours = bw.convolve(turned.transpose(0, 2, 3, 1), swapped.transpose(3, 1, 2, 0), bias[::-1][::-1], **how)
    assert mx.array_equal(ours, bw.convolve(x, weight, bias, **how))


@pytest.mark.parametrize("name", ["2d many", "2d to one channel", "2d of few, dilated"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 1e-45])
def test_one_sample_harms_no_other(backend, name, value):
    x, weight, bias, how = arrays(name)
    x = mx.concatenate([x, x])
    bad = np.array(x)
    bad[1, 5, 5, 2] = value
    ours, plain = (np.array(bw.convolve(mx.array(a), weight, bias, **how)) for a in (bad, x))
    others = np.arange(len(bad)) != 1
    np.testing.assert_array_equal(ours[others], plain[others])
    with mx.stream(mx.cpu):
        want = convolve_reference(
            mx.array(np.where(np.isfinite(bad), 0, 1).astype(np.float32)), mx.ones_like(weight), **how
        )
    if not abs(value) < np.inf:
        np.testing.assert_array_equal(~np.isfinite(ours), np.array(want) > 0)


@pytest.mark.parametrize("name", ["2d many", "2d to one channel", "2d of few, dilated", "2d one by one"])
def test_threads_do_not_change_bits(name):
    x, weight, bias, how = arrays(name)
    found = []
    with _native.using("native"):
        try:
            for n in (1, 2, 5):
                _native.ext.set_num_threads(n)
                found.append(np.array(bw.convolve(x, weight, bias, **how)))
        finally:
            _native.ext.set_num_threads(os.cpu_count())
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


ONES = mx.ones((2, 5, 5, 4))


@pytest.mark.parametrize(
    ("arguments", "how", "message"),
    [
        ((mx.ones((2, 4)), mx.ones((3, 4))), {}, r"\[convolve\] x must be .* 1, 2 or 3 axes of space"),
        ((mx.ones((2, 5, 4), mx.int32), mx.ones((3, 2, 4))), {}, r"x must be float32, float16 or bfloat16"),
        ((ONES, mx.ones((3, 3, 3, 2))), {}, r"weight must have .*\[p, \*kernel_size, 4\]"),
        ((ONES, mx.ones((3, 3, 3, 4), mx.float16)), {}, "weight must have dtype mlx.core.float32"),
        ((ONES, mx.ones((3, 3, 3, 2))), {"groups": 2}, "p a multiple of groups, 2"),
        ((ONES, mx.ones((4, 3, 3, 1))), {"groups": 3}, "groups must divide the channels 4"),
        ((ONES, mx.ones((3, 3, 3, 4)), mx.ones(4)), {}, r"bias must have .* shape \[3\]"),
        ((ONES, mx.ones((3, 6, 3, 4))), {}, "x must reach over the kernel"),
        ((ONES, mx.ones((3, 3, 3, 4))), {"stride": 0}, "stride must be 2 positive whole numbers"),
        ((ONES, mx.ones((3, 3, 3, 4))), {"padding": (1, 1, 1)}, "padding must be 2"),
        ((ONES, mx.ones((0, 3, 3, 4))), {}, "weight must have"),
    ],
)
def test_wrong_arguments(backend, arguments, how, message):
    with pytest.raises(ValueError, match=message):
        bw.convolve(*arguments, **how)
