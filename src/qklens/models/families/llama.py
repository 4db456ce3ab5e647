"""Llama: RMSNorm before attention, rotary positions, MHA/GQA/MQA, optional q/k/v biases, no QK-norm."""

from __future__ import annotations

from transformers.models.llama.modeling_llama import eager_attention_forward

from qklens.models.family import Family

LLAMA = Family(
    model_type="llama",
    eager=eager_attention_forward,
    layers=lambda model: model.model.layers,
    final_norm=lambda model: model.model.norm,
    attention=lambda layer: layer.self_attn,
    input_norm=lambda layer: layer.input_layernorm,
    norm_weight=lambda norm: norm.weight,
    norm_epsilon=lambda norm: norm.variance_epsilon,
    score_scale=lambda attention: float(attention.scaling),
    rotary=lambda model, residual, position_ids: model.model.rotary_emb(residual, position_ids=position_ids),
    tensors=(
        "model.layers.{layer}.input_layernorm.weight",
        "model.layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.v_proj.weight",
        "model.layers.{layer}.self_attn.o_proj.weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
        "model.layers.{layer}.mlp.gate_proj.weight",
        "model.layers.{layer}.mlp.up_proj.weight",
        "model.layers.{layer}.mlp.down_proj.weight",
    ),
)
