"""A sparse autoencoder with random weights: many features, of which few are active at a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qklens.dictionaries.source import ErrorByDecoding, Stream, dense_decode


@dataclass(frozen=True, eq=False)
class SparseSource(ErrorByDecoding):
    """aᵢ = pᵢ sᵢ where pᵢ = ⟨eᵢ, x − b⟩ > t, else 0; the sign sᵢ makes some activations negative."""

    labels: tuple[str, ...]
    encoder: Tensor
    decoder: Tensor
    mean: Tensor
    threshold: float
    sign: Tensor
    layers: tuple[int, ...]
    name: str = "sparse"

    def reads(self, layer: int) -> tuple[int, ...]:
        return (layer,)

    def encode(self, layer: int, stream: Stream) -> Tensor:
        x = stream(layer)
        x = x if x.dtype == torch.float64 else x.float()
        before = (x - self.mean.to(x)) @ self.encoder.to(x).T
        before = before / before.std(dim=-1, keepdim=True).clamp(min=1e-9)
        return before * (before > self.threshold) * self.sign.to(x)

    @property
    def site(self) -> str:
        return "resid_pre"

    def decode(self, layer: int, activations: Tensor) -> Tensor:
        return dense_decode(self, layer, activations)

    def directions(self, layer: int) -> Tensor:
        return self.decoder

    def bias(self, layer: int) -> Tensor:
        return self.mean

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


def sparse_source(
    d_model: int, n_features: int, layers: tuple[int, ...], *, threshold: float = 1.5, seed: int = 0, size: float = 1.0
) -> SparseSource:
    """A fifth of the features have negative activations, and every seventh is never active."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    encoder = draw(n_features, d_model)
    encoder[::7] = 0
    sign = torch.ones(n_features)
    sign[::5] = -1
    decoder = size * draw(n_features, d_model) / d_model**0.5
    labels = tuple(f"f{i}" for i in range(n_features))
    return SparseSource(labels, encoder, decoder, size * 0.1 * draw(d_model), threshold, sign, layers)
