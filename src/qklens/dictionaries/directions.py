"""Contrast directions as a feature source: a handful of named directions a layer, differences of class means.

    x = Σ aᵢ dᵢ + b + e,   a = (x − b) D⁺

The activations are the least-squares coordinates, so the error is orthogonal to every direction. Whitened directions
(`whitening`) are written in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.dictionaries.source import ErrorByDecoding, Stream, at_least_float32, check_layer, dense_decode


@dataclass(frozen=True, eq=False)
class Directions(ErrorByDecoding):
    """Named directions at each layer.

    Attributes:
        labels: the directions' names.
        vectors: per layer, `direction d_model`.
        means: per layer, the bias b.
        name: what reports call them.
        about: what else `describe` says of them.
    """

    labels: tuple[str, ...]
    vectors: dict[int, Float[Tensor, "direction d_model"]]
    means: dict[int, Float[Tensor, " d_model"]]
    name: str = "directions"
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def site(self) -> str:
        """resid_pre."""
        return "resid_pre"

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have directions."""
        return tuple(sorted(self.vectors))

    def reads(self, layer: int) -> tuple[int, ...]:
        """The layer itself."""
        return (layer,)

    def encode(self, layer: int, stream: Stream) -> Float[Tensor, "*any direction"]:
        """Least-squares coordinates of x − b in the directions' span."""
        check_layer(self, layer)
        residual = at_least_float32(stream(layer))
        return (residual - self.means[layer].to(residual)) @ torch.linalg.pinv(self.vectors[layer].to(residual))

    def decode(self, layer: int, activations: Float[Tensor, "*any direction"]) -> Float[Tensor, "*any d_model"]:
        """Σ aᵢ dᵢ + b."""
        return dense_decode(self, layer, activations)

    def directions(self, layer: int) -> Float[Tensor, "direction d_model"]:
        """The directions of a layer."""
        check_layer(self, layer)
        return self.vectors[layer]

    def bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """The mean residual of the layer."""
        check_layer(self, layer)
        return self.means[layer]

    def describe(self) -> dict[str, Any]:
        """What results and manifest say of it."""
        about = {"name": self.name, "kind": "directions", "layers": list(self.layers), "n_features": len(self.labels)}
        return about | self.about


def joined(parts: Sequence[Directions]) -> Directions:
    """Directions of the same names at different layers as one source."""
    first = parts[0]
    about = dict(first.about)
    if "shrinkage" in about:
        about["shrinkage"] = {layer: row for part in parts for layer, row in part.about["shrinkage"].items()}
    return Directions(
        first.labels,
        {layer: rows for part in parts for layer, rows in part.vectors.items()},
        {layer: mean for part in parts for layer, mean in part.means.items()},
        first.name,
        about,
    )
