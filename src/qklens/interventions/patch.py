"""Patching as values: pattern rows given or held, ablated head outputs, and terms taken out of a score.

All act at the answer position (the last column), which is where answer-selection heads do their work.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

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
    """Replace heads' outputs at the answer position.

    Attributes:
        outputs: per (layer, head), what stands in before W_O: one vector for all prompts, or one row a prompt.
        kind: how it was made; see `zero`, `mean` and `resample`.
    """

    outputs: Mapping[Head, Float[Tensor, " d_head"] | Float[Tensor, "prompt d_head"]]
    kind: Literal["zero", "mean", "resample", "given"] = "given"

    @classmethod
    def zero(cls, heads: Sequence[Head], d_head: int) -> HeadAblation:
        """Nothing stands in."""
        return cls({head: torch.zeros(d_head) for head in heads}, "zero")

    @classmethod
    def mean(cls, outputs: Float[Tensor, "prompt layer head d_head"], heads: Sequence[Head]) -> HeadAblation:
        """Each head's mean output over prompts stands in."""
        return cls({(layer, head): outputs[:, layer, head].mean(dim=0) for layer, head in heads}, "mean")

    @classmethod
    def resample(
        cls, outputs: Float[Tensor, "prompt layer head d_head"], heads: Sequence[Head], seed: int
    ) -> HeadAblation:
        """On each prompt another item's output stands in, of the same head and the same order of options.

        All heads take theirs from the same item, drawn so that each item gives once and none to itself.

        Args:
            outputs: of prompts that come item by item, both orders of an item next to each other.
            heads: the heads.
            seed: of the draw.

        Raises:
            QklensError: fewer than two items.
        """
        donors = other_items(len(outputs) // 2, seed)
        rows = torch.stack([2 * donors, 2 * donors + 1], dim=1).flatten()
        return cls({(layer, head): outputs[rows, layer, head] for layer, head in heads}, "resample")

    def describe(self) -> dict[str, Any]:
        """The spec as echoed into results."""
        return {
            "patch": "ablation", "kind": self.kind, "heads": [list(head) for head in self.outputs], "tokens": ["answer"]
        }  # fmt: skip

    def edits(self, subject: Subject, prompts: Sequence[Prompt], batch: Batch, index: Sequence[int]) -> list[Edit]:
        """The edits of one pass; `index` says which row belongs to each prompt of the batch."""
        for (layer, head), values in self.outputs.items():
            subject.check_head(layer, head)
            if values.shape[-1] != subject.d_head or (values.ndim == 2 and len(values) <= max(index)):
                raise QklensError(
                    f"the ablation of L{layer}H{head} has outputs of shape {tuple(values.shape)}; expected "
                    f"{subject.d_head} numbers, or as many for each prompt"
                )

        def replace(layer: int) -> OutputEdit:
            def write(output: Tensor, _: int) -> Tensor:
                new = output.clone()
                for (where, head), values in self.outputs.items():
                    if where == layer:
                        new[:, -1, head] = (values if values.ndim == 1 else values[list(index)]).to(new)
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


def frozen_patterns(
    rows: Mapping[Head, Sequence[Float[Tensor, "_k_pos"]]], free: Sequence[Head], from_layer: int = 0
) -> PatternPatch:
    """Hold heads at their own answer rows, so that none downstream can make up for what is done to others.

    Args:
        rows: every head's row of the clean run, one a prompt of the workset that is then run.
        free: heads that are not held.
        from_layer: the first layer whose heads are held.

    Raises:
        QklensError: no head is left to hold.
    """
    held = {head: row for head, row in rows.items() if head not in set(free) and head[0] >= from_layer}
    if not held:
        raise QklensError(
            f"no head is left to freeze: of {len(rows)} heads all from layer {from_layer} on are named as free; "
            "leave one out"
        )
    return PatternPatch(held)


def other_items(n: int, seed: int) -> Int[Tensor, " item"]:
    """For each of n items another one, each taken once and none its own: the next one on a random round of all.

    Raises:
        QklensError: fewer than two items.
    """
    if n < 2:
        raise QklensError(f"resampling needs another item to take from: {n} given, expected at least 2")
    around = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(around).scatter(0, around, around.roll(-1))


def align_rows(
    donor: Prompt, receiver: Prompt, row: Float[Tensor, "*head donor_pos"]
) -> Float[Tensor, "*head receiver_pos"]:
    """Carry a pattern row from one condition's prompt to another's of the same item and order.

    Text before the intent and text from the question on is shared; a token's weight goes to the receiver's token that
    holds the same character. Tokens that only the receiver has (its intent) get zero. The row's sum is kept.
    """
    if donor.text[donor.shared_from :] != receiver.text[receiver.shared_from :]:
        raise QklensError(
            "a pattern is carried between two conditions of one item and order; these prompts differ from the question "
            f"on: {donor.text[donor.shared_from :][:40]!r} and {receiver.text[receiver.shared_from :][:40]!r}"
        )
    shift = receiver.shared_from - donor.shared_from
    moved = [s + shift if s >= donor.shared_from else min(s, receiver.shared_from - 1) for s in donor.starts]
    targets = [max(bisect_right(receiver.starts, start) - 1, 0) for start in moved]
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
    for head in heads:
        for prompt, which in zip(prompts, index, strict=True):
            given = len(rows[layer, head][which]) if which < len(rows[layer, head]) else 0
            if given != len(prompt.tokens):
                raise QklensError(
                    f"the row of L{layer}H{head} for prompt {which} has {given} entries, its prompt has "
                    f"{len(prompt.tokens)} tokens"
                )
    padded = [
        pad_sequence([rows[layer, head][which] for which in index], batch_first=True, padding_side="left")
        for head in heads
    ]
    stacked = torch.stack(padded, dim=1).to(batch.input_ids.device)
    return pad(stacked, (batch.width - stacked.shape[-1], 0))


def _row_writer(rows: Tensor, heads: list[int]) -> Callable[[Tensor, int], Tensor]:
    def write(pattern: Tensor, _: int) -> Tensor:
        new = pattern.clone()
        new[:, heads, -1] = rows.to(new)
        return new

    return write
