"""Give every head a block of another prompt's pattern: what some tokens look at some other tokens with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.data.render import Prompt
from qklens.models.batch import Batch
from qklens.models.edits import Edit, PatternEdit
from qklens.models.subject import Subject


@dataclass(frozen=True, eq=False)
class Block:
    """A part of one prompt's patterns.

    Attributes:
        queries: the rows' tokens, counted from the prompt's first.
        keys: the columns' tokens.
        values: all heads' attention from these queries to these keys.
    """

    queries: Sequence[int]
    keys: Sequence[int]
    values: Float[Tensor, "layer head query key"]


@dataclass(frozen=True, eq=False)
class BlockPatch:
    """Put a block into the patterns of every prompt, in all heads of all layers.

    Attributes:
        blocks: one a prompt; one without queries changes nothing.
    """

    blocks: Sequence[Block]

    def describe(self) -> dict[str, Any]:
        """The spec as echoed into results."""
        return {"patch": "pattern block", "queries": sum(len(block.queries) for block in self.blocks)}

    def edits(self, subject: Subject, prompts: Sequence[Prompt], batch: Batch, index: Sequence[int]) -> list[Edit]:
        """The edits of one pass; `index` says which block belongs to each prompt of the batch."""
        blocks = [(row, batch.padding(row), self.blocks[which]) for row, which in enumerate(index)]
        blocks = [(row, padding, block) for row, padding, block in blocks if len(block.queries)]
        if not blocks:
            return []
        first = min(padding + min(block.queries) for _, padding, block in blocks)
        return [PatternEdit(layer, _writer(layer, blocks), first) for layer in range(subject.n_layers)]


def with_block(
    rows: Float[Tensor, "head query key"], keys: Sequence[int], values: Float[Tensor, "head query its_key"]
) -> Float[Tensor, "head query key"]:
    """Rows of a pattern that look at some keys with given values, each with the sum that it had.

        new[k] = values[k]                               k in keys
                 row[k] / Σ_rest row · (Σ row − Σ values)    any other k

    so what is no longer looked at there goes to all other keys in proportion, and the other way round. Values of more
    than the row's sum (beside an attention sink) are scaled down to it; where all other keys are at zero, and cannot
    take anything, values are scaled up to it, and a row that would look at nothing stays as it is.
    """
    new = rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
    values, whole = values.to(new), new.sum(dim=-1, keepdim=True)
    new[..., keys] = 0.0  # the rest is summed without them: a difference of sums would lose a small one
    rest, given = new.sum(dim=-1, keepdim=True), values.sum(dim=-1, keepdim=True)
    fits = (given <= whole) & (rest > 0)
    new = torch.where(fits, new / rest * (whole - given), 0.0)
    new[..., keys] = torch.where(fits | (given == 0), values, values / given * whole)
    return torch.where((rest > 0) | (given > 0), new.to(rows), rows)


def _writer(layer: int, blocks: Sequence[tuple[int, int, Block]]) -> Callable[[Tensor, int], Tensor]:
    def write(pattern: Tensor, start: int) -> Tensor:
        new = pattern.clone()
        for row, padding, block in blocks:
            queries = [padding + q - start for q in block.queries]
            keys = [padding + k for k in block.keys]
            new[row][:, queries] = with_block(pattern[row][:, queries], keys, block.values[layer])
        return new

    return write
