"""Gauges: ways to write the same model, or the same dictionary, with other numbers, and what each one changes.

A gauge of the model leaves every probability of every prompt alone; a gauge of the dictionary leaves what it writes,
Σ aᵢ dᵢ + b, alone. A quantity that a gauge changes is a fact about how the weights are written, not about what the
model computes. Each line here is measured: the tests rewrite a random model of every family named and compare every
quantity. Under a gauge of the model the dictionary moves along: decoder, bias and encoder follow the stream.

Families are listed as their published checkpoints are. A llama or qwen3 with `attention_bias` has `value_shift` too. A
key bias that turns with its position is no gauge: shifting it moves the scores of a row by different amounts. Neither
are a shift of the unembedding before a cap on the logits, and a shift of the values beside attention sinks.

Notation as in `models/scores.py`; 1 is the vector of ones. Wherever ε is not named, it is untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Quantity = Literal[
    "residual stream",
    "normed input",
    "query and key vectors",
    "head output",
    "logits",
    "margin",
    "pattern",
    "attention difference",
    "score",
    "contrastive score",
    "realised feature pairs",
    "realised bias terms",
    "realised marginals",
    "realised error share",
    "contrastive feature pairs",
    "contrastive bias terms",
    "contrastive marginals",
    "contrastive error share",
    "share-weighted feature pairs",
    "share-weighted bias terms",
    "share-weighted marginals",
    "share-weighted error share",
    "virtual interaction",
    "z against random_pairs",
    "z against matched",
    "direct letter attribution",
    "activations",
    "steering in raw units",
    "steering in activation_max units",
    "steering in resid_norm units",
    "pattern patching",
    "mean ablation",
    "zero ablation",
]
"""What qklens reports. `realised`, `contrastive` and `share-weighted` are the weightings of `analyses/interactions.py`.

Marginals are sums of terms over all partners of one source; an error share is the share of Σ|term| with an error on
either side. Steering, patches and ablations are read by the change of the margin.
"""
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

_RMS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "smollm3", "gpt_oss")
_LAYERNORM = ("gpt2", "gpt_neox")
_GEMMA = ("gemma2", "gemma3_text")
_QK_NORM = ("qwen3", "qwen3_moe", "gemma3_text", "olmo2")
_ALL = (*_RMS, *_LAYERNORM, *_GEMMA, "olmo2")


@dataclass(frozen=True)
class Gauge:
    """One reparameterisation.

    Attributes:
        name: what tests and reports call it.
        text: what it does, in words.
        formula: the same in symbols; ↦ reads "is rewritten as".
        families: `model_type` of the families that have it; empty for a gauge of the dictionary, which all have.
        changes: the quantities that change with it.
    """

    name: str
    text: str
    formula: str
    families: tuple[str, ...]
    changes: tuple[Quantity, ...]

    @property
    def of_dictionary(self) -> bool:
        """Whether it rewrites the dictionary and not the model."""
        return not self.families

    @property
    def keeps(self) -> tuple[Quantity, ...]:
        """All other quantities."""
        return tuple(quantity for quantity in QUANTITIES if quantity not in self.changes)


GAUGES: tuple[Gauge, ...] = (
    Gauge(
        "head_basis",
        "another basis for a head's queries and keys; dimensions that rotary positions turn together can only be "
        "scaled and turned together, and under a norm on queries and keys (QK-norm) only its gains can be scaled",
        "W_Q ↦ A W_Q, W_K ↦ A⁻ᵀ W_K, biases alike",
        _ALL,
        ("query and key vectors",),
    ),
    Gauge(
        "projection_scale",
        "other lengths of W_Q and W_K before a norm on queries and keys, which takes length away",
        "W_Q ↦ s W_Q, W_K ↦ t W_K, biases alike, the QK-norms' ε ↦ s² ε, t² ε",
        _QK_NORM,
        ("virtual interaction",),
    ),
    Gauge(
        "norm_fold",
        "a norm's gain moved into the matrices that read it",
        "γ ↦ t ⊙ γ, β ↦ t ⊙ β, W ↦ W diag(t)⁻¹",
        (*_RMS, *_LAYERNORM, *_GEMMA),
        ("normed input",),
    ),
    Gauge(
        "norm_shift",
        "a LayerNorm's shift moved into the biases of the matrices that read it",
        "β ↦ β + v, b ↦ b − W v",
        _LAYERNORM,
        ("normed input",),
    ),
    Gauge(
        "stream_scale",
        "a longer residual stream: all that writes it is scaled, and the norms that read it take the scale away",
        "E, W_O, W_out ↦ s E, s W_O, s W_out, ε ↦ s² ε; dᵢ, b ↦ s dᵢ, s b",
        (*_RMS, *_LAYERNORM, *_GEMMA),
        ("residual stream",),
    ),
    Gauge(
        "stream_rotation",
        "a turned residual stream, once the norms' gains are moved into the matrices; under LayerNorm the turn leaves "
        "the vector of ones in place",
        "E, W_O, W_out ↦ Q E, Q W_O, Q W_out, W ↦ W Qᵀ; dᵢ, b ↦ Q dᵢ, Q b",
        (*_RMS, *_LAYERNORM),
        ("residual stream", "normed input"),
    ),
    Gauge(
        "stream_mean",
        "another mean of whatever writes the stream, which LayerNorm takes away before anything reads it",
        "w ↦ w + m 1 for every vector w that E, W_O or W_out writes; dᵢ ↦ dᵢ + mᵢ 1",
        _LAYERNORM,
        ("residual stream", "steering in resid_norm units"),
    ),
    Gauge(
        "key_shift",
        "one vector added to every key, in the dimensions that rotary positions leave alone: all scores of a row move "
        "together, and the softmax does not see it",
        "b_K ↦ b_K + c, so u(p, j) ↦ u(p, j) + ⟨q_p, c⟩ for all j",
        _LAYERNORM,
        ("query and key vectors", "score", "realised bias terms", "realised marginals", "realised error share"),
    ),
    Gauge(
        "value_basis",
        "another basis for a head's values",
        "W_V ↦ B W_V, W_O ↦ W_O B⁻¹, biases alike",
        _ALL,
        ("head output",),
    ),
    Gauge(
        "value_shift",
        "one vector moved from a head's values into the bias after W_O; a pattern's weights sum to one, so the sum of "
        "the two stays",
        "b_V ↦ b_V + v, b_O ↦ b_O − W_O v",
        _LAYERNORM,
        ("head output", "direct letter attribution", "zero ablation"),
    ),
    Gauge(
        "unembed_shift",
        "one vector added to every row of the unembedding, which moves all logits together; a tied embedding is copied "
        "first",
        "U ↦ U + 1 vᵀ",
        tuple(family for family in _ALL if family != "gemma2"),
        ("logits",),
    ),
    Gauge(
        "decoder_scale",
        "other lengths of the dictionary's directions",
        "dᵢ ↦ sᵢ dᵢ, aᵢ ↦ aᵢ / sᵢ",
        (),
        ("activations", "z against matched", "steering in raw units"),
    ),
    Gauge(
        "bias_split",
        "part of a feature's activation written as part of the dictionary's bias",
        "aᵢ ↦ aᵢ + c, b ↦ b − c dᵢ",
        (),
        (
            "activations",
            "realised feature pairs",
            "realised bias terms",
            "realised marginals",
            "realised error share",
            "contrastive feature pairs",
            "contrastive bias terms",
            "contrastive marginals",
            "contrastive error share",
            "share-weighted feature pairs",
            "share-weighted bias terms",
            "share-weighted marginals",
            "share-weighted error share",
            "z against matched",
            "steering in activation_max units",
        ),
    ),
    Gauge(
        "feature_mix",
        "other features that write the same vectors: split, merged or mixed ones",
        "D ↦ M D, a ↦ a M⁻¹",
        (),
        (
            "activations",
            "realised feature pairs",
            "realised bias terms",
            "realised marginals",
            "realised error share",
            "contrastive feature pairs",
            "contrastive bias terms",
            "contrastive marginals",
            "contrastive error share",
            "share-weighted feature pairs",
            "share-weighted bias terms",
            "share-weighted marginals",
            "share-weighted error share",
            "virtual interaction",
            "z against random_pairs",
            "z against matched",
            "steering in raw units",
            "steering in activation_max units",
            "steering in resid_norm units",
        ),
    ),
)


def gauges_of(model_type: str | None) -> tuple[Gauge, ...]:
    """The gauges of a model's family and of its dictionary; all of them where the family is not known."""
    known = any(model_type in gauge.families for gauge in GAUGES)
    return tuple(g for g in GAUGES if not known or g.of_dictionary or model_type in g.families)
