"""Activation functions θ of dictionaries: which pre-activations z count, and as how much.

relu       θ(z) = max(z, 0)
topk       θ(z) = max(z, 0) of the k largest of a reading layer's features, 0 elsewhere   (Gao et al. 2024)
threshold  θ(z) = z · 1[z > t]      one threshold: BatchTopK at inference   (Bussmann et al. 2024)
jumprelu   θ(z) = z · 1[z > tᵢ]     a threshold a feature                  (Rajamanoharan et al. 2024)
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, FiniteFloat, PositiveInt
from torch import Tensor

from qklens.strict import Strict


class Relu(Strict):
    """θ(z) = max(z, 0)."""

    kind: Literal["relu"] = "relu"


class TopK(Strict):
    """The k largest of each reading layer's features, where positive."""

    kind: Literal["topk"] = "topk"
    k: PositiveInt


class Threshold(Strict):
    """θ(z) = z · 1[z > threshold]."""

    kind: Literal["threshold"] = "threshold"
    threshold: FiniteFloat


class JumpRelu(Strict):
    """θ(z) = z · 1[z > tᵢ]; the thresholds are tensors beside the weights."""

    kind: Literal["jumprelu"] = "jumprelu"


Activation = Annotated[Relu | TopK | Threshold | JumpRelu, Field(discriminator="kind")]


def activate(
    activation: Relu | TopK | Threshold | JumpRelu,
    before: Float[Tensor, "*any group_feature"],
    thresholds: Float[Tensor, " group_feature"] | None = None,
) -> Float[Tensor, "*any group_feature"]:
    """θ of one reading layer's pre-activations.

    Args:
        activation: which θ.
        before: z of every feature that reads the layer.
        thresholds: tᵢ, for jumprelu alone.
    """
    match activation:
        case Relu():
            return before.relu()
        case TopK():
            if activation.k >= before.shape[-1]:
                return before.relu()
            largest = before.topk(activation.k, dim=-1)
            return torch.zeros_like(before).scatter(-1, largest.indices, largest.values.relu())
        case Threshold():
            return before * (before > activation.threshold)
        case JumpRelu():
            if thresholds is None:
                raise ValueError("jumprelu needs thresholds")
            return before * (before > thresholds.to(before))
