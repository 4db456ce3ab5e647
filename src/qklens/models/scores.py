"""The score as a bilinear form of sources: the two linear maps, and nothing above this file repeats their algebra.

    n(x)   = C x ⊙ γ / σ(x) + β
    q_p    = R_p (γ_Q ⊙ (W_Q n(x_p) + b_Q) / ρ_p)          k_j = R_j (γ_K ⊙ (W_K n(x_j) + b_K) / ρ_j)
    u(p,j) = c ⟨q_p, k_j⟩                                  s = τ tanh(u / τ) where the model caps it

With σ and the QK-norm's ρ held at their observed values a source (a feature times its activation, a bias, an error)
maps linearly to head space, so u is exactly the sum over (query source, key source) pairs. u is the score before the
cap and the softmax and after the model's own scale c; a negative term lowers attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.models.norms import NormMap
from qklens.models.projections import ProjectionSide
from qklens.models.subject import Subject


def soft_capped(u: Float[Tensor, "*any"], cap: float | None) -> Float[Tensor, "*any"]:
    """S = τ tanh(u / τ), or u where nothing caps it; the −∞ of a key that is not seen stays."""
    return u if cap is None else torch.where(u.isneginf(), u, cap * torch.tanh(u / cap))


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary rotation at given positions, or the mean rotation over several offsets (rotations are linear).

    Only the first `rotary` dimensions of a head turn; none do in a layer without positions.

    Attributes:
        cos: broadcast against the vectors it rotates.
        sin: the same shape.
    """

    cos: Float[Tensor, "*pos rotary"]
    sin: Float[Tensor, "*pos rotary"]

    def __call__(self, vectors: Float[Tensor, "*any d_head"]) -> Float[Tensor, "*turned d_head"]:
        """R v, with rotary's half-and-half layout of the rotated pairs."""
        size = self.cos.shape[-1]
        first, rest = vectors[..., :size], vectors[..., size:]
        swapped = torch.cat([-first[..., size // 2 :], first[..., : size // 2]], dim=-1)
        turned = first * self.cos + swapped * self.sin
        if not rest.shape[-1]:
            return turned
        return torch.cat([turned, rest.expand(*turned.shape[:-1], -1)], dim=-1)

    def at(self, *index: int | slice | Tensor) -> Rotation:
        """The rotations at some positions."""
        return Rotation(self.cos[index], self.sin[index])

    def transposed(self) -> Rotation:
        """Rᵀ, with ⟨R q, k⟩ = ⟨q, Rᵀ k⟩: Rᵀ v = v ⊙ cos − swap(v ⊙ sin), where swap(v) = (−second half, first half).

        swap(v ⊙ sin) is swap(v) ⊙ sin with halves of sin exchanged. A mean of rotations is none, so Rᵀ is not R⁻¹.
        """
        return Rotation(self.cos, -self.sin.roll(self.sin.shape[-1] // 2, dims=-1))

    def between(self) -> Rotation:
        """The same rotations with an axis for heads or sources before the last."""
        return Rotation(self.cos[..., None, :], self.sin[..., None, :])


@dataclass(frozen=True, eq=False)
class Scales:
    """What a layer's norms divided by at every token, held there by the decomposition.

    Attributes:
        sigma: σ of the input norm.
        query_rms: ρ of the norm on queries, one without such a norm.
        key_rms: ρ of the norm on keys.
    """

    sigma: Float[Tensor, "*pos"]
    query_rms: Float[Tensor, "*pos head"]
    key_rms: Float[Tensor, "*pos kv_head"]

    def at(self, *index: int | slice | Tensor) -> Scales:
        """The scales at some positions."""
        return Scales(self.sigma[index], self.query_rms[index], self.key_rms[index])


@dataclass(frozen=True, eq=False)
class SideMaps:
    """One side's projection with the input norm's γ and C folded in, in the analysis dtype.

    Attributes:
        weight: W γ C per head.
        bias: W β + b, zero where the family has neither.
        gain: γ of the norm after the projection, or nothing.
        pooled: whether that norm takes all heads as one vector.
        epsilon: inside that norm's root.
    """

    weight: Float[Tensor, "head d_head d_model"]
    bias: Float[Tensor, "head d_head"]
    gain: Float[Tensor, "head d_head"] | None = None
    pooled: bool = False
    epsilon: float = 0.0

    def source(self, vectors: Float[Tensor, "*any d_model"], head: int) -> Float[Tensor, "*any d_head"]:
        """γ ⊙ W γ C x for one head: linear in the source."""
        projected = vectors.to(self.weight.dtype) @ self.weight[head].T
        return projected if self.gain is None else projected * self.gain[head]

    def adjoint(self, vectors: Float[Tensor, "*any d_head"], head: int) -> Float[Tensor, "*any d_model"]:
        """The transpose of `source`, C γ Wᵀ (γ ⊙ v) for one head: ⟨source(x), v⟩ is ⟨x, this⟩."""
        gained = vectors if self.gain is None else vectors * self.gain[head]
        return gained @ self.weight[head]

    def constant(self, head: int) -> Float[Tensor, " d_head"]:
        """The bias's own vector in head space."""
        return self.bias[head] if self.gain is None else self.bias[head] * self.gain[head]

    def rms(self, residual: Float[Tensor, "*pos d_model"], sigma: Float[Tensor, "*pos"]) -> Float[Tensor, "*pos head"]:
        """ρ: the root mean square of what the norm after the projection sees."""
        if self.gain is None:
            return sigma.new_ones((*sigma.shape, len(self.weight)))
        raw = torch.einsum("...d,hed->...he", residual.to(self.weight.dtype), self.weight)
        square = (raw / sigma[..., None, None] + self.bias).pow(2).mean(dim=-1)
        if self.pooled:
            square = square.mean(dim=-1, keepdim=True).expand(square.shape)
        return (square + self.epsilon).sqrt()


@dataclass(frozen=True, eq=False)
class ScoreMaps:
    """One layer's two linear maps, and what its scores meet on the way to the pattern.

    Attributes:
        layer: the layer.
        query_side: W_Q and what follows it.
        key_side: W_K and what follows it.
        norm: the input norm.
        scale: the model's own score scale c.
        cap: τ of the soft cap, or nothing.
        sinks: sink logits per head, or nothing.
        window: how many last tokens, its own among them, a query sees, or nothing for all.
    """

    layer: int
    query_side: SideMaps
    key_side: SideMaps
    norm: NormMap
    scale: float
    cap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    window: int | None = None

    def kv_head(self, head: int) -> int:
        """The key head κ(h) that a query head reads."""
        return head // (len(self.query_side.weight) // len(self.key_side.weight))

    def scales(self, residual: Float[Tensor, "*pos d_model"]) -> Scales:
        """σ and both ρ at every token."""
        residual = residual.to(self.query_side.weight.dtype)
        sigma = self.norm.scale(residual)
        return Scales(sigma, self.query_side.rms(residual, sigma), self.key_side.rms(residual, sigma))

    def unit(self, directions: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """Unit vectors of directions as the input norm reads them, in the maps' dtype: see `NormMap.unit`."""
        return self.norm.unit(directions.to(self.query_side.weight.dtype))

    def query(self, source: Float[Tensor, "*any d_model"], head: int) -> Float[Tensor, "*any d_head"]:
        """The query map of a source for one head; divide by σ ρ and rotate to meet a key."""
        return self.query_side.source(source, head)

    def key(self, source: Float[Tensor, "*any d_model"], head: int) -> Float[Tensor, "*any d_head"]:
        """The key map of a source for the key head that a query head reads."""
        return self.key_side.source(source, self.kv_head(head))

    def query_constant(self, head: int) -> Float[Tensor, " d_head"]:
        """The norm's and projection's biases on the query side; divide by ρ alone."""
        return self.query_side.constant(head)

    def key_constant(self, head: int) -> Float[Tensor, " d_head"]:
        """The norm's and projection's biases on the key side of the key head that a query head reads."""
        return self.key_side.constant(self.kv_head(head))

    def query_rms(self, scales: Scales, head: int) -> Float[Tensor, "*pos"]:
        """ρ of one head's queries."""
        return scales.query_rms[..., head]

    def key_rms(self, scales: Scales, head: int) -> Float[Tensor, "*pos"]:
        """ρ of the keys that a query head reads."""
        return scales.key_rms[..., self.kv_head(head)]

    def whole_query(
        self, residual: Float[Tensor, "*pos d_model"], head: int, scales: Scales | None = None
    ) -> Float[Tensor, "*pos d_head"]:
        """The head's query before rotation, from the stream itself; `scales` holds the norms elsewhere."""
        at = scales or self.scales(residual)
        raw = self.query(residual, head) / at.sigma[..., None] + self.query_constant(head)
        return raw / self.query_rms(at, head)[..., None]

    def whole_key(
        self, residual: Float[Tensor, "*pos d_model"], head: int, scales: Scales | None = None
    ) -> Float[Tensor, "*pos d_head"]:
        """The key before rotation that a query head reads, from the stream itself."""
        at = scales or self.scales(residual)
        raw = self.key(residual, head) / at.sigma[..., None] + self.key_constant(head)
        return raw / self.key_rms(at, head)[..., None]

    def capped(self, u: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Scores as they meet the softmax: see `soft_capped`."""
        return soft_capped(u, self.cap)

    def visible(self, position: int, n_keys: int) -> tuple[int, int]:
        """First and last-plus-one key that the query at a position sees."""
        first = 0 if self.window is None else max(0, position + 1 - self.window)
        return first, min(position + 1, n_keys)

    def pattern(self, scores: Float[Tensor, " k_pos"], head: int) -> Float[Tensor, " k_pos"]:
        """The head's pattern from its scores after the cap, −∞ where it does not see; a sink takes its share."""
        if self.sinks is None:
            return scores.softmax(dim=-1)
        return torch.cat([scores, self.sinks[head][None].to(scores)]).softmax(dim=-1)[:-1]


def score_maps(subject: Subject, layer: int, dtype: torch.dtype = torch.float32) -> ScoreMaps:
    """The maps of one layer; float32 unless asked, also when the model computes in bfloat16."""
    subject.check_head(layer, 0)
    family, attention = subject.family, subject.attention(layer)
    dtype = torch.float64 if subject.dtype == torch.float64 else dtype
    norm = subject.input_norm(layer, dtype)
    sinks = family.sinks(attention)

    def side(which: ProjectionSide) -> SideMaps:
        projection = subject.projection(layer, which)
        weight, bias = projection.weight().to(dtype), projection.bias()
        constant = weight.new_zeros(weight.shape[:2]) if bias is None else bias.to(dtype)
        if norm.beta is not None:
            constant = constant + weight @ norm.beta
        if family.qk_norm is None:
            return SideMaps(norm.fold(weight), constant)
        after = subject.qk_norm(layer, which, dtype)
        gain = None if after.gamma is None else after.gamma.view(-1, weight.shape[1]).expand(weight.shape[:2])
        return SideMaps(norm.fold(weight), constant, gain, family.qk_norm.over == "all", after.epsilon)

    return ScoreMaps(
        layer=layer,
        query_side=side("query"),
        key_side=side("key"),
        norm=norm,
        scale=float(attention.scaling),  # pyright: ignore[reportArgumentType]
        cap=family.score_cap(attention),
        sinks=None if sinks is None else sinks.to(dtype),
        window=family.window(attention),
    )


def rotation(
    subject: Subject, layer: int, positions: Int[Tensor, "*pos"], dtype: torch.dtype = torch.float32
) -> Rotation:
    """The model's own rotations of one layer at some positions; empty for a layer without positions."""
    dtype = torch.float64 if subject.dtype == torch.float64 else dtype
    device = subject.projection(layer, "query").device
    flat = positions.reshape(1, -1).to(device)
    probe = torch.zeros(1, 1, subject.d_model, dtype=dtype, device=device)
    pair = subject.family.rotary(subject.model, layer, probe, flat)
    if pair is None:
        nothing = torch.zeros(*positions.shape, 0, dtype=dtype, device=device)
        return Rotation(nothing, nothing)
    cos, sin = pair
    shape = (*positions.shape, cos.shape[-1])
    return Rotation(cos[0].to(dtype).reshape(shape), sin[0].to(dtype).reshape(shape))


def offset_rotation(subject: Subject, layer: int, offsets: Int[Tensor, "offset"]) -> Rotation:
    """The mean over offsets p - j of the rotation between a query at p and a key at j.

    ⟨R_p q, R_j k⟩ = ⟨R_{p-j} q, k⟩ for pure rotations. Some rotary scalings also multiply cos and sin by a constant a
    on both sides, so the pair carries a²; a is read off at position 0.
    """
    turned = rotation(subject, layer, offsets)
    amplitude = rotation(subject, layer, torch.zeros(1, dtype=torch.long)).cos[0, :1]
    return Rotation(turned.cos.mean(dim=0) * amplitude, turned.sin.mean(dim=0) * amplitude)


def virtual_interaction(
    maps: ScoreMaps,
    head: int,
    turn: Rotation,
    query: Float[Tensor, "*#rows d_model"],
    key: Float[Tensor, "*#rows d_model"],
) -> Float[Tensor, "*#rows"]:
    """Weights-only interaction of unit directions, row by row: c ⟨R̄ W_Q γ q̂, W_K γ k̂⟩; no activations, no σ.

    q̂ and k̂ are `ScoreMaps.unit` of the two: of length one after the input norm's centring, where it centres. One query
    row meets every key row.
    """
    return maps.scale * (turn(maps.query(maps.unit(query), head)) * maps.key(maps.unit(key), head)).sum(dim=-1)


def virtual_reader(
    maps: ScoreMaps, head: int, turn: Rotation, fixed: Float[Tensor, " d_model"], side: Literal["query", "key"]
) -> Float[Tensor, " d_model"]:
    """The vector r in the stream with virtual interaction ⟨d̂, r⟩ for every unit direction d̂ on the other side.

    Unit as `ScoreMaps.unit` has it: centred first, where the input norm centres.

    Held as a query q̂: r = c W̃_Kᵀ R̄ W̃_Q q̂. Held as a key k̂: r = c W̃_Qᵀ R̄ᵀ W̃_K k̂. W̃ holds all gains of its side.

    Args:
        maps: the layer's maps.
        head: the query head; under grouped queries it reads the key head κ(head).
        turn: rotation between query and key, or its mean over offsets.
        fixed: the direction held; its length does not matter.
        side: where `fixed` is held.
    """
    unit = maps.unit(fixed)
    if side == "query":
        return maps.scale * maps.key_side.adjoint(turn(maps.query(unit, head)), maps.kv_head(head))
    return maps.scale * maps.query_side.adjoint(turn.transposed()(maps.key(unit, head)), head)
