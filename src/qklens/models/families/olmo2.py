"""OLMo 2: no norm before attention, one after it, and an RMSNorm over all heads' queries (and keys) as one vector."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.olmo2.modeling_olmo2 import eager_attention_forward

from qklens.models.families.llama import ATTENTION, LLAMA, MLP, QK_NORMS
from qklens.models.family import QKNorm

OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    eager=eager_attention_forward,
    tensors=(
        *ATTENTION,
        *QK_NORMS,
        *MLP,
        "model.layers.{layer}.post_attention_layernorm.weight",
        "model.layers.{layer}.post_feedforward_layernorm.weight",
    ),
    input_norm=lambda layer: None,
    output_norm=lambda layer: layer.post_attention_layernorm,
    qk_norm=QKNorm("all"),
)
