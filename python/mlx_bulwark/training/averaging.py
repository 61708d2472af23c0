"""Exponential moving average of weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..privacy.taps import named_arrays
from ..smoothing.bounds import is_number


class EMA:
    """Exponential moving average of a model's weights, which resists more than its last ones.

    Running statistics of batch norm are averaged with them. Averages are kept in float32, where half precision would
    lose each single step. In a compiled step ``ema.state`` belongs to the inputs and outputs.

    Args:
        model: The model; the average starts at its weights.
        decay: Share of the average that stays in an update, in [0, 1).

    Raises:
        ValueError: An argument has a wrong value.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.training import EMA
        >>> model = nn.Linear(1, 1, bias=False)
        >>> model.weight = mx.zeros((1, 1))
        >>> ema = EMA(model, decay=0.75)
        >>> model.weight = mx.ones((1, 1))
        >>> ema.update(model)
        >>> with ema.applied(model):
        ...     print(model.weight.item())
        0.25

    Source:
        P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018; S. Gowal et al.,
        "Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial Examples", 2020.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not is_number(decay) or not 0 <= decay < 1:
            raise ValueError(f"[EMA] decay must be a number in [0, 1) but is {decay!r}")
        self.decay = float(decay)
        self.state: dict[str, mx.array] = {path: _wide(a) for path, a in named_arrays(model.parameters())}

    def update(self, model: nn.Module) -> None:
        """Take the model's weights into the average.

        Args:
            model: The model, with the parameters that it had.

        Raises:
            ValueError: Its parameters are others.

        Example:
            >>> import mlx.nn as nn
            >>> from mlx_bulwark.training import EMA
            >>> model = nn.Linear(2, 2)
            >>> EMA(model).update(model)
        """
        arrays = dict(named_arrays(model.parameters()))
        if {path: a.shape for path, a in arrays.items()} != {path: a.shape for path, a in self.state.items()}:
            raise ValueError("[EMA] model must have the parameters that the average was made for but has others")
        for path, a in arrays.items():
            old = self.state[path]
            mixes = mx.issubdtype(a.dtype, mx.floating)
            self.state[path] = self.decay * old + (1 - self.decay) * a.astype(mx.float32) if mixes else a

    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averaged weights, in the dtypes that it has.

        Args:
            model: The model; changed in place.

        Example:
            >>> import mlx.nn as nn
            >>> from mlx_bulwark.training import EMA
            >>> model = nn.Linear(2, 2)
            >>> EMA(model).copy_to(model)
        """
        dtypes = {path: a.dtype for path, a in named_arrays(model.parameters())}
        model.update(tree_unflatten([(path, a.astype(dtypes[path])) for path, a in self.state.items()]))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Lend the model the averaged weights; afterwards it has its own again.

        Args:
            model: The model.

        Returns:
            A context in which the model, which it also yields, has the averaged weights.

        Example:
            >>> import mlx.nn as nn
            >>> from mlx_bulwark.training import EMA
            >>> with EMA(nn.Linear(2, 2)).applied(nn.Linear(2, 2)) as averaged:
            ...     averaged.weight.shape
            (2, 2)
        """
        own = tree_unflatten(named_arrays(model.parameters()))  # of its own: update() writes into the model's
        self.copy_to(model)
        try:
            yield model
        finally:
            model.update(own)


def _wide(a: mx.array) -> mx.array:
    # Arrays of its own: a compiled step must not meet one array as weight and as average.
    return mx.array(a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
