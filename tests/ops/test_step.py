import math

import mlx.core as mx
import mlx_bulwark as bw
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_bulwark.ops import step
from scipy import optimize, stats

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
SHAPES = [(0, 5), (3, 0), (1, 1), (2, 31), (5, 33), (4, 3, 9, 7), (33,)]
NAN, INF = float("nan"), float("inf")
RATE = 1e-6  # of false alarms of a statistical test, had its seed not been fixed


# ---- Oracles: one sample at a time in float64.


def length64(v, norm):
    return {"linf": abs(v).max(initial=0), "l2": math.sqrt((v**2).sum()), "l1": abs(v).sum()}[norm]


def l1_projection64(u, eps, low, high):
    """The point nearest to u with an L1 norm of at most eps, between low <= 0 and high >= 0: the threshold by which all
    coordinates shrink is a root."""

    def shrunk(threshold):
        return np.clip(np.sign(u) * np.maximum(abs(u) - threshold, 0), low, high)

    def excess(threshold):
        return abs(shrunk(threshold)).sum() - eps

    if excess(0) <= 0:
        return shrunk(0)
    return shrunk(optimize.brentq(excess, 0, abs(u).max(), xtol=1e-15, rtol=1e-14, maxiter=500))


def step64(x, g, origin, eps, alpha, norm, low=-INF, high=INF):
    if norm == "linf":
        moved = np.clip(x - origin + alpha * np.sign(g), -eps, eps)
    else:
        length = length64(g, norm)
        moved = x - origin + (alpha * g / length if length else 0)
        if norm == "l2" and length64(moved, norm) > eps:
            moved = moved * eps / length64(moved, norm)
        if norm == "l1":
            moved = l1_projection64(moved, eps, low - origin, high - origin)
    return np.clip(origin + moved, low, high)


def f64(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def inputs(shape, dtype=mx.float32, seed=0):
    """A point near its origin, and a gradient; origins are in [0, 1], some at its ends."""
    rng = np.random.default_rng(seed)
    origin = np.clip(rng.uniform(-0.2, 1.2, shape), 0, 1)
    x = np.clip(origin + rng.normal(0, 0.05, shape), 0, 1)
    return [mx.array(a.astype(np.float32)).astype(dtype) for a in (x, rng.standard_normal(shape), origin)]


def size_of(norm, d):
    """A radius of the same meaning in each norm: some tenth a coordinate."""
    return {"linf": 0.1, "l2": 0.1 * math.sqrt(d), "l1": 0.1 * d}[norm]


# ---- projected_step


@pytest.mark.parametrize("bounds", [None, (0, 1)])
@pytest.mark.parametrize("norm", step.NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_step_against_float64(backend, shape, norm, bounds):
    x, grad, origin = inputs(shape)
    d = math.prod(shape[1:])
    for eps, alpha in ((1, 0.5), (0.3, 2), (1, 0), (0, 1), (100, 1)):
        eps, alpha = eps * size_of(norm, d), alpha * size_of(norm, d)
        got = bw.projected_step(x, grad, origin, eps, alpha, norm, bounds)
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        rows = zip(*(f64(a) for a in (x, grad, origin, got)), strict=True)
        for a, g, o, y in rows:
            expected = step64(a, g, o, eps, alpha, norm, *(bounds or ()))
            np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * max(1, eps))


@pytest.mark.parametrize("norm", step.NORMS)
def test_a_large_input(backend, norm):
    x, grad, origin = inputs((2, 100_003))
    eps = size_of(norm, 100_003)
    got = bw.projected_step(x, grad, origin, eps, eps / 2, norm, (0, 1))
    for a, g, o, y in zip(*(f64(v) for v in (x, grad, origin, got)), strict=True):
        np.testing.assert_allclose(y, step64(a, g, o, eps, eps / 2, norm, 0, 1), rtol=0, atol=1e-5)


def test_l1_projection_is_the_nearest_point():
    """Against a solver of quadratic programs that knows nothing of thresholds."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        u, origin = rng.normal(0, 0.5, 6), rng.uniform(0, 1, 6)
        # delta = p - q with p, q >= 0 makes the norm linear
        nearest = optimize.minimize(
            lambda v, u=u: ((v[:6] - v[6:] - u) ** 2).sum(),
            np.zeros(12),
            bounds=[*((0, 1 - o) for o in origin), *((0, o) for o in origin)],
            constraints={"type": "ineq", "fun": lambda v: 0.7 - v.sum()},
            options={"ftol": 1e-14, "maxiter": 1000},
        ).x
        rows = [mx.array(v[None].astype(np.float32)) for v in (origin + u, np.zeros(6), origin)]
        got = f64(bw.projected_step(*rows, 0.7, 0.0, "l1", (0, 1)))[0]
        np.testing.assert_allclose(got - origin, nearest[:6] - nearest[6:], atol=2e-5)


@given(
    st.integers(0, 6),
    st.integers(1, 70),
    st.sampled_from(step.NORMS),
    st.sampled_from(DTYPES),
    st.floats(0, 3),
    st.floats(0, 3),
    st.integers(0, 10_000),
)
def test_never_outside(backend, rows, d, norm, dtype, eps, alpha, seed):
    """Inside the ball and the bounds after rounding to the dtype."""
    x, grad, origin = inputs((rows, d), dtype, seed)
    radius = np.float32(eps * size_of(norm, d))
    got = bw.projected_step(x, grad, origin, float(radius), alpha * size_of(norm, d), norm, (0, 1))
    assert got.dtype == dtype
    for y, o in zip(f64(got), f64(origin), strict=True):
        assert length64(y - o, norm) <= radius * (1 + 1e-6) + 1e-6
        assert (y >= 0).all()
        assert (y <= 1).all()


@pytest.mark.parametrize("norm", step.NORMS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_float32_rounded_towards_the_origin(backend, dtype, norm):
    x, grad, origin = inputs((5, 200), dtype)
    single = [a.astype(mx.float32) for a in (x, grad, origin)]
    eps = size_of(norm, 200)
    half = f64(bw.projected_step(x, grad, origin, eps, eps, norm, (0, 1)))
    wide, start = f64(bw.projected_step(*single, eps, eps, norm, (0, 1))), f64(origin)
    assert (abs(half - start) <= abs(wide - start) + 1e-7).all()
    unit = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}[dtype]
    assert (abs(half - wide) <= unit * abs(wide) + 1e-7).all()


@pytest.mark.parametrize("norm", step.NORMS)
def test_values_by_sample(backend, norm):
    x, grad, origin = inputs((3, 40))
    eps, alpha = (size_of(norm, 40) * np.array(v, np.float32) for v in ([0, 0.5, 2], [1, 0.2, 0]))
    got = bw.projected_step(x, grad, origin, mx.array(eps), mx.array(alpha), norm, (0, 1))
    for i in range(3):
        one = [a[i : i + 1] for a in (x, grad, origin)]
        expected = bw.projected_step(*one, float(eps[i]), float(alpha[i]), norm, (0, 1))
        assert bool((got[i] == expected[0]).all().item())
    assert bool((got[0] == origin[0]).all().item())
    scalars = bw.projected_step(x, grad, origin, mx.array(eps[1]), mx.array(alpha[1]), norm)
    assert bool((scalars == bw.projected_step(x, grad, origin, float(eps[1]), float(alpha[1]), norm)).all().item())


@pytest.mark.parametrize("norm", step.NORMS)
def test_a_gradient_of_zeros_moves_nothing(backend, norm):
    x, _, origin = inputs((3, 40))
    got = bw.projected_step(x, mx.zeros_like(x), origin, 100.0, 1.0, norm)
    np.testing.assert_allclose(f64(got), f64(x), atol=1e-7)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("norm", step.NORMS)
def test_the_size_of_a_gradient_does_not_matter(backend, norm, scale):
    """Models whose gradients nearly vanish are what an attack must not stop at."""
    x, grad, origin = inputs((3, 40))
    grad = mx.sign(grad) * (0.5 + mx.abs(grad))
    eps = size_of(norm, 40)
    got, expected = (bw.projected_step(x, g, origin, eps, eps, norm) for g in (grad * scale, grad))
    np.testing.assert_allclose(f64(got), f64(expected), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", step.NORMS)
def test_what_is_not_finite_in_a_gradient_counts_as_zero(backend, norm, dtype):
    x, grad, origin = inputs((4, 40), dtype)
    place = mx.arange(160).reshape(4, 40)
    spoiled, without = grad, grad
    for at, value in ((50, NAN), (51, INF), (59, -INF), (119, -NAN)):
        spoiled, without = mx.where(place == at, value, spoiled), mx.where(place == at, 0, without)
    spoiled, without = mx.where(place >= 120, NAN, spoiled), mx.where(place >= 120, 0, without)
    got, expected = (bw.projected_step(x, g, origin, 1.0, 0.5, norm, (0, 1)) for g in (spoiled, without))
    assert bool(mx.isfinite(got).all().item())
    assert bool((got == expected).all().item())


@pytest.mark.parametrize("norm", step.NORMS)
def test_nan_stays_in_its_sample(backend, norm):
    x, grad, origin = inputs((3, 40))
    spoiled = mx.where(mx.arange(120).reshape(3, 40) == 50, NAN, x)
    got = f64(bw.projected_step(spoiled, grad, origin, 1.0, 0.5, norm, (0, 1)))
    expected = f64(bw.projected_step(x, grad, origin, 1.0, 0.5, norm, (0, 1)))
    assert np.isnan(got[1, 10])
    np.testing.assert_array_equal(got[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("norm", step.NORMS)
def test_non_contiguous(backend, norm):
    x, grad, origin = (a.T for a in inputs((50, 6)))
    copies = [mx.array(np.array(a)) for a in (x, grad, origin)]
    got, expected = (bw.projected_step(*a, 1.0, 0.5, norm, (0, 1)) for a in ((x, grad, origin), copies))
    assert bool((got == expected).all().item())


@pytest.mark.parametrize("norm", step.NORMS)
def test_compiled_and_without_a_derivative(backend, norm):
    if (backend, norm) == ("reference", "l1"):
        pytest.skip("MLX's compiler takes half a minute for its bisection")
    x, grad, origin = inputs((3, 40))
    eps = mx.array([0.5, 1.0, 2.0])
    f = mx.compile(lambda *a: bw.projected_step(*a, 0.3, norm, (0, 1)))
    got, expected = f(x, grad, origin, eps), bw.projected_step(x, grad, origin, eps, 0.3, norm, (0, 1))
    np.testing.assert_allclose(f64(got), f64(expected), atol=1e-6)
    derivative = mx.grad(lambda x: bw.projected_step(x, grad, origin, eps, 0.3, norm, (0, 1)).sum())(x)
    assert not derivative.any().item()


# ---- random_start


@pytest.mark.parametrize("norm", step.NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_start_is_inside(backend, shape, norm):
    _, _, x = inputs(shape)
    eps = size_of(norm, math.prod(shape[1:]))
    for dtype in DTYPES:
        start = bw.random_start(x.astype(dtype), eps, norm, (0, 1), seed=1)
        assert (start.dtype, start.shape) == (dtype, shape)
        for y, o in zip(f64(start), f64(x.astype(dtype)), strict=True):
            assert length64(y - o, norm) <= eps * (1 + 1e-6) + 1e-7
            assert ((y >= 0) & (y <= 1)).all()


@pytest.mark.parametrize("d", [1, 2, 7])
@pytest.mark.parametrize("norm", step.NORMS)
def test_start_is_uniform_in_volume(norm, d):
    """The share of the volume inside of a draw is uniform; its coordinates are symmetric, alike and uncorrelated."""
    n, eps = 20_000, 0.5
    moved = f64(bw.random_start(mx.zeros((n, d)), eps, norm, seed=5))
    share = np.array([length64(v, norm) for v in moved]) / eps
    assert stats.kstest(share**d, "uniform").pvalue > RATE
    limit = stats.norm.isf(RATE / 2)
    assert (abs(np.sign(moved).mean(0)) < limit / math.sqrt(n)).all()
    if norm == "linf":
        assert stats.kstest(moved.reshape(-1) / eps, stats.uniform(-1, 2).cdf).pvalue > RATE
    for i in range(1, d):
        assert stats.ks_2samp(moved[:, 0], moved[:, i]).pvalue > RATE
        assert abs(np.corrcoef(moved[:, 0], moved[:, i])[0, 1]) < limit / math.sqrt(n)


def test_marginal_of_the_l1_ball():
    """In two dimensions a coordinate of the uniform draw has a triangular density."""
    moved = f64(bw.random_start(mx.zeros((20_000, 2)), 1.0, "l1", seed=6))
    assert stats.kstest(moved[:, 0], stats.triang(0.5, -1, 2).cdf).pvalue > RATE


def test_seeds(backend):
    x = mx.zeros((3, 50))
    for norm in step.NORMS:
        first = bw.random_start(x, 1.0, norm, seed=3)
        assert bool((first == bw.random_start(x, 1.0, norm, seed=mx.random.key(3))).all().item())
        assert not (first == bw.random_start(x, 1.0, norm, seed=4)).any().item()
        assert len({v.item() for v in first.reshape(-1)}) == 150
        still = bw.random_start(x, mx.array([0.0, 1.0, 2.0]), norm, seed=3)
        assert not still[0].any().item()
        np.testing.assert_allclose(f64(still[2]), 2 * f64(first[2]), rtol=1e-6)


# ---- Refusals

X = mx.zeros((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bw.projected_step(X.astype(mx.int32), X, X, 1, 1), r"x must be a float32, .* has .*int32"),
        (lambda: bw.projected_step(mx.array(1.0), X, X, 1, 1), r"x must be .* \[B, ...\] but has .* shape \(\)"),
        (lambda: bw.projected_step(None, X, X, 1, 1), r"x must be .* has type NoneType"),
        (lambda: bw.projected_step(X, X[:1], X, 1, 1), r"grad must have .* shape \(2, 3\) but has .* \(1, 3\)"),
        (lambda: bw.projected_step(X, X, X.astype(mx.float16), 1, 1), r"origin must have x's dtype .*float16"),
        (lambda: bw.projected_step(X, None, X, 1, 1), r"grad must have .* type NoneType"),
        (lambda: bw.projected_step(X, X, X, -1, 1), r"eps must be a finite number >= 0 but is -1"),
        (lambda: bw.projected_step(X, X, X, 1, NAN), r"alpha must be a finite number >= 0 but is nan"),
        (lambda: bw.projected_step(X, X, X, 1, "1"), r"alpha must be a finite number"),
        (lambda: bw.projected_step(X, X, X, mx.ones(3), 1), r"eps must be .* shape \(2,\) but has .* \(3,\)"),
        (lambda: bw.projected_step(X, X, X, mx.array([1, 1]), 1), r"eps must be .*int32"),
        (lambda: bw.projected_step(X, X, X, 1, 1, "l0"), r"norm must be 'linf', 'l2' or 'l1' but is 'l0'"),
        (lambda: bw.projected_step(X, X, X, 1, 1, "l2", (1, 0)), r"bounds must be finite and increase"),
        (lambda: bw.projected_step(X, X, X, 1, 1, "l2", (0, INF)), r"bounds must be finite and increase"),
        (lambda: bw.projected_step(X, X, X, 1, 1, "l2", 1.0), r"bounds must be two numbers"),
        (lambda: bw.random_start(X, -1.0, seed=0), r"eps must be a finite number >= 0"),
        (lambda: bw.random_start(X, 1.0, "l3", seed=0), r"norm must be"),
        (lambda: bw.random_start(X, 1.0, seed=-1), r"seed must be an integer in \[0, 2\^64\)"),
        (lambda: bw.random_start(X, 1.0, seed=mx.zeros(8, mx.uint32)), r"seed must be .* a key of mx.random but has"),
    ],
)
def test_refusals(backend, call, message):
    with pytest.raises(ValueError, match=rf"^\[(projected_step|random_start)\] {message}"):
        call()
