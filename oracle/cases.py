"""What both sides are given: four tiny configs, two prompts, one edit's size. Data only, for either environment."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNS = Path(__file__).resolve().parents[1] / "runs" / "oracle"
LAYERS, HEADS, VOCABULARY = 4, 4, 64
PROMPTS = ((11, 42, 13, 60, 15, 16, 33, 18, 19, 20, 21), (9, 50, 27, 8, 31, 12, 44))
EDIT_NORM = 4.0
_COMMON = {
    "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 32,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One family's tiny config.

    Attributes:
        model_type: the family.
        shows: what its attention has that another family's lacks.
        changes: its config beside what all share.
        single_norms: transformers computes its norms in float32 in a float64 model too, and TransformerLens runs
            those modules; pair terms, whose norms are float64, then agree at float32's resolution.
        single_softmax: transformers computes the softmax in float32 and TransformerLens does not; all that comes
            after the first pattern then agrees at float32's resolution.
    """

    model_type: str
    shows: str
    changes: dict[str, Any]
    single_norms: bool = False
    single_softmax: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The whole config."""
        return {**_COMMON, **self.changes}

    @property
    def model(self) -> Path:
        """The model directory that both sides load."""
        return RUNS / self.model_type / "model"

    @property
    def weights(self) -> Path:
        """The model's weights."""
        return self.model / "model.safetensors"

    def digest(self) -> str:
        """SHA-256 of the weights; both sides write it beside their numbers."""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()

    @property
    def edit(self) -> Path:
        """The vector that both sides add to what one head's query reads."""
        return RUNS / self.model_type / "edit.safetensors"

    def numbers(self, side: str) -> Path:
        """What one side computed."""
        return RUNS / self.model_type / f"{side}.safetensors"


CASES = (
    Case(
        "llama",
        "RMSNorm, grouped keys, wide heads",
        {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
        single_norms=True,
    ),
    Case("gpt2", "LayerNorm, biases, learned positions", {"n_inner": 48}),
    Case(
        "gpt_neox",
        "partial rotary, parallel MLP, q k v fused by head",
        {
            "intermediate_size": 48,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        single_softmax=True,
    ),
    Case(
        "gemma2",
        "soft cap, sliding window, grouped keys",
        {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "sliding_window": 5,
        },
        single_norms=True,
    ),
)
