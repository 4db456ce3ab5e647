"""Give every head a block of another prompt's pattern: what some tokens look at some other tokens with.

In a changed row, the rest is scaled so that its sum stays: what is no longer looked at there goes to all other keys in
proportion, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


def _writer(layer: int, blocks: Sequence[tuple[int, int, Block]]) -> Callable[[Tensor, int], Tensor]:
    def write(pattern: Tensor, start: int) -> Tensor:
        new = pattern.clone()
        for row, padding, block in blocks:
            queries = [padding + q - start for q in block.queries]
            keys = [padding + k for k in block.keys]
            rows = new[row][:, queries]
            whole, values = rows.sum(dim=-1), block.values[layer].to(rows)
            rest = whole - rows[..., keys].sum(dim=-1)
            scale = (whole - values.sum(dim=-1)).clamp(min=0.0) / rest.clamp(min=1e-12)
            rows = rows * scale[..., None]
            rows[..., keys] = values
            new[row][:, queries] = rows
        return new

    return write
