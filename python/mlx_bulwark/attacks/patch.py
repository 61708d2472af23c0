"""One patch that fools a model wherever it lies on any image."""

import math
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..ops.step import usable
from .base import Array, Model, check_model, checked_count, predicted, within
from .gradients import objective_of
from .losses import Loss, LossName


class PatchResult(NamedTuple):
    """What a patch did to images; one entry an image."""

    adversarial: mx.array
    """``[B, H, W, C]``: all images with the patch on them."""
    success: mx.array
    """bool ``[B]``: the image was classified correctly and is not with the patch; with a target: it was of another
    class, was not classified as the target, and is with the patch."""
    correct: mx.array
    """bool ``[B]``: the model classifies the image without the patch correctly."""
    success_rate: float
    """Successes over the images that could be one; NaN where there are none."""


class UniversalPatch:
    """A patch trained over a data set, at random places, that fools on images it has not seen.

    Each step lays the patch on a batch of images, each at a place of its own, and moves it by the sign of the mean
    gradient. ``fit`` trains it, ``apply`` lays it on images, ``evaluate`` says what it does; measure on other images
    than it was trained on.

    Args:
        shape: Height and width of the patch, in pixels.
        target: The class that patched images shall have; None: any but their own.
        mask: bool ``[h, w]``, the pixels of the patch that are laid; None: all.
        steps: Steps of the training, each a forward and a backward pass over a batch.
        step_size: Of a step, as a share of the bounds; falls to 0 over the training.
        batch_size: Images of a step.
        bounds: Lowest and highest value of a pixel.
        loss: As that of ``PGD``.
        seed: Of the places and the batches.

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_bulwark.attacks import UniversalPatch
        >>> model = lambda x: mx.stack([x.sum(axis=(1, 2, 3)), mx.full((len(x),), 17.0)], axis=1)
        >>> x, y = mx.full((8, 6, 6, 1), 0.5), mx.zeros(8, mx.int32)
        >>> patch = UniversalPatch((2, 2), steps=20).fit(model, x, y)
        >>> patch.patch.max().item(), patch.evaluate(model, x, y).success_rate
        (0.0, 1.0)

    Source:
        T. Brown et al., "Adversarial Patch", 2017.
    """

    is_universal = True  # made from many inputs: private training refuses it

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        target: int | None = None,
        mask: mx.array | None = None,
        steps: int = 500,
        step_size: float = 0.05,
        batch_size: int = 64,
        bounds: tuple[float, float] = (0.0, 1.0),
        loss: LossName | Loss = "cross_entropy",
        seed: int = 0,
    ) -> None:
        count = partial(checked_count, type(self).__name__)
        self.shape = tuple(count("shape", side) for side in shape)
        if len(self.shape) != 2:
            raise _error(f"shape must be height and width but is {shape!r}")
        self.target = None if target is None else count("target", target, least=0)
        if mask is not None and (mask.dtype != mx.bool_ or mask.shape != self.shape or not mask.any().item()):
            raise _error(f"mask must be bool of shape {self.shape} and not empty but has {mask.dtype} {mask.shape}")
        self.mask = mx.ones(self.shape, mx.bool_) if mask is None else mask
        self.steps, self.batch_size = count("steps", steps), count("batch_size", batch_size)
        if not 0 < step_size < math.inf:
            raise _error(f"step_size must be > 0 but is {step_size!r}")
        low, high = map(float, bounds)
        if not -math.inf < low < high < math.inf:
            raise _error(f"bounds must be finite and increase but is {bounds!r}")
        self.step_size, self.bounds, self.seed = float(step_size), (low, high), count("seed", seed, least=0)
        self._objective = objective_of("UniversalPatch", loss, target is not None)
        self.patch: mx.array | None = None
        """float32 ``[h, w, C]``, once it is trained; may be set to one that was saved."""

    def fit(self, model: Model, x: mx.array, y: mx.array) -> "UniversalPatch":
        """Train the patch.

        Args:
            model: Takes images ``[m, H, W, C]`` and any m, returns logits.
            x: Images ``[B, H, W, C]`` within the bounds.
            y: Classes ``[B]``, integers.

        Returns:
            UniversalPatch: Itself.

        Raises:
            ValueError: An argument has a wrong value, shape or dtype.
        """
        self._check(model, x, y)
        rng = np.random.default_rng(self.seed)
        patch = mx.full((*self.shape, x.shape[3]), sum(self.bounds) / 2)

        def total(patch: mx.array, x: mx.array, y: mx.array, places: mx.array) -> mx.array:
            logits = model(self._laid(patch, x, places)).astype(mx.float32)
            targets = mx.full(y.shape, self.target or 0, mx.int32)
            return self._objective(logits, y, targets).mean()

        gradient = mx.grad(total)
        for step in range(self.steps):
            rows = mx.array(rng.integers(0, len(x), min(self.batch_size, len(x))))
            grad = gradient(patch, x[rows], y[rows].astype(mx.int32), self._places(rng, x[rows]))
            grad = usable(grad)
            length = self.step_size * (self.bounds[1] - self.bounds[0]) * (1 - step / self.steps)
            patch = mx.clip(patch + length * mx.sign(grad), *self.bounds)
            mx.eval(patch)
        self.patch = patch
        return self

    def apply(self, x: mx.array, *, places: mx.array | None = None, seed: int = 0) -> mx.array:
        """Lay the patch on images.

        Args:
            x: Images ``[B, H, W, C]``.
            places: Rows and columns of the patch's upper left corners, int32 ``[B, 2]``; None: random.
            seed: Of random places.

        Returns:
            array: The images with the patch, in the dtype of ``x``.

        Raises:
            ValueError: There is no patch yet, or an argument has a wrong shape.
        """
        self._check_images(x)
        if self.patch is None:
            raise _error("patch must be trained by fit, or set, but is None")
        if self.patch.shape != (*self.shape, x.shape[3]):
            raise _error(f"patch must have shape {(*self.shape, x.shape[3])} but has {self.patch.shape}")
        if places is None:
            places = self._places(np.random.default_rng(seed), x)
        if places.shape != (len(x), 2):
            raise _error(f"places must have shape ({len(x)}, 2), [B, 2], but has {places.shape}")
        return self._laid(self.patch, x, places)

    def evaluate(self, model: Model, x: mx.array, y: mx.array, *, seed: int = 1) -> PatchResult:
        """Lay the patch on images at random places and ask the model; they should not be those of the training.

        Args:
            model: As that of ``fit``.
            x: Images ``[B, H, W, C]`` within the bounds.
            y: Classes ``[B]``, integers.
            seed: Of the places.

        Returns:
            PatchResult: The images with the patch, and which of them fool the model.

        Raises:
            ValueError: An argument has a wrong value, shape or dtype.
        """
        self._check(model, x, y)
        adversarial = self.apply(x, seed=seed)
        before, after = (self._predicted(model, images) for images in (x, adversarial))
        labels = np.array(y)
        if self.target is None:
            open_, fooled = before == labels, after != labels
        else:
            open_, fooled = (before != self.target) & (labels != self.target), after == self.target
        success = open_ & fooled
        rate = float(success.sum() / open_.sum()) if open_.any() else math.nan
        return PatchResult(adversarial, mx.array(success), mx.array(before == labels), rate)

    def _predicted(self, model: Model, x: mx.array) -> Array:
        parts = [x[i : i + self.batch_size] for i in range(0, len(x), self.batch_size)]
        return np.concatenate([np.array(predicted(model(part))) for part in parts])

    def _places(self, rng: np.random.Generator, x: mx.array) -> mx.array:
        most = x.shape[1] - self.shape[0] + 1, x.shape[2] - self.shape[1] + 1
        return mx.array(rng.integers(0, most, (len(x), 2)).astype(np.int32))

    def _laid(self, patch: mx.array, x: mx.array, places: mx.array) -> mx.array:
        height, width = self.shape
        down = (mx.arange(x.shape[1])[None] - places[:, :1])[:, :, None]
        right = (mx.arange(x.shape[2])[None] - places[:, 1:])[:, None]
        rows, columns = (mx.clip(a, 0, side - 1) for a, side in ((down, height), (right, width)))
        flat = rows * width + columns
        inside = mx.logical_and(rows == down, columns == right)
        inside = mx.logical_and(inside, self.mask.reshape(-1)[flat])
        return mx.where(inside[..., None], patch.reshape(height * width, -1)[flat].astype(x.dtype), x)

    def _check_images(self, x: Any) -> None:
        if not isinstance(x, mx.array) or x.ndim != 4 or not mx.issubdtype(x.dtype, mx.floating) or not len(x):
            has = f"{x.dtype} of shape {x.shape}" if isinstance(x, mx.array) else f"type {type(x).__name__}"
            raise _error(f"x must be floating images [B, H, W, C], B >= 1, but has {has}")
        if x.shape[1] < self.shape[0] or x.shape[2] < self.shape[1]:
            raise _error(f"x must be as large as the patch, {self.shape}, but has {x.shape[1:3]}")

    def _check(self, model: Any, x: Any, y: Any) -> None:
        check_model("UniversalPatch", model)
        self._check_images(x)
        if outside := int((~np.array(within(x, self.bounds))).sum()):
            raise _error(f"x must be finite and within the bounds {self.bounds} but has {outside} images that are not")
        if not isinstance(y, mx.array) or y.shape != x.shape[:1] or not mx.issubdtype(y.dtype, mx.integer):
            raise _error(f"y must be integers of shape ({len(x)},), [B], but has {getattr(y, 'shape', y)!r}")
        logits = model(x[:1])
        if not isinstance(logits, mx.array) or logits.ndim != 2 or logits.shape[1] < 2:
            raise _error("model must return logits [m, C], C >= 2")
        labels = np.append(np.array(y), 0 if self.target is None else self.target)
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise _error(f"y and target must be in [0, {logits.shape[1]}) but have {labels.min()} to {labels.max()}")


def _error(text: str) -> ValueError:
    return ValueError(f"[UniversalPatch] {text}")
