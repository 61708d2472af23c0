"""Rules of convolutions: matrix products of what each output position sees."""

from typing import Any

import mlx.core as mx

from .per_sample import PerSample, Tapped, combine, join, rows
from .rules_products import bias, product
from .taps import Site


def convolution(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.Conv1d, nn.Conv2d, nn.Conv3d."""
    groups = int(getattr(site.module, "groups", 1))

    def split(x: mx.array) -> mx.array:  # [B, T, k, c] -> [B, G, T, k * c / G]
        B, T, k, c = x.shape
        return x.reshape(B, T, k, groups, c // groups).transpose(0, 3, 1, 2, 4).reshape(B, groups, T, -1)

    results = []
    if "bias" in site.params:
        results.append(bias("bias", join([rows(c.dy) for c in calls], 1)))
    if "weight" in site.params:
        shape = site.params["weight"].shape
        U = join([split(patches(site.module, shape[1:-1], c.x)) for c in calls], 2)
        D = join([split(rows(c.dy)[:, :, None]) for c in calls], 2)
        results.append(product("weight", shape, U, D))
    return combine(results)


def transposed_convolution(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d: convolutions with input and output exchanged."""
    results = []
    if "bias" in site.params:
        results.append(bias("bias", join([rows(c.dy) for c in calls], 1)))
    if "weight" in site.params:
        shape = site.params["weight"].shape  # [p, *kernel, d]
        seen = [patches(site.module, shape[1:-1], c.dy, c.x.shape[1:-1]) for c in calls]
        U = join([s.reshape(*s.shape[:2], -1) for s in seen], 1)
        D = join([rows(c.x) for c in calls], 1)
        by_input = product("weight", (shape[-1], *shape[1:-1], shape[0]), U[:, None], D[:, None])
        results.append(_exchange(by_input))
    return combine(results)


def _exchange(r: PerSample) -> PerSample:
    """[d, *kernel, p] -> [p, *kernel, d]."""
    weighted_sums = r.weighted_sums
    return PerSample(
        {name: g.swapaxes(1, -1) for name, g in r.built.items()},
        r.sq_norms,
        (lambda factors: {name: s.swapaxes(0, -1) for name, s in weighted_sums(factors).items()})
        if weighted_sums
        else None,
    )


def patches(layer: Any, kernel: tuple[int, ...], x: mx.array, positions: tuple[int, ...] | None = None) -> mx.array:
    """[B, *space, c] -> [B, T, k, c] float32: what each position of a convolution sees, all or the first ones."""
    n = x.ndim - 2
    stride, padding, dilation = (_tuple(getattr(layer, a, 1), n) for a in ("stride", "padding", "dilation"))
    x = x.astype(mx.float32)
    if any(padding):
        x = mx.pad(x, [(0, 0), *((p, p) for p in padding), (0, 0)])
    x = mx.contiguous(x)
    space = x.shape[1:-1]
    fitting = [(s - d * (k - 1) - 1) // t + 1 for s, k, t, d in zip(space, kernel, stride, dilation, strict=True)]
    out = positions or fitting
    step = [x.shape[-1]] * n
    for i in reversed(range(n - 1)):
        step[i] = step[i + 1] * space[i + 1]
    moves = [a * t for a, t in zip(step, stride, strict=True)]
    offsets = [a * d for a, d in zip(step, dilation, strict=True)]
    strides = [step[0] * space[0], *moves, *offsets, 1]
    view = mx.as_strided(x, (x.shape[0], *out, *kernel, x.shape[-1]), strides)
    T, k = 1, 1
    for o, q in zip(out, kernel, strict=True):
        T, k = T * o, k * q
    return view.reshape(x.shape[0], T, k, x.shape[-1])


def _tuple(value: int | tuple[int, ...], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)
