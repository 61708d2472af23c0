"""Steps of adversarial attacks: along the gradient, back into a ball around the input, and into its bounds."""

import math
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from .. import _native
from .._native import Stream
from .noise import FLOATS, _integers, _is_int, _on
from .smooth import _float_of

Norm = Literal["linf", "l2", "l1"]

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
BISECTIONS = 32  # of a threshold, which is then known to 2^-32 of the largest coordinate


class _Ball(NamedTuple):
    """Where a step may end."""

    eps: mx.array  # [B, 1]
    norm: str
    low: float
    high: float


def projected_step(
    x: mx.array,
    grad: mx.array,
    origin: mx.array,
    eps: float | mx.array,
    alpha: float | mx.array,
    norm: Norm = "linf",
    bounds: tuple[float, float] | None = None,
    *,
    stream: Stream = None,
) -> mx.array:
    """Take one step of projected gradient ascent, each sample in a ball around its origin and within bounds.

    The step is ``alpha`` times the gradient's sign (linf), or the gradient divided by its own norm (l2, l1). Zeros move
    nothing; values of a gradient that are not finite count as zeros. Then linf and l1 project exactly onto what ball
    and bounds share; l2 projects onto the ball and clips to the bounds, which stays inside the ball. Computed in
    float32; float16 and bfloat16 are rounded towards the origin, so that they do not leave the ball.

    Args:
        x: Adversarial inputs ``[B, ...]``, float32, float16 or bfloat16.
        grad: Gradient of what the attack raises, of the shape and dtype of ``x``; a targeted attack negates it.
        origin: The inputs that are attacked, of the shape and dtype of ``x``, within ``bounds``.
        eps: Radius of the ball, in the unit of ``x``: a number >= 0, or float32 ``[B]``, one a sample.
        alpha: Length of the step in the same norm: a number >= 0, or float32 ``[B]``.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: Lowest and highest value of an input.
        stream: Stream or device.

    Returns:
        array: The next adversarial inputs, of the shape and dtype of ``x``. They are constants of a derivative.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> x = mx.array([[0.1, 0.5]])
        >>> bw.projected_step(x, mx.array([[-2.0, 3.0]]), x, 0.3, 0.25, "linf", (0, 1)).tolist()
        [[0.0, 0.75]]

    Source:
        A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018; F. Croce and M. Hein,
        "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers", 2021.
    """
    length, ball = _step_inputs(x, grad, origin, eps, alpha, norm, bounds)
    if _native.runs_native(stream):
        order = NORMS.index(norm)
        return _native.ext.projected_step(x, grad, origin, ball.eps, length, order, ball.low, ball.high, stream)
    with _on(stream):
        return _projected_step(x, grad, origin, length, ball)


def projected_step_reference(
    x: mx.array,
    grad: mx.array,
    origin: mx.array,
    eps: float | mx.array,
    alpha: float | mx.array,
    norm: Norm = "linf",
    bounds: tuple[float, float] | None = None,
    *,
    stream: Stream = None,
) -> mx.array:
    """Compute ``projected_step`` by plain MLX ops."""
    length, ball = _step_inputs(x, grad, origin, eps, alpha, norm, bounds)
    with _on(stream):
        return _projected_step(x, grad, origin, length, ball)


def random_start(
    x: mx.array,
    eps: float | mx.array,
    norm: Norm = "linf",
    bounds: tuple[float, float] | None = None,
    *,
    seed: int | mx.array,
    stream: Stream = None,
) -> mx.array:
    """Move inputs to random places of the balls around them, uniform in volume, then clip them to bounds.

    Args:
        x: Inputs ``[B, ...]``, float32, float16 or bfloat16, within ``bounds``.
        eps: Radius of the ball, in the unit of ``x``: a number >= 0, or float32 ``[B]``, one a sample.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: Lowest and highest value of an input.
        seed: An integer, or a key of ``mx.random``. The place is no secret.
        stream: Stream or device.

    Returns:
        array: Of the shape and dtype of ``x``; a constant of a derivative.

    Raises:
        ValueError: An argument has a wrong value, shape or dtype.

    Example:
        >>> import mlx.core as mx
        >>> import mlx_bulwark as bw
        >>> start = bw.random_start(mx.zeros((2, 100)), mx.array([0.5, 3.0]), "l2", seed=0)
        >>> [bool(0.9 * e < n <= e) for n, e in zip(mx.linalg.norm(start, axis=1), (0.5, 3.0))]
        [True, True]

    Source:
        A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018; F. Barthe et al., "A
        Probabilistic Approach to the Geometry of the l_p^n-Ball", 2005.
    """
    op = "random_start"
    _check_inputs(op, x)
    ball = _Ball(_a_sample(op, "eps", eps, x), _check_norm(op, norm), *_bounds(op, bounds))
    key = _seed(seed)
    with _on(stream):
        rows = mx.stop_gradient(_rows(x))
        return _bounded(rows, rows + ball.eps * _in_unit_ball(rows.shape, norm, key), ball, x)


# Checks


def _step_inputs(
    x: Any, grad: Any, origin: Any, eps: Any, alpha: Any, norm: Any, bounds: Any
) -> tuple[mx.array, _Ball]:
    op = "projected_step"
    _check_inputs(op, x, grad=grad, origin=origin)
    length = _a_sample(op, "alpha", alpha, x)
    return length, _Ball(_a_sample(op, "eps", eps, x), _check_norm(op, norm), *_bounds(op, bounds))


def _check_inputs(op: str, x: Any, **others: Any) -> None:
    if not isinstance(x, mx.array) or x.dtype not in FLOATS or x.ndim < 1:
        has = f"{x.dtype} of shape {x.shape}" if isinstance(x, mx.array) else f"type {type(x).__name__}"
        raise ValueError(f"[{op}] x must be a float32, float16 or bfloat16 array [B, ...] but has {has}")
    for name, other in others.items():
        if not isinstance(other, mx.array) or other.shape != x.shape or other.dtype != x.dtype:
            has = (
                f"{other.dtype} of shape {other.shape}"
                if isinstance(other, mx.array)
                else f"type {type(other).__name__}"
            )
            raise ValueError(f"[{op}] {name} must have x's dtype {x.dtype} and shape {x.shape} but has {has}")


def _check_norm(op: str, norm: Any) -> str:
    if norm not in NORMS:
        raise ValueError(f"[{op}] norm must be 'linf', 'l2' or 'l1' but is {norm!r}")
    return str(norm)


def _a_sample(op: str, name: str, value: Any, x: mx.array) -> mx.array:
    if isinstance(value, mx.array):
        if value.dtype != mx.float32 or value.shape not in ((), (x.shape[0],)):
            raise ValueError(
                f"[{op}] {name} must be a number or a float32 array of shape ({x.shape[0]},) but has {value.dtype} of "
                f"shape {value.shape}"
            )
        return value.reshape(-1, 1)
    if isinstance(value, bool) or not hasattr(value, "__float__") or not 0 <= float(value) < math.inf:
        raise ValueError(f"[{op}] {name} must be a finite number >= 0 but is {value!r}")
    return mx.array([[float(value)]], mx.float32)


def _bounds(op: str, bounds: Any) -> tuple[float, float]:
    if bounds is None:
        return -math.inf, math.inf
    try:
        low, high = (float(b) for b in bounds)
    except (TypeError, ValueError):
        raise ValueError(f"[{op}] bounds must be two numbers but is {bounds!r}") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"[{op}] bounds must be finite and increase but is {bounds!r}")
    return low, high


def _seed(seed: Any) -> mx.array:
    if isinstance(seed, mx.array):
        if seed.dtype != mx.uint32 or seed.shape != (2,):
            raise ValueError(
                f"[random_start] seed must be an integer or a key of mx.random but has {seed.dtype} of shape "
                f"{seed.shape}"
            )
        return seed
    if not _is_int(seed) or not 0 <= seed < 1 << 64:
        raise ValueError(f"[random_start] seed must be an integer in [0, 2^64) or a key of mx.random but is {seed!r}")
    return mx.random.key(int(seed))


# The reference: samples are rows, in float32.


@_native.reference("projected_step")
def _(arrays: list[mx.array], stream: Any) -> list[mx.array]:
    x, grad, origin, eps, alpha, parameters = arrays
    norm, low, high = _integers(parameters)
    with _on(stream):
        return [_projected_step(x, grad, origin, alpha, _Ball(eps, NORMS[norm], _float_of(low), _float_of(high)))]


def _projected_step(x: mx.array, grad: mx.array, origin: mx.array, length: mx.array, ball: _Ball) -> mx.array:
    rows, steps, origins = (mx.stop_gradient(_rows(a)) for a in (x, grad, origin))
    step = length * _direction(steps, ball.norm)
    if ball.norm == "linf":
        return _bounded(origins, _between(rows + step, origins - ball.eps, origins + ball.eps), ball, x)
    return _bounded(origins, origins + _inside(origins, rows - origins + step, ball), ball, x)


def _rows(x: mx.array) -> mx.array:
    return x.astype(mx.float32).reshape(x.shape[0], math.prod(x.shape[1:]))


def _direction(grad: mx.array, norm: str) -> mx.array:
    grad = usable(grad)
    if norm == "linf":
        return mx.sign(grad)
    if grad.size == 0:
        return grad
    largest = mx.abs(grad).max(axis=1, keepdims=True)  # the squares of small gradients vanish
    scaled = mx.where(largest == 0, grad, grad / largest)
    length = _length(scaled, norm)
    return mx.where(length == 0, scaled, scaled / length)


def usable(grad: mx.array) -> mx.array:
    """Zeros where it is not finite; three passes over the data, where ``mx.isfinite`` alone takes more."""
    return mx.where(mx.abs(grad) < math.inf, grad, 0)


def _length(rows: mx.array, norm: str) -> mx.array:
    if norm == "l1":
        return mx.abs(rows).sum(axis=1, keepdims=True)
    return mx.sqrt(mx.square(rows).sum(axis=1, keepdims=True))


def _between(value: mx.array, low: float | mx.array, high: float | mx.array) -> mx.array:
    """The value, clipped; NaN stays."""
    return mx.where(value < low, low, mx.where(value > high, high, value))


def _bounded(origin: mx.array, value: mx.array, ball: _Ball, like: mx.array) -> mx.array:
    return _rounded_towards(origin, _between(value, ball.low, ball.high), like.dtype).reshape(like.shape)


def _inside(origin: mx.array, moved: mx.array, ball: _Ball) -> mx.array:
    if moved.size == 0:
        return moved
    if ball.norm == "l1":
        return _l1_projection(origin, moved, ball)
    length = _length(moved, "l2")
    return mx.where(length > ball.eps, moved * (ball.eps / length), moved)


def _l1_projection(origin: mx.array, moved: mx.array, ball: _Ball) -> mx.array:
    """Shrink every coordinate by one threshold, no coordinate further than its bound: what solves the projection onto
    ball and bounds at once. The threshold is the least at which the sum fits, found by bisection."""
    room = mx.maximum(mx.where(moved < 0, origin - ball.low, ball.high - origin), 0)
    size = mx.abs(moved)

    def shrunk(threshold: mx.array) -> mx.array:
        return mx.minimum(mx.maximum(size - threshold, 0), room)

    def fits(threshold: mx.array) -> mx.array:
        return shrunk(threshold).sum(axis=1, keepdims=True) <= ball.eps

    high = size.max(axis=1, keepdims=True)
    low = mx.zeros_like(high)
    high = mx.where(fits(low), low, high)
    for _ in range(BISECTIONS):
        middle = low + (high - low) / 2
        fit = fits(middle)
        low, high = mx.where(fit, low, middle), mx.where(fit, middle, high)
    return mx.where(mx.isnan(moved), moved, mx.sign(moved) * shrunk(high))


def _rounded_towards(origin: mx.array, value: mx.array, dtype: mx.Dtype) -> mx.array:
    """The value of the dtype that is nearest to ``value`` and no further from the origin, which the dtype holds."""
    near = value.astype(dtype)
    if dtype == mx.float32:
        return near
    wide = near.astype(mx.float32)
    beyond = mx.abs(wide - origin) > mx.abs(value - origin)
    bits = near.view(mx.int16)
    away = mx.where((wide > origin) == (wide > 0), -1, 1)  # of the magnitude's bits; a value beyond 0 is not 0
    return mx.where(mx.logical_and(beyond, wide != 0), bits + away.astype(mx.int16), bits).view(dtype)


def _in_unit_ball(shape: tuple[int, ...], norm: str, key: mx.array) -> mx.array:
    """Uniform in volume."""
    if norm == "linf":
        return mx.random.uniform(-1, 1, shape, key=key)
    first, second = mx.random.split(key)
    if norm == "l2":
        z = mx.random.normal(shape, key=first)
        radius = mx.random.uniform(shape=(shape[0], 1), key=second) ** (1 / max(shape[1], 1))
        return z / mx.maximum(_length(z, "l2"), 1e-30) * radius
    # Of d + 1 exponentials, the share of the last is what the others leave of the radius.
    e = -mx.log(1 - mx.random.uniform(shape=(shape[0], shape[1] + 1), key=first))
    sign = mx.where(mx.random.bernoulli(0.5, shape, key=second), 1.0, -1.0)
    return sign * e[:, :-1] / e.sum(axis=1, keepdims=True)
