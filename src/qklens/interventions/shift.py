"""Add vectors of its own to each prompt's tokens, where some heads read them on one side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.data.render import Prompt
from qklens.errors import QklensError
from qklens.interventions.own_keys import own_key_edit
from qklens.interventions.steer import ALL_TOKENS, Head
from qklens.models.batch import Batch
from qklens.models.edits import Edit, VectorEdit
from qklens.models.subject import Subject


@dataclass(frozen=True, eq=False)
class StreamShift:
    """x' = x + δ + v at some tokens, read by the named heads alone, on one side; norms are recomputed.

    Attributes:
        label: what results call it.
        shifts: per layer, δ of each prompt of the workset over all of that prompt's own tokens.
        heads: (layer, head) pairs; on the key side each has its own copy of the key, also where heads share one.
        side: the side that reads x'.
        tokens: span names, or ("all",).
        plus: per layer, v, the same at every such token: a step of steering, where one edit must do both.
    """

    label: str
    shifts: Mapping[int, Sequence[Float[Tensor, "_pos d_model"]]]
    heads: tuple[Head, ...]
    side: Literal["query", "key"]
    tokens: tuple[str, ...] = (ALL_TOKENS,)
    plus: Mapping[int, Float[Tensor, " d_model"]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The spec as echoed into results."""
        return {
            "shift": self.label,
            "side": self.side,
            "heads": [list(head) for head in self.heads],
            "tokens": list(self.tokens),
        }

    def edits(self, subject: Subject, prompts: Sequence[Prompt], batch: Batch, index: Sequence[int]) -> list[Edit]:
        """The edits of one pass; `index` says which shift belongs to each prompt of the batch.

        Raises:
            QklensError: no such head or span, a layer without shifts, or a shift that does not fit its prompt.
        """
        by_layer: dict[int, list[int]] = {}
        for layer, head in self.heads:
            subject.check_head(layer, head)
            by_layer.setdefault(layer, []).append(head)
        mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            mask[row, [batch.padding(row) + p for p in self._positions(prompt)]] = True
        mask = mask.to(batch.input_ids.device)
        edits: list[Edit] = []
        for layer, heads in by_layer.items():
            change = _adder(self._rows(subject, prompts, index, layer))
            if self.side == "query":
                edits.append(VectorEdit(layer, "query", mask, change, tuple(heads)))
            else:
                edits.append(own_key_edit(subject, batch, layer, heads, mask, change, (), frozen_norm=False))
        return edits

    def _positions(self, prompt: Prompt) -> list[int]:
        """Rising, as a mask reads them."""
        if ALL_TOKENS in self.tokens:
            return list(range(len(prompt.tokens)))
        return sorted({p for name in self.tokens for p in prompt.span(name)})

    def _rows(
        self, subject: Subject, prompts: Sequence[Prompt], index: Sequence[int], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """δ + v at the tokens of a batch, prompt by prompt."""
        if layer not in self.shifts:
            raise QklensError(f"shift {self.label!r} has no vectors for layer {layer}; it has {sorted(self.shifts)}")
        given, rows = self.shifts[layer], []
        for prompt, which in zip(prompts, index, strict=True):
            expected = len(prompt.tokens), subject.d_model
            shape = tuple(given[which].shape) if which < len(given) else None
            if shape != expected:
                raise QklensError(
                    f"shift {self.label!r} of layer {layer} has shape {shape} for prompt {which}, expected {expected}"
                )
            rows.append(given[which][self._positions(prompt)])
        joined = torch.cat(rows)
        return joined + self.plus[layer].to(joined) if layer in self.plus else joined


def _adder(delta: Tensor) -> Callable[[Tensor, Callable[[int], Tensor]], Tensor]:
    return lambda rows, _: rows + delta.to(rows)
