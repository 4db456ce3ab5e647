"""Where a head's W_Q, W_K and W_V lie: own linear maps, or rows of a fused one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ProjectionSide = Literal["query", "key", "value"]


@dataclass(frozen=True)
class HeadCounts:
    """How the attention of a model is laid out."""

    n_heads: int
    n_kv_heads: int
    d_head: int

    def of(self, side: ProjectionSide) -> int:
        """Heads on a side."""
        return self.n_heads if side == "query" else self.n_kv_heads


@dataclass(frozen=True, eq=False)
class Projection:
    """One side's projection inside a module.

    Attributes:
        module: the linear map that computes it, alone or together with others.
        rows: which outputs of the module are each head's.
    """

    module: nn.Module
    rows: Int[Tensor, "head d_head"]

    def weight(self, heads: Sequence[int] | None = None) -> Float[Tensor, "head d_head d_model"]:
        """W, one matrix for each of some heads, or of all."""
        weight: Tensor = self.module.weight  # pyright: ignore[reportAssignmentType]
        return (weight.T if isinstance(self.module, Conv1D) else weight)[self.columns(heads).to(weight.device)]

    def bias(self, heads: Sequence[int] | None = None) -> Float[Tensor, "head d_head"] | None:
        """B of some heads, or of all; nothing where there is none."""
        bias: Tensor | None = self.module.bias  # pyright: ignore[reportAssignmentType]
        return None if bias is None else bias[self.columns(heads).to(bias.device)]

    @property
    def device(self) -> torch.device:
        """Where the module lives."""
        return next(self.module.parameters()).device

    def columns(self, heads: Sequence[int] | None = None) -> Int[Tensor, "head d_head"]:
        """Where some heads lie in the module's output."""
        return self.rows if heads is None else self.rows[list(heads)]


Layout = Callable[[Any, HeadCounts, ProjectionSide], Projection]


def separate(attention: Any, counts: HeadCounts, side: ProjectionSide) -> Projection:  # noqa: ANN401
    """`q_proj`, `k_proj`, `v_proj`."""
    module = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}[side]
    return Projection(module, _block(0, counts.of(side), counts.d_head))


def stacked(name: str) -> Layout:
    """One module whose outputs are all of q, then all of k, then all of v (phi3, gpt2)."""

    def find(attention: Any, counts: HeadCounts, side: ProjectionSide) -> Projection:  # noqa: ANN401
        before = {"query": 0, "key": counts.n_heads, "value": counts.n_heads + counts.n_kv_heads}[side]
        return Projection(getattr(attention, name), _block(before * counts.d_head, counts.of(side), counts.d_head))

    return find


def interleaved(name: str) -> Layout:
    """One module whose outputs are q, k, v of the first head, then of the second, and so on (gpt_neox)."""

    def find(attention: Any, counts: HeadCounts, side: ProjectionSide) -> Projection:  # noqa: ANN401
        which = ("query", "key", "value").index(side)
        rows = _block(0, 3 * counts.n_heads, counts.d_head)[which::3]
        return Projection(getattr(attention, name), rows)

    return find


def _block(first: int, heads: int, d_head: int) -> Int[Tensor, "head d_head"]:
    return torch.arange(first, first + heads * d_head).view(heads, d_head)
