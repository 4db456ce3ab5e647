"""The frozen-random control of a dictionary: what would features say whose directions nobody has learnt?

    aᵢ = gᵢ pᵢ 1[pᵢ > tᵢ],   pᵢ = ⟨r̂ᵢ, x − b⟩,   x = Σ aᵢ rᵢ + b + e

rᵢ is drawn at random, at the length of the dictionary's own dᵢ; r̂ᵢ reads as well as writes. The threshold tᵢ lets
feature i be active at as many tokens of a given batch as the dictionary's own feature i, and gᵢ makes it as active
there in the mean. Bias, labels, and which layers a feature reads and writes are the dictionary's. Nothing is trained;
the frozen decoders of Korznikov et al. 2026 (arXiv 2602.14111) have an encoder that is trained around them.

Directions are drawn isotropic, or within the covariance of the stream (`covariance`): r = Σ^½ z. A feature has one z
for all layers that it writes. Where a row holds the streams of two checkpoints side by side, it has one z for both, and
keeps its length in each and so the share of either. Contrast directions keep their least-squares coordinates; only the
vectors are drawn.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.dictionaries.blocks import blocks
from qklens.dictionaries.directions import Directions
from qklens.dictionaries.source import (
    ErrorByDecoding,
    FeatureSource,
    Stream,
    at_least_float32,
    check_layer,
    dense_decode,
)
from qklens.errors import QklensError

RandomLaw = Literal["isotropic", "covariance"]
LAWS: tuple[RandomLaw, ...] = get_args(RandomLaw)


@dataclass(frozen=True, eq=False)
class RandomControl(ErrorByDecoding):
    """A control; made by `random_control`.

    Attributes:
        name: what reports call it.
        about: what it is the control of.
        labels: the dictionary's.
        read_by: per written layer, the layers that `encode` looks at.
        reader: per written layer, the layer that each feature reads, −1 for one that does not write it.
        vectors: per layer, rᵢ.
        biases: per layer, b.
        threshold: per written layer, tᵢ; infinite for a feature that was never active.
        gain: per written layer, gᵢ.
    """

    name: str
    about: dict[str, Any]
    labels: tuple[str, ...]
    read_by: dict[int, tuple[int, ...]]
    reader: dict[int, Int[Tensor, " feature"]]
    vectors: dict[int, Float[Tensor, "feature d_model"]]
    biases: dict[int, Float[Tensor, " d_model"]]
    threshold: dict[int, Float[Tensor, " feature"]]
    gain: dict[int, Float[Tensor, " feature"]]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers it writes."""
        return tuple(self.vectors)

    @property
    def site(self) -> str:
        """The stream that layers read."""
        return "resid_pre"

    def reads(self, layer: int) -> tuple[int, ...]:
        """The layers that the dictionary reads to write this one."""
        check_layer(self, layer)
        return self.read_by[layer]

    def encode(self, layer: int, stream: Stream) -> Float[Tensor, "*any feature"]:
        """Activations: what of a direction stands above its threshold, times its gain."""
        check_layer(self, layer)
        first = at_least_float32(stream(layer))
        out = first.new_zeros(*first.shape[:-1], len(self.labels))
        for reader in self.reader[layer].unique().tolist():
            if reader >= 0:
                at = (self.reader[layer] == reader).nonzero()[:, 0]
                before = self._along(reader, at, at_least_float32(stream(reader)))
                above = before > self.threshold[layer][at].to(before)
                out[..., at.to(out.device)] = before * above * self.gain[layer][at].to(before)
        return out

    def _along(self, reader: int, at: Tensor, residual: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(self.vectors[reader][at].to(residual), dim=-1)
        return (residual - self.biases[reader].to(residual)) @ unit.T

    def decode(self, layer: int, activations: Float[Tensor, "*any feature"]) -> Float[Tensor, "*any d_model"]:
        """Σ aᵢ rᵢ + b."""
        check_layer(self, layer)
        return dense_decode(self, layer, activations)

    def directions(self, layer: int) -> Float[Tensor, "feature d_model"]:
        """The drawn directions at a layer."""
        check_layer(self, layer)
        return self.vectors[layer]

    def bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """The dictionary's own bias."""
        check_layer(self, layer)
        return self.biases[layer]

    def describe(self) -> dict[str, Any]:
        """What results and manifest say of it."""
        return {"name": self.name, "layers": list(self.layers), "n_features": len(self.labels), **self.about}


@torch.no_grad()
def random_control(
    source: FeatureSource,
    rows: dict[int, Float[Tensor, "row d_model"]],
    *,
    seed: int,
    law: RandomLaw = "isotropic",
    streams: int = 1,
) -> FeatureSource:
    """The control of a dictionary or of contrast directions.

    Args:
        source: what it is the control of.
        rows: the batch on which densities are kept: resid_pre at every layer that the source writes, the same row the
            same token in every layer.
        seed: of the draw.
        law: how directions are drawn.
        streams: how many streams of the same width stand side by side in a row.

    Raises:
        QklensError: a layer without rows, fewer than two rows, or rows without any covariance to draw within.
    """
    for layer in source.layers:
        if layer not in rows or len(rows[layer]) < 2:
            raise QklensError(
                f"random control of {source.name!r}: resid_pre.{layer} has {len(rows.get(layer, ()))} tokens; expected "
                "at least 2"
            )
    vectors = _drawn(source, rows, seed, law, streams)
    name = f"random {law} control of {source.name}"
    about = {"kind": "random control", "law": law, "seed": seed, "control_of": source.describe()}
    if isinstance(source, Directions):
        return Directions(source.labels, vectors, source.means, name, about)
    drawn = torch.cat([vector.cpu().flatten() for vector in vectors.values()])
    control = RandomControl(
        name=name,
        about={**about, "sha256": hashlib.sha256(drawn.numpy().tobytes()).hexdigest()},
        labels=source.labels,
        read_by={layer: tuple(source.reads(layer)) for layer in source.layers},
        reader={layer: _readers(source, layer) for layer in source.layers},
        vectors=vectors,
        biases={layer: source.bias(layer) for layer in source.layers},
        threshold={},
        gain={},
    )
    for layer in source.layers:
        _keep_density(control, source, layer, rows)
    return control


def _drawn(
    source: FeatureSource, rows: dict[int, Tensor], seed: int, law: RandomLaw, streams: int
) -> dict[int, Float[Tensor, "feature d_model"]]:
    width = source.directions(source.layers[0]).shape[1] // streams
    noise = torch.randn(len(source.labels), width, generator=torch.Generator().manual_seed(seed))
    found = {}
    for layer in source.layers:
        parts = []
        for own, part in zip(
            source.directions(layer).chunk(streams, dim=1), rows[layer].chunk(streams, dim=1), strict=True
        ):
            shaped = noise if law == "isotropic" else (noise.double() @ _root(part, layer).cpu()).float()
            unit = torch.nn.functional.normalize(shaped.to(own), dim=-1)
            parts.append(unit * torch.linalg.vector_norm(own, dim=-1, keepdim=True))
        found[layer] = torch.cat(parts, dim=1)
    return found


def _root(rows: Float[Tensor, "row d_model"], layer: int) -> Float[Tensor, "d_model d_model"]:
    """The symmetric root of the rows' covariance."""
    centred = rows.double() - rows.double().mean(dim=0)
    values, basis = torch.linalg.eigh(centred.T @ centred / (len(rows) - 1))
    if not bool((values > 0).any()) or not bool(values.isfinite().all()):
        raise QklensError(
            f"random control: resid_pre.{layer} does not vary, so there is no covariance to draw within; use the "
            "isotropic law"
        )
    return (basis * values.clamp(min=0).sqrt()) @ basis.T


def _readers(source: FeatureSource, layer: int) -> Int[Tensor, " feature"]:
    """Which layer each feature reads: of those looked at, the first that it writes."""
    reader = torch.full((len(source.labels),), -1)
    for candidate in sorted(set(source.reads(layer)) & set(source.layers), reverse=True):
        reader[source.directions(candidate).any(dim=1).cpu()] = candidate
    return reader.masked_fill(~source.directions(layer).any(dim=1).cpu(), -1)


def _keep_density(control: RandomControl, source: FeatureSource, layer: int, rows: dict[int, Tensor]) -> None:
    """Set a layer's thresholds and gains."""
    n_features, n = len(control.labels), len(rows[layer])
    count, size = torch.zeros(n_features, dtype=torch.long), torch.zeros(n_features, dtype=torch.float64)
    device = source.directions(layer).device
    for begin, end in blocks(n, n_features):
        active = source.encode(layer, lambda m, b=begin, e=end: rows[m][b:e].to(device)).cpu()
        count += (active != 0).sum(dim=0)
        size += active.double().abs().sum(dim=0)
    threshold, gain = torch.full((n_features,), torch.inf), torch.zeros(n_features)
    for reader in control.reader[layer].unique().tolist():
        at = ((control.reader[layer] == reader) & (count > 0)).nonzero()[:, 0]
        if reader < 0 or not len(at):
            continue
        for begin, end in blocks(len(at), n):
            some = at[begin:end]
            ordered = control._along(reader, some, at_least_float32(rows[reader]).to(device)).cpu().sort(dim=0).values
            threshold[some] = _between(ordered, count[some])
            active = ordered * (ordered > threshold[some])
            gain[some] = (size[some] / active.double().abs().sum(dim=0).clamp(min=1e-30)).float()
    control.threshold[layer], control.gain[layer] = threshold, gain


def _between(
    ordered: Float[Tensor, "row some_feature"], count: Int[Tensor, " some_feature"]
) -> Float[Tensor, " some_feature"]:
    """Halfway between each column's `count` largest values and the others; −∞ where all are wanted."""
    n = len(ordered)
    least = ordered.gather(0, (n - count)[None])[0]
    next_one = ordered.gather(0, (n - count - 1).clamp(min=0)[None])[0]
    return ((least + next_one) / 2).where(count < n, torch.tensor(-torch.inf))
