"""What is steered: a direction in each layer's stream, and how active it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.dictionaries.source import FeatureSource, Stream
from qklens.errors import QklensError


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction to steer along.

    Attributes:
        label: what reports call it.
        vectors: per layer, its vector in resid_pre.layer.
        typical: per layer, the activation that `unit="activation_max"` counts as 1 (in multiples of the vector).
        read: (layer, stream) -> its activation at each token, in multiples of the vector.
        reads: the layers whose stream `read` looks at.
    """

    label: str
    vectors: Mapping[int, Float[Tensor, " d_model"]]
    typical: Mapping[int, float]
    read: Callable[[int, Stream], Float[Tensor, "*any"]]
    reads: Callable[[int], tuple[int, ...]] = lambda layer: (layer,)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers where it has a vector that is not zero."""
        return tuple(layer for layer in sorted(self.vectors) if bool((self.vectors[layer] != 0).any()))


def feature_direction(source: FeatureSource, feature: int, typical: Mapping[int, float]) -> Direction:
    """A feature of a source as a direction; `typical` is usually its largest activation on the discovery half."""
    return Direction(
        label=source.labels[feature],
        vectors={layer: source.directions(layer)[feature] for layer in source.layers},
        typical=typical,
        read=lambda layer, stream: source.encode(layer, stream)[..., feature],
        reads=source.reads,
    )


def random_direction(like: Direction, seed: int) -> Direction:
    """A random direction with the same norm at every layer: the control at equal norm and position.

    One isotropic draw is used in every layer, as a feature's vectors in successive layers resemble each other.
    """
    some = next(iter(like.vectors.values()))
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(some.shape, generator=generator).to(some), dim=0)
    vectors = {layer: unit * vector.norm() for layer, vector in like.vectors.items()}

    def read(layer: int, stream: Stream) -> Tensor:
        vector = vectors[layer]
        return stream(layer) @ (vector / vector.pow(2).sum())

    return Direction(f"random[{seed}]", vectors, like.typical, read)


def at_equal_norm(direction: Direction, like: Direction) -> Direction:
    """Another direction rescaled to the norms and typical activations of `like`, for use as its control."""
    vectors = {}
    for layer in like.layers:
        vector = like.vectors[layer]
        if layer not in direction.vectors:
            raise QklensError(f"direction {direction.label!r} has no vector at layer {layer}")
        own = direction.vectors[layer]
        vectors[layer] = own * (vector.norm() / own.norm().clamp(min=1e-12))

    def read(layer: int, stream: Stream) -> Tensor:
        own, scaled = direction.vectors[layer].norm(), vectors[layer].norm().clamp(min=1e-12)
        return direction.read(layer, stream) * (own / scaled)

    return Direction(direction.label, vectors, like.typical, read, direction.reads)
