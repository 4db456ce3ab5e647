"""SmolLM3: Llama with some layers that have no positions, and sliding windows where the config sets them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.models.smollm3.modeling_smollm3 import eager_attention_forward

from qklens.models.families.llama import LLAMA
from qklens.models.family import shared_rotary


def _rotary(
    model: Any,  # noqa: ANN401
    layer: int,
    residual: Tensor,
    position_ids: Tensor,
) -> tuple[Tensor, Tensor] | None:
    turns = model.model.layers[layer].self_attn.use_rope
    return shared_rotary(model, layer, residual, position_ids) if turns else None


def _masked_but_unread_window(config: dict[str, Any]) -> str | None:
    """The mask goes by `layer_types`, the attention modules by `use_sliding_window`."""
    sliding = "sliding_attention" in (config.get("layer_types") or ())
    return (
        "sliding layer_types and use_sliding_window false" if sliding and not config.get("use_sliding_window") else None
    )


SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    eager=eager_attention_forward,
    rotary=_rotary,
    window=lambda attention: attention.sliding_window,
    unproven=_masked_but_unread_window,
)
