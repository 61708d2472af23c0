"""Preprocessors that take detail out of images, and the detector that sees whom that confuses (feature squeezing)."""

import functools
import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..attacks.base import check_model

# Tables K.1 and K.2 of ITU-T T.81, as libjpeg scales them by quality.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
TO_RGB = ((1, 0, 1.402), (1, -0.344136286, -0.714136286), (1, 1.772, 0))


class BitDepth(nn.Module):
    """Round values to ``2 ** bits`` levels between the bounds.

    Its gradient is 0: an attack must go around it (``straight_through``), and does.

    Args:
        bits: 1 to 16.
        bounds: Lowest and highest value of an input; values outside are clipped.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.gate import BitDepth
        >>> BitDepth(1)(mx.array([0.1, 0.4, 0.6, 0.9])).tolist()
        [0.0, 0.0, 1.0, 1.0]

    Source:
        W. Xu, D. Evans, Y. Qi, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks", 2018.
    """

    def __init__(self, bits: int, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
            raise ValueError(f"[BitDepth] bits must be an integer from 1 to 16 but is {bits}")
        self.bits, self.bounds = bits, _checked_bounds("BitDepth", bounds)

    def __call__(self, x: mx.array) -> mx.array:
        """Squeeze floating inputs of any shape."""
        _refuse_integers("BitDepth", x)
        low, high = self.bounds
        steps = 2**self.bits - 1
        unit = mx.clip((x.astype(mx.float32) - low) / (high - low), 0, 1)
        levels: mx.array = mx.round(unit * steps) / steps * (high - low) + low
        return levels.astype(x.dtype)


class MedianSmoothing(nn.Module):
    """Replace each pixel by the median of its neighbours, channel by channel.

    Edges are mirrored; of an even number of neighbours the upper median is taken, and an even window reaches one pixel
    farther up and left, as in ``scipy.ndimage.median_filter`` and the paper.

    Args:
        size: Height and width of the window, or one number for both.

    Raises:
        ValueError: ``size`` is not positive.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.gate import MedianSmoothing
        >>> image = mx.zeros((1, 5, 5, 1))
        >>> image[0, 2, 2, 0] = 1.0  # a speck
        >>> MedianSmoothing(3)(image).max().item()
        0.0

    Source:
        W. Xu, D. Evans, Y. Qi, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks", 2018.
    """

    def __init__(self, size: int | tuple[int, int] = 2) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"[MedianSmoothing] size must be positive, one number or two, but is {size}")

    def __call__(self, x: mx.array) -> mx.array:
        """Smooth images ``[B, H, W, C]``."""
        _refuse_other_than_images("MedianSmoothing", x)
        rows, columns = (_mirrored(n, s) for n, s in zip(x.shape[1:3], self.size, strict=True))
        padded = x[:, rows][:, :, columns]
        height, width = x.shape[1:3]
        shifted = [padded[:, i : i + height, j : j + width] for i in range(self.size[0]) for j in range(self.size[1])]
        return mx.sort(mx.stack(shifted, axis=-1), axis=-1)[..., len(shifted) // 2]


class JPEG(nn.Module):
    """Compress and decompress as JPEG does: 8-bit levels, YCbCr, DCT of 8x8 blocks, quantisation tables by quality.

    Chroma is not subsampled. Sides that are no multiples of 8 are continued by their last pixels. Its gradient is 0, as
    that of ``BitDepth``.

    Args:
        quality: 1 to 100, as libjpeg and Pillow scale it.
        bounds: The values that are black and white.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.gate import JPEG
        >>> image = mx.random.uniform(shape=(1, 16, 16, 3))
        >>> JPEG(quality=75)(image).shape
        (1, 16, 16, 3)

    Source:
        ITU-T T.81 (1992); C. Guo et al., "Countering Adversarial Images using Input Transformations", 2018.
    """

    def __init__(self, quality: int = 75, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
            raise ValueError(f"[JPEG] quality must be an integer from 1 to 100 but is {quality}")
        self.quality, self.bounds = quality, _checked_bounds("JPEG", bounds)

    def __call__(self, x: mx.array) -> mx.array:
        """Compress images ``[B, H, W, C]`` with 1 or 3 channels."""
        _refuse_other_than_images("JPEG", x)
        if x.shape[3] not in (1, 3):
            raise ValueError(f"[JPEG] x must have 1 channel or 3 but has shape {list(x.shape)}")
        low, high = self.bounds
        levels = mx.round(mx.clip((x.astype(mx.float32) - low) / (high - low), 0, 1) * 255)
        centre = mx.array([128.0, 0.0, 0.0])
        if x.shape[3] == 3:
            levels = mx.round(levels @ mx.array(TO_YCBCR).T) + (128.0 - centre)
        out = mx.clip(mx.round(self._quantised(levels - 128.0) + 128.0), 0, 255)
        if x.shape[3] == 3:
            out = mx.clip(mx.round((out - (128.0 - centre)) @ mx.array(TO_RGB).T), 0, 255)
        return (out / 255 * (high - low) + low).astype(x.dtype)

    def _quantised(self, levels: mx.array) -> mx.array:
        batch, height, width, channels = levels.shape
        down, right = -height % 8, -width % 8
        padded = mx.pad(levels, [(0, 0), (0, down), (0, right), (0, 0)], mode="edge")
        blocks = padded.reshape(batch, (height + down) // 8, 8, (width + right) // 8, 8, channels)
        blocks = blocks.transpose(0, 1, 3, 5, 2, 4)  # [B, rows, columns, C, 8, 8]
        dct = mx.array(_dct())
        tables = mx.array(quantisation_tables(self.quality)[[0, 1, 1][:channels]])
        kept = mx.round(dct @ blocks @ dct.T / tables) * tables
        blocks = (dct.T @ kept @ dct).transpose(0, 1, 4, 2, 5, 3)
        return blocks.reshape(padded.shape)[:, :height, :width]


def straight_through(squeezer: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """The same function with the gradient of the identity, as an attacker takes it (BPDA).

    Whoever evaluates a model behind a squeezer must attack it so: that its own gradient is 0 protects nobody.

    Args:
        squeezer: Returns an array like its input.

    Returns:
        Callable: Equal values, gradient 1.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.gate import BitDepth, straight_through
        >>> mx.grad(lambda x: straight_through(BitDepth(3))(x).sum())(mx.array([0.2, 0.7])).tolist()
        [1.0, 1.0]

    Source:
        A. Athalye, N. Carlini, D. Wagner, "Obfuscated Gradients Give a False Sense of Security", 2018.
    """

    def passed(x: mx.array) -> mx.array:
        return x + mx.stop_gradient(squeezer(x) - x)

    return passed


class FeatureSqueezing:
    """Detect adversarial inputs by how much a classifier changes its mind when detail is taken away.

    The score of an input is the largest L1 distance, over the squeezers, between the probabilities of the input and of
    the squeezed input: 0 to 2. What is above the threshold is detected.

    It catches attacks that do not know of it. One that does, optimising over the squeezers too (``straight_through``),
    beats it with somewhat larger perturbations (He et al. 2017): it is a tripwire, not a defense.

    Args:
        model: Takes ``[B, ...]``, returns logits ``[B, C]``.
        squeezers: Functions of a batch; ``BitDepth``, ``MedianSmoothing``, ``JPEG`` or others.
        false_positive_rate: Share of clean inputs that may be detected, above 0 and below 1.
        threshold: In place of ``fit``.
        batch_size: Inputs that the model sees at once.

    Attributes:
        threshold: Scores above are detected; None before ``fit``.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.gate import BitDepth, FeatureSqueezing
        >>> model = lambda x: 8 * mx.stack([x[:, 0] - 0.5, 0.5 - x[:, 0]], axis=1)
        >>> clean = mx.concatenate([mx.linspace(0, 0.1, 50), mx.linspace(0.9, 1, 50)])[:, None]
        >>> detector = FeatureSqueezing(model, [BitDepth(1)], false_positive_rate=0.05).fit(clean)
        >>> detector.detect(mx.array([[0.03], [0.45]])).tolist()  # just across the border, as an attack leaves it
        [False, True]

    Source:
        W. Xu, D. Evans, Y. Qi, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks", 2018; W. He
        et al., "Adversarial Example Defenses: Ensembles of Weak Defenses are not Strong", 2017.
    """

    def __init__(
        self,
        model: Callable[[mx.array], mx.array],
        squeezers: Sequence[Callable[[mx.array], mx.array]],
        false_positive_rate: float = 0.05,
        *,
        threshold: float | None = None,
        batch_size: int = 256,
    ) -> None:
        if not squeezers:
            raise ValueError("[FeatureSqueezing] squeezers must be one or more but are none")
        if not 0 < false_positive_rate < 1:
            raise ValueError(
                f"[FeatureSqueezing] false_positive_rate must be above 0 and below 1 but is {false_positive_rate}"
            )
        if batch_size < 1:
            raise ValueError(f"[FeatureSqueezing] batch_size must be positive but is {batch_size}")
        self.model, self.squeezers = model, list(squeezers)
        self.false_positive_rate, self.batch_size = false_positive_rate, batch_size
        self.threshold = threshold

    def fit(self, x: mx.array) -> "FeatureSqueezing":
        """Set the threshold by clean inputs that the model was not trained on.

        It is the score of such a rank that a further clean input is detected with probability ``false_positive_rate``
        at most, over the draw of both.

        Args:
            x: Clean inputs ``[n, ...]``, ``1 / false_positive_rate - 1`` or more.

        Returns:
            FeatureSqueezing: Itself.

        Raises:
            ValueError: There are too few inputs, or a score is NaN.
        """
        scores = np.sort(np.array(self.score(x)))
        # one part in 10^9 against the rounding of rates like 0.05
        rank = math.ceil((len(scores) + 1) * (1 - self.false_positive_rate) * (1 - 1e-9))
        if rank > len(scores):
            least = math.ceil(1 / self.false_positive_rate) - 1
            raise ValueError(f"[FeatureSqueezing] x must have {least} rows or more but has {len(scores)}")
        if np.isnan(scores).any():
            raise ValueError(f"[FeatureSqueezing] x must have scores but {np.isnan(scores).sum()} rows give NaN")
        self.threshold = float(scores[rank - 1])
        return self

    def score(self, x: mx.array) -> mx.array:
        """Largest L1 distance of probabilities over the squeezers.

        Args:
            x: Inputs ``[n, ...]``.

        Returns:
            array: float32 ``[n]``, 0 to 2.

        Raises:
            ValueError: The model returns no logits ``[n, C]``, or is in training mode with layers that mind it.
        """
        check_model("FeatureSqueezing", self.model)
        if not isinstance(x, mx.array) or not x.ndim:
            raise ValueError("[FeatureSqueezing] x must be an mlx array [n, ...] but is not")
        parts = [mx.zeros(0)]
        for start in range(0, len(x), self.batch_size):
            parts.append(self._scored(x[start : start + self.batch_size]))
            mx.eval(parts[-1])
        return mx.concatenate(parts)

    def detect(self, x: mx.array) -> mx.array:
        """Tell which inputs are adversarial by the threshold.

        Args:
            x: Inputs ``[n, ...]``.

        Returns:
            array: bool ``[n]``. A score of NaN is detected.

        Raises:
            ValueError: There is no threshold yet.
        """
        if self.threshold is None:
            raise ValueError("[FeatureSqueezing] detect must come after fit, or with a threshold, but has none")
        return mx.logical_not(self.score(x) <= self.threshold)

    def _scored(self, x: mx.array) -> mx.array:
        usual = self._probabilities(x)
        far = [mx.abs(self._probabilities(squeeze(x)) - usual).sum(axis=1) for squeeze in self.squeezers]
        return functools.reduce(mx.maximum, far)

    def _probabilities(self, x: mx.array) -> mx.array:
        logits = self.model(x)
        if not isinstance(logits, mx.array) or logits.ndim != 2 or len(logits) != len(x):
            has = f"shape {list(logits.shape)}" if isinstance(logits, mx.array) else type(logits).__name__
            raise ValueError(f"[FeatureSqueezing] model must return logits [{len(x)}, C] but returned {has}")
        return mx.softmax(logits.astype(mx.float32), axis=1, precise=True)


def quantisation_tables(quality: int) -> np.ndarray:
    """Tables of luminance and chrominance at a quality, float32 ``[2, 8, 8]``."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = np.array([LUMINANCE, CHROMINANCE], np.int64)
    return np.clip((base * scale + 50) // 100, 1, 255).astype(np.float32)


@functools.lru_cache
def _dct() -> np.ndarray:
    """Orthonormal DCT-II of 8 values."""
    k, n = np.mgrid[:8, :8]
    rows = np.cos(np.pi * (2 * n + 1) * k / 16) / 2
    rows[0] /= math.sqrt(2)
    dct: np.ndarray = rows.astype(np.float32)
    return dct


def _mirrored(length: int, size: int) -> mx.array:
    """Places of the pixels from half a window before the first to half a window after the last."""
    place = np.arange(-(size // 2), length + size - 1 - size // 2) % (2 * max(length, 1))
    return mx.array(np.where(place < length, place, 2 * length - 1 - place).astype(np.int32))


def _checked_bounds(where: str, bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = (float(b) for b in bounds)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"[{where}] bounds must be finite and ascending but are {bounds}")
    return low, high


def _refuse_integers(where: str, x: mx.array) -> None:
    if not isinstance(x, mx.array) or not mx.issubdtype(x.dtype, mx.floating):
        has = f"dtype {x.dtype}" if isinstance(x, mx.array) else f"type {type(x).__name__}"
        raise ValueError(f"[{where}] x must be a floating array but has {has}")


def _refuse_other_than_images(where: str, x: mx.array) -> None:
    _refuse_integers(where, x)
    if x.ndim != 4 or not all(x.shape[1:]):
        raise ValueError(f"[{where}] x must be images [B, H, W, C] but has shape {list(x.shape)}")
