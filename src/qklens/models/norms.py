"""Norms as the score's algebra needs them: n(x) = C x ⊙ γ / σ(x) + β, linear in x once σ is held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class NormRule:
    """How a family's norm modules compute.

    Attributes:
        centred: whether C is centring (LayerNorm) or the identity (RMSNorm).
        offset: γ = weight + offset; Gemma stores γ − 1.
        epsilon: reads the epsilon inside the root from a module.
    """

    centred: bool
    offset: float
    epsilon: Callable[[Any], float]


RMS = NormRule(False, 0.0, lambda norm: norm.variance_epsilon)
GEMMA_RMS = NormRule(False, 1.0, lambda norm: norm.eps)
LAYER = NormRule(True, 0.0, lambda norm: norm.eps)


@dataclass(frozen=True, eq=False)
class NormMap:
    """One norm's numbers in the analysis dtype; without `gamma` it is the identity with σ = 1.

    Attributes:
        centred: whether the mean is taken off first.
        gamma: γ as it multiplies.
        beta: β, or nothing.
        epsilon: inside σ's root.
    """

    centred: bool = False
    gamma: Float[Tensor, " d_model"] | None = None
    beta: Float[Tensor, " d_model"] | None = None
    epsilon: float = 0.0

    def scale(self, x: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any"]:
        """σ(x) = sqrt(mean (C x)² + ε)."""
        if self.gamma is None:
            return torch.ones_like(x[..., 0])
        return (self.centre(x).pow(2).mean(dim=-1) + self.epsilon).sqrt()

    def linear(self, x: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """C x ⊙ γ: what is left of the norm when σ is held and β is a source of its own."""
        return x if self.gamma is None else self.centre(x) * self.gamma

    def fold(self, weight: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """W ↦ W γ C, so that (W γ C) x = W (C x ⊙ γ)."""
        return weight if self.gamma is None else self.centre(weight * self.gamma)

    def centre(self, x: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """C x: x − mean(x) under LayerNorm, x itself under RMSNorm."""
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x

    def unit(self, directions: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """C d / ‖C d‖: the unit vector of what the norm lets through of a direction, zero where nothing is left.

        LayerNorm takes the mean away, so d and d + m 1 write the same as far as anything that reads the stream can
        tell, and must have the same unit vector: d / ‖d‖ would be shorter by √(1 + m² d_model / ‖C d‖²) for no reason
        that the model knows of.
        """
        seen = self.centre(directions)
        unit = torch.nn.functional.normalize(seen, dim=-1)
        if not self.centred:
            return unit
        rounding = 8 * torch.finfo(seen.dtype).eps * directions.norm(dim=-1, keepdim=True)
        return unit.where(seen.norm(dim=-1, keepdim=True) > rounding, 0)


def norm_map(rule: NormRule, module: nn.Module | None, dtype: torch.dtype) -> NormMap:
    """The numbers of one norm module; no module is the identity."""
    if module is None:
        return NormMap()
    weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    beta: Tensor | None = getattr(module, "bias", None)
    return NormMap(
        rule.centred,
        weight.to(dtype) + rule.offset,
        None if beta is None else beta.to(dtype),
        float(rule.epsilon(module)),
    )
