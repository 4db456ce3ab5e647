"""Llama Scope and the library behind it, OpenMOSS Language-Model-SAEs, in its two layouts.

    z = s x W_E + b_E,   a = θ(z ‖d‖) [sparsity_include_decoder_norm] or θ(z),   x̂ = (a W_D + b_D) / s

with s = √d_model / dataset_average_activation_norm where norm_activation is dataset-wise, and 1 where it is inference.

* Llama Scope: `hyperparams.json`, `checkpoints/final.safetensors` (`encoder.weight` ...), norms in the JSON. The
  library loads it with b_E and b_D divided by s and W_E as it is, and only then compares with the one
  `jump_relu_threshold`; a topk with such a threshold is a jumprelu at inference.
* Later releases: `config.json`, `sae_weights.safetensors` (`encoder.weight` or `W_E` ...), norms and a
  `log_jumprelu_threshold` a feature among the tensors, compared in units of s x.

Where the decoder's norms count, decoder rows have unit length here and activations are in units of their norms, as
the library's `transform_to_unit_decoder_norm` gives them.

Source: Language-Model-SAEs, `src/lm_saes/sae.py` of November 2024 and `models/sae.py`, `models/sparse_dictionary.py` of
2026 (github.com/OpenMOSS/Language-Model-SAEs); SAELens' `llama_scope` loaders; He et al. 2024.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qklens.dictionaries.activation import JumpRelu, Relu, Threshold, TopK
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.formats.fields import Fields
from qklens.dictionaries.formats.plain import Plain, native
from qklens.dictionaries.formats.sites import agreed_layer, reading_layer
from qklens.dictionaries.stored import StoredTensors, read_safetensors
from qklens.errors import QklensError

KIND = "openmoss"
OLD, OLD_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
NEW, NEW_WEIGHTS = "config.json", "sae_weights.safetensors"
LOOKS_LIKE = f"{OLD} with {OLD_WEIGHTS} (Llama Scope), {NEW} with {NEW_WEIGHTS} (Language-Model-SAEs)"

_NORM = "dataset_average_activation_norm"
_KNOWN = (
    "hook_point_in", "hook_point_out", "d_model", "d_sae", "expansion_factor", "use_decoder_bias", "act_fn", "top_k",
    "apply_decoder_bias_to_pre_encoder", "norm_activation", "sparsity_include_decoder_norm", "jump_relu_threshold",
    _NORM, "use_glu_encoder", "sae_type",
)  # fmt: skip


def matches(folder: Path) -> bool:
    """Whether a folder holds this format's files."""
    pairs = ((OLD, OLD_WEIGHTS), (NEW, NEW_WEIGHTS))
    return any((folder / config).is_file() and (folder / weights).is_file() for config, weights in pairs)


def read(folder: Path, layer: int | None = None) -> Crosscoder:
    """The dictionary of a directory of either layout.

    Raises:
        QklensError: a kind, normalisation or site that the native form cannot hold exactly, or damage.
    """
    old = (folder / OLD).is_file()
    config, weights = (folder / OLD, folder / OLD_WEIGHTS) if old else (folder / NEW, folder / NEW_WEIGHTS)
    fields = Fields.read(config, _KNOWN)
    hook, out = fields.need("hook_point_in", str), fields.need("hook_point_out", str)
    if (kind := fields.get("sae_type", "sae", str)) != "sae" or hook != out:
        raise QklensError(f"{config}: a {kind} from {hook!r} to {out!r}; expected an sae of one site")
    if fields.get("use_glu_encoder", False, bool):
        raise QklensError(f"{config}: use_glu_encoder is set; expected a linear encoder")
    where = agreed_layer(reading_layer(hook, config), layer, config, "")
    stored = read_safetensors(weights)
    plain, scale = _weights(fields, stored), _scale(fields, stored, hook)
    if old:  # its library scales biases first and compares afterwards
        plain = replace(
            plain,
            encoder_bias=plain.encoder_bias / scale,
            decoder_bias=plain.decoder_bias / scale,
            folded=(f"input scale {scale:.6g} ({config}: {_NORM})",),
        )
        scale = 1.0
    if fields.get("sparsity_include_decoder_norm", True, bool):
        plain = plain.rescaled_by_norms()
    if not fields.get("apply_decoder_bias_to_pre_encoder", False, bool):
        plain = plain.bias_subtracted()
    if scale != 1.0:
        plain = plain.input_scaled(scale, f"{stored.path}: {_NORM}")
    return native(plain, where, folder=folder, kind=KIND, model="", site=hook, files=(config, weights))


def _weights(fields: Fields, stored: StoredTensors) -> Plain:
    d_model, named = fields.need("d_model", int), "W_E" in stored
    encoder = "W_E" if named else "encoder.weight"
    n = stored.shape(encoder, 2)[1 if named else 0]
    declared = fields.get("d_sae", n, int)
    if declared != n:
        raise QklensError(
            f"{fields.path}: d_sae is {declared}, tensor {encoder!r} of {stored.path.name} has {n} features"
        )
    bias = fields.get("use_decoder_bias", True, bool)
    zeros = torch.zeros(d_model)
    if named:
        weight, decoder = stored.take("W_E", d_model, n).T.contiguous(), stored.take("W_D", n, d_model)
        offset, shift = stored.take("b_E", n), stored.take("b_D", d_model) if bias else zeros
    else:
        weight, decoder = (
            stored.take("encoder.weight", n, d_model),
            stored.take("decoder.weight", d_model, n).T.contiguous(),
        )
        offset, shift = stored.take("encoder.bias", n), stored.take("decoder.bias", d_model) if bias else zeros
    activation, thresholds = _activation(fields, stored, n)
    return Plain(weight, offset, decoder, shift, activation, thresholds)


def _activation(
    fields: Fields, stored: StoredTensors, n: int
) -> tuple[Relu | TopK | Threshold | JumpRelu, Tensor | None]:
    kind = fields.need("act_fn", str).lower()
    threshold = fields.get("jump_relu_threshold", 0.0, float)
    name = next(
        (key for key in ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold") if key in stored), ""
    )
    if kind == "jumprelu" and name:
        return JumpRelu(), stored.take(name, n).exp()
    if kind == "jumprelu" or (kind == "topk" and threshold > 0):
        return Threshold(threshold=fields.need("jump_relu_threshold", float)), None
    if kind == "topk":
        k = fields.need("top_k", int)
        if k < 1:
            raise QklensError(f"{fields.path}: key 'top_k' is {k}, expected at least 1")
        return TopK(k=k), None
    if kind == "relu":
        return Relu(), None
    raise QklensError(f"{fields.path}: act_fn {kind!r} is not supported; expected 'jumprelu', 'topk' or 'relu'")


def _scale(fields: Fields, stored: StoredTensors, hook: str) -> float:
    kind = fields.get("norm_activation", "dataset-wise", str)
    if kind == "inference":
        return 1.0
    if kind != "dataset-wise":
        raise QklensError(
            f"{fields.path}: norm_activation is {kind!r}, which depends on the input and cannot be folded; "
            "expected 'dataset-wise' or 'inference'"
        )
    if f"{_NORM}.{hook}" in stored:
        norm = float(stored.take(f"{_NORM}.{hook}"))
    else:
        norms = fields.inner(_NORM)
        norm = norms.need("in", float)
        if norms.get("out", norm, float) != norm:
            raise QklensError(f"{fields.path}: {_NORM} differs between in and out; expected one site's")
    if not 0 < norm < math.inf:
        raise QklensError(f"{fields.path}: {_NORM} is {norm}, expected a positive number")
    return math.sqrt(fields.need("d_model", int)) / norm
