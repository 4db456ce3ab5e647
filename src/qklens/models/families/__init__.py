"""The families whose decomposition is proven, one declarative file each, and what is known to be missing for others."""

from __future__ import annotations

from importlib import import_module

from qklens.models.family import Family

FAMILIES = {
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3_moe",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2", "smollm3": "smollm3",
    "gpt2": "gpt2", "gpt_neox": "gpt_neox", "gpt_oss": "gpt_oss",
}  # fmt: skip
"""A config's `model_type` -> the file here that declares it."""

_ALIBI = "ALiBi position biases in the score"
_LATENT = "multi-head latent attention, whose keys are compressed"
_LINEAR = "linear attention or a state space, which has no score"
_VISION = "a text-only checkpoint; this one has other inputs than text"

MISSING = {
    "bloom": _ALIBI, "mpt": _ALIBI, "falcon": _ALIBI,
    "deepseek_v2": _LATENT, "deepseek_v3": _LATENT, "kimi_k2": _LATENT, "deepseek_v32": _LATENT,
    "minicpm3": _LATENT, "longcat_flash": _LATENT, "glm_moe_dsa": _LATENT,
    "mamba": _LINEAR, "mamba2": _LINEAR, "rwkv": _LINEAR, "jamba": _LINEAR, "qwen3_next": _LINEAR, "minimax": _LINEAR,
    "falcon_h1": _LINEAR, "falcon_mamba": _LINEAR, "bamba": _LINEAR, "zamba": _LINEAR, "zamba2": _LINEAR,
    "nemotron_h": _LINEAR, "recurrent_gemma": _LINEAR, "lfm2": _LINEAR, "granitemoehybrid": _LINEAR,
    "gemma3": _VISION, "llama4": _VISION, "mllama": _VISION, "qwen2_vl": _VISION, "qwen2_5_vl": _VISION,
}  # fmt: skip


def load_family(model_type: str) -> Family:
    """Import the file that declares a family; the others' model code stays unloaded."""
    name = FAMILIES[model_type]
    return getattr(import_module(f"qklens.models.families.{name}"), name.upper())
