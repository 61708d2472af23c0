"""Phase I: centre and sigma of a process from values that are trusted."""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from .charts import Array

Estimator = Literal["moving_range", "standard_deviation", "median"]

D2 = 1.1283791670955126  # 2 / sqrt(pi): mean range of two normal values, in sigmas
MAD = 1.482602218505602  # 1 / the 75 % quantile of the normal distribution


class Estimate(NamedTuple):
    """What trusted values say of a process.

    Attributes:
        center: Its centre.
        sigma: Its standard deviation.
        size: Values that both were estimated from.
    """

    center: float
    sigma: float
    size: int


def estimate(values: Any, estimator: Estimator = "moving_range") -> Estimate:
    """Estimate centre and sigma of a process from trusted values in the order of their time.

    Limits from estimates are wrong by as much as the estimates are, so that run lengths differ from chart to chart.
    With known parameters 3-sigma limits give a false alarm every 370 values on average; of charts from 30 values one in
    ten gives one every 52 values or more often, from 300 every 190 (by the moving range; ``docs/monitor.md`` has more).
    Take several hundred values where you can.

    Args:
        values: Numbers ``[n]``, n >= 2, oldest first.
        estimator: ``"moving_range"``: mean, and mean difference of neighbours / 1.128, which a slow drift or a shift
            within the baseline hardly widens. ``"standard_deviation"``: mean and standard deviation (n - 1), sharper
            where the baseline is known to be in control. ``"median"``: median and median absolute deviation * 1.4826,
            which outliers hardly move.

    Returns:
        Estimate: Centre, sigma, and the number of values.

    Raises:
        ValueError: The values are fewer than 2, not finite, or so much alike that sigma is 0.

    Example:
        >>> from mlx_bulwark.monitor import estimate
        >>> baseline = estimate([0.91, 0.92, 0.90, 0.91, 0.93])
        >>> round(baseline.center, 3), round(baseline.sigma, 4)
        (0.914, 0.0133)

    Source:
        D. Montgomery, "Introduction to Statistical Quality Control", 2012, section 6.4; on run lengths:
        W. Jensen, L. Jones-Farmer, C. Champ, W. Woodall, "Effects of Parameter Estimation on Control Chart
        Properties", 2006.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"[estimate] values must be [n] with n >= 2 but have shape {list(x.shape)}")
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise ValueError(f"[estimate] values must be finite but have {len(bad)} that are not, the first at {bad[0]}")
    if estimator not in get_args(Estimator):
        raise ValueError(f"[estimate] estimator must be one of {', '.join(get_args(Estimator))} but is {estimator!r}")
    center = float(np.median(x) if estimator == "median" else x.mean())
    sigma = _sigma(x, center, estimator)
    if not sigma > 0:
        raise ValueError(f"[estimate] values must vary but their {estimator.replace('_', ' ')} gives a sigma of 0")
    return Estimate(center, sigma, len(x))


def _sigma(x: Array, center: float, estimator: Estimator) -> float:
    if estimator == "moving_range":
        return float(np.abs(np.diff(x)).mean() / D2)
    if estimator == "median":
        return float(np.median(np.abs(x - center)) * MAD)
    return float(x.std(ddof=1))
