"""What is learnt: per group an encoder, its bias and a decoder; one bias a row; thresholds for jumprelu.

Master weights are float32 whatever the rows come in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.dictionaries.training.adam import scale_to_one
from qklens.dictionaries.training.config import TrainingConfig
from qklens.dictionaries.training.layout import Layout


@dataclass(eq=False)
class GroupWeights:
    """The weights of one group of features.

    Attributes:
        encoder: rows over the columns that the group reads.
        encoder_bias: one a feature.
        decoder: rows over the columns that the group writes, of norm 1.
        log_threshold: log tᵢ, for jumprelu alone.
    """

    encoder: Float[Tensor, "feature read"]
    encoder_bias: Float[Tensor, " feature"]
    decoder: Float[Tensor, "feature written"]
    log_threshold: Float[Tensor, " feature"] | None

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        named = {"encoder": self.encoder, "encoder_bias": self.encoder_bias, "decoder": self.decoder}
        return named if self.log_threshold is None else named | {"log_threshold": self.log_threshold}


@dataclass(eq=False)
class Weights:
    """All weights.

    Attributes:
        groups: in the order of the layout.
        bias: b, one a column; subtracted before encoding, added after decoding.
    """

    groups: list[GroupWeights]
    bias: Float[Tensor, " column"]

    def tensors(self) -> dict[str, Tensor]:
        """By name, as checkpoints hold them."""
        named = {f"{i}.{name}": t for i, group in enumerate(self.groups) for name, t in group.tensors().items()}
        return named | {"bias": self.bias}


def first_weights(
    config: TrainingConfig, layout: Layout, bias: Float[Tensor, " column"], generator: torch.Generator
) -> Weights:
    """The weights before the first step.

    A feature starts as one random direction in every stream that it writes, and reads along it: a row that is this
    direction in all of those streams is encoded and decoded to itself.
    """
    groups = []
    for group in layout.groups:
        reads, writes = len(group.reads), len(group.writes)
        drawn = torch.randn(config.features, layout.d_model, generator=generator, dtype=bias.dtype)
        unit = torch.nn.functional.normalize(drawn, dim=1).to(bias.device)
        decoder = unit.repeat(1, writes)
        length = decoder.norm(dim=1, keepdim=True)
        scale_to_one(decoder, group.parts)
        encoder = unit.repeat(1, reads) * (length / decoder.norm(dim=1, keepdim=True) / reads)
        log_threshold = None
        if config.activation == "jumprelu":
            first = torch.tensor(config.first_threshold, dtype=bias.dtype).log()
            log_threshold = first.repeat(config.features).to(bias.device)
        groups.append(GroupWeights(encoder, bias.new_zeros(config.features), decoder, log_threshold))
    return Weights(groups, bias.clone())
