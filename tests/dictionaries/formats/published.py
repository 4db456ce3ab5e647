"""Small dictionary directories as each tool publishes them, with the tool's own documented forward beside each.

Written from the layouts that the tools document; nothing here calls what it tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, FEATURES = 6, 15


@dataclass(frozen=True)
class Written:
    """A directory and what its tool computes from a stream: activations and reconstruction."""

    folder: Path
    layer: int
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]


class Draw:
    """Random numbers that float32 holds exactly, in float64."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).double()

    def positive(self, *shape: int) -> Tensor:
        return (torch.rand(*shape, generator=self.generator) + 0.25).double()


def k_largest(z: Tensor, k: int) -> Tensor:
    """The k largest of each row, where positive, one row and one feature at a time."""
    kept = torch.zeros_like(z)
    for row in range(len(z)):
        for index in sorted(range(z.shape[1]), key=lambda i: -float(z[row, i]))[:k]:
            kept[row, index] = max(float(z[row, index]), 0.0)
    return kept


def write(folder: Path, config: str, content: dict[str, Any], weights: str, tensors: dict[str, Tensor]) -> Path:
    (folder / weights).parent.mkdir(parents=True, exist_ok=True)
    (folder / config).write_text(json.dumps(content))
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, folder / weights)
    return folder


def saelens(
    folder: Path,
    architecture: str = "standard",
    *,
    version: int = 6,
    subtract: bool = True,
    k: int = 4,
    scale: float | None = None,
    rescale: bool = False,
    finetuned: bool = False,
    hook: str = "blocks.3.hook_resid_post",
) -> Written:
    draw = Draw(1)
    t = {"W_enc": draw(WIDTH, FEATURES), "W_dec": draw(FEATURES, WIDTH), "b_dec": draw(WIDTH)}
    config: dict[str, Any] = {"d_in": WIDTH, "d_sae": FEATURES, "dtype": "float32", "apply_b_dec_to_input": subtract}
    config |= {"normalize_activations": "none", "architecture": architecture}
    if architecture == "gated":
        t |= {"b_gate": draw(FEATURES), "b_mag": draw(FEATURES), "r_mag": 0.3 * draw(FEATURES)}
    else:
        t["b_enc"] = draw(FEATURES)
    if architecture == "jumprelu":
        t["threshold"] = draw(FEATURES)
    if architecture == "batchtopk":
        t["topk_threshold"] = torch.tensor(0.7).double()
    if scale is not None:
        config |= {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": scale}
    if rescale:
        config["rescale_acts_by_decoder_norm"] = True
    factors = draw.positive(FEATURES).float().double()
    if finetuned:
        t["finetuning_scaling_factor"] = factors
        config["finetuning_scaling_factor"] = True
    if version == 6:
        config |= {"metadata": {"sae_lens_version": "6.5.0", "hook_name": hook, "model_name": "gemma-2-2b"}}
        config |= {"k": k} if architecture == "topk" else {}
    else:
        config |= {"model_name": "gpt2-small", "hook_layer": 3, "hook_head_index": None, "activation_fn_str": "relu"}
        config |= {"hook_point" if version == 3 else "hook_name": hook, "context_size": 128, "prepend_bos": True}
        if architecture == "topk":
            del config["architecture"]
            config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}}
    write(folder, "cfg.json", config, "sae_weights.safetensors", t)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * (1.0 if scale is None else scale)
        x = x - t["b_dec"] if subtract else x
        norms = t["W_dec"].norm(dim=1) if rescale else torch.ones(FEATURES, dtype=torch.float64)
        if architecture == "gated":
            gate = (x @ t["W_enc"] + t["b_gate"]) > 0
            acts = gate * torch.relu(x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"])
        else:
            z = (x @ t["W_enc"] + t["b_enc"]) * norms
            if architecture == "topk":
                acts = k_largest(z, k)
            elif architecture == "jumprelu":
                acts = torch.relu(z) * (z > torch.relu(t["threshold"]))
            elif architecture == "batchtopk":
                acts = torch.relu(z) * (z > float(t["topk_threshold"].float()))
            else:
                acts = torch.relu(z)
        decoded = (acts * factors if finetuned else acts) / norms
        out = decoded @ t["W_dec"] + t["b_dec"]
        return acts, out / (1.0 if scale is None else scale)

    return Written(folder, 4 if hook.endswith("post") else 3, forward)


def gemma_scope(root: Path) -> Written:
    draw = Draw(2)
    arrays = {"W_enc": draw(WIDTH, FEATURES), "W_dec": draw(FEATURES, WIDTH), "b_enc": draw(FEATURES)}
    arrays |= {"b_dec": draw(WIDTH), "threshold": draw.positive(FEATURES).float().double()}
    folder = root / "models--google--gemma-scope-2b-pt-res" / "layer_5" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: array.float().numpy() for name, array in arrays.items()})

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = x @ arrays["W_enc"] + arrays["b_enc"]
        acts = (pre > arrays["threshold"]) * torch.relu(pre)
        return acts, acts @ arrays["W_dec"] + arrays["b_dec"]

    return Written(folder, 6, forward)


def gemma_scope_2_config(hook: str, kind: str = "sae") -> dict[str, Any]:
    return {
        "hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": FEATURES, "model_name": "google/gemma-3-1b-it",
        "architecture": "jump_relu", "l0": 50, "affine_connection": False, "type": kind,
    }  # fmt: skip


def gemma_scope_2(folder: Path) -> Written:
    draw = Draw(3)
    t = {"w_enc": draw(WIDTH, FEATURES), "w_dec": draw(FEATURES, WIDTH), "b_enc": draw(FEATURES), "b_dec": draw(WIDTH)}
    t["threshold"] = draw.positive(FEATURES).float().double()
    write(folder, "config.json", gemma_scope_2_config("model.layers.2.output"), "params.safetensors", t)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = x @ t["w_enc"] + t["b_enc"]
        acts = (pre > t["threshold"]) * torch.relu(pre)
        return acts, acts @ t["w_dec"] + t["b_dec"]

    return Written(folder, 3, forward)


def gemma_scope_2_crosscoder(folder: Path) -> tuple[Path, list[dict[str, Tensor]]]:
    """Three layers, resid_post of 1, 4 and 6; the decoder of file i writes from its own layer on."""
    draw = Draw(4)
    shards = []
    for i in range(3):
        decoder = draw(FEATURES, 3, WIDTH)
        decoder[:, :i] = 0
        t = {"w_enc": draw(WIDTH, FEATURES), "w_dec": decoder, "b_enc": draw(FEATURES), "b_dec": draw(WIDTH)}
        shards.append(t | {"threshold": draw.positive(FEATURES).float().double()})
        write(folder, "config.json", {}, f"params_layer_{i}.safetensors", shards[-1])
    config = gemma_scope_2_config("model.layers.{1,4,6}.output", "crosscoder")
    (folder / "config.json").write_text(json.dumps(config))
    return folder, shards


def llama_scope(folder: Path, act_fn: str = "jumprelu", threshold: float = 0.5) -> Written:
    """As its library's from_pretrained prepares it: biases scaled, unit decoder rows, then one threshold."""
    draw = Draw(5)
    t = {"encoder.weight": draw(FEATURES, WIDTH), "encoder.bias": draw(FEATURES)}
    t |= {"decoder.weight": draw(WIDTH, FEATURES), "decoder.bias": draw(WIDTH)}
    config = {
        "hook_point_in": "blocks.7.hook_resid_post", "hook_point_out": "blocks.7.hook_resid_post", "d_model": WIDTH,
        "d_sae": FEATURES, "expansion_factor": 2.5, "use_decoder_bias": True, "act_fn": act_fn, "top_k": 50,
        "apply_decoder_bias_to_pre_encoder": False, "jump_relu_threshold": threshold, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 17.125, "out": 17.125}, "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False, "dtype": "torch.bfloat16",
    }  # fmt: skip
    write(folder, "hyperparams.json", config, "checkpoints/final.safetensors", t)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        factor = math.sqrt(WIDTH) / 17.125
        norms = t["decoder.weight"].norm(dim=0)
        z = (x @ t["encoder.weight"].T + t["encoder.bias"] / factor) * norms
        acts = torch.where(z > threshold, z, torch.zeros_like(z))
        return acts, acts @ (t["decoder.weight"] / norms).T + t["decoder.bias"] / factor

    return Written(folder, 8, forward)


def openmoss(folder: Path, act_fn: str = "jumprelu", norm: str = "dataset-wise") -> Written:
    """Of 2026: thresholds a feature, in units of the scaled input; W_E and W_D as matrices."""
    draw = Draw(6)
    hook = "blocks.1.hook_resid_pre"
    t = {"W_E": draw(WIDTH, FEATURES), "b_E": draw(FEATURES), "W_D": draw(FEATURES, WIDTH), "b_D": draw(WIDTH)}
    if act_fn == "jumprelu":
        t["activation_function.log_jumprelu_threshold"] = 0.2 * draw(FEATURES).float().double()
    t[f"dataset_average_activation_norm.{hook}"] = torch.tensor(3.5).double()
    config = {
        "sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": WIDTH, "expansion_factor": 2.5,
        "use_decoder_bias": True, "act_fn": act_fn, "top_k": 4, "norm_activation": norm,
        "sparsity_include_decoder_norm": True, "use_glu_encoder": False,
    }  # fmt: skip
    write(folder, "config.json", config, "sae_weights.safetensors", t)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = math.sqrt(WIDTH) / 3.5 if norm == "dataset-wise" else 1.0
        norms = t["W_D"].norm(dim=1)
        z = (scale * x @ t["W_E"] + t["b_E"]) * norms
        if act_fn == "topk":
            acts = k_largest(z, 4)
        else:
            limit = t["activation_function.log_jumprelu_threshold"].float().double().exp()
            acts = z * (z > limit)
        return acts, (acts / norms @ t["W_D"] + t["b_D"]) / scale

    return Written(folder, 1, forward)


def sparsify(root: Path, k: int = 4) -> Written:
    draw = Draw(7)
    t = {"encoder.weight": draw(FEATURES, WIDTH), "encoder.bias": draw(FEATURES)}
    t |= {"W_dec": draw(FEATURES, WIDTH), "b_dec": draw(WIDTH)}
    config = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": FEATURES, "k": k,
        "multi_topk": True, "skip_connection": False, "transcode": False, "d_in": WIDTH,
    }  # fmt: skip
    folder = write(root / "layers.10", "cfg.json", config, "sae.safetensors", t)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = k_largest((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], k)
        return acts, acts @ t["W_dec"] + t["b_dec"]

    return Written(folder, 11, forward)
