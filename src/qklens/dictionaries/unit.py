"""Decoder directions scaled to unit length once, so that every ranking after it is a product alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qklens.dictionaries.source import at_least_float32
from qklens.errors import QklensError

SHORTEST = 1e-12


@dataclass(frozen=True, eq=False)
class UnitDirections:
    """d̂ᵢ = dᵢ / ‖dᵢ‖ of some features at one layer; made by `unit_directions`.

    Attributes:
        rows: d̂ᵢ, and zero for a feature that does not write the layer.
        present: which features write it.
    """

    rows: Float[Tensor, "feature d_model"]
    present: Bool[Tensor, " feature"]

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, begin: int, end: int) -> UnitDirections:
        """The features from `begin` up to `end`, without a copy."""
        return UnitDirections(self.rows[begin:end], self.present[begin:end])

    def to(self, like: Tensor) -> UnitDirections:
        """The same in another tensor's dtype and on its device; itself where nothing changes."""
        return UnitDirections(self.rows.to(like), self.present.to(like.device))

    def where(self, keep: Bool[Tensor, " feature"]) -> UnitDirections:
        """The features of a mask, in their order."""
        return UnitDirections(self.rows[keep], self.present[keep])


def unit_directions(
    directions: Float[Tensor, "feature d_model"],
    name: str = "directions",
    first: int = 0,
    in_place: bool = False,
    centred: bool = False,
) -> UnitDirections:
    """Scale each direction to unit length, in float32 or better; one shorter than 1e-12 counts as not written.

    Args:
        directions: decoder directions, zero rows for features that do not write the layer.
        name: what an error calls them.
        first: what an error counts rows from.
        in_place: overwrite `directions`, which are in float32 or better, to save their memory.
        centred: take each direction's mean off first, as an input norm does that centres; what is then nothing but
            rounding counts as not written.

    Raises:
        QklensError: a direction holds NaN or infinity, or is too long for its norm to be a number.
    """
    rows, shortest = at_least_float32(directions), torch.tensor(SHORTEST)
    if centred:
        shortest = 8 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows, dim=1) + SHORTEST
        mean = rows.mean(dim=1, keepdim=True)
        rows = rows.sub_(mean) if in_place else rows - mean
    norm = torch.linalg.vector_norm(rows, dim=1)
    finite = norm.isfinite()
    if not finite.all():
        row = first + int((~finite).nonzero()[0, 0])
        raise QklensError(
            f"{name}: row {row} holds NaN or infinity, or its norm overflows; expected finite decoder directions"
        )
    present = norm > shortest.to(norm)
    inverse = torch.where(present, norm.reciprocal(), norm.new_zeros(()))[:, None]
    return UnitDirections(rows.mul_(inverse) if in_place else rows * inverse, present)
