"""What a pass hands out, and how its columns are laid out when several copies run side by side after one prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.models.attention import AttentionRead
from qklens.models.projections import ProjectionSide


@dataclass(frozen=True, eq=False)
class Reads:
    """What a pass hands out; a sink sees the tensor once and keeps what it needs.

    With several copies the axes of positions hold them one after the other; see `Copies.answer_rows`.

    Attributes:
        residual: by layer, resid_pre.L after its edits; L = n_layers is the stream before the final norm.
        attention: by layer, the layer's attention.
        after: by layer, resid_post.L, before any edit of the next layer's input.
        projected: by (layer, side), the normed vectors that the side's projection reads; an edit of that side alone
            acts behind it.
    """

    residual: dict[int, Callable[[Tensor], None]]
    attention: dict[int, Callable[[AttentionRead], None]]
    after: dict[int, Callable[[Tensor], None]] = field(default_factory=dict)
    projected: dict[tuple[int, ProjectionSide], Callable[[Tensor], None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Copies:
    """How a pass's columns are laid out.

    Attributes:
        number: copies.
        start: columns of the prefix.
        own: columns of each copy.
    """

    number: int
    start: int
    own: int

    def columns(self, copy: int) -> slice:
        """A copy's columns among those that run."""
        return slice(copy * self.own, (copy + 1) * self.own)

    def take_keys(self, x: Float[Tensor, "*any k_pos n"], copy: int) -> Float[Tensor, "*any own_k_pos n"]:
        """Along the last but one axis, the prefix and a copy's own columns."""
        if self.number == 1:
            return x
        here = self.columns(copy)
        return torch.cat([x[..., : self.start, :], x[..., self.start + here.start : self.start + here.stop, :]], dim=-2)

    def take(self, x: Float[Tensor, "*any q_pos k_pos"], copy: int) -> Float[Tensor, "*any own_q_pos own_k_pos"]:
        """A copy's queries against the prefix and its own keys."""
        if self.number == 1:
            return x
        return self.take_keys(x[..., self.columns(copy), :].transpose(-1, -2), copy).transpose(-1, -2)

    def put(
        self, x: Float[Tensor, "*any q_pos k_pos"], copy: int, value: Float[Tensor, "*any own_q_pos own_k_pos"]
    ) -> None:
        """Write a copy's block in place."""
        here = self.columns(copy)
        x[..., here, : self.start] = value[..., : self.start]
        x[..., here, self.start + here.start : self.start + here.stop] = value[..., self.start :]

    def answer_rows(
        self, pattern: Float[Tensor, "batch head q_pos k_pos"]
    ) -> Float[Tensor, "batch head copy own_k_pos"]:
        """Each copy's last query row, over the prefix and its own columns."""
        rows = pattern[:, :, self.own - 1 :: self.own]
        own = rows[..., self.start :].unflatten(-1, (self.number, self.own)).diagonal(dim1=2, dim2=3)
        return torch.cat([rows[..., : self.start], own.movedim(-1, 2)], dim=-1)
