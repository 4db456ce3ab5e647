"""Where a planted model's named directions lie in its residual stream.

    D = normalise(Q + ρ G)

Q is a random orthonormal set, so no axis of the stream means anything; it is orthogonal to the vector of ones, so that
LayerNorm's centring leaves it alone. G is Gaussian noise of unit length within the same space: ρ is about the typical
|cos| between two features times √d (superposition). `constant` stays orthogonal to all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.bench.planted.blueprint import CONSTANT, CONSTANT_AMOUNT, NAMES

D_MODEL = 96
WORD_AMOUNT = 0.5
"""Every token's own random vector, in the part of the space that no named direction starts from."""
TYPICAL_NORM = (CONSTANT_AMOUNT**2 + 3.0) ** 0.5
READ = D_MODEL**0.5 / TYPICAL_NORM
"""What a norm multiplies the stream by, about: its width's root over its usual length."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Named unit vectors of the stream, and the space left for words.

    Attributes:
        vectors: one row a name of `NAMES`.
        words: an orthonormal basis of the rest.
    """

    vectors: Float[Tensor, "name d_model"]
    words: Float[Tensor, "rest d_model"]

    def __getitem__(self, name: str) -> Float[Tensor, " d_model"]:
        return self.vectors[NAMES.index(name)]

    def sum(self, amounts: Mapping[str, float]) -> Float[Tensor, " d_model"]:
        """Σ amount · direction."""
        total = torch.zeros(D_MODEL, dtype=torch.float64)
        for name, amount in amounts.items():
            total = total + amount * self[name]
        return total


def draw_basis(rho: float, generator: torch.Generator) -> Basis:
    """A basis with superposition ρ."""
    ones = torch.ones(D_MODEL, 1, dtype=torch.float64)
    drawn = torch.randn(D_MODEL, D_MODEL - 1, generator=generator, dtype=torch.float64)
    frame = torch.linalg.qr(torch.cat([ones, drawn], dim=1)).Q.T[1:]
    named, words = frame[: len(NAMES)].clone(), frame[len(NAMES) :]
    constant = NAMES.index(CONSTANT)
    noise = (
        torch.randn(len(NAMES), D_MODEL - 1, generator=generator, dtype=torch.float64) / (D_MODEL - 1) ** 0.5 @ frame
    )
    noise = noise - (noise @ named[constant])[:, None] * named[constant]
    noise[constant] = 0.0
    return Basis(torch.nn.functional.normalize(named + rho * noise, dim=-1), words)
