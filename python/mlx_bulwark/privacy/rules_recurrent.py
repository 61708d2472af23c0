"""Rules of recurrent layers: over all time steps at once, one matrix product for each of their weights.

What is added before the gates, W_x x_t + W_h h_{t-1} + bias, gets a probe for every row and step by way of the bias;
its gradient is the output gradient of both products, and the layer's own backward pass has computed it.
"""

from typing import Any

import mlx.core as mx

from .per_sample import PerSample, Tapped, combine, join, rows
from .rules_products import bias, product
from .taps import PrivacyError, Site


def gate_biases(layer: Any, inputs: list[mx.array]) -> dict[str, tuple[int, ...]]:
    """The bias before the gates, one for every row and step."""
    name, weight = ("bias", "Wxh") if "Wxh" in layer else ("b" if hasattr(layer, "bhn") else "bias", "Wx")
    x = inputs[0]
    if x.ndim < 2:
        raise PrivacyError(f"[value_and_grad] a recurrent layer must see [..., steps, features] but has {x.shape}")
    return {name: (*x.shape[:-1], layer[weight].shape[0])}


def rnn(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.RNN."""
    return _gates(site, calls, "bias", "Wxh", "Whh")


def lstm(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.LSTM."""
    return _gates(site, calls, "bias", "Wx", "Wh")


def gru(site: Site, calls: list[Tapped]) -> PerSample:
    """nn.GRU: the reset gate lies between its candidate and the second product."""
    layer: Any = site.module
    H = layer.hidden_size
    X, hidden = _inputs(calls), _hidden(site, calls)
    D = join([rows(c.inner["b"]) for c in calls], 1)
    reset = X @ layer.Wx[:H].astype(mx.float32).T + hidden @ layer.Wh[:H].astype(mx.float32).T
    if layer.b is not None:
        reset = reset + layer.b[:H]
    candidate = mx.sigmoid(reset) * D[..., -H:]
    second = mx.concatenate([D[..., :-H], candidate], axis=-1)
    biases = {"b": D, "bhn": candidate}
    return _products(site, {"Wx": (X, D), "Wh": (hidden, second)}, biases)


def _gates(site: Site, calls: list[Tapped], name: str, of_input: str, of_hidden: str) -> PerSample:
    D = join([rows(c.inner[name]) for c in calls], 1)
    return _products(site, {of_input: (_inputs(calls), D), of_hidden: (_hidden(site, calls), D)}, {name: D})


def _products(site: Site, weights: dict[str, tuple[mx.array, mx.array]], biases: dict[str, mx.array]) -> PerSample:
    params = site.params
    of_weights = [product(name, params[name].shape, U, D) for name, (U, D) in weights.items() if name in params]
    return combine(of_weights + [bias(name, D) for name, D in biases.items() if name in params])


def _inputs(calls: list[Tapped]) -> mx.array:
    return join([rows(c.x) for c in calls], 1)


def _hidden(site: Site, calls: list[Tapped]) -> mx.array:
    """What each step saw as hidden state."""
    parts = []
    for c in calls:
        if c.x.ndim < 3:
            raise PrivacyError(
                f"[value_and_grad] {site.label} must see [batch, steps, features] but has input shape {c.x.shape}: "
                "without an axis of steps it would run from one example into the next"
            )
        y, (_, first) = c.recorded["output"], c.named("x", "hidden")
        shape = (*y.shape[:-2], 1, y.shape[-1])
        start = mx.zeros(shape, y.dtype) if first is None else mx.broadcast_to(first[..., None, :], shape)
        parts.append(rows(mx.concatenate([start, y[..., :-1, :]], axis=-2)))
    return join(parts, 1)
