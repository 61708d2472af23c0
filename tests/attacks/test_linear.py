"""On linear models the least change that fools is known: every attack must reach it and none may beat it.

With f = w . x + b of the nearest class, the least change is |f| over the dual norm of w: that of l2 is l2, that of linf
is l1 and that of l1 is linf.
"""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark.attacks import APGD, FAB, FGSM, PGD, CarliniWagnerL2, DeepFool, Transfer
from mlx_bulwark.attacks.fab import to_hyperplane
from scipy import optimize

RNG = np.random.default_rng(0)
CLASSES, D, B = 5, 12, 60
WEIGHT, BIAS = RNG.standard_normal((CLASSES, D)), RNG.standard_normal(CLASSES)
X = RNG.random((B, D)).astype(np.float32)
Z = X @ WEIGHT.T + BIAS
Y = Z.argmax(1)
WIDE = (-4.0, 5.0)  # bounds that play no part
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
NORMS = {"linf": np.inf, "l2": 2, "l1": 1}


def model(x):
    return x @ mx.array(WEIGHT.T.astype(np.float32)) + mx.array(BIAS.astype(np.float32))


def least(norm):
    """The least changes, ``[B]``."""
    changes = np.full((B, CLASSES), np.inf)
    for k in range(CLASSES):
        w = WEIGHT[k] - WEIGHT[Y]
        changes[:, k] = (Z[np.arange(B), Y] - Z[:, k]) / np.maximum(np.linalg.norm(w, DUAL[norm], axis=1), 1e-300)
    changes[np.arange(B), Y] = np.inf
    return changes.min(1)


def attacked(attack, **options):
    return attack(model, mx.array(X), mx.array(Y), **options)


def two(x):
    return model(x)[:, :2]


TWO = mx.array(Z[:, :2].argmax(1))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    ("make", "more"),
    [(FGSM, 1.001), (PGD, 1.1), (lambda *a, **o: PGD(*a, momentum=1.0, **o), 1.1), (APGD, 1.1)],
    ids=["fgsm", "pgd", "momentum", "apgd"],
)
def test_two_classes(norm, make, more):
    """With a little more than the least change all inputs fall, with a little less none."""
    radius = abs(Z[:, 1] - Z[:, 0]) / np.linalg.norm(WEIGHT[1] - WEIGHT[0], DUAL[norm])
    for scale, want in ((more, True), (0.999, False)):
        attack = make(mx.array((scale * radius).astype(np.float32)), norm=norm, bounds=WIDE)
        assert (attack(two, mx.array(X), TWO).success == want).all().item()
        transferred = Transfer(attack, lambda x: 2 * two(x) + 1)(two, mx.array(X), TWO)
        assert (transferred.success == want).all().item()
        assert (transferred.queries == 2).all().item()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("target_classes", [4, None])
@pytest.mark.parametrize("attack", [APGD, FAB])
def test_many_classes(attack, norm, target_classes):
    """What goes through the classes, or looks at all, finds the nearest one."""
    if attack is APGD and target_classes is None:
        return
    radius = least(norm)
    for scale, want in ((1.1 if norm == "l1" else 1.03, True), (0.999, False)):
        eps = mx.array((scale * radius).astype(np.float32))
        found = attacked(attack(eps, norm=norm, target_classes=target_classes, bounds=WIDE))
        assert (found.success == want).all().item()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("target_classes", [9, None])
def test_fab_finds_the_least_change(norm, target_classes):
    found = attacked(FAB(norm=norm, bounds=WIDE, steps=40, target_classes=target_classes))
    assert found.success.all().item()
    assert np.allclose(found.distances, least(norm), rtol=2e-3)
    assert (np.array(found.distances) >= least(norm) * (1 - 1e-5)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_finds_the_least_change(norm):
    found = attacked(DeepFool(norm=norm, bounds=WIDE, overshoot=1e-3))
    assert found.success.all().item()
    distances = np.array(found.distances)
    assert (distances >= least(norm) * (1 - 1e-5)).all()
    assert (distances <= 1.001 * least(norm) + 1e-3).all()  # of bounds nine wide a step adds 0.0009
    assert (found.queries <= 1 + 4 * 14).all().item()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_does_not_jump_over_a_boundary_that_bends(norm):
    """Inside of a circle: the tangent at 0.5 points to 1.25, and there a whole step ends."""
    x = mx.array([[0.5, 0.0], [0.0, -0.6]])

    def inside(a):
        lead = 1 - mx.square(a).sum(axis=1)
        return mx.stack([lead, 0 * lead], axis=1)

    found = DeepFool(norm=norm, bounds=WIDE)(inside, x, mx.zeros(2, mx.int32))
    assert found.success.all().item()
    assert (np.array(found.distances) <= np.array([0.5, 0.4]) * 1.05).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_deepfool_moves_what_the_bounds_let_move(norm, targeted):
    """Nearly all of the gradient points out of the box; the least change is that of the other coordinates."""
    weight = np.full(D, 30.0)
    weight[:3] = 1, 2, -2
    x = np.where(np.arange(D) < 3, 0.5, np.arange(D) % 2)
    weight[3:] *= np.where(x[3:] > 0.5, 1, -1)

    def boxed(a):
        lead = 0.6 - ((a - mx.array(x, mx.float32)) * mx.array(weight, mx.float32)).sum(axis=1)
        return mx.stack([lead, 0 * lead], axis=1)

    start, zero, one = mx.array(np.tile(x, (2, 1)).astype(np.float32)), mx.zeros(2, mx.int32), mx.ones(2, mx.int32)
    found = DeepFool(norm=norm, targeted=targeted)(boxed, start, zero, **({"targets": one} if targeted else {}))
    assert found.success.all().item()
    ratio = np.array(found.distances) / (0.6 / np.linalg.norm(weight[:3], DUAL[norm]))
    assert ((ratio >= 1 - 1e-5) & (ratio <= 1.02)).all()
    assert (found.queries <= 14).all().item()


def test_carlini_wagner_finds_the_least_change():
    # The bounds are nine wide, and steps are shares of them: at twice the rate they are as long as the least changes.
    found = CarliniWagnerL2(bounds=WIDE, initial_const=1.0, learning_rate=0.005, steps=300)(two, mx.array(X), TWO)
    want = abs(Z[:, 1] - Z[:, 0]) / np.linalg.norm(WEIGHT[1] - WEIGHT[0])
    assert found.success.all().item()
    ratio = np.array(found.distances) / want
    assert ratio.min() >= 1 - 1e-4
    assert np.median(ratio) < 1.005
    assert ratio.max() < 1.1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_carlini_wagner_moves_values_that_lie_on_a_bound(value):
    """Where all do, only these can fool, within few steps; the least change is known."""
    x = mx.full((3, D), value)
    sign = 1 if value == 0 else -1

    def ground(x):
        lead = 0.6 - sign * (x - value).sum(axis=1)
        return mx.stack([lead, 0 * lead], axis=1)

    found = CarliniWagnerL2(initial_const=0.1, steps=100)(ground, x, mx.zeros(3, mx.int32))
    assert found.success.all().item()
    assert np.allclose(found.distances, 0.6 / D**0.5, rtol=0.01)
    assert (found.distances >= 0.6 / D**0.5 * (1 - 1e-5)).all().item()


def test_carlini_wagner_of_few_steps_takes_longer_ones():
    x, y = mx.array(X), TWO

    def reached(**settings):
        return CarliniWagnerL2(bounds=(0.0, 1.0), steps=10, **settings)(two, x, y)

    found, want = reached(), abs(Z[:, 1] - Z[:, 0]) / np.linalg.norm(WEIGHT[1] - WEIGHT[0])
    near = (want > 0.1) & (want < 0.3)  # a step is some 0.05 long
    assert near.sum() >= 8
    assert np.array(found.success)[near].all()
    assert np.median(np.array(found.distances)[near] / want[near]) < 1.3
    assert np.array(reached(learning_rate=0.01).success)[near].mean() < 0.5
    assert CarliniWagnerL2(steps=1000).learning_rate == 0.01


def test_carlini_wagner_confidence():
    found = attacked(CarliniWagnerL2(bounds=WIDE, initial_const=1.0, confidence=0.5, steps=200))
    z = np.array(model(found.adversarial))
    own = z[np.arange(B), Y]
    z[np.arange(B), Y] = -np.inf
    assert found.success.all().item()
    assert (z.max(1) - own >= 0.5 - 1e-4).all()


@pytest.mark.parametrize(
    "attack",
    [
        CarliniWagnerL2(targeted=True, bounds=WIDE, initial_const=1.0, steps=200),
        DeepFool(targeted=True, bounds=WIDE, overshoot=0.001),
        FAB(norm="l2", targeted=True, bounds=WIDE),
    ],
    ids=["carlini-wagner", "deepfool", "fab"],
)
def test_targets(attack):
    """Never below the least change towards the target, which a quadratic program knows, and near it on average."""
    targets = (Y + 1) % CLASSES
    found = attacked(attack, targets=mx.array(targets))
    success = np.array(found.success)
    # FAB goes to the nearest rival alone, and where two of them meet it may turn back and forth.
    assert success.mean() > 0.9 if isinstance(attack, FAB) else success.all()
    want = []
    for x, t in zip(X.astype(np.float64), targets, strict=True):
        others = np.arange(CLASSES) != t
        w, b = WEIGHT[t] - WEIGHT[others], BIAS[t] - BIAS[others]
        constraint = {"type": "ineq", "fun": lambda d, w=w, b=b, x=x: w @ (x + d) + b, "jac": lambda d, w=w: w}
        solved = optimize.minimize(
            lambda d: d @ d, np.zeros(D), jac=lambda d: 2 * d, constraints=constraint, method="SLSQP"
        )
        want.append(np.sqrt(solved.fun))
    ratio = (np.array(found.distances) / np.array(want))[success]
    assert ratio.min() >= 1 - 1e-3
    assert np.median(ratio) < 1.05


@pytest.mark.parametrize(("attack", "norm"), [(PGD, "linf"), (APGD, "linf"), (FAB, "linf"), (FAB, "l2"), (FAB, "l1")])
def test_within_the_box(norm, attack):
    """Two classes and bounds that cut the ball: only moves that fill most of the box reach the boundary.

    Not for PGD in l2 and l1: clipped to the bounds after each step, in l2 it does not come into the corners of the box,
    and in l1 not in so few steps.
    """
    w, lead = WEIGHT[1] - WEIGHT[0], Z[:, 0] - Z[:, 1]
    shift = (np.where(w > 0, 1 - X, X) @ abs(w) - lead).min() - 0.5
    need = np.array([reach(norm, x, w, z + shift) for x, z in zip(X.astype(np.float64), lead, strict=True)])
    for scale, want in ((1.1, True), (0.99, False)):
        options = {"steps": 200} if attack is FAB else {"loss": "margin"}
        found = attack(mx.array((scale * need).astype(np.float32)), norm=norm, **options)(
            lambda x: two(x) + mx.array([shift, 0.0]), mx.array(X), mx.zeros(B, mx.int32)
        )
        assert (found.success == want).all().item()


def reach(norm, x, w, rise):
    """The least norm of moves in the unit box with w . move = rise: by bisection over the radius, exactly in each."""
    slope, room = abs(w), np.where(w > 0, 1 - x, x)
    if slope @ room < rise:
        return np.inf
    low, high = 0.0, 100.0
    for _ in range(50):
        eps = (low + high) / 2
        if norm == "linf":
            gain = slope @ np.minimum(room, eps)
        elif norm == "l1":
            order, left, gain = np.argsort(-slope), eps, 0.0
            for i in order:
                part = min(left, room[i])
                gain, left = gain + slope[i] * part, left - part
        else:
            t_low, t_high = 0.0, 1e4
            for _ in range(60):
                t = (t_low + t_high) / 2
                t_low, t_high = (t, t_high) if np.linalg.norm(np.minimum(room, t * slope)) < eps else (t_low, t)
            gain = slope @ np.minimum(room, t_low * slope)
        low, high = (eps, high) if gain < rise else (low, eps)
    return high


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1, 2, 7, 31, 784]))
def test_moves_to_hyperplanes(seed, norm, d):
    """The least norm, on the hyperplane or as far as the box allows, in the box."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((3, d)) < 0.3, rng.integers(0, 2, (3, d)), rng.random((3, d))).astype(np.float32)
    w = np.where(rng.random((3, d)) < 0.2, 0, rng.standard_normal((3, d))).astype(np.float32)
    rise = (rng.standard_normal(3) * rng.choice([0.0, 0.1, 1.0, 10.0], 3)).astype(np.float32)
    moves = np.array(to_hyperplane(mx.array(x), mx.array(w), mx.array(rise), 0.0, 1.0, norm), np.float64)
    assert ((x + moves >= -1e-6) & (x + moves <= 1 + 1e-6)).all()
    for i in range(3):
        signed = w[i].astype(np.float64) * (1 if rise[i] >= 0 else -1)
        need = reach(norm, x[i].astype(np.float64), signed, abs(float(rise[i])))
        if np.isinf(need):
            assert np.allclose(signed @ moves[i], abs(signed) @ np.where(signed > 0, 1 - x[i], x[i]), atol=1e-5)
        else:
            assert signed @ moves[i] == pytest.approx(abs(rise[i]), rel=1e-6, abs=1e-5)  # sums of 784 in float32
            assert np.linalg.norm(moves[i], NORMS[norm]) == pytest.approx(need, rel=1e-4, abs=1e-5)
