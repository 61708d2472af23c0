"""How a unit's gradient is bounded: over the whole model, by layer or by group; to a fixed norm, or to a found one."""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import mlx.core as mx

from ..ops.clip import clip_factors
from .taps import PrivacyError, Site

ClippingMode = Literal["flat", "automatic", "per_layer", "per_group", "adaptive"]
FactorMode = Literal["flat", "automatic"]

QUANTILE = "clipping/quantile"  # among the sums by path: no parameter has a slash in its path
_RANGE = 1e6  # a found norm stays within this factor of the first one


class Sensitivity(NamedTuple):
    """Largest change of the released sums in L2 norm, by how neighbouring data sets differ."""

    add_or_remove_one: float
    replace_one: float


class Group(NamedTuple):
    """Parameters that are clipped together, to ``share`` of the model's norm."""

    paths: frozenset[str]
    share: float


@dataclass(frozen=True)
class AdaptiveClipping:
    """Clipping norm that follows a quantile of the gradient norms, found privately.

    Every step counts, with noise of its own, how many norms were at most the clipping norm C, and moves C by
    exp(-learning_rate * (share - target_quantile)). What the count spends is part of the step: the sums get so much
    more noise that both together are one Gaussian mechanism of the engine's ``noise_multiplier``.

    Args:
        target_quantile: share of the norms that are to be at most C, in [0, 1].
        learning_rate: of the logarithm of C, above 0.
        count_noise: standard deviation of the noise on the count, in units; more than half the engine's noise
            multiplier. Default: a twentieth of the expected batch size, or the noise multiplier if that is more.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import mlx_bulwark as bw
        >>> clipping = bw.AdaptiveClipping(target_quantile=0.7)
        >>> engine = bw.PrivacyEngine(
        ...     1000, batch_size=100, noise_multiplier=1.0, max_grad_norm=0.1, clipping=clipping
        ... )
        >>> round(engine.sensitivity.add_or_remove_one, 5)
        0.1005

    Source:
        Andrew et al. 2021, Differentially Private Learning with Adaptive Clipping, algorithm 1 and theorem 1
        (arXiv:1905.03871).
    """

    target_quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.target_quantile <= 1:
            raise ValueError(f"[AdaptiveClipping] target_quantile must be in [0, 1] but is {self.target_quantile}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"[AdaptiveClipping] learning_rate must be positive but is {self.learning_rate}")
        if self.count_noise is not None and not 0 < self.count_noise < math.inf:
            raise ValueError(f"[AdaptiveClipping] count_noise must be positive but is {self.count_noise}")


class Quantile(NamedTuple):
    """Adaptive clipping for one engine."""

    rule: AdaptiveClipping
    count_noise: float
    expected_batch_size: float
    smallest: float
    largest: float

    def noise_ratio(self, noise_multiplier: float) -> float:
        """Noise on the sums over C, such that sums and count together have ``noise_multiplier`` (theorem 1)."""
        if noise_multiplier == 0:
            return 0.0
        if 2 * self.count_noise <= noise_multiplier:
            raise ValueError(
                f"[PrivacyEngine] count_noise must be more than noise_multiplier / 2 = {noise_multiplier / 2:.6g} but "
                f"is {self.count_noise:.6g}: the count alone would spend more than the step may"
            )
        return float((noise_multiplier**-2 - (2 * self.count_noise) ** -2) ** -0.5)

    def counted(self, sq_norms: mx.array, C: mx.array, noise_std: mx.array, mask: mx.array | None) -> mx.array:
        """Sum over the units of 1/2 for norms of at most C and -1/2 for others, in units of the noise on the sums.

        So scaled it takes the same noise as every other coordinate: one release, one Gaussian.
        """
        bits = mx.where(sq_norms <= C * C, 0.5, -0.5)  # NaN compares false: a refused unit counts as above
        if mask is not None:
            bits = mx.where(mask, bits, 0.0)
        return bits.sum() * self._weight(noise_std)

    def move(self, state: dict[str, Any], noisy_count: mx.array) -> None:
        """Put the next C into an engine's state, and the noise that goes with it."""
        C, noise_std = state["max_grad_norm"], state["noise_std"]
        share = noisy_count / self._weight(noise_std) / self.expected_batch_size + 0.5
        moved = C * mx.exp(-self.rule.learning_rate * (share - self.rule.target_quantile))
        state["max_grad_norm"] = mx.clip(moved, self.smallest, self.largest)
        state["noise_std"] = state["max_grad_norm"] * state["noise_ratio"]

    def _weight(self, noise_std: mx.array) -> mx.array:
        return mx.where(noise_std > 0, noise_std / self.count_noise, 1.0)


class Factors(NamedTuple):
    """Factors [B] of each group, squared norms [B] over all, and how many units were refused."""

    by_group: list[mx.array]
    sq_norms: mx.array
    num_refused: mx.array


@dataclass(frozen=True)
class Clipping:
    """What bounds a unit's gradient. ``norm``, the bound over the whole model, comes with each call: it may move."""

    factor_mode: FactorMode = "flat"
    by: Literal["model", "layer", "group"] = "model"
    norms: tuple[tuple[str, float], ...] = ()  # layer or pattern of parameter paths, and its norm
    quantile: Quantile | None = None

    def groups(self, sites: list[Site]) -> list[Group]:
        """Which parameters are clipped together."""
        paths = [(site.path, slot.path) for site in sites for slot in site.slots]
        if self.by == "model":
            return [Group(frozenset(p for _, p in paths), 1.0)]
        if self.by == "layer" and not self.norms:
            layers = list(dict.fromkeys(layer for layer, _ in paths))
            return [Group(frozenset(p for q, p in paths if q == layer), len(layers) ** -0.5) for layer in layers]
        members: dict[str, list[str]] = {name: [] for name, _ in self.norms}
        for layer, path in paths:
            members[self._name(layer, path)].append(path)
        if empty := [name for name, mine in members.items() if not mine]:
            raise PrivacyError(
                f"[value_and_grad] max_grad_norm must name {self.by}s of trainable parameters but names {empty}, which "
                f"matches none of {[p for _, p in paths]}"
            )
        total = math.sqrt(sum(c * c for _, c in self.norms))
        return [Group(frozenset(members[name]), c / total) for name, c in self.norms]

    def _name(self, layer: str, path: str) -> str:
        for name, _ in self.norms:
            if layer == name if self.by == "layer" else fnmatch.fnmatchcase(path, name):
                return name
        raise PrivacyError(
            f"[value_and_grad] max_grad_norm must cover every trainable parameter but has no {self.by} for {path}; "
            f"it has {[name for name, _ in self.norms]}"
        )

    def factors(
        self, groups: list[Group], sq_norms: list[mx.array], norm: float | mx.array, mask: mx.array | None
    ) -> Factors:
        """Factors from the squared norms [B] of each group; a unit that one group refuses has 0 in all."""
        if len(groups) == 1:
            factors, num_refused = clip_factors(sq_norms[0], norm, self.factor_mode, mask)
            return Factors([factors], sq_norms[0], num_refused)
        total = sum(sq_norms[1:], sq_norms[0])
        finite = mx.isfinite(total)
        kept = finite if mask is None else finite & mask
        refused = ~finite if mask is None else ~finite & mask
        by_group = [
            clip_factors(n, norm * g.share, self.factor_mode, kept).factors
            for g, n in zip(groups, sq_norms, strict=True)
        ]
        return Factors(by_group, total, refused.sum().astype(mx.int32))

    def noise_ratio(self, noise_multiplier: float) -> float:
        """Standard deviation of the noise on a clipped sum over the norm."""
        return self.quantile.noise_ratio(noise_multiplier) if self.quantile else noise_multiplier

    def sensitivity(self, norm: float, noise_multiplier: float) -> Sensitivity:
        """Sensitivity of what a step releases: noise is ``noise_multiplier`` times that of add or remove one."""
        most = norm * (self.noise_ratio(noise_multiplier) / noise_multiplier if noise_multiplier else 1.0)
        return Sensitivity(most, 2 * most)


def make_clipping(
    clipping: "ClippingMode | AdaptiveClipping",
    max_grad_norm: float | Mapping[str, float],
    noise_multiplier: float,
    expected_batch_size: float,
) -> tuple[Clipping, float]:
    """Check an engine's arguments; return the clipping and the norm over the whole model that it starts with."""
    if not isinstance(clipping, AdaptiveClipping) and clipping not in get_args(ClippingMode):
        raise ValueError(
            f"[PrivacyEngine] clipping must be one of {', '.join(map(repr, get_args(ClippingMode)))} or an "
            f"AdaptiveClipping but is {clipping!r}"
        )
    many = isinstance(max_grad_norm, Mapping)
    if many != (clipping == "per_group") and not (many and clipping == "per_layer"):
        raise ValueError(
            "[PrivacyEngine] max_grad_norm must be a mapping from parameter patterns with clipping='per_group', may be "
            f"one from layers with 'per_layer', and a number with others, but is {max_grad_norm!r} with {clipping!r}"
        )
    norms = tuple((str(k), float(c)) for k, c in max_grad_norm.items()) if isinstance(max_grad_norm, Mapping) else ()
    norm = math.sqrt(sum(c * c for _, c in norms)) if isinstance(max_grad_norm, Mapping) else float(max_grad_norm)
    unbounded = norm == math.inf and (noise_multiplier > 0 or clipping != "flat")
    if not norm > 0 or unbounded or any(not c > 0 for _, c in norms):
        raise ValueError(
            f"[PrivacyEngine] max_grad_norm must be positive, and finite where there is noise, but is {max_grad_norm}"
        )
    if clipping == "per_layer":
        return Clipping(by="layer", norms=norms), norm
    if clipping == "per_group":
        return Clipping(by="group", norms=norms), norm
    if clipping == "automatic":
        return Clipping("automatic"), norm
    if clipping == "flat":
        return Clipping(), norm
    rule = clipping if isinstance(clipping, AdaptiveClipping) else AdaptiveClipping()
    count_noise = rule.count_noise or max(expected_batch_size / 20, noise_multiplier)
    quantile = Quantile(rule, count_noise, expected_batch_size, norm / _RANGE, norm * _RANGE)
    quantile.noise_ratio(noise_multiplier)
    return Clipping(quantile=quantile), norm
