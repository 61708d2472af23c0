"""How numbers of any magnitude reach kernels that compute in float32."""

from typing import NamedTuple

import numpy as np

from ._types import Float32, Float64, Floats

LIMIT = 1e12  # squares of it, added up over a million columns, stay within float32
_LOOKED_AT = 4096  # rows: what is found only conditions the arithmetic


class Frame(NamedTuple):
    """An offset and a power of two a column, chosen at fit from the training rows.

    A column whose values stand far from zero for what they spread (a date in seconds, say) is moved by its median, in
    float64; all columns are scaled by powers of two, which is exact, so that their typical size is near one. What then
    lies farther out than ``LIMIT`` times that is taken as lying there.
    """

    center: Float64
    scale: Float64

    def apply(self, x: Floats) -> Float32:
        """Rows as the kernels see them."""
        if x.dtype == np.float32 and not self.center.any() and (self.scale == 1).all():
            return np.clip(x, -LIMIT, LIMIT)
        with np.errstate(over="ignore", under="ignore"):
            z = (x.astype(np.float64) - self.center) * self.scale
        return np.clip(z, -LIMIT, LIMIT).astype(np.float32)


def frame_of(x: Floats, *, per_column: bool) -> Frame:
    """Frame of training rows, with one scale a column, or one for all."""
    with np.errstate(over="ignore", invalid="ignore"):
        some = x[:: max(1, -(-len(x) // _LOOKED_AT))].astype(np.float64)
        low, middle, high = np.percentile(some, [25, 50, 75], axis=0, method="nearest")
        center = np.where(high / 64 - low / 64 < np.abs(middle) / 4096, middle, 0.0)
        sizes = np.abs(some - center)
    if per_column:
        scale = np.array([_scale(column) for column in sizes.T])
    else:
        scale = np.full(x.shape[1], _scale(sizes.ravel()))
    return Frame(center, scale)


def _scale(sizes: Float64) -> float:
    sizes = sizes[(sizes > 0) & np.isfinite(sizes)]
    if not len(sizes):
        return 1.0
    return 2.0 ** -int(np.clip(np.round(np.log2(np.median(sizes))), -1000, 1000))
