"""Mistral: Llama with a sliding window on every layer, where the config sets one."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.mistral.modeling_mistral import eager_attention_forward

from qklens.models.families.llama import LLAMA

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    eager=eager_attention_forward,
    window=lambda attention: attention.config.sliding_window,
)
