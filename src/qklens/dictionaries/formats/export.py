"""A native dictionary of one layer as a SAELens directory (version 6), exactly.

Both read θ(W (x − b) + c); what SAELens has no kind for, one threshold for all features, becomes a jumprelu.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from qklens.dictionaries.activation import JumpRelu, Relu, Threshold, TopK
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.formats.saelens import CONFIG, WEIGHTS
from qklens.errors import QklensError
from qklens.files import atomic_write, whole_folder, write_json


def export_saelens(dictionary: Crosscoder, folder: Path, layer: int | None = None) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`, both or neither.

    Args:
        dictionary: of one layer, or of several where `layer` names the first.
        folder: a directory that is new or empty.
        layer: which layer's own features to write; only the first layer's are an autoencoder by themselves.

    Raises:
        QklensError: features that no single autoencoder holds, a negative threshold, or a folder that is not empty.
    """
    chosen = _exact_layer(dictionary, layer)
    refuse_full(folder)
    group = dictionary.config.features_per_layer
    tensors = {
        "W_enc": dictionary.encoder[chosen].T,
        "b_enc": dictionary.encoder_bias[chosen],
        "W_dec": dictionary.decoder[chosen][:group],
        "b_dec": dictionary.decoder_bias[chosen],
    }
    architecture, more = _activation(dictionary, chosen, tensors)
    config = {
        "d_in": dictionary.config.d_model,
        "d_sae": group,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **more,
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": dictionary.config.source.model if dictionary.config.source else "",
            "hook_name": f"blocks.{chosen}.hook_resid_pre",
        },
        "architecture": architecture,
    }
    stored = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_folder(folder) as filled:
        atomic_write(filled / WEIGHTS, save(stored))
        write_json(filled / CONFIG, config)


def refuse_full(folder: Path) -> None:
    """Raise unless a directory is new or empty: nothing is overwritten, and no two formats end up in one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise QklensError(f"{folder}: exists and is not an empty directory; choose another OUT")


def _exact_layer(dictionary: Crosscoder, layer: int | None) -> int:
    layers, name = dictionary.layers, f"dictionary {dictionary.name!r}"
    first = layers[0]
    if layer is not None and layer not in layers:
        raise QklensError(f"--layer {layer}: {name} writes layers {list(layers)}; choose one of them")
    if layer is None and len(layers) > 1:
        raise QklensError(
            f"{name} is a crosscoder of layers {list(layers)}: its features write several layers, which a SAELens "
            f"directory cannot hold; --layer {first} exports the features that read resid_pre.{first}, which are an "
            "autoencoder of that layer by themselves"
        )
    chosen = first if layer is None else layer
    if chosen != first:
        raise QklensError(
            f"--layer {chosen}: features that read earlier layers of {name} write it too; its own features alone "
            f"are no autoencoder of it, only those of --layer {first} are"
        )
    return chosen


def _activation(dictionary: Crosscoder, layer: int, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    match dictionary.config.activation:
        case Relu():
            return "standard", {}
        case TopK() as top:
            return "topk", {"k": top.k, "rescale_acts_by_decoder_norm": False}
        case Threshold() as one:
            thresholds = torch.full((dictionary.config.features_per_layer,), one.threshold)
        case JumpRelu():
            thresholds = dictionary.thresholds[layer]
    if bool((thresholds < 0).any()):
        raise QklensError(f"dictionary {dictionary.name!r} has negative thresholds, which SAELens raises to 0")
    tensors["threshold"] = thresholds
    return "jumprelu", {}
