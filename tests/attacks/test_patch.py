"""A patch over a data set: where it lies, what it may hold, and that it fools images it was not trained on."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_bulwark.attacks import UniversalPatch

RNG = np.random.default_rng(0)
X = (0.5 + 0.1 * RNG.standard_normal((80, 8, 9, 2))).clip(0, 1).astype(np.float32)
WEIGHT = RNG.standard_normal((2, 3)).astype(np.float32)


def model(x):
    """Looks at the mean of each channel, so that a patch works anywhere."""
    return (x.astype(mx.float32).mean(axis=(1, 2)) - 0.5) @ mx.array(WEIGHT)


Y = np.array(model(mx.array(X)).argmax(axis=1))


def test_fools_images_that_it_has_not_seen():
    x, y = mx.array(X), mx.array(Y)
    patch = UniversalPatch((3, 3), target=int(np.bincount(Y).argmax()), steps=60).fit(model, x[:40], y[:40])
    found = patch.evaluate(model, x[40:], y[40:])
    assert found.success_rate > 0.9
    grey = UniversalPatch((3, 3), target=patch.target)
    grey.patch = mx.full((3, 3, 2), 0.5)
    assert grey.evaluate(model, x[40:], y[40:]).success_rate < 0.5
    again = UniversalPatch((3, 3), target=patch.target, steps=60).fit(model, x[:40], y[:40])
    assert (again.patch == patch.patch).all().item()


def test_success_is_counted_over_what_could_be_one():
    x, y = mx.array(X), mx.array(np.where(np.arange(80) % 4 == 0, (Y + 1) % 3, Y))
    patch = UniversalPatch((4, 4), steps=30).fit(model, x, y)
    found = patch.evaluate(model, x, y)
    correct = np.array(y) == Y
    after = np.array(model(found.adversarial).argmax(axis=1))
    assert (np.array(found.correct) == correct).all()
    assert (np.array(found.success) == (correct & (after != np.array(y)))).all()
    assert found.success_rate == pytest.approx(np.array(found.success).sum() / correct.sum())


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_lies_where_it_is_laid(dtype):
    mask = np.array([[True, False, True], [True, True, True]])
    patch = UniversalPatch((2, 3), mask=mx.array(mask))
    patch.patch = mx.array(RNG.random((2, 3, 2), dtype=np.float32))
    places = np.stack([RNG.integers(0, 7, 80), RNG.integers(0, 7, 80)], axis=1)
    x = mx.array(X).astype(dtype)
    found = patch.apply(x, places=mx.array(places))
    want = np.array(x)
    for image, (top, left) in zip(want, places, strict=True):
        window = image[top : top + 2, left : left + 3]
        window[mask] = np.array(patch.patch.astype(dtype))[mask]
    assert found.dtype == dtype
    assert (np.array(found) == want).all()


def test_random_places_reach_every_corner():
    patch = UniversalPatch((7, 8))
    patch.patch = mx.zeros((7, 8, 2))
    empty = np.array(patch.apply(mx.ones((80, 8, 9, 2))))[..., 0]
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert 5 < (empty[:, corner[0], corner[1]] == 0).sum() < 40


def test_stays_in_the_bounds():
    x, y = mx.array(X * 4 - 2), mx.array(Y)
    patch = UniversalPatch((2, 2), bounds=(-2, 2), steps=50, step_size=0.3).fit(lambda x: model(x / 4 + 0.5), x, y)
    assert patch.patch.min().item() >= -2
    assert patch.patch.max().item() <= 2
    assert mx.abs(patch.patch).max().item() == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: UniversalPatch((0, 3)), "shape must be"),
        (lambda x, y: UniversalPatch((3, 3), mask=mx.ones((2, 2), mx.bool_)), "mask must be"),
        (lambda x, y: UniversalPatch((3, 3), step_size=0), "step_size must be"),
        (lambda x, y: UniversalPatch((3, 3), bounds=(1, 0)), "bounds must be"),
        (lambda x, y: UniversalPatch((3, 3), loss="hinge"), "loss must be"),
        (lambda x, y: UniversalPatch((3, 3), target=3).fit(model, x, y), r"in \[0, 3\)"),
        (lambda x, y: UniversalPatch((9, 3)).fit(model, x, y), "as large as the patch"),
        (lambda x, y: UniversalPatch((3, 3)).fit(model, x + 1, y), "within the bounds"),
        (lambda x, y: UniversalPatch((3, 3)).fit(model, x[0], y), "x must be floating images"),
        (lambda x, y: UniversalPatch((3, 3)).fit(model, x, y[:2]), "y must be integers"),
        (lambda x, y: UniversalPatch((3, 3)).apply(x), "patch must be trained"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(mx.array(X), mx.array(Y))
