"""The gauges of `qklens.analyses.gauge`, applied: each rewrites a tiny model in place and carries its dictionary along.

A vector of the stream is a row here: x ↦ x Qᵀ in the table is `x @ turn` below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from model_parts import along, map_heads, norms, output, scale_epsilon, scale_norm, shift_heads, untie, writers
from torch import Tensor

from qklens.dictionaries.source import ErrorByDecoding, Stream
from qklens.models.scores import rotation
from qklens.models.subject import Subject

LAYER = 1


@dataclass(frozen=True, eq=False)
class Sparse(ErrorByDecoding):
    """A feature source of one layer: a = relu(|x W| − θ) M + c, x = a D + b + e; active in any model's stream."""

    encoder: Tensor
    threshold: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    mix: Tensor | None = None
    offset: Tensor | None = None
    name: str = "sparse"
    layers: tuple[int, ...] = (LAYER,)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(f"f{i}" for i in range(len(self.decoder)))

    def reads(self, layer: int) -> tuple[int, ...]:
        return (layer,)

    def encode(self, layer: int, stream: Stream) -> Tensor:
        active = ((stream(layer) @ self.encoder).abs() - self.threshold).relu()
        active = active if self.mix is None else active @ self.mix
        return active if self.offset is None else active + self.offset

    @property
    def site(self) -> str:
        return "resid_pre"

    def decode(self, layer: int, activations: Tensor) -> Tensor:
        return activations @ self.decoder.to(activations) + self.decoder_bias.to(activations)

    def directions(self, layer: int) -> Tensor:
        return self.decoder

    def bias(self, layer: int) -> Tensor:
        return self.decoder_bias

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


Rewrite = Callable[[Subject, Sparse, torch.Generator], Sparse]


def head_basis(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    for layer in range(subject.n_layers):
        turning = rotation(subject, layer, torch.arange(2)).cos.shape[-1]
        if subject.family.qk_norm:
            factor = _between(draw, subject.d_head // 2).repeat(2)
            scale_norm(subject, subject.qk_norm_module(layer, "query"), factor)
            scale_norm(subject, subject.qk_norm_module(layer, "key"), 1 / factor)
            continue
        basis = torch.stack([_commuting(draw, subject.d_head, turning) for _ in range(subject.n_kv_heads)])
        group = subject.n_heads // subject.n_kv_heads
        map_heads(subject, layer, "query", basis.repeat_interleave(group, dim=0))
        map_heads(subject, layer, "key", torch.linalg.inv(basis).transpose(1, 2))
    return source


def projection_scale(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    for layer in range(subject.n_layers):
        for side, factor in (("query", 1.7), ("key", 0.8)):
            heads = subject.counts.of(side)
            same = torch.eye(subject.d_head, dtype=torch.float64).expand(heads, -1, -1)
            map_heads(subject, layer, side, factor * same)
            scale_epsilon(subject.qk_norm_module(layer, side), factor**2)
    return source


def norm_fold(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    untie(subject)
    for norm, readers in norms(subject):
        factor = _between(draw, subject.d_model)
        scale_norm(subject, norm, factor)
        for parameter, axis, _ in readers:
            along(parameter, axis, lambda rows, factor=factor: rows / factor)
    return source


def norm_shift(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    for norm, readers in list(norms(subject))[:-1]:  # the unembedding has no bias to move into
        shift = _randn(draw, subject.d_model)
        norm.bias.data += shift
        for parameter, axis, bias in readers:
            bias.data -= parameter.data.movedim(axis, -1) @ shift
    return source


def stream_scale(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    factor = 1.7
    untie(subject)
    for parameter, axis in writers(subject):
        along(parameter, axis, lambda rows: rows * factor)
    for layer in subject.layers:
        if (after := subject.family.output_norm(layer)) is not None:
            for norm in (after, layer.post_feedforward_layernorm):
                scale_norm(subject, norm, torch.full((subject.d_model,), factor, dtype=torch.float64))
    for norm, _ in norms(subject):
        scale_epsilon(norm, factor**2)
    decoder, bias = source.decoder * factor, source.decoder_bias * factor
    return replace(source, encoder=source.encoder / factor, decoder=decoder, decoder_bias=bias)


def stream_rotation(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    untie(subject)
    turn = _orthogonal(draw, subject.d_model, keep_ones=subject.family.norm.centred)
    for norm, readers in norms(subject):
        gain = norm.weight.data.clone()
        norm.weight.data.fill_(1.0)
        for parameter, axis, _ in readers:
            along(parameter, axis, lambda rows, gain=gain: (rows * gain) @ turn)
        if subject.family.norm.centred:
            # C x ⊙ γ / σ + β = γ ⊙ (C x / σ + β / γ): γ goes into W, what is left of β turns with the stream.
            norm.bias.data = (norm.bias.data / gain) @ turn
    for parameter, axis in writers(subject):
        along(parameter, axis, lambda rows: rows @ turn)
    decoder, bias = source.decoder @ turn, source.decoder_bias @ turn
    return replace(source, encoder=turn.T @ source.encoder, decoder=decoder, decoder_bias=bias)


def stream_mean(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    untie(subject)

    def add_mean(rows: Tensor) -> Tensor:
        return rows + 2 * _randn(draw, *rows.shape[:-1], 1)

    for parameter, axis in writers(subject):
        along(parameter, axis, add_mean)
    return replace(source, decoder=add_mean(source.decoder), decoder_bias=add_mean(source.decoder_bias))


def key_shift(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    for layer in range(subject.n_layers):
        turning = rotation(subject, layer, torch.arange(2)).cos.shape[-1]
        shift = 10 * _randn(draw, subject.n_kv_heads, subject.d_head)
        shift[:, :turning] = 0
        shift_heads(subject, layer, "key", shift)
    return source


def value_basis(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    group = subject.n_heads // subject.n_kv_heads
    for layer in range(subject.n_layers):
        basis = torch.stack([_commuting(draw, subject.d_head, 0) for _ in range(subject.n_kv_heads)])
        map_heads(subject, layer, "value", basis)
        back = torch.linalg.inv(basis).repeat_interleave(group, dim=0)
        weight = torch.einsum("mhd,hde->mhe", subject.output_weight(layer), back)
        output(subject, layer).copy_(weight.flatten(1))
    return source


def value_shift(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    group = subject.n_heads // subject.n_kv_heads
    for layer in range(subject.n_layers):
        shift = _randn(draw, subject.n_kv_heads, subject.d_head)
        shift_heads(subject, layer, "value", shift)
        carried = torch.einsum("mhd,hd->m", subject.output_weight(layer), shift.repeat_interleave(group, dim=0))
        subject.output_bias(layer).data -= carried
    return source


def unembed_shift(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    untie(subject)
    subject.unembedding.weight.data += _randn(draw, subject.d_model)
    return source


def decoder_scale(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    factor = _between(draw, len(source.decoder))
    return replace(source, decoder=source.decoder * factor[:, None], mix=torch.diag(1 / factor))


def bias_split(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    offset = 3.0 * (torch.arange(len(source.decoder)) % 4 == 0).double()
    return replace(source, offset=offset, decoder_bias=source.decoder_bias - offset @ source.decoder)


def feature_mix(subject: Subject, source: Sparse, draw: torch.Generator) -> Sparse:
    mix = _orthogonal(draw, len(source.decoder)) * _between(draw, len(source.decoder))
    return replace(source, decoder=mix @ source.decoder, mix=torch.linalg.inv(mix))


REWRITES: dict[str, Rewrite] = {
    rewrite.__name__: rewrite
    for rewrite in (
        head_basis, projection_scale, norm_fold, norm_shift, stream_scale, stream_rotation, stream_mean, key_shift,
        value_basis, value_shift, unembed_shift, decoder_scale, bias_split, feature_mix,
    )
}  # fmt: skip


def _randn(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def _between(draw: torch.Generator, n: int) -> Tensor:
    """Factors from 0.5 to 2."""
    return 2.0 ** (2 * torch.rand(n, generator=draw, dtype=torch.float64) - 1)


def _orthogonal(draw: torch.Generator, n: int, *, keep_ones: bool = False) -> Tensor:
    turn = torch.linalg.qr(_randn(draw, n, n))[0]
    if not keep_ones:
        return turn
    ones = torch.ones(n, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, _randn(draw, n, n - 1)], dim=1))[0]
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), torch.linalg.qr(_randn(draw, n - 1, n - 1))[0])
    return basis @ inner @ basis.T


def _commuting(draw: torch.Generator, size: int, turning: int) -> Tensor:
    """An invertible map that scales and turns each rotary pair (i, i + turning / 2), and mixes all that is left."""
    half, left = turning // 2, size - turning
    angle, length = 3 * _randn(draw, half), _between(draw, half)
    real, imaginary = torch.diag(length * angle.cos()), torch.diag(length * angle.sin())
    pairs = torch.cat([torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)])
    return torch.block_diag(pairs, _orthogonal(draw, left) * _between(draw, left)) if left else pairs
