"""A weakly causal crosscoder: features read one layer's stream and write it and every later layer of the dictionary.

    a = θ(W_enc (x_ℓ − b_ℓ) + b_enc)           for the features that read layer ℓ
    x̂_m = Σ_{ℓ ≤ m} Σ_{i reads ℓ} aᵢ dᵢ^m + b_m

θ is one of `activation`. With a single layer it is a plain SAE. Crosscoders: Lindsey et al. 2024; weakly causal: Kamath
et al. 2025.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from qklens.dictionaries.activation import JumpRelu, activate
from qklens.dictionaries.config import CONFIG_FILE, WEIGHTS_FILE, DictionaryConfig, n_written, read_config
from qklens.dictionaries.source import ErrorByDecoding, Stream, at_least_float32, check_layer, dense_decode
from qklens.dictionaries.stored import read_safetensors
from qklens.errors import QklensError
from qklens.files import atomic_write, sha256_files, write_json


@dataclass(frozen=True, eq=False)
class Crosscoder(ErrorByDecoding):
    """The dictionary in memory.

    Attributes:
        config: its configuration.
        encoder: W_enc, per reading layer.
        encoder_bias: b_enc, per reading layer.
        decoder: per written layer, rows in the order of `labels`; rows of later readers are zero.
        decoder_bias: b, per layer.
        sha256: of the files that it was read from.
        thresholds: tᵢ, per reading layer, for jumprelu alone.
    """

    config: DictionaryConfig
    encoder: dict[int, Float[Tensor, "group_feature d_model"]]
    encoder_bias: dict[int, Float[Tensor, " group_feature"]]
    decoder: dict[int, Float[Tensor, "feature d_model"]]
    decoder_bias: dict[int, Float[Tensor, " d_model"]]
    sha256: str | None = None
    thresholds: dict[int, Float[Tensor, " group_feature"]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.config.name

    @property
    def site(self) -> str:
        """The kind of site that it reads and writes."""
        return self.config.site

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers it writes."""
        return self.config.layers

    @property
    def labels(self) -> tuple[str, ...]:
        """`L<reading layer>/<index>`."""
        return self._labels

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        return tuple(f"L{layer}/{i}" for layer in self.layers for i in range(self.config.features_per_layer))

    def reads(self, layer: int) -> tuple[int, ...]:
        """The dictionary's layers up to this one."""
        return tuple(reader for reader in self.layers if reader <= layer)

    def encode(self, layer: int, stream: Stream) -> Float[Tensor, "*any feature"]:
        """Activations of every feature that reads `layer` or an earlier one; later readers are zero."""
        check_layer(self, layer)
        groups = []
        for reader in self.layers:
            if reader > layer:
                groups.append(torch.zeros_like(groups[-1]))
                continue
            residual = at_least_float32(stream(reader))
            before = (residual - self.decoder_bias[reader].to(residual)) @ self.encoder[reader].to(residual).T
            before = before + self.encoder_bias[reader].to(residual)
            groups.append(activate(self.config.activation, before, self.thresholds.get(reader)))
        return torch.cat(groups, dim=-1)

    def decode(self, layer: int, activations: Float[Tensor, "*any feature"]) -> Float[Tensor, "*any d_model"]:
        """x̂ = Σ aᵢ dᵢ + b at a layer."""
        return dense_decode(self, layer, activations)

    def directions(self, layer: int) -> Float[Tensor, "feature d_model"]:
        """Decoder directions at a layer."""
        check_layer(self, layer)
        return self.decoder[layer]

    def bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Decoder bias at a layer."""
        check_layer(self, layer)
        return self.decoder_bias[layer]

    def describe(self) -> dict[str, Any]:
        """What results and manifest say of it."""
        fidelity = self.config.fidelity.model_dump(mode="json") if self.config.fidelity else None
        return {
            "name": self.name,
            "kind": "weakly causal crosscoder" if len(self.layers) > 1 else "sae",
            "layers": list(self.layers),
            "n_features": len(self.layers) * self.config.features_per_layer,
            "activation": self.config.activation.model_dump(),
            "source": self.config.source.model_dump(mode="json") if self.config.source else None,
            "fidelity": fidelity,
            "sha256": self.sha256,
        }


def save_crosscoder(crosscoder: Crosscoder, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a dictionary's two files atomically, weights first and config last.

    Raises:
        QklensError: a value does not fit `dtype`; nothing is written.
    """
    tensors: dict[str, Tensor] = {}
    for layer in crosscoder.layers:
        tensors[f"encoder.{layer}"] = crosscoder.encoder[layer]
        tensors[f"encoder_bias.{layer}"] = crosscoder.encoder_bias[layer]
        tensors[f"decoder.{layer}"] = crosscoder.decoder[layer][: n_written(crosscoder.config, layer)]
        tensors[f"decoder_bias.{layer}"] = crosscoder.decoder_bias[layer]
    for layer, values in crosscoder.thresholds.items():
        tensors[f"threshold.{layer}"] = values
    # Copies, because encoder and decoder may be one tensor, which the format has no word for.
    stored = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise QklensError(f"{folder / WEIGHTS_FILE}: tensor {name!r} does not fit {dtype}; save it as float32")
    atomic_write(folder / WEIGHTS_FILE, save(stored))
    write_json(folder / CONFIG_FILE, crosscoder.config.model_dump(mode="json"))


def load_crosscoder(folder: Path, device: torch.device | str = "cpu") -> Crosscoder:
    """Read a dictionary directory.

    Raises:
        QklensError: a missing or damaged file, an unknown config key, a missing tensor or a wrong shape.
    """
    config, stored = read_config(folder), read_safetensors(folder / WEIGHTS_FILE)
    total = len(config.layers) * config.features_per_layer

    def take(name: str, *shape: int) -> Tensor:
        return stored.take(name, *shape).to(device)

    group, width = config.features_per_layer, config.d_model
    decoder = {}
    for layer in config.layers:
        written = n_written(config, layer)
        decoder[layer] = torch.cat(
            [take(f"decoder.{layer}", written, width), torch.zeros(total - written, width, device=device)]
        )
    jumps = config.layers if isinstance(config.activation, JumpRelu) else ()
    return Crosscoder(
        config=config,
        encoder={layer: take(f"encoder.{layer}", group, width) for layer in config.layers},
        encoder_bias={layer: take(f"encoder_bias.{layer}", group) for layer in config.layers},
        decoder=decoder,
        decoder_bias={layer: take(f"decoder_bias.{layer}", width) for layer in config.layers},
        sha256=sha256_files([folder / CONFIG_FILE, folder / WEIGHTS_FILE]),
        thresholds={layer: take(f"threshold.{layer}", group) for layer in jumps},
    )
