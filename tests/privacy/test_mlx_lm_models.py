"""Models of mlx-lm as they are: all of their parameters, and adapters over 4 bits."""

import importlib
import inspect

import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_epsilon": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
    "query_pre_attn_scalar": 16,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 128,
    "n_ctx": 128,
    "state_size": 8,
    "conv_kernel": 4,
    "use_bias": True,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}


def build(name):
    module = importlib.import_module(f"mlx_lm.models.{name}")
    accepted = inspect.signature(module.ModelArgs).parameters
    mx.random.seed(0)
    return module.Model(module.ModelArgs(model_type=name, **{k: v for k, v in SIZES.items() if k in accepted}))


def fits_groups(path, module):
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def adapted(model, **options):
    nn.quantize(model, 32, 4, class_predicate=fits_groups)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "dropout": 0.1, "scale": 2.0}, **options)
    for module in model.modules():
        if "lora_b" in module:  # zero at the start, which would hide the gradient of lora_a
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    return model


TOKENS = mx.array(np.random.default_rng(0).integers(0, 96, (3, 12)))


def loss_fn(model, tokens):
    return nn.losses.cross_entropy(model(tokens)[:, :-1], tokens[:, 1:], reduction="none").mean(axis=1)


def check(model):
    engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=0.1)
    report = engine.validate(model)
    assert report.is_valid, str(report)
    engine.check(model, (TOKENS,), loss_fn, noise_steps=2)
    return report


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "mamba"])
def test_full_fine_tuning(name):
    report = check(build(name))
    assert report.frozen_parameters == 0
    by_vmap = {r.type for r in report.layers if "vmap" in r.reason}
    assert by_vmap == ({"MambaBlock"} if name == "mamba" else set())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "mamba"])
def test_adapters_over_4_bits(name):
    report = check(adapted(build(name)))
    assert {r.type for r in report.layers if r.status == "private"} == {"LoRALinear"}


def test_dora_over_4_bits():
    report = check(adapted(build("llama"), use_dora=True))
    assert {r.type for r in report.layers if r.status == "private"} == {"DoRALinear"}


def test_attention_of_a_mixture_of_experts():
    model = build("mixtral")
    for _, module in model.named_modules():
        if type(module).__name__ == "SwitchLinear":
            module.freeze()
    assert "SwitchLinear" in {r.type for r in check(model).layers if r.status == "frozen"}
