"""GPT-NeoX (Pythia): LayerNorm, attention beside the MLP, rotary on part of each head, fused q, k and v by head."""

from __future__ import annotations

from transformers.models.gpt_neox.modeling_gpt_neox import eager_attention_forward

from qklens.models.family import Family
from qklens.models.norms import LAYER
from qklens.models.projections import interleaved

_NORMS = ("input_layernorm", "post_attention_layernorm")
_MAPS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

GPT_NEOX = Family(
    model_type="gpt_neox",
    eager=eager_attention_forward,
    tensors=tuple(f"gpt_neox.layers.{{layer}}.{part}.weight" for part in (*_NORMS, *_MAPS)),
    layers=lambda model: model.gpt_neox.layers,
    final_norm=lambda model: model.gpt_neox.final_layer_norm,
    attention=lambda layer: layer.attention,
    norm=LAYER,
    projections=interleaved("query_key_value"),
    output="dense",
    rotary=lambda model, layer, residual, position_ids: model.gpt_neox.rotary_emb(residual, position_ids=position_ids),
    grouped=False,
)
