"""On linear models the least change that fools is known: every attack must reach it and none may beat it.

With f = w . x + b of the nearest class, the least change is |f| over the dual norm of w: that of l2 is l2, that of linf
is l1 and that of l1 is linf.
"""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
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
WIDE = (-20.0, 20.0)  # bounds that play no part
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
NORMS = {"linf": np.inf, "l2": 2, "l1": 1}


def model(x):
    return x @ mx.array(WEIGHT.T.astype(np.float32)) + mx.array(BIAS.astype(np.float32))


def least(norm, targets=None):
    """The least changes, ``[B]``; towards a target: the least that makes it the largest, by quadratic programming."""
    rivals = range(CLASSES)
    changes = np.full((B, CLASSES), np.inf)
    for k in rivals:
        w = WEIGHT[k] - WEIGHT[Y]
        changes[:, k] = (Z[np.arange(B), Y] - Z[:, k]) / np.maximum(np.linalg.norm(w, DUAL[norm], axis=1), 1e-300)
    changes[np.arange(B), Y] = np.inf
    return changes.min(1)


def attacked(attack, **options):
    return attack(model, mx.array(X), mx.array(Y), **options)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "make",
    [
        lambda *a, **o: PGD(*a, steps=100, restarts=3, loss="margin", **o),
        lambda *a, **o: APGD(*a, restarts=3, **o),
        lambda *a, **o: APGD(*a, loss="dlr", restarts=3, **o),
        lambda *a, **o: APGD(*a, target_classes=4, **o),
        lambda *a, **o: FAB(*a, **o),
        lambda *a, **o: FAB(*a, target_classes=None, **o),
    ],
    ids=["pgd", "apgd", "apgd-dlr", "apgd-t", "fab-t", "fab"],
)
def test_radii_around_the_least_change(make, norm):
    """With 3 % more than the least change all inputs fall, with 1 % less none."""
    radius = least(norm).astype(np.float32)
    assert attacked(make(mx.array(1.03 * radius), norm=norm, bounds=WIDE)).success.all().item()
    assert not attacked(make(mx.array(0.99 * radius), norm=norm, bounds=WIDE)).success.any().item()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_two_classes(norm):
    """The single step of FGSM is the best one on two classes in linf and l2, and a step along the gradient in l1."""
    w = WEIGHT[1] - WEIGHT[0]

    def two(x):
        return model(x)[:, :2]

    y = Z[:, :2].argmax(1)
    radius = abs(Z[:, 1] - Z[:, 0]) / np.linalg.norm(w, DUAL[norm])
    if norm == "l1":
        radius *= np.linalg.norm(w, np.inf) * np.linalg.norm(w, 1) / np.linalg.norm(w, 2) ** 2
    for scale, want in ((1.001, True), (0.999, False)):
        eps = mx.array((scale * radius).astype(np.float32))
        found = FGSM(eps, norm=norm, bounds=WIDE)(two, mx.array(X), mx.array(y))
        assert (found.success == want).all().item()
        transferred = Transfer(FGSM(eps, norm=norm, bounds=WIDE), lambda x: 3 * two(x) + 1)
        assert (transferred(two, mx.array(X), mx.array(y)).success == want).all().item()


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
    assert np.allclose(found.distances, least(norm), rtol=1.1e-3)
    assert (found.queries <= 1 + 2 * 4 + 2).all().item()


def test_carlini_wagner_finds_the_least_change():
    found = attacked(CarliniWagnerL2(bounds=WIDE, initial_const=1.0, learning_rate=2e-3))
    assert found.success.all().item()
    assert np.allclose(found.distances, least("l2"), rtol=5e-3)
    assert (np.array(found.distances) >= least("l2") * (1 - 1e-4)).all()


def test_carlini_wagner_confidence():
    found = attacked(CarliniWagnerL2(bounds=WIDE, initial_const=1.0, confidence=0.5, steps=400, learning_rate=2e-3))
    z = np.array(model(found.adversarial))
    own = z[np.arange(B), Y]
    z[np.arange(B), Y] = -np.inf
    assert found.success.all().item()
    assert (z.max(1) - own >= 0.5 - 1e-4).all()


@pytest.mark.parametrize(
    "attack",
    [
        CarliniWagnerL2(targeted=True, bounds=WIDE, initial_const=1.0, steps=500, learning_rate=5e-3),
        DeepFool(targeted=True, bounds=WIDE, overshoot=0.001),
        FAB(norm="l2", targeted=True, bounds=WIDE, steps=40),
    ],
    ids=["carlini-wagner", "deepfool", "fab"],
)
def test_targets(attack):
    """Never below the least change towards the target, which a quadratic program knows, and near it on average."""
    targets = (Y + 1) % CLASSES
    found = attacked(attack, targets=mx.array(targets))
    assert found.success.all().item()
    want = []
    for x, t in zip(X.astype(np.float64), targets, strict=True):
        others = np.arange(CLASSES) != t
        w, b = WEIGHT[t] - WEIGHT[others], BIAS[t] - BIAS[others]
        constraint = {"type": "ineq", "fun": lambda d, w=w, b=b, x=x: w @ (x + d) + b, "jac": lambda d, w=w: w}
        solved = optimize.minimize(
            lambda d: d @ d, np.zeros(D), jac=lambda d: 2 * d, constraints=constraint, method="SLSQP"
        )
        want.append(np.sqrt(solved.fun))
    assert (np.array(found.distances) >= np.array(want) * (1 - 1e-3)).all()
    assert np.array(found.distances).mean() <= 1.05 * np.mean(want)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", [PGD, APGD, FAB])
def test_within_the_box(norm, attack):
    """Two classes and bounds that cut the ball: what can be gained is that of a program, linear or quadratic."""
    w = (WEIGHT[1] - WEIGHT[0]) * np.where(Z[:, 1] < Z[:, 0], 1, -1)[:, None]
    lead = -abs(Z[:, 1] - Z[:, 0])
    need = np.array([reach(norm, X[i].astype(np.float64), w[i], -lead[i]) for i in range(B)])
    can = np.isfinite(need)
    assert 20 < can.sum() < B
    y = Z[:, :2].argmax(1)
    for scale, want in ((1.04, can), (0.98, np.zeros(B, bool))):
        eps = mx.array((scale * np.where(can, need, 100.0)).astype(np.float32))
        options = {"restarts": 3, "loss": "margin"} if attack is not FAB else {"steps": 200}
        found = attack(eps, norm=norm, **options)(lambda x: model(x)[:, :2], mx.array(X), mx.array(y))
        assert (np.array(found.success) == want).all()


def reach(norm, x, w, rise):
    """The least norm of moves in the unit box with w . move = rise: by bisection over the radius, exactly in each."""
    slope, room = abs(w), np.where(w > 0, 1 - x, x)
    if slope @ room < rise:
        return np.inf
    low, high = 0.0, 100.0
    for _ in range(100):
        eps = (low + high) / 2
        if norm == "linf":
            gain = slope @ np.minimum(room, eps)
        elif norm == "l1":
            order, left, gain = np.argsort(-slope), eps, 0.0
            for i in order:
                part = min(left, room[i])
                gain, left = gain + slope[i] * part, left - part
        else:
            t_low, t_high = 0.0, 1e6
            for _ in range(200):
                t = (t_low + t_high) / 2
                t_low, t_high = (t, t_high) if np.linalg.norm(np.minimum(room, t * slope)) < eps else (t_low, t)
            gain = slope @ np.minimum(room, t_low * slope)
        low, high = (eps, high) if gain < rise else (low, eps)
    return high


@given(st.integers(0, 2**32 - 1), st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1, 2, 7, 31]))
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
            assert signed @ moves[i] == pytest.approx(abs(rise[i]), abs=1e-5)
            assert np.linalg.norm(moves[i], NORMS[norm]) == pytest.approx(need, rel=1e-4, abs=1e-5)
