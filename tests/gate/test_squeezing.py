"""Squeezers against NumPy, SciPy and Pillow; the detector on a trained network under attack."""

import io

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import packaged_data
import pytest
import scipy.fft
import scipy.ndimage
from mlx_bulwark.attacks import FGSM, PGD
from mlx_bulwark.gate import JPEG, BitDepth, FeatureSqueezing, MedianSmoothing, squeezing, straight_through
from PIL import Image

SHAPES = [(1, 1, 1, 1), (2, 7, 33, 3), (3, 16, 8, 1), (0, 8, 8, 3), (1, 31, 9, 3)]


def images(shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 3, 8, 16])
@pytest.mark.parametrize("bounds", [(0, 1), (-1.0, 3.0)])
def test_bit_depth_is_rounding(bits, bounds):
    x = images((1000,)) * 6 - 2
    low, high = bounds
    steps = 2**bits - 1
    level = np.clip((x.astype(np.float64) - low) / (high - low), 0, 1) * steps
    away = np.abs(level % 1 - 0.5) > 2e-7 * steps  # float32 may round a tie the other way
    expected = np.round(level) / steps * (high - low) + low
    np.testing.assert_allclose(np.array(BitDepth(bits, bounds)(mx.array(x)))[away], expected[away], atol=1e-6)
    assert away.mean() > 0.9
    assert len(np.unique(np.array(BitDepth(3)(mx.array(x))))) == 8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3, (1, 4), (5, 3)])
def test_median_is_that_of_scipy(shape, size):
    x = images(shape)
    window = (1, *(size if isinstance(size, tuple) else (size, size)), 1)
    expected = scipy.ndimage.median_filter(x, window, mode="reflect") if x.size else x
    np.testing.assert_array_equal(np.array(MedianSmoothing(size)(mx.array(x))), expected)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_types_are_kept(dtype):
    x = mx.array(images((2, 9, 9, 3))).astype(dtype)
    for squeezer in (BitDepth(4), MedianSmoothing(2), JPEG(50)):
        assert squeezer(x).dtype == dtype
        assert squeezer(x).shape == x.shape


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
def test_grey_jpeg_is_the_transform_of_scipy(quality):
    """In float64; a coefficient beside a tie may go the other way, and its block with it."""
    x = images((2, 16, 24, 1), quality)
    levels = np.round(x.astype(np.float64) * 255)[..., 0] - 128
    table = squeezing.quantisation_tables(quality)[0].astype(np.float64)
    expected = np.empty_like(levels)
    for b, i, j in np.ndindex(2, 2, 3):
        block = np.s_[b, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
        kept = np.round(scipy.fft.dctn(levels[block], norm="ortho") / table) * table
        expected[block] = scipy.fft.idctn(kept, norm="ortho")
    expected = np.clip(np.round(expected + 128), 0, 255)
    found = np.array(JPEG(quality)(mx.array(x)))[..., 0] * 255
    assert (np.abs(found - expected) < 0.01).mean() > 0.99


@pytest.mark.parametrize("quality", [5, 30, 75, 95])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_pillow(quality, channels):
    """Its DCT is one of integers: levels differ a little, and one block of 35 where a coefficient is beside a tie."""
    smooth = scipy.ndimage.gaussian_filter(images((1, 35, 50, channels)), (0, 2, 2, 0))
    x = np.round((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)
    picture = Image.fromarray(x[0] if channels == 3 else x[0, ..., 0])
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    expected = np.array(Image.open(file)).reshape(x.shape).astype(int)
    found = np.round(np.array(JPEG(quality)(mx.array(x / 255.0).astype(mx.float32))) * 255).astype(int)
    assert (np.abs(found - expected) <= 3).mean() > 0.96
    assert np.abs(found - expected).mean() < 0.6
    assert np.abs(found - x).mean() > np.abs(found - expected).mean()


def test_quantisation_tables_are_those_of_pillow():
    for quality in (1, 20, 50, 77, 100):
        file = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "JPEG", quality=quality)
        written = Image.open(file).quantization
        for ours, theirs in zip(squeezing.quantisation_tables(quality), (written[0], written[1]), strict=True):
            assert ours.ravel().tolist() == list(theirs)


def test_a_squeezer_has_no_gradient_but_going_around_it_has():
    x = mx.array(images((1, 8, 8, 1)))
    for squeezer in (BitDepth(2), JPEG(50)):
        assert not mx.grad(lambda x, f=squeezer: f(x).sum())(x).any()
        around = straight_through(squeezer)
        assert mx.allclose(around(x), squeezer(x), atol=1e-6)
        assert (mx.grad(lambda x, f=around: f(x).sum())(x) == 1).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BitDepth(0), "bits"),
        (lambda: BitDepth(3, (1, 1)), "bounds"),
        (lambda: MedianSmoothing(0), "size"),
        (lambda: JPEG(0), "quality"),
        (lambda: JPEG()(mx.zeros((1, 8, 8, 2))), "1 channel or 3"),
        (lambda: JPEG()(mx.zeros((8, 8, 3))), "images"),
        (lambda: MedianSmoothing(2)(mx.zeros((1, 0, 8, 3))), "images"),
        (lambda: BitDepth(3)(mx.zeros(3, mx.uint8)), "floating"),
        (lambda: FeatureSqueezing(lambda x: x, []), "squeezers"),
        (lambda: FeatureSqueezing(lambda x: x, [BitDepth(1)], 0.0), "false_positive_rate"),
        (lambda: FeatureSqueezing(lambda x: x, [BitDepth(1)]).detect(mx.zeros((1, 2))), "after fit"),
        (lambda: FeatureSqueezing(lambda x: x, [BitDepth(1)]).fit(mx.zeros((18, 2))), "19 rows or more but has 18"),
        (lambda: FeatureSqueezing(lambda x: x.sum(), [BitDepth(1)]).score(mx.zeros((1, 2))), "logits"),
        (lambda: FeatureSqueezing(lambda x: x / 0, [BitDepth(1)]).fit(mx.zeros((30, 2))), "NaN"),
    ],
)
def test_misuse_is_told(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_scores_are_distances_of_probabilities():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(5, 3)).astype(np.float32)
    x = images((700, 5))
    detector = FeatureSqueezing(lambda x: x @ mx.array(weights), [BitDepth(1), BitDepth(3)], threshold=0.3)

    def probabilities(x):
        e = np.exp(x @ weights.astype(np.float64))
        return e / e.sum(axis=1, keepdims=True)

    usual = probabilities(x)
    distances = [np.abs(probabilities(np.round(x * s) / s) - usual).sum(axis=1) for s in (1, 7)]
    expected = np.maximum(*distances)
    np.testing.assert_allclose(np.array(detector.score(mx.array(x))), expected, atol=1e-5)
    assert np.array(detector.detect(mx.array(x))).tolist() == (expected > 0.3).tolist()
    assert detector.score(mx.zeros((0, 5))).shape == (0,)
    assert FeatureSqueezing(lambda x: x / 0, [BitDepth(1)], threshold=1.9).detect(mx.zeros((2, 5))).all()


def test_the_threshold_keeps_its_rate_on_other_clean_inputs():
    """Mean rate over 400 fits of 99 rows and 200 others: 0.1 at most; false alarms of this test below 1e-6."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(400):
        x = mx.array(rng.normal(0.5, 0.2, (299, 1)).astype(np.float32))
        detector = FeatureSqueezing(lambda x: mx.concatenate([x, -x], axis=1), [BitDepth(2)], 0.1).fit(x[:99])
        rates.append(detector.detect(x[99:]).mean().item())
    assert abs(np.mean(rates) - 0.1) < 5 * np.std(rates) / 20
    assert detector.threshold == pytest.approx(float(np.sort(np.array(detector.score(x[:99])))[89]))


def test_a_trained_network_under_attack():
    """Attacks that do not know of the detector are seen, one that does is not (He et al. 2017)."""
    pictures, labels = packaged_data.mnist_images()
    order = np.random.default_rng(0).permutation(len(labels))
    x = mx.array((pictures[order] / 255).astype(np.float32)[..., None])
    y = mx.array(labels[order].astype(np.int32))
    model = trained(x[:4000], y[:4000])
    x, y, held_out = x[4500:4800], y[4500:4800], x[4000:4500]
    assert (model(x).argmax(axis=1) == y).mean() > 0.85

    squeezers = [BitDepth(1), MedianSmoothing(2)]
    detector = FeatureSqueezing(model, squeezers, 0.05).fit(held_out)
    assert detector.detect(x).mean().item() < 0.12  # of 300 rows, by 500 others: more than 4 deviations
    for attack, least in ((FGSM(0.1), 0.6), (PGD(0.1, steps=10), 0.5)):
        found = attack(model, x, y)
        seen = mx.logical_and(detector.detect(found.adversarial), found.success).sum() / found.success.sum()
        assert seen.item() > least

    def knowing(z):  # agreed on by all that the detector compares
        views = z, straight_through(squeezers[0])(z), squeezers[1](z)
        return sum(nn.log_softmax(model(view)) for view in views)

    x, y = x[:100], y[:100]
    runner_up = mx.argmax(mx.where(mx.arange(10) == y[:, None], -mx.inf, model(x)), axis=1)
    found = PGD(0.4, steps=30, targeted=True, early_stop=False)(knowing, x, y, targets=runner_up)
    fooled = model(found.adversarial).argmax(axis=1) != y
    missed = mx.logical_and(fooled, mx.logical_not(detector.detect(found.adversarial)))
    assert missed.mean().item() > 0.25


def trained(x, y):
    """A perceptron on images."""
    model = nn.Sequential(lambda x: x.reshape(len(x), -1), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = optim.Adam(5e-3)
    step = nn.value_and_grad(model, lambda m, x, y: nn.losses.cross_entropy(m(x), y, reduction="mean"))
    rng = np.random.default_rng(0)
    for _ in range(150):
        rows = mx.array(rng.integers(0, len(x), 64))
        _, gradients = step(model, x[rows], y[rows])
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
    return model
