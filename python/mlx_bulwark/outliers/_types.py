"""Names of types."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32 or float64
Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Ints = NDArray[np.int64]
