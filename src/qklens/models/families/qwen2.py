"""Qwen2: Llama with biases on q, k and v, and sliding windows on some layers where the config sets them."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from qklens.models.families.llama import LLAMA

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    eager=eager_attention_forward,
    window=lambda attention: attention.sliding_window,
)
