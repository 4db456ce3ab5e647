"""Qwen3-MoE: Qwen3's attention; its MLPs are mixtures of experts, which the score does not see."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward

from qklens.models.families.llama import ATTENTION, NORMS, QK_NORMS
from qklens.models.families.qwen3 import QWEN3

QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    eager=eager_attention_forward,
    tensors=ATTENTION + NORMS + QK_NORMS,
    experts=True,
    window=lambda attention: attention.sliding_window,
)
