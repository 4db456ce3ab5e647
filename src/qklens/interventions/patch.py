"""Patching as values: pattern rows from another prompt, ablated head outputs, and terms taken out of a score.

All act at the answer position (the last column), which is where answer-selection heads do their work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.data.render import Prompt
from qklens.errors import QklensError
from qklens.interventions.steer import Head
from qklens.models.batch import Batch
from qklens.models.edits import Edit, OutputEdit, PatternEdit, ScoreEdit, ScoreView
from qklens.models.subject import Subject


@dataclass(frozen=True, eq=False)
class PatternPatch:
    """Give heads the answer row of another prompt's pattern.

    Attributes:
        rows: per (layer, head), one row a prompt over that prompt's own tokens; see `align_rows`.
    """

    rows: Mapping[Head, Sequence[Float[Tensor, "_k_pos"]]]

    def describe(self) -> dict[str, Any]:
        """The spec as echoed into results."""
        return {"patch": "pattern", "heads": [list(head) for head in self.rows], "tokens": ["answer"]}

    def edits(self, subject: Subject, prompts: Sequence[Prompt], batch: Batch, index: Sequence[int]) -> list[Edit]:
        """The edits of one pass; `index` says which row belongs to each prompt of the batch."""
        by_layer: dict[int, list[int]] = {}
        for layer, head in self.rows:
            subject.check_head(layer, head)
            by_layer.setdefault(layer, []).append(head)
        return [
            PatternEdit(layer, _row_writer(_stack(self.rows, layer, heads, prompts, batch, index), heads))
            for layer, heads in by_layer.items()
        ]


@dataclass(frozen=True, eq=False)
class HeadAblation:
    """Replace heads' outputs at the answer position by a fixed vector (their mean over prompts, or zero).

    Attributes:
        outputs: per (layer, head), the vector that stands in, before W_O.
    """

    outputs: dict[Head, Float[Tensor, " d_head"]]

    def describe(self) -> dict[str, Any]:
        """The spec as echoed into results."""
        return {"patch": "ablation", "heads": [list(head) for head in self.outputs], "tokens": ["answer"]}

    def edits(self, subject: Subject, prompts: Sequence[Prompt], batch: Batch, index: Sequence[int]) -> list[Edit]:
        """The edits of one pass."""
        for layer, head in self.outputs:
            subject.check_head(layer, head)

        def replace(layer: int) -> OutputEdit:
            def write(output: Tensor, _: int) -> Tensor:
                new = output.clone()
                for (where, head), vector in self.outputs.items():
                    if where == layer:
                        new[:, -1, head] = vector.to(new)
                return new

            return OutputEdit(layer, write)

        return [replace(layer) for layer in sorted({layer for layer, _ in self.outputs})]


@dataclass(frozen=True, eq=False)
class ScoreShift:
    """Add to the answer row of heads' scores before softmax: with minus a pair's terms, that pair is taken out.

    Attributes:
        shifts: per (layer, head), one row a prompt over that prompt's own tokens, in score units.
    """

    shifts: Mapping[Head, Sequence[Float[Tensor, "_k_pos"]]]

    def describe(self) -> dict[str, Any]:
        """The spec as echoed into results."""
        return {"patch": "score", "heads": [list(head) for head in self.shifts], "tokens": ["answer"]}

    def edits(self, subject: Subject, prompts: Sequence[Prompt], batch: Batch, index: Sequence[int]) -> list[Edit]:
        """The edits of one pass."""
        by_layer: dict[int, list[int]] = {}
        for layer, head in self.shifts:
            subject.check_head(layer, head)
            by_layer.setdefault(layer, []).append(head)

        def shift(layer: int, heads: list[int]) -> ScoreEdit:
            rows = _stack(self.shifts, layer, heads, prompts, batch, index)

            def bias(view: ScoreView) -> Tensor:
                total = view.query.new_zeros((*view.query.shape[:3], view.key.shape[2]))
                total[:, heads, -1] = rows.to(total)
                return total

            return ScoreEdit(layer, bias)

        return [shift(layer, heads) for layer, heads in by_layer.items()]


def align_rows(
    donor: Prompt, receiver: Prompt, row: Float[Tensor, "*head donor_pos"]
) -> Float[Tensor, "*head receiver_pos"]:
    """Carry a pattern row from one condition's prompt to another's of the same item and order.

    Text before the intent and text from the question on is shared; a token's weight goes to the receiver's token that
    holds the same character. Tokens that only the receiver has (its intent) get zero. The row's sum is kept.
    """
    shift = receiver.shared_from - donor.shared_from
    starts = torch.tensor(receiver.starts)
    targets = []
    for start in donor.starts:
        moved = start + shift if start >= donor.shared_from else min(start, receiver.shared_from - 1)
        targets.append(max(int(torch.searchsorted(starts, moved, right=True)) - 1, 0))
    result = row.new_zeros((*row.shape[:-1], len(receiver.tokens)))
    return result.index_add(-1, torch.tensor(targets, device=row.device), row)


def _stack(
    rows: Mapping[Head, Sequence[Tensor]],
    layer: int,
    heads: list[int],
    prompts: Sequence[Prompt],
    batch: Batch,
    index: Sequence[int],
) -> Float[Tensor, "batch head k_pos"]:
    stacked = torch.zeros(len(prompts), len(heads), batch.width, device=batch.input_ids.device)
    for row, (prompt, which) in enumerate(zip(prompts, index, strict=True)):
        for column, head in enumerate(heads):
            values = rows[layer, head][which]
            if len(values) != len(prompt.tokens):
                raise QklensError(f"a patch row has {len(values)} entries, its prompt has {len(prompt.tokens)} tokens")
            stacked[row, column, batch.width - len(prompt.tokens) :] = values.to(stacked)
    return stacked


def _row_writer(rows: Tensor, heads: list[int]) -> Callable[[Tensor, int], Tensor]:
    def write(pattern: Tensor, _: int) -> Tensor:
        new = pattern.clone()
        new[:, heads, -1] = rows.to(new)
        return new

    return write
