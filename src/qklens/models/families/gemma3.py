"""Gemma 3, text only: Gemma 2 with QK-norm for the soft cap, and a rotary base for local and one for global layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward

from qklens.models.families.gemma2 import GEMMA2
from qklens.models.families.llama import QK_NORMS
from qklens.models.family import QKNorm


def _rotary(model: Any, layer: int, residual: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    return model.model.rotary_emb(residual, position_ids, model.config.layer_types[layer])


GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    eager=eager_attention_forward,
    tensors=GEMMA2.tensors + QK_NORMS,
    qk_norm=QKNorm("head", layout="head pos"),
    rotary=_rotary,
    score_cap=lambda attention: None,
    unproven=lambda config: "use_bidirectional_attention" if config.get("use_bidirectional_attention") else None,
)
