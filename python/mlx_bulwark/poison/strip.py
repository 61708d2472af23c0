"""STRIP: an input whose class stands whatever is laid over it carries a trigger."""

from typing import Any, Literal

import numpy as np

from ..attacks.base import check_model
from .classifier import Array, bounds_of, inputs_of, integer, least_clean, logits_of, rank_of, share

Blend = Literal["sum", "mean"]


class STRIP:
    """Find inputs that carry a trigger, by a backdoored model that is being used.

    Clean images are laid over an input, and the entropy over classes of what the model says of each blend is averaged.
    Of a clean input the blends confuse the model; those of a triggered one go to the attacker's class all the same, and
    the mean entropy is low.

    Some clean images are the overlays, the same for every input, so that an input's score depends on nothing else. The
    others give the threshold: a quantile by rank of their own entropies, which a new clean input falls below with
    probability ``false_rejection_rate`` at most, whatever their distribution. (The paper fits a normal distribution;
    entropies are bounded and skewed, so its tail is elsewhere.)

    Args:
        model: Takes inputs ``[m, ...]`` and any m, returns logits ``[m, C]``; in evaluation mode.
        clean: Trusted inputs ``[n, ...]`` without trigger, within the bounds, NumPy or MLX.
        n: Overlays.
        false_rejection_rate: Share of clean inputs that may be taken for triggered ones. There must be
            ``1 / false_rejection_rate - 1`` clean inputs beside the overlays, or more.
        blend: ``"sum"``, cut off at the bounds, as in the authors' code, where the trigger keeps its contrast on a dark
            ground; ``"mean"``, half of each.
        bounds: Lowest and highest value of an input.
        batch_size: Inputs of a forward pass.
        seed: Of the choice of overlays.

    Attributes:
        clean_entropy: float64, ascending: of the clean inputs that are no overlays.
        threshold: Entropy at and below which an input is taken for triggered, in nats.

    Raises:
        TypeError: The model cannot be called.
        ValueError: An argument has a wrong value, shape or dtype; there are too few clean inputs; the model is in
            training mode or returns NaN.

    Example:
        >>> import mlx.core as mx, numpy as np
        >>> from mlx_bulwark.poison import STRIP
        >>> w = mx.array(np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)) * 2
        >>> w[0] = mx.array([100, 0, 0])  # the backdoor: a bright first value means class 0
        >>> clean = np.random.default_rng(1).uniform(0, 0.6, (150, 16)).astype(np.float32)
        >>> clean[:, 0] = 0
        >>> strip = STRIP(lambda x: x @ w, clean, n=20)
        >>> triggered = clean[:4].copy()
        >>> triggered[:, 0] = 1
        >>> strip.detect(triggered).tolist()
        [True, True, True, True]

    Source:
        Y. Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", 2019.
    """

    def __init__(
        self,
        model: Any,
        clean: Any,
        *,
        n: int = 50,
        false_rejection_rate: float = 0.01,
        blend: Blend = "sum",
        bounds: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        check_model("STRIP", model)
        count = integer("STRIP", "n", n, 1)
        self.false_rejection_rate = share("STRIP", "false_rejection_rate", false_rejection_rate)
        if blend not in ("sum", "mean"):
            raise ValueError(f"[STRIP] blend must be 'sum' or 'mean' but is {blend!r}")
        self.model, self.blend, self.batch_size = model, blend, integer("STRIP", "batch_size", batch_size, 1)
        least = count + least_clean(self.false_rejection_rate)
        rows = inputs_of("STRIP", "clean", clean, least=least)
        self.bounds = bounds_of("STRIP", "clean", rows, bounds)
        order = np.random.default_rng(integer("STRIP", "seed", seed, 0)).permutation(len(rows))
        self._overlays = rows[order[:count]]
        self.clean_entropy = np.sort(self.entropy(rows[order[count:]]))
        rank = rank_of(self.false_rejection_rate, len(self.clean_entropy))
        self.threshold = float(self.clean_entropy[rank - 1])

    def entropy(self, x: Any) -> Array:
        """Mean entropy over classes of what the model says of the blends of each input.

        Args:
            x: Inputs ``[m, ...]`` of the shape of the clean ones, within the bounds.

        Returns:
            array: float64 ``[m]``, in nats, from 0 to log C; low is suspicious.

        Raises:
            ValueError: ``x`` has a wrong shape, dtype or value, or the model returns NaN.
        """
        rows = inputs_of("STRIP", "x", x, shape=self._overlays.shape[1:])
        bounds_of("STRIP", "x", rows, self.bounds)
        at_once = max(1, self.batch_size // len(self._overlays))
        found = [self._entropy(rows[i : i + at_once]) for i in range(0, len(rows), at_once)]
        return np.concatenate(found) if found else np.zeros(0)

    def detect(self, x: Any) -> Array:
        """Tell which inputs carry a trigger.

        Args:
            x: Inputs ``[m, ...]``.

        Returns:
            array: bool ``[m]``.

        Raises:
            ValueError: As ``entropy``.
        """
        found: Array = self.entropy(x) <= self.threshold
        return found

    def p_values(self, x: Any) -> Array:
        """The probability of an entropy as low as each input's, were it clean: by rank among the clean ones.

        Args:
            x: Inputs ``[m, ...]``.

        Returns:
            array: float64 ``[m]``, from 1 / (clean inputs + 1) to 1.

        Raises:
            ValueError: As ``entropy``.
        """
        below = np.searchsorted(self.clean_entropy, self.entropy(x), side="right")
        found: Array = (1 + below) / (1 + len(self.clean_entropy))
        return found

    def _entropy(self, rows: Array) -> Array:
        first, second = rows[:, None], self._overlays[None]
        low, high = self.bounds
        blends = (first + second) / 2 if self.blend == "mean" else np.clip(first + (second - low), low, high)
        logits = logits_of("STRIP", self.model, blends.reshape(-1, *rows.shape[1:]), self.batch_size).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        total = np.exp(logits).sum(axis=1, keepdims=True)
        probabilities = np.exp(logits) / total
        entropy = (probabilities * (np.log(total) - logits)).sum(axis=1)
        mean: Array = entropy.reshape(len(rows), -1).mean(axis=1)
        return mean
