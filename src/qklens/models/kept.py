"""What a clean pass leaves for later ones: every layer's keys and values, and the stream where a later pass begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from qklens.models.batch import Batch


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of a clean pass for every column, one pair a layer, each `batch kv_head k_pos d_head`."""

    pairs: tuple[tuple[Tensor, Tensor], ...]

    def rows(self, index: Int[Tensor, " row"]) -> Prefix:
        """Some rows, in this order, copied."""
        return Prefix(tuple((k[index.to(k.device)], v[index.to(v.device)]) for k, v in self.pairs))

    def columns(self, index: Int[Tensor, "batch n"]) -> Prefix:
        """Some columns of each row, copied."""

        def pick(x: Tensor) -> Tensor:
            at = index.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            return x.gather(2, at)

        return Prefix(tuple((pick(k), pick(v)) for k, v in self.pairs))

    def followed_by(self, other: Prefix) -> Prefix:
        """These columns, then another's."""
        pairs = zip(self.pairs, other.pairs, strict=True)
        return Prefix(tuple((torch.cat([k, k2], dim=2), torch.cat([v, v2], dim=2)) for (k, v), (k2, v2) in pairs))


@dataclass(frozen=True, eq=False)
class Beginning:
    """Where a pass begins: columns before `start` and layers before `layer` are not run.

    Attributes:
        prefix: clean keys and values, of which the columns before `start` are used.
        start: the first column that runs.
        layer: the first layer that runs.
        stream: resid_pre.`layer` of the clean pass at the columns from `start` on; nothing for layer 0.
    """

    prefix: Prefix
    start: int
    layer: int = 0
    stream: Float[Tensor, "batch pos d_model"] | None = None


class FixedCache(DynamicCache):
    """A cache that serves the same prefix to every pass, and hands the passes' own keys and values to whoever asks."""

    def __init__(self, prefix: Prefix, width: int) -> None:
        # transformers asks its own layers for nothing but their length
        super().__init__([(k[:1, :1, :width, :1], v[:1, :1, :width, :1]) for k, v in prefix.pairs])
        self._held = [(k[:, :, :width], v[:, :, :width]) for k, v in prefix.pairs]
        self.own: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """What a layer attends to: the prefix, then its own keys and values."""
        keys, values = self._held[layer_idx]
        self.own.append((key_states, value_states))
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


def visible(
    batch: Batch, start: int, copies: int
) -> tuple[Int[Tensor, "batch k_pos"], Bool[Tensor, "batch q_pos k_pos"]]:
    """Each key column's position, and which keys a query may see at all before causality and windows are asked.

    Queries are the columns from `start` on, `copies` times side by side; a copy sees the prefix and itself.
    """
    own = batch.width - start
    device = batch.input_ids.device
    position = torch.cat([batch.position_ids[:, :start], batch.position_ids[:, start:].repeat(1, copies)], dim=1)
    real = torch.cat([batch.attention_mask[:, :start], batch.attention_mask[:, start:].repeat(1, copies)], dim=1) != 0
    copy = torch.arange(copies, device=device).repeat_interleave(own)
    same = torch.ones(len(copy), start + len(copy), dtype=torch.bool, device=device)
    same[:, start:] = copy[:, None] == copy
    return position, real[:, None] & same


def left_packed(real: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "row n"]:
    """Columns to pick so that each row's real ones stand at the right; what fills the left is hidden by the mask."""
    width = max(map(len, real))
    return torch.tensor([[columns[0]] * (width - len(columns)) + list(columns) for columns in real], device=device)
