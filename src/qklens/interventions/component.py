"""Give tokens the amount of one direction that they had in another run, and leave all else of them alone.

x' = x + (t − ⟨x, w⟩ / ⟨w, w⟩) w
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.data.render import Prompt
from qklens.models.batch import Batch
from qklens.models.edits import Edit, VectorEdit
from qklens.models.subject import Subject


@dataclass(frozen=True, eq=False)
class ComponentPatch:
    """Set a direction's amount at some tokens of the residual stream.

    Attributes:
        label: what results call the direction.
        vectors: per layer, the direction w in resid_pre of that layer.
        positions: per prompt, the tokens, counted from its first.
        targets: per layer and prompt, the amounts t in multiples of w, one a token of `positions`.
    """

    label: str
    vectors: Mapping[int, Float[Tensor, " d_model"]]
    positions: Sequence[Sequence[int]]
    targets: Mapping[int, Sequence[Float[Tensor, "_token"]]]

    def describe(self) -> dict[str, Any]:
        """The spec as echoed into results."""
        return {"patch": "component", "direction": self.label, "layers": list(self.vectors)}

    def edits(self, subject: Subject, prompts: Sequence[Prompt], batch: Batch, index: Sequence[int]) -> list[Edit]:
        """The edits of one pass; `index` says which prompts of the workset these are."""
        mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        amounts = {layer: torch.zeros(batch.input_ids.shape) for layer in self.vectors}
        for row, which in enumerate(index):
            columns = [batch.padding(row) + p for p in self.positions[which]]
            mask[row, columns] = True
            for layer, rows in self.targets.items():
                amounts[layer][row, columns] = rows[which].to(amounts[layer])
        return [self._edit(layer, mask.to(batch.input_ids.device), amounts[layer][mask]) for layer in self.vectors]

    def _edit(self, layer: int, mask: Tensor, target: Tensor) -> VectorEdit:
        vector = self.vectors[layer]

        def change(rows: Tensor, _: object) -> Tensor:
            w = vector.to(rows)
            return rows + (target.to(rows) - rows @ w / w.pow(2).sum())[:, None] * w

        return VectorEdit(layer, "residual", mask, change)
