"""The largest activations at a few fixed tokens: what L0 and variance unexplained cannot see.

Both are sums. They hardly notice an encoder that is off by a few percent, and nothing of features in another order or
of an encoder and a decoder that are off by factors that cancel. Which features are most active at a token, and by how
much, is compared directly; only what is at least a quarter of a token's largest activation counts, because that lies
far above any threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

PEAKS = 4
"""Features of each token."""
_SHARE = 0.25
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Peaks:
    """The most active features of some tokens at each layer.

    Attributes:
        feature: which, per layer; largest first.
        activation: how much, per layer.
    """

    feature: dict[int, Int[Tensor, "token peak"]]
    activation: dict[int, Float[Tensor, "token peak"]]


def find_peaks(activations: dict[int, Float[Tensor, "token _feature"]]) -> Peaks:
    """The peaks of activations, per layer."""
    found = {layer: a.abs().topk(min(PEAKS, a.shape[1]), dim=1).indices for layer, a in activations.items()}
    return Peaks(found, {layer: activations[layer].gather(1, index) for layer, index in found.items()})


def peak_change(recorded: Peaks, activations: dict[int, Float[Tensor, "token _feature"]]) -> dict[int, float]:
    """The largest change of a recorded peak at each layer, as a share of its token's largest activation.

    Infinite where the features or layers are not those of the record.
    """
    changes = {}
    for layer, now in activations.items():
        feature, then = recorded.feature.get(layer), recorded.activation.get(layer)
        if feature is None or then is None or len(feature) != len(now) or int(feature.max()) >= now.shape[1]:
            changes[layer] = torch.inf
            continue
        largest = then.abs().amax(dim=1, keepdim=True)
        counted = then.abs() >= (_SHARE * largest).clamp(min=_TINY)
        change = (now.gather(1, feature) - then).abs() / largest.clamp(min=_TINY)
        changes[layer] = float(change.where(counted, torch.zeros(())).max())
    return changes
