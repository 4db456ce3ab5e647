"""Which tokens does a direction promote by itself, past all later layers?

    ℓ_v = ⟨W_U[v] − mean_v W_U, C d̂ ⊙ γ⟩ / σ,   d̂ = d / ‖d‖

C and γ are the final norm's linear part, σ its scale, held at a given value. Positive promotes the token. The mean over
the vocabulary is taken off because the softmax does not see it. A bias, β and a cap on the logits have no part in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.analyses.top_lists import ColumnLists
from qklens.dictionaries.unit import UnitDirections, unit_directions
from qklens.models.subject import Subject

_TILE = 1 << 12


@dataclass(frozen=True, eq=False)
class Ends:
    """Both ends of a ranking, most extreme first; index −1 and value NaN past a row's last."""

    lowest: tuple[Int[Tensor, "row place"], Float[Tensor, "row place"]]
    highest: tuple[Int[Tensor, "row place"], Float[Tensor, "row place"]]


@torch.no_grad()
def direct_logits(subject: Subject, directions: Float[Tensor, "row d_model"], scale: float, k: int) -> Ends:
    """The k tokens that each direction promotes and suppresses most; columns are token ids of the tokenizer.

    Args:
        subject: the model.
        directions: any length; a zero row promotes nothing.
        scale: σ.
        k: how many from each end.
    """
    weight: Tensor = subject.unembedding.weight  # pyright: ignore[reportAssignmentType]
    weight = weight[: len(subject.tokenizer)]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    unit = unit_directions(directions.to(weight.device, dtype)).rows
    norm = subject.final_norm(dtype)
    through = norm.linear(unit) / scale
    through = through.to(weight.device)
    mean = sum(rows.to(dtype).sum(dim=0, dtype=torch.float64) for rows in weight.split(_TILE)) / len(weight)
    return _ranked(through, weight, through @ torch.as_tensor(mean).to(through), k)


@torch.no_grad()
def nearest_directions(
    every: Float[Tensor, "feature d_model"], chosen: Int[Tensor, " row"], k: int, *, centred: bool = False
) -> Ends:
    """The k features of largest and of smallest cosine to each chosen one, itself and unwritten ones left out.

    Args:
        every: decoder directions of a layer.
        chosen: indices of features.
        k: how many from each end.
        centred: compare what a norm that centres lets through.
    """
    unit: UnitDirections = unit_directions(every, centred=centred)
    written = unit.present.nonzero()[:, 0]
    ends = _ranked(unit.rows[chosen], unit.rows[written], None, k + 1)
    return Ends(*(_without(chosen, written, index, value, k) for index, value in (ends.lowest, ends.highest)))


def _without(chosen: Tensor, written: Tensor, index: Tensor, value: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns as features, with each row's own taken out."""
    feature = torch.where(index >= 0, written[index.clamp(min=0)], -1)
    own = feature == chosen[:, None]
    order = own.long().sort(dim=1, stable=True).indices[:, :k]
    feature = feature.masked_fill(own, -1).gather(1, order)
    return feature, value.gather(1, order).masked_fill(feature < 0, torch.nan)


def _ranked(rows: Tensor, matrix: Tensor, off: Tensor | None, k: int) -> Ends:
    """Both ends of each row's products with a matrix's rows, a tile of the matrix at a time."""
    lists = ColumnLists(len(rows), min(k, len(matrix)), _TILE, 1, rows)
    for begin in range(0, len(matrix), _TILE):
        block = matrix[begin : begin + _TILE].to(rows)
        tile = lists.tile(0, len(block))
        tile.copy_(rows @ block.T if off is None else rows @ block.T - off[:, None])
        lists.glance(0, len(block))
        lists.collect(torch.arange(begin, begin + len(block), device=rows.device))
    lowest, highest = lists.ranked(min(k, len(matrix)))
    return Ends(lowest, highest)
