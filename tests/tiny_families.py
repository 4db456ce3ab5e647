"""Tiny random models of every family and head layout, made in memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qklens.models.families import load_family

LAYERS, HEADS, WIDTH = 4, 4, 32
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16, "truncate": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
HALF_SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama mha": ("llama", {"num_key_value_heads": 4}),
    "llama gqa": ("llama", {}),
    "llama mqa": ("llama", {"num_key_value_heads": 1}),
    "llama biases": ("llama", {"attention_bias": True}),
    "llama wide heads": ("llama", {"head_dim": 16}),
    "llama rotary scaling llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama rotary scaling yarn": ("llama", {"rope_parameters": YARN}),
    "llama rotary scaling linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": HALF_SLIDING}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 mha biases": ("qwen3", {"head_dim": 8, "num_key_value_heads": 4, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, "num_experts": 4, **EXPERTS}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}),
    "gemma2 without a cap": ("gemma2", {"head_dim": 8, "attn_logit_softcapping": None, "sliding_window": 64}),
    "gemma2 low cap": ("gemma2", {"head_dim": 8, "attn_logit_softcapping": 1.5, "sliding_window": 64}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 5, "layer_types": HALF_SLIDING}),
    "gemma3 mqa": ("gemma3_text", {"head_dim": 8, "num_key_value_heads": 1, "query_pre_attn_scalar": 13}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3 partial rotary window": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 5}),
    "olmo2": ("olmo2", {}),
    "olmo2 mha": ("olmo2", {"num_key_value_heads": 4}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "gpt2": ("gpt2", {}),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2 unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "gpt_oss": (
        "gpt_oss",
        {"num_experts_per_tok": 2, "head_dim": 8, "num_local_experts": 4, "sliding_window": 5, "rope_parameters": YARN},
    ),
}


def tiny_model(case: str, vocabulary: int, dtype: torch.dtype) -> PreTrainedModel:
    """A random model with every parameter drawn, norms, biases and sinks too, so that none can be left out unseen."""
    model_type, changes = CASES[case]
    common: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if model_type == "gpt2":
        shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
    else:
        shape = {
            "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 48,
            "max_position_embeddings": 128,
        }  # fmt: skip
        if model_type != "gpt_neox":
            shape["num_key_value_heads"] = 2
    config = AutoConfig.for_model(model_type, **{**common, **shape, **changes})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if load_family(model_type).experts:
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            spread = 0.5 if parameter.ndim == 1 else 0.25
            plus = 1.0 if parameter.ndim == 1 and "norm" in name and "weight" in name else 0.0
            parameter.copy_(spread * drawn + plus)
    return model.to(dtype).eval()
