"""GPT-2: LayerNorm, learned positions, q, k and v in one transposed projection with biases, scales by layer."""

from __future__ import annotations

from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

from qklens.models.family import Family
from qklens.models.norms import LAYER
from qklens.models.projections import stacked

_PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")

GPT2 = Family(
    model_type="gpt2",
    eager=eager_attention_forward,
    tensors=tuple(f"h.{{layer}}.{part}.{kind}" for part in _PARTS for kind in ("weight", "bias")),
    tensor_prefix="transformer.",
    layers=lambda model: model.transformer.h,
    final_norm=lambda model: model.transformer.ln_f,
    attention=lambda layer: layer.attn,
    norm=LAYER,
    input_norm=lambda layer: layer.ln_1,
    projections=stacked("c_attn"),
    output="c_proj",
    rotary=lambda model, layer, residual, position_ids: None,
    unproven=lambda config: "reorder_and_upcast_attn" if config.get("reorder_and_upcast_attn") else None,
    grouped=False,
)
