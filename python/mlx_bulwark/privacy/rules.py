"""Which rule gives the per-sample gradients of which layer."""

from typing import Any

import mlx.nn as nn

from .per_sample import PerSample, Tapped
from .refusals import own_arrays
from .rules_activations import prelu
from .rules_convolutions import convolution, transposed_convolution
from .rules_embeddings import embedding
from .rules_experts import lora_switch_linear, switch_linear
from .rules_generic import generic
from .rules_lora import dora_embedding, dora_linear, lora_embedding, lora_linear
from .rules_norms import group_norm, instance_norm, layer_norm, rms_norm
from .rules_products import bilinear, linear
from .rules_quantized import quantized_linear
from .rules_recurrent import gate_biases, gru, lstm, rnn
from .taps import Rule, Site

LORA, DORA = ("lora_a", "lora_b"), ("lora_a", "lora_b", "m")
LOOKUP = ("__call__", "as_linear")
RECURRENT: dict[str, Any] = {"needs_outputs": True, "expanded": gate_biases}
DROPOUT: dict[str, Any] = {"recorded": ("dropout",)}
TABLE: dict[str, Any] = {"methods": LOOKUP, "recorded": ("dropout",), "probed": ("dropout",)}

# By name: a model that has layers of mlx-lm has imported it, and no other model should.
RULES = {
    "mlx.nn.layers.linear.Linear": Rule(linear),
    "mlx.nn.layers.linear.Bilinear": Rule(bilinear),
    "mlx.nn.layers.convolution.Conv1d": Rule(convolution),
    "mlx.nn.layers.convolution.Conv2d": Rule(convolution),
    "mlx.nn.layers.convolution.Conv3d": Rule(convolution),
    "mlx.nn.layers.convolution_transpose.ConvTranspose1d": Rule(transposed_convolution),
    "mlx.nn.layers.convolution_transpose.ConvTranspose2d": Rule(transposed_convolution),
    "mlx.nn.layers.convolution_transpose.ConvTranspose3d": Rule(transposed_convolution),
    "mlx.nn.layers.embedding.Embedding": Rule(embedding, methods=LOOKUP),
    "mlx.nn.layers.normalization.LayerNorm": Rule(layer_norm),
    "mlx.nn.layers.normalization.RMSNorm": Rule(rms_norm),
    "mlx.nn.layers.normalization.GroupNorm": Rule(group_norm),
    "mlx.nn.layers.normalization.InstanceNorm": Rule(instance_norm),
    "mlx.nn.layers.activations.PReLU": Rule(prelu),
    "mlx.nn.layers.recurrent.RNN": Rule(rnn, ("Wxh", "Whh", "bias"), **RECURRENT),
    "mlx.nn.layers.recurrent.GRU": Rule(gru, ("Wx", "Wh", "b", "bhn"), **RECURRENT),
    "mlx.nn.layers.recurrent.LSTM": Rule(lstm, ("Wx", "Wh", "bias"), **RECURRENT),
    "mlx.nn.layers.quantized.QuantizedLinear": Rule(quantized_linear, ("scales", "biases", "bias")),
    "mlx_lm.tuner.lora.LoRALinear": Rule(lora_linear, LORA, **DROPOUT),
    "mlx_lm.tuner.lora.LoRAEmbedding": Rule(lora_embedding, LORA, **TABLE),
    "mlx_lm.tuner.dora.DoRALinear": Rule(dora_linear, DORA, **DROPOUT),
    "mlx_lm.tuner.dora.DoRAEmbedding": Rule(dora_embedding, DORA, **TABLE),
    "mlx_lm.models.switch_layers.SwitchLinear": Rule(switch_linear, routed=True),
    "mlx_lm.tuner.lora.LoRASwitchLinear": Rule(lora_switch_linear, LORA, routed=True, **DROPOUT),
    "mlx_lm.models.gemma.RMSNorm": Rule(rms_norm),
    "mlx_lm.models.gemma2.RMSNorm": Rule(rms_norm),
    "mlx_lm.models.gemma3_text.RMSNorm": Rule(rms_norm),
}


def rule_of(module: nn.Module) -> Rule | None:
    """Rule of this layer: that of its type, or of a base whose methods it leaves alone and adds no parameter to."""
    cls = type(module)
    for base in cls.__mro__:
        rule = RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule:
            unchanged = all(getattr(cls, m) is getattr(base, m) for m in rule.methods)
            return rule if unchanged and own_arrays(module, trainable=True).keys() <= set(rule.parameters) else None
    return None


def per_sample(site: Site, calls: list[Tapped]) -> PerSample:
    """Per-sample gradients of one layer over all its calls."""
    result: PerSample = site.rule.per_sample(site, calls) if site.rule else generic(site, calls)
    return result
