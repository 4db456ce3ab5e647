"""Adam on blocks of rows, with the decoder's norm kept.

    m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,  w ← w − η · m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)

Every row is updated in every step, whether its feature was active or not: momentum goes on moving it. A matrix is
updated a block of rows at a time, and a block's gradient is made when its turn comes: the gradient of the whole matrix
never exists, and a block's weights, moments and gradient meet in cache.

A decoder row is a list of vectors d^l, one a written stream, and its norm stays 1: the gradient's component that would
change it is taken off before Adam, and what the step still changed is scaled away after it. Which norm, hangs on what
chooses features. Where activations are penalised it is Σ_l ‖d^l‖, so that the penalty λ Σ_i f_i Σ_l ‖d_i^l‖ (Lindsey et
al. 2024) is λ Σ_i f_i. Where they are counted it is the whole row's, so that the largest activations are those that
explain most: f² ‖d‖² is what a feature takes from the squared error. A row falls into `parts` whose norms are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from qklens.dictionaries.training.config import TrainingConfig

BLOCK_BYTES = 1 << 19


@dataclass(eq=False)
class Moments:
    """Adam's state of one tensor, in the tensor's own shape."""

    mean: Tensor
    square: Tensor


def zero_moments(weights: Tensor) -> Moments:
    """Before the first step."""
    return Moments(torch.zeros_like(weights), torch.zeros_like(weights))


def adam_rows(
    config: TrainingConfig,
    weights: Tensor,
    moments: Moments,
    gradient: Tensor,
    *,
    step: int,
    learning_rate: float,
    begin: int = 0,
) -> Tensor:
    """Update the rows from `begin` on, as many as the gradient has; returns them.

    `step` counts from 0.
    """
    rows = slice(begin, begin + len(gradient))
    adam(
        [weights[rows]],
        [gradient],
        [moments.mean[rows]],
        [moments.square[rows]],
        [],
        [torch.tensor(float(step), device=weights.device)],
        foreach=False,
        fused=True,
        amsgrad=False,
        beta1=config.beta1,
        beta2=config.beta2,
        lr=learning_rate,
        weight_decay=0.0,
        eps=config.epsilon,
        maximize=False,
    )
    return weights[rows]


def block_size(columns: int) -> int:
    """Rows of a block."""
    return max(1, BLOCK_BYTES // (4 * columns))


def part_norms(decoder: Float[Tensor, "row column"], parts: int) -> Float[Tensor, "row part 1"]:
    """‖d^l‖."""
    return torch.linalg.vector_norm(decoder.unflatten(1, (parts, -1)), dim=2, keepdim=True)


def without_radial(
    gradient: Float[Tensor, "row column"], decoder: Float[Tensor, "row column"], parts: int
) -> Float[Tensor, "row column"]:
    """The gradient without what would change Σ_l ‖d^l‖, in place: g − ⟨g, u⟩ u / ‖u‖² with u = [d^l / ‖d^l‖]_l."""
    if parts == 1:  # rows have unit norm, u is the row itself
        return gradient.addcmul_(torch.linalg.vecdot(gradient, decoder)[:, None], decoder, value=-1)
    norms = part_norms(decoder, parts)
    unit = (decoder.unflatten(1, (parts, -1)) / norms.clamp(min=1e-12)).flatten(1)
    along = torch.linalg.vecdot(gradient, unit) / torch.linalg.vecdot(unit, unit).clamp(min=1e-12)
    return gradient.addcmul_(along[:, None], unit, value=-1)


def scale_to_one(decoder: Float[Tensor, "row column"], parts: int) -> None:
    """Scale each row so that Σ_l ‖d^l‖ = 1, in place."""
    total = part_norms(decoder, parts).sum(dim=1)
    decoder.div_(total.clamp(min=1e-12))
