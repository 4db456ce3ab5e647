"""A crosscoder over two checkpoints: one set of features reads and writes the stream of the base and of the chat model.

    a   = θ(W_base (x_base − b_base) + W_chat (x_chat − b_chat) + b_enc)
    x̂_m = Σᵢ aᵢ dᵢ^m + b_m                                              m = base, chat

Both models read the same tokens, at one layer. As a feature source it reads and writes both streams side by side, base
first: rows of 2 d_model numbers, as in training.

The relative norm r = ‖s d^chat‖ / (‖s d^base‖ + ‖s d^chat‖), with each stream at mean square 1, says whose a feature
is: near 0 the base model's alone, near 1 the chat model's, 1/2 shared (Lindsey et al. 2024). A norm near 1 alone can
come from shrinkage: see also where the feature fires.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from qklens.dictionaries.activation import Activation, JumpRelu, activate
from qklens.dictionaries.config import CONFIG_FILE, TWO_CHECKPOINTS, WEIGHTS_FILE, Batch, DiffFidelity, validated
from qklens.dictionaries.source import ErrorByDecoding, Stream, at_least_float32, check_layer, dense_decode
from qklens.dictionaries.stored import as_float32
from qklens.errors import QklensError
from qklens.files import atomic_write, sha256_files, write_json
from qklens.strict import Strict


class ModelDiffConfig(Strict):
    """What the weights alone do not say."""

    format: Literal["qklens-model-diff-1"] = TWO_CHECKPOINTS
    name: str
    layer: int
    features: PositiveInt
    d_model: PositiveInt
    activation: Activation
    site: Literal["resid_pre"]
    base_sha256: str
    chat_sha256: str
    training: dict[str, Any]
    fidelity: DiffFidelity | None
    batch: Batch | None = None


@dataclass(frozen=True, eq=False)
class ModelDiff(ErrorByDecoding):
    """The dictionary in memory, a feature source of both streams side by side.

    Attributes:
        config: its configuration.
        encoder: W, base first.
        encoder_bias: b_enc.
        decoder: d, base first.
        decoder_bias: b, base first.
        scale: by which each stream was multiplied in training; norms are compared with it.
        thresholds: tᵢ, for jumprelu alone.
        sha256: of the files that it was read from.
    """

    config: ModelDiffConfig
    encoder: Float[Tensor, "side feature d_model"]
    encoder_bias: Float[Tensor, " feature"]
    decoder: Float[Tensor, "side feature d_model"]
    decoder_bias: Float[Tensor, "side d_model"]
    scale: Float[Tensor, " side"]
    thresholds: Float[Tensor, " feature"] | None = None
    sha256: str | None = None

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
        """The one layer."""
        return (self.config.layer,)

    @property
    def labels(self) -> tuple[str, ...]:
        """`L<layer>/<index>`."""
        return tuple(f"L{self.config.layer}/{i}" for i in range(self.config.features))

    def reads(self, layer: int) -> tuple[int, ...]:
        """The one layer, of both models."""
        check_layer(self, layer)
        return self.layers

    def encode(self, layer: int, stream: Stream) -> Float[Tensor, "*any feature"]:
        """Activations from both models' streams at the same tokens, side by side.

        Raises:
            QklensError: a stream of another width, as that of one model alone.
        """
        check_layer(self, layer)
        both, width = at_least_float32(stream(layer)), 2 * self.config.d_model
        if both.shape[-1] != width:
            raise QklensError(
                f"dictionary {self.name!r} encodes two checkpoints side by side, {width} numbers a token; the stream "
                f"has {both.shape[-1]}, and that of one model does not say what is active"
            )
        before = self.encoder_bias.to(both)
        for x, weight, bias in zip(both.chunk(2, dim=-1), self.encoder, self.decoder_bias, strict=True):
            before = before + (x - bias.to(x)) @ weight.to(x).T
        return activate(self.config.activation, before, self.thresholds)

    def decode(self, layer: int, activations: Float[Tensor, "*any feature"]) -> Float[Tensor, "*any columns"]:
        """What activations write in the stream of base and chat, side by side."""
        return dense_decode(self, layer, activations)

    def directions(self, layer: int) -> Float[Tensor, "feature columns"]:
        """Decoder directions in base and chat, side by side."""
        check_layer(self, layer)
        return torch.cat(self.decoder.unbind(), dim=1)

    def bias(self, layer: int) -> Float[Tensor, " columns"]:
        """Decoder biases of base and chat, one after the other."""
        check_layer(self, layer)
        return self.decoder_bias.flatten()

    def relative_norm(self) -> Float[Tensor, " feature"]:
        """How far a feature is the chat model's: 0 is the base model's alone, 1 the chat model's alone."""
        base, chat = torch.linalg.vector_norm(self.decoder, dim=2) * self.scale[:, None]
        return chat / (base + chat).clamp(min=1e-12)

    def describe(self) -> dict[str, Any]:
        """What results and manifest say of it."""
        fidelity = self.config.fidelity.model_dump(mode="json") if self.config.fidelity else None
        return {
            "name": self.name,
            "kind": "crosscoder over two checkpoints",
            "layers": list(self.layers),
            "n_features": self.config.features,
            "activation": self.config.activation.model_dump(),
            "source": None,
            "fidelity": fidelity,
            "sha256": self.sha256,
        }


def save_model_diff(diff: ModelDiff, folder: Path) -> None:
    """Write its two files atomically in float32, weights first and config last.

    Raises:
        QklensError: a value that is not finite, or a full disk.
    """
    tensors = {name: getattr(diff, name) for name in ("encoder", "encoder_bias", "decoder", "decoder_bias", "scale")}
    if diff.thresholds is not None:
        tensors["threshold"] = diff.thresholds
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise QklensError(f"{folder / WEIGHTS_FILE}: not written: tensor {name!r} holds NaN or infinity")
    atomic_write(
        folder / WEIGHTS_FILE, save({name: t.to(torch.float32, copy=True).contiguous() for name, t in tensors.items()})
    )
    write_json(folder / CONFIG_FILE, diff.config.model_dump(mode="json"))


def load_model_diff(folder: Path, device: torch.device | str = "cpu") -> ModelDiff:
    """Read a dictionary directory that `save_model_diff` wrote.

    Raises:
        QklensError: a missing or damaged file, another format, an unknown key, a missing tensor or a wrong shape.
    """
    path = folder / WEIGHTS_FILE
    config = validated(ModelDiffConfig, folder / CONFIG_FILE)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise QklensError(f"{path}: damaged ({error}); copy it again") from error
    n, width = config.features, config.d_model

    def take(name: str, *shape: int) -> Tensor:
        if name not in tensors:
            raise QklensError(f"{path}: tensor {name!r} is missing")
        tensor = as_float32(tensors[name], f"{path}: tensor {name!r}")
        if tuple(tensor.shape) != shape:
            raise QklensError(f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}")
        if not torch.isfinite(tensor).all():
            raise QklensError(f"{path}: tensor {name!r} holds NaN or infinity; copy it again")
        return tensor.to(device)

    scale = take("scale", 2)
    if bool((scale <= 0).any()):
        raise QklensError(f"{path}: tensor 'scale' holds {float(scale.min()):g}; expected two positive numbers")
    return ModelDiff(
        config=config,
        encoder=take("encoder", 2, n, width),
        encoder_bias=take("encoder_bias", n),
        decoder=take("decoder", 2, n, width),
        decoder_bias=take("decoder_bias", 2, width),
        scale=scale,
        thresholds=take("threshold", n) if isinstance(config.activation, JumpRelu) else None,
        sha256=sha256_files([folder / CONFIG_FILE, path]),
    )
