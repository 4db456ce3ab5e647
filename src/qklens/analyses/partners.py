"""Who else does a feature push away? Every feature of the dictionary ranked by virtual interaction with one query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.models.scores import Rotation, ScoreMaps, virtual_interaction


@dataclass(frozen=True, eq=False)
class PartnerScores:
    """Virtual interaction of one query direction with every key feature, mean over heads.

    Attributes:
        value: mean over heads, score units for unit vectors.
        z: value against the distribution over all alive features, mean over heads of the per-head z.
    """

    value: Float[Tensor, " feature"]
    z: Float[Tensor, " feature"]


def partner_scores(
    query: dict[int, Float[Tensor, " d_model"]],
    keys: dict[int, Float[Tensor, "feature d_model"]],
    heads: Sequence[tuple[ScoreMaps, int, Rotation]],
    alive: dict[int, Tensor],
) -> PartnerScores:
    """Rank all features as keys of one query at some heads.

    Args:
        query: the query direction per layer.
        keys: all features' directions per layer.
        heads: (maps, head, mean rotation over real offsets).
        alive: per layer, which features occur there; z is against these.
    """
    values, scores = [], []
    for maps, head, turn in heads:
        value = virtual_interaction(maps, head, turn, query[maps.layer][None], keys[maps.layer])
        living = value[alive[maps.layer]]
        values.append(value)
        scores.append((value - living.mean()) / living.std().clamp(min=1e-12))
    return PartnerScores(torch.stack(values).mean(dim=0), torch.stack(scores).mean(dim=0))
