"""Qwen3: Llama with an RMSNorm on each head's query and key."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from qklens.models.families.llama import LLAMA, QK_NORMS
from qklens.models.family import QKNorm

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    eager=eager_attention_forward,
    tensors=LLAMA.tensors + QK_NORMS,
    qk_norm=QKNorm("head"),
    window=lambda attention: attention.sliding_window,
)
