"""gpt-oss: Llama with biases, attention sinks, alternating windows, YaRN, and mixtures of experts for MLPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from qklens.models.families.llama import ATTENTION, LLAMA, NORMS
from qklens.models.family import shared_rotary


def _rotary(model: Any, layer: int, residual: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    # This family hands out each angle once; the rotated halves share it.
    cos, sin = shared_rotary(model, layer, residual, position_ids)
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


GPT_OSS = replace(
    LLAMA,
    model_type="gpt_oss",
    eager=eager_attention_forward,
    tensors=(*ATTENTION, *NORMS, "model.layers.{layer}.self_attn.sinks"),
    rotary=_rotary,
    sinks=lambda attention: attention.sinks,
    experts=True,
    window=lambda attention: attention.sliding_window,
)
