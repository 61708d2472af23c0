"""Families of mlx-lm as they are: all of their parameters, and adapters over 4 bits, against a loop over examples."""

import importlib
import inspect

import mlx.core as mx
import mlx.nn as nn
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx.utils import tree_flatten
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
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 0,
    "moe_gate_act": "softmax",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "layer_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "sliding_window_pattern": 2,
    "layer_types": ["full_attention"] * 2,
}
# What a family wants else, or otherwise.
WIDTHS = ("linear_key_head_dim", "linear_value_head_dim")
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 16}
SCALES = {"logits_scaling": 1.0, "attention_multiplier": 0.25, "embedding_multiplier": 1.0, "residual_multiplier": 1.0}
STATES = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4, "mamba_proj_bias": False}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma2": {},
    "gpt2": {},
    "mamba": {},
    "qwen3_moe": {},
    "mixtral": {},
    "olmoe": {},
    "deepseek": {},
    "afmoe": {"num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 16},
    "bailing_moe": {"num_shared_experts": 1},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, "sliding_window": 16},
    "deepseek_v2": {**LATENT, "rope_scaling": {"type": "yarn", "factor": 2.0}, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "ernie4_5": {"use_bias": False},
    "ernie4_5_moe": {"use_bias": False},
    "exaone4": {"sliding_window": 16, "sliding_window_pattern": "LG"},
    "gemma": {},
    "gemma3_text": {"sliding_window": 16},
    "glm4": {},
    "glm4_moe": {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "use_qk_norm": True},
    "gpt_bigcode": {"n_inner": 128, "multi_query": True},
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10_000, "use_parallel_residual": True},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "gptj": {"n_inner": 128, "rotary_dim": 8, "n_rotary": 8},
    "granite": SCALES,
    "granitemoe": SCALES,
    "helium": {},
    "internlm2": {},
    "jamba": {
        **STATES,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {
        "conv_bias": True,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [0],
    },
    "mamba2": {"num_heads": 8, "n_groups": 1, "time_step_limit": (0.0, 100.0), "chunk_size": 16},
    "mimo": {},
    "minicpm": {"tie_word_embeddings": False, "dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 12.0},
    "minimax": {"shared_intermediate_size": 32, "rotary_dim": 8},
    "nemotron": {"norm_eps": 1e-5},
    "olmo2": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "plamo2": {"mamba_num_heads": 8, "mamba_step": 2, "mamba_d_state": 8, "attention_window_size": 16},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3_next": {**LINEAR, "linear_conv_kernel_dim": 4, "full_attention_interval": 2},
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "seed_oss": {"tie_word_embeddings": False, "attention_out_bias": False},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {"use_qkv_bias": False, "rope_theta": 1e4},
    "starcoder2": {},
}


def build(name, **changed):
    module = importlib.import_module(f"mlx_lm.models.{name}")
    accepted = inspect.signature(module.ModelArgs).parameters
    mx.random.seed(0)
    settings = {k: v for k, v in (SIZES | FAMILIES.get(name, {}) | changed).items() if k in accepted}
    model = module.Model(module.ModelArgs(model_type=name, **settings))
    assert sum(a.size for _, a in tree_flatten(model.parameters())) < 1e6
    for path, a in tree_flatten(model.parameters()):  # routers of zeros send all tokens to the same experts, by chance
        if mx.issubdtype(a.dtype, mx.floating) and not a.any().item():
            model.load_weights([(path, 0.1 * mx.random.normal(a.shape))], strict=False)
    return model


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


def check(model, **settings):
    engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=0.1, **settings)
    report = engine.validate(model)
    assert report.is_valid, str(report)
    engine.check(model, (TOKENS,), loss_fn, noise_steps=2)
    return report


BRIEF = ("llama", "qwen3", "gemma2", "gpt2", "mamba", "qwen3_moe", "olmoe", "deepseek")
by_family = pytest.mark.parametrize(
    "name", [n if n in BRIEF else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)


@by_family
def test_full_fine_tuning(name):
    report = check(build(name))
    assert report.frozen_parameters == 0


@by_family
def test_adapters_over_4_bits(name):
    report = check(adapted(build(name)))
    assert {r.type for r in report.layers if r.status == "private"} <= {"LoRALinear", "LoRASwitchLinear"}


def test_dora_over_4_bits():
    report = check(adapted(build("llama"), use_dora=True))
    assert {r.type for r in report.layers if r.status == "private"} == {"DoRALinear"}


def test_attention_of_a_mixture_of_experts():
    model = build("mixtral")
    for _, module in model.named_modules():
        if type(module).__name__ == "SwitchLinear":
            module.freeze()
    assert "SwitchLinear" in {r.type for r in check(model).layers if r.status == "frozen"}


@pytest.mark.parametrize("name", ["minicpm", "seed_oss"])
def test_tables_that_are_multiplied_by_hand(name):
    model = build(name, tie_word_embeddings=True)
    with pytest.raises(
        bw.PrivacyError, match=r"model\.embed_tokens\.weight must be .* inside .*grad_sample_mode='loop'"
    ):
        check(model)
    assert "by a backward pass for each row" in {r.reason for r in check(model, grad_sample_mode="loop").layers}


def test_weights_of_three_values_are_refused():
    engine = bw.PrivacyEngine(100, batch_size=10, noise_multiplier=1.0, max_grad_norm=0.1)
    report = engine.validate(build("bitnet"))
    assert {r.type for r in report.refused} == {"BitLinear"}
    assert "trainable weight must be floating" in report.refused[0].reason
