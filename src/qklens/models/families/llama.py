"""Llama: RMSNorm before attention, rotary positions (any scaling), MHA/GQA/MQA, optional q/k/v biases."""

from __future__ import annotations

from transformers.models.llama.modeling_llama import eager_attention_forward

from qklens.models.family import Family

_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION = tuple(f"model.layers.{{layer}}.self_attn.{name}.weight" for name in _MAPS)
NORMS = tuple(f"model.layers.{{layer}}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm"))
MLP = tuple(f"model.layers.{{layer}}.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj"))
QK_NORMS = tuple(f"model.layers.{{layer}}.self_attn.{name}.weight" for name in ("q_norm", "k_norm"))

LLAMA = Family(model_type="llama", eager=eager_attention_forward, tensors=ATTENTION + NORMS + MLP)
