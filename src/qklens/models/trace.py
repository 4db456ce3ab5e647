"""What some layers' attention did on a batch of prompts: the score's two linear maps there, scores, and patterns.

    u(p, j) = c ⟨M_Q(p) x_p + m_Q(p), M_K(j) x_j + m_K(j)⟩

M is the matrix of `query_map` or `key_map` with every norm's scale held at what it was on this prompt, and m its
constant (the norm's and projection's biases). `score` and `pattern` are the model's own, never rebuilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.errors import QklensError
from qklens.models.attention import AttentionRead
from qklens.models.batch import Batch
from qklens.models.copies import Reads
from qklens.models.edits import Edit
from qklens.models.passes import run_pass
from qklens.models.scores import Rotation, ScoreMaps, SideMaps, rotation, score_maps
from qklens.models.sites import columns_of
from qklens.models.subject import Subject

Position = int | Sequence[int] | Int[Tensor, " batch"]
"""A token of each prompt, counted from its first one, or from its end when negative: one for all, or one each."""


@dataclass(frozen=True, eq=False)
class HeadMap:
    """One side of one head at given tokens: x ↦ R (γ W C x) / (σ ρ), linear in x, and the constant beside it.

    Attributes:
        side: the side's projection.
        head: the head on that side (a key head for keys).
        sigma: σ of the input norm at the tokens.
        rms: ρ of the norm after the projection.
        turn: the rotations at the tokens' positions.
    """

    side: SideMaps
    head: int
    sigma: Float[Tensor, "*token"]
    rms: Float[Tensor, "*token"]
    turn: Rotation

    def __call__(self, sources: Float[Tensor, "*token source d_model"]) -> Float[Tensor, "*token source d_head"]:
        """Where sources of the stream at these tokens land in head space."""
        return self.place(self.side.source(sources, self.head))

    def place(self, projected: Float[Tensor, "*token source d_head"]) -> Float[Tensor, "*token source d_head"]:
        """The same for sources that went through the projection (`SideMaps.source`) before."""
        return self.turn.between()(projected / (self.sigma * self.rms)[..., None, None])

    @property
    def constant(self) -> Float[Tensor, "*token d_head"]:
        """Where the norm's and projection's biases land; no part of the stream."""
        return self.turn(self.side.constant(self.head) / self.rms[..., None])

    @property
    def matrix(self) -> Float[Tensor, "*token d_head d_model"]:
        """The linear map itself."""
        d_model = self.side.weight.shape[-1]
        basis = torch.eye(d_model, dtype=self.side.weight.dtype, device=self.side.weight.device)
        return self(basis.expand(*self.sigma.shape, d_model, d_model)).transpose(-1, -2)


@dataclass(frozen=True, eq=False)
class Trace:
    """A pass over a batch with some layers' streams and attention kept.

    Attributes:
        subject: the model.
        batch: the prompts.
        streams: resid_pre by layer.
        attention: the layers that were asked for.
        logits: at the answer position.
        heads: the heads whose attention was kept, in that order; None is all.
    """

    subject: Subject
    batch: Batch
    streams: dict[int, Float[Tensor, "batch pos d_model"]]
    attention: dict[int, AttentionRead]
    logits: Float[Tensor, "batch vocab"]
    heads: tuple[int, ...] | None = None

    def at(self, position: Position) -> Int[Tensor, " batch"]:
        """The column of a token in each prompt's row."""
        rows = len(self.batch.input_ids)
        if isinstance(position, int):
            return columns_of(self.batch, [position])[:, 0]
        each = torch.as_tensor(position)
        if each.shape != (rows,):
            raise QklensError(f"{len(each)} positions for {rows} prompts; expected one for all, or one each")
        lengths = self.batch.attention_mask.sum(dim=1).to(each.device)
        for row in range(rows):
            if not -int(lengths[row]) <= int(each[row]) < int(lengths[row]):
                raise QklensError(
                    f"position {int(each[row])} does not exist in prompt {row}, which has {int(lengths[row])} tokens"
                )
        return torch.where(each >= 0, self.batch.width - lengths + each, self.batch.width + each)

    def stream(self, layer: int, position: Position) -> Float[Tensor, "batch d_model"]:
        """resid_pre of a layer at a token of each prompt."""
        if layer not in self.streams:
            raise QklensError(
                f"the stream of layer {layer} was not traced; it holds layers {sorted(self.streams)}: add it to `also`"
            )
        stream = self.streams[layer]
        columns = self.at(position).to(stream.device)
        return stream[torch.arange(len(stream), device=stream.device), columns]

    def maps(self, layer: int) -> ScoreMaps:
        """The layer's weights as the score's algebra uses them."""
        return score_maps(self.subject, layer)

    def query_map(self, layer: int, head: int, q_pos: Position) -> HeadMap:
        """The linear map of queries of a head at a token of each prompt.

        Raises:
            QklensError: no such head or token, or the layer was not traced.
        """
        self.subject.check_head(layer, head)
        maps, stream, turn = self._at(layer, q_pos)
        scales = maps.scales(stream)
        return HeadMap(maps.query_side, head, scales.sigma, maps.query_rms(scales, head), turn)

    def key_map(self, layer: int, head: int, k_pos: Position) -> HeadMap:
        """The linear map of the keys that a query head reads, at a token of each prompt."""
        self.subject.check_head(layer, head)
        maps, stream, turn = self._at(layer, k_pos)
        scales = maps.scales(stream)
        return HeadMap(maps.key_side, maps.kv_head(head), scales.sigma, maps.key_rms(scales, head), turn)

    def score(self, layer: int, head: int, q_pos: Position, k_pos: Position) -> Float[Tensor, " batch"]:
        """The model's own u(p, j): after its scale, before a soft cap and the softmax; −∞ where it does not see."""
        read, which = self._attention(layer, head)
        row = read.score(torch.tensor([which], device=read.query.device), self.at(q_pos).to(read.query.device)[:, None])
        return row[torch.arange(len(row), device=row.device), 0, 0, self.at(k_pos).to(row.device)]

    def pattern(self, layer: int, head: int, q_pos: Position) -> Float[Tensor, "batch k_pos"]:
        """The model's own pattern row over the batch's columns."""
        read, which = self._attention(layer, head)
        rows = torch.arange(len(read.pattern), device=read.pattern.device)
        return read.pattern[rows, which, self.at(q_pos).to(rows.device)]

    def _attention(self, layer: int, head: int) -> tuple[AttentionRead, int]:
        self.subject.check_head(layer, head)
        if layer not in self.attention:
            raise QklensError(f"the attention of layer {layer} was not traced; it holds {sorted(self.attention)}")
        if self.heads is None:
            return self.attention[layer], head
        if head not in self.heads:
            raise QklensError(f"head {head} was not traced; it holds heads {list(self.heads)}")
        return self.attention[layer], self.heads.index(head)

    def _at(self, layer: int, position: Position) -> tuple[ScoreMaps, Tensor, Rotation]:
        maps, stream = self.maps(layer), self.stream(layer, position)
        columns = self.at(position).to(self.batch.position_ids.device)
        rows = torch.arange(len(columns), device=columns.device)
        return maps, stream, rotation(self.subject, layer, self.batch.position_ids[rows, columns])


def trace(
    subject: Subject,
    batch: Batch,
    layers: Sequence[int],
    *,
    heads: Sequence[int] | None = None,
    also: Sequence[int] = (),
    edits: Sequence[Edit] = (),
) -> Trace:
    """Run the model once and keep what `query_map`, `key_map`, `score` and `pattern` of some layers need.

    Args:
        subject: the model.
        batch: left-padded prompts.
        layers: whose stream and attention to keep.
        heads: whose attention to keep; None is all.
        also: other layers whose stream a feature source reads to write these (`source.reads(layer)`).
        edits: applied in the pass.

    Raises:
        QklensError: no such layer or head, or an edit that cannot act.
    """
    for layer in (*layers, *also):
        for head in heads or (0,):
            subject.check_head(layer, head)
    streams: dict[int, Tensor] = {}
    attention: dict[int, AttentionRead] = {}
    reads = Reads(
        {layer: lambda x, layer=layer: streams.__setitem__(layer, x) for layer in {*layers, *also}},
        {
            layer: lambda a, layer=layer: attention.__setitem__(layer, a if heads is None else a.of(heads))
            for layer in layers
        },
    )
    logits = run_pass(subject, batch, edits, reads).logits
    return Trace(subject, batch, streams, attention, logits, None if heads is None else tuple(heads))
