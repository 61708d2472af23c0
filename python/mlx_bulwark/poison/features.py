"""What a model makes of its inputs: the features before its last layer, and its logits."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..attacks.base import check_model

Array = np.ndarray[Any, Any]

LAYERS = (
    nn.Linear, nn.QuantizedLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


class Features(NamedTuple):
    """What a model makes of its inputs."""

    features: Array
    """float32 ``[n, d]``: what the layer is given."""
    logits: Array
    """float32 ``[n, c]``: what the model returns."""
    layer: str
    """Name of the layer, as in ``model.named_modules()``."""


def penultimate_features(model: nn.Module, x: Any, *, layer: str | None = None, batch_size: int = 256) -> Array:
    """What a model's last layer is given: the features that its classes are drawn from.

    The layer is the last linear layer or convolution that runs, whatever the order of the attributes. Its input is read
    as it passes; the model, its weights and its modes stay as they are. Where that input has axes between the first and
    the last, positions or tokens, the features are their mean.

    Args:
        model: A classifier in evaluation mode, from ``[b, ...]`` to ``[b, c]``.
        x: Inputs ``[n, ...]``, NumPy or MLX, as the model takes them; float64 is given as float32.
        layer: Name of another layer whose input is wanted, as in ``model.named_modules()``. Where a layer runs several
            times, its last input counts.
        batch_size: Rows of a forward pass.

    Returns:
        array: float32 ``[n, d]``, NumPy.

    Raises:
        TypeError: The model is no ``nn.Module``.
        ValueError: It is in training mode, where dropout or batch statistics would show; it has no such layer, or the
            layer does not run or is not given a float array with one row an input; or an argument has a wrong value.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.poison import penultimate_features
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> penultimate_features(model, mx.ones((5, 4))).shape
        (5, 8)
        >>> penultimate_features(model, mx.ones((5, 4)), layer="layers.0").shape
        (5, 4)

    Source:
        B. Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", 2018.
    """
    return _run("penultimate_features", model, x, layer, batch_size)[0]


def features_and_logits(model: nn.Module, x: Any, *, layer: str | None = None, batch_size: int = 256) -> Features:
    """What a model's last layer is given, and what the model returns, of one pass over the inputs.

    Args:
        model: As for ``penultimate_features``.
        x: Inputs ``[n, ...]``, NumPy or MLX.
        layer: Name of another layer whose input is wanted.
        batch_size: Rows of a forward pass.

    Returns:
        Features: Features ``[n, d]``, logits ``[n, c]``, both float32 in NumPy, and the layer's name.

    Raises:
        TypeError: As ``penultimate_features``.
        ValueError: As ``penultimate_features``, or the model does not return ``[b, c]``.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlx_bulwark.poison import features_and_logits
        >>> found = features_and_logits(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), mx.ones((5, 4)))
        >>> found.features.shape, found.logits.shape, found.layer
        ((5, 8), (5, 3), 'layers.1')

    Source:
        As ``penultimate_features``.
    """
    features, logits, name = _run("features_and_logits", model, x, layer, batch_size)
    if any(a.ndim != 2 for a in logits):
        raise ValueError(
            f"[features_and_logits] model must return [b, c], a row of logits an input, "
            f"but returned {list(logits[0].shape)}"
        )
    return Features(features, np.concatenate(logits), name)


class _Tap:
    """The last call of the layers that are listened to."""

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        chosen = [(n, m) for n, m in model.named_modules() if (isinstance(m, LAYERS) if layer is None else n == layer)]
        self.names = {id(module): name for name, module in reversed(chosen)}  # of two names the first
        self.modules = list({id(module): module for _, module in chosen}.values())
        self.last: tuple[str, Any] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The layers' classes are replaced meanwhile by ones that tell what they are given."""
        classes = [module.__class__ for module in self.modules]
        try:
            for module in self.modules:
                module.__class__ = self._telling(module.__class__)
            yield
        finally:
            for module, cls in zip(self.modules, classes, strict=True):
                module.__class__ = cls

    def _telling(self, cls: type[nn.Module]) -> type[nn.Module]:
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            self.last = self.names[id(module)], next((a for a in (*args, *kwargs.values())), None)
            return cls.__call__(module, *args, **kwargs)

        return type(cls.__name__, (cls,), {"__call__": call})


def _run(where: str, model: nn.Module, x: Any, layer: str | None, batch_size: int) -> tuple[Array, list[Array], str]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"[{where}] model must be a mlx.nn.Module, whose layers are known, but is {type(model).__name__}"
        )
    check_model(where, model)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"[{where}] batch_size must be an integer >= 1 but is {batch_size!r}")
    x = _inputs(where, x)
    tap = _Tap(model, layer)
    if not tap.modules:
        raise ValueError(f"[{where}] {_missing(model, layer)}")
    if not len(x):  # one row of zeros tells the widths
        blank = (
            np.zeros((1, *x.shape[1:]), x.dtype) if isinstance(x, np.ndarray) else mx.zeros((1, *x.shape[1:]), x.dtype)
        )
        one, logits, name = _run(where, model, blank, layer, batch_size)
        return one[:0], [a[:0] for a in logits], name
    features: list[Array] = []
    outputs: list[Array] = []
    names: set[str] = set()
    with tap.listening():
        for start in range(0, len(x), batch_size):
            batch = mx.array(x[start : start + batch_size])
            tap.last = None
            output = model(batch)
            if tap.last is None:
                raise ValueError(f"[{where}] layer {layer or 'of model'} must run when the model does but did not")
            name, given = tap.last
            feature = _flat(where, name, given, len(batch))
            output = output.astype(mx.float32) if isinstance(output, mx.array) else mx.zeros(())
            mx.eval(feature, output)
            features.append(np.array(feature))
            outputs.append(np.array(output))
            names.add(name)
    if len(names) > 1:
        raise ValueError(f"[{where}] model must end in the same layer for all inputs but ends in {sorted(names)}")
    return np.concatenate(features), outputs, names.pop()


def _inputs(where: str, x: Any) -> Any:
    if isinstance(x, np.ndarray) and x.dtype == np.float64:
        x = x.astype(np.float32)
    known = isinstance(x, mx.array) or (isinstance(x, np.ndarray) and x.dtype.kind in "biuf")
    if not known or x.ndim < 1:
        has = f"{x.dtype} of shape {list(x.shape)}" if hasattr(x, "dtype") else f"type {type(x).__name__}"
        raise ValueError(f"[{where}] x must be an array of numbers [n, ...], NumPy or MLX, but has {has}")
    return x


def _flat(where: str, name: str, given: Any, rows: int) -> mx.array:
    if not isinstance(given, mx.array) or not mx.issubdtype(given.dtype, mx.floating):
        has = f"dtype {given.dtype}" if isinstance(given, mx.array) else f"type {type(given).__name__}"
        raise ValueError(f"[{where}] layer {name} must be given floats, which are the features, but is given {has}")
    if given.ndim < 2 or given.shape[0] != rows:
        raise ValueError(
            f"[{where}] layer {name} must be given one row for each of the {rows} inputs of a batch "
            f"but is given shape {list(given.shape)}; name a layer that is, by layer="
        )
    given = given.astype(mx.float32)
    between = tuple(range(1, given.ndim - 1))
    return mx.mean(given, axis=between) if between else given


def _missing(model: nn.Module, layer: str | None) -> str:
    names = [name for name, _ in model.named_modules() if name]
    if layer is None:
        return f"model must have a linear layer or a convolution but has none; name one of {', '.join(names)} by layer="
    near = difflib.get_close_matches(layer, names, n=5, cutoff=0.3) or sorted(names)[:5]
    return f"layer must be in model.named_modules() but is {layer!r}; near it are {', '.join(near)}"
