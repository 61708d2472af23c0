"""Activation ranges: inputs that drive a unit where no trusted input drives it."""

from typing import Any

import mlx.nn as nn
import numpy as np

from .classifier import Array, inputs_of, integer, least_clean, rank_of, share
from .features import penultimate_features

FLOOR = 0.1  # of the mean deviation of all units: what a unit's own is at least, for units at rest


class ActivationRange:
    """Find inputs whose units before the last layer leave the range that trusted inputs gave them.

    A trigger often drives a few units to values that no clean input reaches. Half of the trusted inputs give each
    unit's highest value and deviation; an input's score is by how many deviations its most extreme unit is above that.
    The other half give the threshold, by rank: a new clean input is above it with probability ``false_alarm_rate`` at
    most, whatever the distribution.

    Args:
        model: A classifier in evaluation mode.
        trusted: Inputs ``[n, ...]`` without trigger, NumPy or MLX.
        layer: Name of another layer whose inputs are looked at, as in ``model.named_modules()``.
        false_alarm_rate: Share of clean inputs that may be taken for triggered ones.
        batch_size: Inputs of a forward pass.
        seed: Of the halves.

    Attributes:
        highest: float64 ``[d]``: of each unit on trusted inputs.
        threshold: Score at and above which an input is found.

    Raises:
        TypeError: The model is no ``nn.Module``.
        ValueError: An argument has a wrong value or shape, or there are too few trusted inputs.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, numpy as np
        >>> from mlx_bulwark.poison import ActivationRange
        >>> mx.random.seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = np.random.default_rng(0).uniform(size=(400, 4)).astype(np.float32)
        >>> ranges = ActivationRange(model, x)
        >>> ranges.detect(10 * x[:3]).tolist()
        [True, True, True]

    Source:
        K. Liu, B. Dolan-Gavitt, S. Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
        2018, on what triggers do to units.
    """

    def __init__(
        self,
        model: nn.Module,
        trusted: Any,
        *,
        layer: str | None = None,
        false_alarm_rate: float = 0.01,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        op = "ActivationRange"
        self.false_alarm_rate = share(op, "false_alarm_rate", false_alarm_rate)
        self.model, self.layer = model, layer
        self.batch_size = integer(op, "batch_size", batch_size, 1)
        least = 2 * least_clean(self.false_alarm_rate)
        rows = inputs_of(op, "trusted", trusted, least=max(4, least))
        rows = rows[np.random.default_rng(integer(op, "seed", seed, 0)).permutation(len(rows))]
        self._shape = rows.shape[1:]
        features = self._features(rows)
        half = len(rows) // 2
        self.highest = features[:half].max(axis=0)
        deviation = features[:half].std(axis=0)
        self._scale = deviation + FLOOR * deviation.mean()
        if not self._scale.all():
            raise ValueError(f"[{op}] model must have units that vary over the trusted inputs but all are constant")
        self.trusted_scores = np.sort(self._scores(features[half:]))
        self.threshold = float(self.trusted_scores[-rank_of(self.false_alarm_rate, len(self.trusted_scores))])

    def score(self, x: Any) -> Array:
        """By how many deviations the most extreme unit of each input is above the trusted range.

        Args:
            x: Inputs ``[m, ...]``.

        Returns:
            array: float64 ``[m]``; negative within the range.

        Raises:
            ValueError: ``x`` has a wrong shape or value.
        """
        return self._scores(self._features(inputs_of("ActivationRange", "x", x, shape=self._shape)))

    def detect(self, x: Any) -> Array:
        """Tell which inputs leave the range.

        Args:
            x: Inputs ``[m, ...]``.

        Returns:
            array: bool ``[m]``.

        Raises:
            ValueError: As ``score``.
        """
        found: Array = self.score(x) >= self.threshold
        return found

    def units(self, x: Any) -> Array:
        """Count by unit the inputs that drive it above its range as far as it takes to be found.

        Args:
            x: Inputs ``[m, ...]``.

        Returns:
            array: int64 ``[d]``.

        Raises:
            ValueError: As ``score``.
        """
        features = self._features(inputs_of("ActivationRange", "x", x, shape=self._shape))
        counts: Array = ((features - self.highest) / self._scale >= self.threshold).sum(axis=0)
        return counts

    def _features(self, x: Array) -> Array:
        found = penultimate_features(self.model, x, layer=self.layer, batch_size=self.batch_size).astype(np.float64)
        if not np.isfinite(found).all():
            raise ValueError("[ActivationRange] model must have finite activations but has NaN or infinity")
        return found

    def _scores(self, features: Array) -> Array:
        scores: Array = ((features - self.highest) / self._scale).max(axis=1)
        return scores
