"""Phi-3: Llama with q, k and v in one projection, rotary on part of each head, a sliding window on every layer."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.phi3.modeling_phi3 import eager_attention_forward

from qklens.models.families.llama import LLAMA, NORMS
from qklens.models.projections import stacked

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    eager=eager_attention_forward,
    tensors=(
        *NORMS,
        "model.layers.{layer}.self_attn.qkv_proj.weight",
        "model.layers.{layer}.self_attn.o_proj.weight",
        "model.layers.{layer}.mlp.gate_up_proj.weight",
        "model.layers.{layer}.mlp.down_proj.weight",
    ),
    projections=stacked("qkv_proj"),
    window=lambda attention: attention.config.sliding_window,
)
