"""Token batches, padded on the left so that the answer position is the last column of every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from qklens.errors import QklensError


@dataclass(frozen=True, eq=False)
class Batch:
    """Left-padded tokens; positions count from each row's first real token, so padding changes nothing.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 at real tokens.
        position_ids: 0 at a row's first real token.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.input_ids.shape[1]

    def padding(self, row: int) -> int:
        """How many columns of a row are padding."""
        return self.width - int(self.attention_mask[row].sum())


def left_padded(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Batch:
    """Stack token sequences, padded on the left.

    Raises:
        QklensError: no sequence, or an empty one.
    """
    if not sequences or any(len(sequence) == 0 for sequence in sequences):
        raise QklensError("a batch needs at least one prompt, and every prompt at least one token")
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.as_tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(ids.to(device), mask.to(device), positions.to(device))
