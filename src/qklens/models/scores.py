"""The score as a bilinear form of sources: the two linear maps, and nothing above this file repeats their algebra.

    q_p = R_p (W_Q γ x_p / σ_p + b_Q)      k_j = R_j (W_K γ x_j / σ_j + b_K)      u(p, j) = c ⟨q_p, k_j⟩

With σ held at its observed value a source (a feature times its activation, a bias, an error) maps linearly to head
space, so u is exactly the sum over (query source, key source) pairs. u is the score before softmax and after the
model's own scale c; a negative term lowers attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.models.subject import Subject


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary rotation at given positions, or the mean rotation over several offsets (rotations are linear).

    Attributes:
        cos: `... d_head`, broadcast against the vectors it rotates.
        sin: the same shape.
    """

    cos: Float[Tensor, "*pos d_head"]
    sin: Float[Tensor, "*pos d_head"]

    def __call__(self, vectors: Float[Tensor, "*any d_head"]) -> Float[Tensor, "*any d_head"]:
        """R v, with rotary's half-and-half layout of the rotated pairs."""
        half = vectors.shape[-1] // 2
        turned = torch.cat([-vectors[..., half:], vectors[..., :half]], dim=-1)
        return vectors * self.cos + turned * self.sin

    def at(self, *index: int | slice | Tensor) -> Rotation:
        """The rotations at some positions."""
        return Rotation(self.cos[index], self.sin[index])


@dataclass(frozen=True, eq=False)
class ScoreMaps:
    """One layer's projections with the norm's γ folded in, in the analysis dtype.

    Attributes:
        query_weight: W_Q γ per query head.
        key_weight: W_K γ per key head.
        query_bias: b_Q, zero where the family has none.
        key_bias: b_K.
        scale: the model's own score scale c.
        epsilon: inside σ's root.
    """

    layer: int
    query_weight: Float[Tensor, "head d_head d_model"]
    key_weight: Float[Tensor, "kv_head d_head d_model"]
    query_bias: Float[Tensor, "head d_head"]
    key_bias: Float[Tensor, "kv_head d_head"]
    scale: float
    epsilon: float

    def kv_head(self, head: int) -> int:
        """The key head κ(h) that a query head reads."""
        return head // (self.query_weight.shape[0] // self.key_weight.shape[0])

    def sigma(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any"]:
        """σ(x) = sqrt(mean x² + ε), the scale that stays frozen."""
        return (residual.to(self.query_weight.dtype).pow(2).mean(dim=-1) + self.epsilon).sqrt()

    def query(self, source: Float[Tensor, "*any d_model"], head: int) -> Float[Tensor, "*any d_head"]:
        """W_Q γ x for one head: linear in the source; divide by σ and rotate to meet a key."""
        return source.to(self.query_weight.dtype) @ self.query_weight[head].T

    def key(self, source: Float[Tensor, "*any d_model"], head: int) -> Float[Tensor, "*any d_head"]:
        """W_K γ x for the key head that a query head reads."""
        return source.to(self.key_weight.dtype) @ self.key_weight[self.kv_head(head)].T


def score_maps(subject: Subject, layer: int, dtype: torch.dtype = torch.float32) -> ScoreMaps:
    """The maps of one layer; float32 unless asked, also when the model computes in bfloat16."""
    subject.check_head(layer, 0)
    attention = subject.attention(layer)
    norm = subject.family.input_norm(subject.layers[layer])
    dtype = torch.float64 if subject.dtype == torch.float64 else dtype
    gamma = subject.family.norm_weight(norm).to(dtype)

    def fold(projection: torch.nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
        weight = projection.weight.to(dtype).view(heads, subject.d_head, subject.d_model) * gamma
        if projection.bias is None:
            return weight, weight.new_zeros(heads, subject.d_head)
        return weight, projection.bias.to(dtype).view(heads, subject.d_head)

    query_weight, query_bias = fold(subject.projection(layer, "q_proj"), subject.n_heads)
    key_weight, key_bias = fold(subject.projection(layer, "k_proj"), subject.n_kv_heads)
    return ScoreMaps(
        layer=layer,
        query_weight=query_weight,
        key_weight=key_weight,
        query_bias=query_bias,
        key_bias=key_bias,
        scale=subject.family.score_scale(attention),
        epsilon=float(subject.family.norm_epsilon(norm)),
    )


def rotation(subject: Subject, positions: Int[Tensor, "*pos"], dtype: torch.dtype = torch.float32) -> Rotation:
    """The model's own rotations at some positions."""
    dtype = torch.float64 if subject.dtype == torch.float64 else dtype
    flat = positions.reshape(1, -1).to(subject.device)
    probe = torch.zeros(1, 1, subject.d_model, dtype=dtype, device=subject.device)
    cos, sin = subject.family.rotary(subject.model, probe, flat)
    shape = (*positions.shape, cos.shape[-1])
    return Rotation(cos[0].to(dtype).reshape(shape), sin[0].to(dtype).reshape(shape))


def offset_rotation(subject: Subject, offsets: Int[Tensor, "offset"]) -> Rotation:
    """The mean over offsets p - j of the rotation between a query at p and a key at j.

    ⟨R_p q, R_j k⟩ = ⟨R_{p-j} q, k⟩ for pure rotations. Some rotary scalings also multiply cos and sin by a constant a
    on both sides, so the pair carries a²; a is read off at position 0.
    """
    turned = rotation(subject, offsets)
    amplitude = rotation(subject, torch.zeros(1, dtype=torch.long)).cos[0, 0]
    return Rotation(turned.cos.mean(dim=0) * amplitude, turned.sin.mean(dim=0) * amplitude)


def virtual_interaction(
    maps: ScoreMaps,
    head: int,
    turn: Rotation,
    query: Float[Tensor, "*#rows d_model"],
    key: Float[Tensor, "*#rows d_model"],
) -> Float[Tensor, "*#rows"]:
    """Weights-only interaction of unit directions, row by row: c ⟨R̄ W_Q γ q̂, W_K γ k̂⟩; no activations, no σ.

    One query row meets every key row.
    """
    unit_query = torch.nn.functional.normalize(query.to(maps.query_weight.dtype), dim=-1)
    unit_key = torch.nn.functional.normalize(key.to(maps.key_weight.dtype), dim=-1)
    return maps.scale * (turn(maps.query(unit_query, head)) * maps.key(unit_key, head)).sum(dim=-1)
