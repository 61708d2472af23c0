"""Losses that train a classifier to be smoothed, for any training loop of MLX.

Their noise is for training and comes from ``mx.random``: in a compiled step ``mx.random.state`` belongs to the inputs
and outputs, as with dropout.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .bounds import check_count, check_positive, is_number

Model = Callable[[mx.array], mx.array]


def gaussian_augmentation_loss(
    model: Model, x: mx.array, y: mx.array, sigma: float, *, copies: int = 1, key: mx.array | None = None
) -> mx.array:
    """Cross-entropy on noisy inputs, the simplest training for smoothing.

    Args:
        model: Takes ``[m, *shape]``, returns logits ``[m, c]``.
        x: Inputs ``[b, *shape]``, floating.
        y: Classes ``[b]``, integers.
        sigma: Standard deviation of the noise, in the unit of ``x``; best that of the certificates.
        copies: Noisy copies of each input.
        key: Key of ``mx.random``; by default its global state.

    Returns:
        array: The mean loss, a scalar.

    Raises:
        ValueError: An argument has a wrong value or shape.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.smoothing import gaussian_augmentation_loss
        >>> model, x, y = nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> loss, gradients = nn.value_and_grad(model, gaussian_augmentation_loss)(model, x, y, 0.25)
        >>> loss.shape
        ()

    Source:
        J. Cohen, E. Rosenfeld, Z. Kolter, "Certified Adversarial Robustness via Randomized Smoothing", 2019.
    """
    _check("gaussian_augmentation_loss", x, y, sigma, copies)
    logits = _logits(model, _noisy(x, sigma, copies, key))
    return -_mean_log_probability(logits, y)


def smooth_adv_loss(
    model: Model,
    x: mx.array,
    y: mx.array,
    sigma: float,
    *,
    epsilon: float,
    steps: int = 4,
    step_size: float | None = None,
    copies: int = 2,
    key: mx.array | None = None,
) -> mx.array:
    """Adversarial training of the smoothed classifier (SmoothAdv): cross-entropy on noisy adversarial inputs.

    The adversary goes against the mean probability over noisy copies, by projected gradient ascent in the L2 ball; the
    loss is taken at what it found, under the same noise.

    Args:
        model: Takes ``[m, *shape]``, returns logits ``[m, c]``.
        x: Inputs ``[b, *shape]``, floating.
        y: Classes ``[b]``, integers.
        sigma: Standard deviation of the noise, in the unit of ``x``.
        epsilon: L2 radius of the adversary, in the unit of ``x``. Best raised from 0 over the first epochs.
        steps: Steps of the adversary; each takes the time of a training step.
        step_size: L2 length of a step, by default ``2 * epsilon / steps``.
        copies: Noisy copies of each input.
        key: Key of ``mx.random``; by default its global state.

    Returns:
        array: The mean loss, a scalar.

    Raises:
        ValueError: An argument has a wrong value or shape.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.smoothing import smooth_adv_loss
        >>> model, x, y = nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> loss, gradients = nn.value_and_grad(model, smooth_adv_loss)(model, x, y, 0.25, epsilon=0.5)
        >>> loss.shape
        ()

    Source:
        H. Salman et al., "Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers", 2019.
    """
    _check("smooth_adv_loss", x, y, sigma, copies)
    check_count("smooth_adv_loss", "steps", steps)
    _check_weights("smooth_adv_loss", epsilon=epsilon)
    step = 2 * epsilon / steps if step_size is None else step_size
    _check_weights("smooth_adv_loss", step_size=step)
    noise = sigma * mx.random.normal((copies, *x.shape), key=key)

    def log_mean_probability(shift: mx.array) -> mx.array:
        probabilities = _log_probabilities(_logits(model, (x + shift + noise).astype(x.dtype)), y)
        return mx.logsumexp(probabilities, axis=0).sum()

    shift = mx.zeros(x.shape)
    for _ in range(steps):
        shift = shift - step * _unit(mx.grad(log_mean_probability)(shift))
        shift = shift * mx.minimum(1.0, epsilon / mx.maximum(_norm(shift), 1e-12))
    adversarial = (x + mx.stop_gradient(shift) + noise).astype(x.dtype)
    return -_mean_log_probability(_logits(model, adversarial), y)


def macer_loss(
    model: Model,
    x: mx.array,
    y: mx.array,
    sigma: float,
    *,
    copies: int = 16,
    weight: float = 12.0,
    gamma: float = 8.0,
    beta: float = 16.0,
    key: mx.array | None = None,
) -> mx.array:
    """Cross-entropy of the smoothed classifier, and its certified radius made larger (MACER), without an attack.

    For inputs that are classified correctly under noise, ``weight * sigma / 2 * max(0, gamma - (z_y - z_other))`` is
    added, where z are the normal quantiles of the mean softmax, at inverse temperature beta, of the class and of its
    best rival: their difference times sigma / 2 is the radius.

    Args:
        model: Takes ``[m, *shape]``, returns logits ``[m, c]``.
        x: Inputs ``[b, *shape]``, floating.
        y: Classes ``[b]``, integers.
        sigma: Standard deviation of the noise, in the unit of ``x``.
        copies: Noisy copies of each input.
        weight: Weight of the radius, >= 0.
        gamma: Difference of quantiles from which an input is robust enough.
        beta: Inverse temperature of the softmax in the radius.
        key: Key of ``mx.random``; by default its global state.

    Returns:
        array: The mean loss, a scalar.

    Raises:
        ValueError: An argument has a wrong value or shape.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.smoothing import macer_loss
        >>> model, x, y = nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> loss, gradients = nn.value_and_grad(model, macer_loss)(model, x, y, 0.25)
        >>> loss.shape
        ()

    Source:
        R. Zhai et al., "MACER: Attack-free and Scalable Robust Training via Maximizing Certified Radius", 2020.
    """
    _check("macer_loss", x, y, sigma, copies)
    _check_weights("macer_loss", weight=weight, gamma=gamma, beta=beta)
    logits = _logits(model, _noisy(x, sigma, copies, key))
    classification = math.log(copies) - mx.logsumexp(_log_probabilities(logits, y), axis=0)
    mean = mx.softmax(beta * logits, axis=-1).mean(axis=0)
    own = y[:, None] == mx.arange(mean.shape[-1])
    right, rival = mx.where(own, mean, 0).sum(-1), mx.where(own, 0, mean).max(-1)
    # Where a float32 cannot tell p from 1 the radius is large enough, and its derivative infinite.
    usable = (right > rival) & (rival > 1e-7) & (right < 1 - 1e-7)
    gap = _quantile(mx.where(usable, right, 0.5)) - _quantile(mx.where(usable, rival, 0.5))
    radius = mx.where(usable, mx.maximum(gamma - gap, 0), 0)
    loss: mx.array = (classification + weight * sigma / 2 * radius).mean()
    return loss


def consistency_loss(
    model: Model,
    x: mx.array,
    y: mx.array,
    sigma: float,
    *,
    copies: int = 2,
    weight: float = 10.0,
    entropy_weight: float = 0.5,
    key: mx.array | None = None,
) -> mx.array:
    """Cross-entropy on noisy inputs, and predictions that agree over the noise (consistency regularisation).

    Adds ``weight`` times the mean divergence KL(mean prediction || prediction of a copy), and ``entropy_weight`` times
    the entropy of the mean prediction.

    Args:
        model: Takes ``[m, *shape]``, returns logits ``[m, c]``.
        x: Inputs ``[b, *shape]``, floating.
        y: Classes ``[b]``, integers.
        sigma: Standard deviation of the noise, in the unit of ``x``.
        copies: Noisy copies of each input, >= 2.
        weight: Weight of the divergence, >= 0.
        entropy_weight: Weight of the entropy, >= 0.
        key: Key of ``mx.random``; by default its global state.

    Returns:
        array: The mean loss, a scalar.

    Raises:
        ValueError: An argument has a wrong value or shape.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.smoothing import consistency_loss
        >>> model, x, y = nn.Linear(4, 3), mx.zeros((8, 4)), mx.zeros(8, mx.int32)
        >>> loss, gradients = nn.value_and_grad(model, consistency_loss)(model, x, y, 0.25)
        >>> loss.shape
        ()

    Source:
        J. Jeong, J. Shin, "Consistency Regularization for Certified Robustness of Smoothed Classifiers", 2020.
    """
    _check("consistency_loss", x, y, sigma, copies)
    _check_weights("consistency_loss", weight=weight, entropy_weight=entropy_weight)
    if copies < 2:
        raise ValueError(f"[consistency_loss] copies must be 2 or more but is {copies}")
    logits = _logits(model, _noisy(x, sigma, copies, key))
    each = nn.log_softmax(logits, axis=-1)
    log_mean = mx.logsumexp(each, axis=0) - math.log(copies)
    mean = mx.exp(log_mean)
    entropy = -(mean * log_mean).sum(-1).mean()
    divergence = (mean * (log_mean - each)).sum(-1).mean()
    loss: mx.array = -_mean_log_probability(logits, y) + weight * divergence + entropy_weight * entropy
    return loss


def denoising_loss(
    denoiser: Model,
    x: mx.array,
    sigma: float,
    *,
    classifier: Model | None = None,
    copies: int = 1,
    key: mx.array | None = None,
) -> mx.array:
    """Train a denoiser to stand before a fixed classifier (denoised smoothing).

    Without a classifier the mean squared error against the clean inputs; with one the cross-entropy of its
    predictions on denoised inputs against its own classes of the clean ones (the "stability" objective).

    Args:
        denoiser: Takes noisy inputs ``[m, *shape]``, returns ``[m, *shape]``.
        x: Inputs ``[b, *shape]``, floating.
        sigma: Standard deviation of the noise, in the unit of ``x``.
        classifier: The fixed classifier; derivatives pass through it.
        copies: Noisy copies of each input.
        key: Key of ``mx.random``; by default its global state.

    Returns:
        array: The mean loss, a scalar.

    Raises:
        ValueError: An argument has a wrong value, or the denoiser changes the shape.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.smoothing import denoising_loss
        >>> denoiser, x = nn.Linear(4, 4), mx.zeros((8, 4))
        >>> loss, gradients = nn.value_and_grad(denoiser, denoising_loss)(denoiser, x, 0.25)
        >>> loss.shape
        ()

    Source:
        H. Salman, M. Sun, G. Yang, A. Kapoor, Z. Kolter, "Denoised Smoothing: A Provable Defense for Pretrained
        Classifiers", 2020.
    """
    _check("denoising_loss", x, None, sigma, copies)
    noisy = _noisy(x, sigma, copies, key)
    cleaned = denoiser(noisy.reshape(-1, *x.shape[1:]))
    if cleaned.shape != (copies * len(x), *x.shape[1:]):
        raise ValueError(f"[denoising_loss] denoiser must return {x.shape[1:]} each but has shape {cleaned.shape}")
    if classifier is None:
        return mx.square(cleaned.reshape(noisy.shape).astype(mx.float32) - x).mean()
    own = mx.stop_gradient(mx.argmax(classifier(x), axis=-1))
    logits = classifier(cleaned).astype(mx.float32)
    return -_mean_log_probability(logits.reshape(copies, len(x), -1), own)


class DenoisedClassifier(nn.Module):
    """A denoiser before a fixed classifier: what ``Smooth`` certifies without touching the classifier.

    Args:
        denoiser: Takes ``[m, *shape]``, returns ``[m, *shape]``; trained by ``denoising_loss``.
        classifier: Takes ``[m, *shape]``, returns logits. It is frozen here.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.smoothing import DenoisedClassifier
        >>> model = DenoisedClassifier(nn.Linear(4, 4), nn.Linear(4, 3))
        >>> model(mx.zeros((2, 4))).shape, model.trainable_parameters()["classifier"]
        ((2, 3), {})

    Source:
        H. Salman, M. Sun, G. Yang, A. Kapoor, Z. Kolter, "Denoised Smoothing: A Provable Defense for Pretrained
        Classifiers", 2020.
    """

    def __init__(self, denoiser: nn.Module, classifier: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.denoiser = denoiser
        self.classifier = classifier
        classifier.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """Denoise, then classify."""
        logits: mx.array = self.classifier(self.denoiser(x))
        return logits


def _check(where: str, x: Any, y: Any, sigma: Any, copies: Any) -> None:
    check_positive(where, "sigma", sigma)
    check_count(where, "copies", copies)
    if not isinstance(x, mx.array) or not mx.issubdtype(x.dtype, mx.floating) or x.ndim < 2:
        has = f"{x.dtype} of shape {x.shape}" if isinstance(x, mx.array) else f"type {type(x).__name__}"
        raise ValueError(f"[{where}] x must be a floating array [b, *shape] but has {has}")
    if y is None:
        return
    if not isinstance(y, mx.array) or not mx.issubdtype(y.dtype, mx.integer) or y.shape != (len(x),):
        has = f"{y.dtype} of shape {y.shape}" if isinstance(y, mx.array) else f"type {type(y).__name__}"
        raise ValueError(f"[{where}] y must be {len(x)} integers, one for each row of x, but has {has}")


def _check_weights(where: str, **weights: Any) -> None:
    for name, value in weights.items():
        if not is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"[{where}] {name} must be a finite number >= 0 but is {value!r}")


def _noisy(x: mx.array, sigma: float, copies: int, key: mx.array | None) -> mx.array:
    return (x + sigma * mx.random.normal((copies, *x.shape), key=key)).astype(x.dtype)


def _logits(model: Model, noisy: mx.array) -> mx.array:
    """Logits ``[copies, b, c]`` of inputs ``[copies, b, *shape]``, in float32."""
    copies, b = noisy.shape[:2]
    return model(noisy.reshape(-1, *noisy.shape[2:])).astype(mx.float32).reshape(copies, b, -1)


def _log_probabilities(logits: mx.array, y: mx.array) -> mx.array:
    """Log of the probability of the class, ``[copies, b]``."""
    own = mx.broadcast_to(y[None, :, None], (*logits.shape[:2], 1))
    return mx.take_along_axis(logits, own, axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)


def _mean_log_probability(logits: mx.array, y: mx.array) -> mx.array:
    return _log_probabilities(logits, y).mean()


def _quantile(p: mx.array) -> mx.array:
    return math.sqrt(2) * mx.erfinv(2 * p - 1)


def _norm(x: mx.array) -> mx.array:
    return mx.sqrt(mx.square(x).sum(axis=tuple(range(1, x.ndim)), keepdims=True))


def _unit(x: mx.array) -> mx.array:
    return x / mx.maximum(_norm(x), 1e-12)
