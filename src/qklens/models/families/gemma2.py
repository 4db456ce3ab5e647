"""Gemma 2: γ stored as γ − 1, norms before and after attention, own score scale, soft cap, alternating windows."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from qklens.models.families.llama import LLAMA
from qklens.models.norms import GEMMA_RMS

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    eager=eager_attention_forward,
    tensors=(
        *LLAMA.tensors,
        "model.layers.{layer}.pre_feedforward_layernorm.weight",
        "model.layers.{layer}.post_feedforward_layernorm.weight",
    ),
    norm=GEMMA_RMS,
    output_norm=lambda layer: layer.post_attention_layernorm,
    score_cap=lambda attention: attention.attn_logit_softcapping,
    window=lambda attention: attention.sliding_window,
)
