"""Feature sources: whatever writes a residual vector as Σ aᵢ dᵢ + b + e.

A source knows layers and vectors, never a model family. `layer` always means the site resid_pre.layer, the stream that
the heads of that layer read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.errors import QklensError, nearest

_SPELL_CHECKED = 20_000
"""Labels among which a misspelt one is looked for; in a million it would take a minute."""
Stream = Callable[[int], Tensor]
"""Gives the residual stream of a layer at the tokens in question, `... d_model`."""


@runtime_checkable
class FeatureSource(Protocol):
    """A dictionary over one or more layers of one model."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def site(self) -> str:
        """The kind of site that it reads and writes: `resid_pre`, the only one that heads read."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose resid_pre it writes."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """One name a feature, unique."""
        ...

    def reads(self, layer: int) -> tuple[int, ...]:
        """Layers of the stream that `encode` looks at to write a layer."""
        ...

    def encode(self, layer: int, stream: Stream) -> Float[Tensor, "*any feature"]:
        """Activations aᵢ that write resid_pre.layer; may read earlier layers of the stream."""
        ...

    def decode(self, layer: int, activations: Float[Tensor, "*any feature"]) -> Float[Tensor, "*any d_model"]:
        """What activations write: x̂ = Σ aᵢ dᵢ + b, in their dtype."""
        ...

    def error(
        self, layer: int, stream: Stream, activations: Float[Tensor, "*any feature"] | None = None
    ) -> Float[Tensor, "*any d_model"]:
        """What it leaves of the stream, e = x − x̂, in its dtype; `ErrorByDecoding` has it."""
        ...

    def directions(self, layer: int) -> Float[Tensor, "feature d_model"]:
        """Decoder directions dᵢ at a layer; zero rows for features that do not write it."""
        ...

    def bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """The decoder's bias b at a layer."""
        ...

    def describe(self) -> dict[str, Any]:
        """What results and manifest say of it."""
        ...


class ErrorByDecoding:
    """The error of a source, from its `encode` and `decode`; every source inherits it, so that there is one."""

    def error(
        self: FeatureSource, layer: int, stream: Stream, activations: Float[Tensor, "*any feature"] | None = None
    ) -> Float[Tensor, "*any d_model"]:
        """The error: e = x − (Σ aᵢ dᵢ + b) at resid_pre.layer, in the stream's dtype.

        Args:
            layer: which.
            stream: of all layers that `encode` reads.
            activations: a of this very stream, where they are at hand; else `encode` gives them.
        """
        residual = stream(layer)
        found = self.encode(layer, stream) if activations is None else activations
        return residual - self.decode(layer, found.to(residual))


@dataclass(frozen=True, eq=False)
class Parts:
    """A stream written by a source: x = Σ aᵢ dᵢ + b + e, exactly, because e is what is left.

    Attributes:
        activations: aᵢ.
        directions: dᵢ.
        bias: b.
        error: e.
    """

    activations: Float[Tensor, "*any feature"]
    directions: Float[Tensor, "feature d_model"]
    bias: Float[Tensor, " d_model"]
    error: Float[Tensor, "*any d_model"]


def write_parts(source: FeatureSource, layer: int, stream: Stream) -> Parts:
    """Decompose resid_pre.layer by a source.

    Raises:
        QklensError: the source does not write this layer, or its vectors have another width than the stream.
    """
    residual = stream(layer)
    check_width(source, layer, residual)
    directions = source.directions(layer).to(residual)
    activations = source.encode(layer, stream).to(residual)
    bias = source.bias(layer).to(residual)
    return Parts(activations, directions, bias, source.error(layer, stream, activations))


def dense_decode(
    source: FeatureSource, layer: int, activations: Float[Tensor, "*any feature"]
) -> Float[Tensor, "*any d_model"]:
    """Σ aᵢ dᵢ + b as one product, in the dtype of the activations."""
    return activations @ source.directions(layer).to(activations) + source.bias(layer).to(activations)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Sources compute in float32 or better, whatever the model computes in."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def check_layer(source: FeatureSource, layer: int) -> None:
    """Raise unless the source writes resid_pre.layer."""
    if layer not in source.layers:
        raise QklensError(
            f"dictionary {source.name!r} does not write resid_pre.{layer}, which heads of layer {layer} read; it "
            f"writes layers {list(source.layers)}"
        )


def check_width(source: FeatureSource, layer: int, residual: Float[Tensor, "*any d_model"]) -> None:
    """Raise unless the source writes resid_pre.layer in vectors of the stream's width."""
    check_layer(source, layer)
    if (width := source.bias(layer).shape[-1]) != residual.shape[-1]:
        raise QklensError(
            f"dictionary {source.name!r} has vectors of {width} dimensions, the model's residual stream has "
            f"{residual.shape[-1]}; it belongs to another model"
        )


def feature_index(source: FeatureSource, label: str) -> int:
    """The index of a feature by its label; an unknown label names the nearest known one."""
    labels = source.labels
    try:
        return labels.index(label)
    except ValueError:
        raise QklensError(
            f"feature {label!r} is not in dictionary {source.name!r}; expected a label from {labels[0]!r} to "
            f"{labels[-1]!r}{nearest(label, labels) if len(labels) <= _SPELL_CHECKED else ''}"
        ) from None


def fraction_variance_unexplained(residual: Float[Tensor, "row d_model"], error: Float[Tensor, "row d_model"]) -> float:
    """FVU = Σ‖e‖² / Σ‖x − mean x‖², summed in float64."""
    centred = residual - residual.mean(dim=0, dtype=torch.float64).to(residual)
    left, all_of_it = (x.pow(2).sum(dtype=torch.float64) for x in (error, centred))
    return float(left / all_of_it.clamp(min=torch.finfo(residual.dtype).tiny))
