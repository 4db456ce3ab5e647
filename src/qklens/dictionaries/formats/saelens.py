"""SAELens directories: `cfg.json` and `sae_weights.safetensors`, as versions 3 to 6 write them.

    sae_in = norm(x) − b_dec [apply_b_dec_to_input],  z = sae_in W_enc + b_enc,  a = θ(z),  x̂ = norm⁻¹(a W_dec + b_dec)

θ: standard relu; topk the k largest, then relu; jumprelu z · 1[z > max(threshold, 0)]; gated, which shares one encoder,
is a jumprelu: with m = exp(r_mag), z = m ⊙ (sae_in W_enc) + b_mag is active above both 0 and b_mag − m b_gate;
batchtopk is a training checkpoint, with one threshold for inference. `rescale_acts_by_decoder_norm` compares and
decodes in units of the decoder's norms. From version 6 on, the hook stands under `metadata`.

Source: SAELens (github.com/decoderesearch/SAELens), `sae_lens/saes/` and `sae_lens/loading/pretrained_sae_loaders.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from qklens.dictionaries.activation import JumpRelu, Relu, Threshold, TopK
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.formats.fields import Fields
from qklens.dictionaries.formats.plain import Plain, native
from qklens.dictionaries.formats.sites import agreed_layer, reading_layer
from qklens.dictionaries.stored import StoredTensors, read_safetensors
from qklens.errors import QklensError

KIND = "saelens"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LOOKS_LIKE = f"{CONFIG} with {WEIGHTS} (SAELens)"

_STANDARD, _TOPK, _JUMP, _GATED = "standard", "topk", "jumprelu", "gated"
_BATCH = ("batchtopk", "matryoshka_batchtopk")
_KNOWN = (
    "activation_fn", "activation_fn_str", "activation_fn_kwargs", "hook_name", "hook_point", "hook_name_out",
    "hook_layer", "hook_point_layer", "hook_head_index", "hook_point_head_index", "d_in", "d_out", "d_sae", "k",
    "model_name", "model_class_name", "normalize_sae_decoder", "sae_lens_version", "sae_lens_training_version",
    "dtype", "device",
)  # fmt: skip


def matches(folder: Path) -> bool:
    """Whether a folder holds this format's files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path, layer: int | None = None) -> Crosscoder:
    """The dictionary of a SAELens directory.

    Raises:
        QklensError: an architecture, normalisation or site that the native form cannot hold exactly, or damage.
    """
    fields = Fields.read(folder / CONFIG, _KNOWN)
    about = fields.inner("metadata") if "metadata" in fields.content else fields
    hook = about.need("hook_name" if "hook_name" in about.content or about is not fields else "hook_point", str)
    _refuse_other_sites(fields, about, hook)
    where = agreed_layer(reading_layer(hook, fields.path), layer, fields.path, "")
    stored = read_safetensors(folder / WEIGHTS)
    d_in, d_sae = fields.need("d_in", int), fields.need("d_sae", int)
    plain = _weights(fields, stored, d_in, d_sae)
    if fields.get("rescale_acts_by_decoder_norm", False, bool):
        if not isinstance(plain.activation, TopK | Threshold):
            raise QklensError(
                f"{fields.path}: rescale_acts_by_decoder_norm is set, expected only with topk or batchtopk"
            )
        plain = plain.rescaled_by_norms()
    plain = _finetuned(fields, stored, plain)
    if not fields.get("apply_b_dec_to_input", True, bool):
        plain = plain.bias_subtracted()
    plain = _normalised(fields, plain)
    model = about.get("model_name", "", str)
    files = (folder / CONFIG, folder / WEIGHTS)
    return native(plain, where, folder=folder, kind=KIND, model=model, site=hook, files=files)


def _refuse_other_sites(fields: Fields, about: Fields, hook: str) -> None:
    out = about.get("hook_name_out", hook, str)
    if out != hook or "d_out" in fields.content:
        raise QklensError(f"{fields.path}: a transcoder from {hook!r} to {out!r}; expected one site read and written")
    head = next((k for k in ("hook_head_index", "hook_point_head_index") if about.content.get(k) is not None), None)
    if head is not None:
        raise QklensError(
            f"{fields.path}: {head} is {about.content[head]!r}: one head's output, not the residual stream"
        )
    if fields.get("reshape_activations", "none", str) != "none":
        raise QklensError(f"{fields.path}: reshape_activations is set, expected 'none': heads read the whole stream")


def _weights(fields: Fields, stored: StoredTensors, d_in: int, d_sae: int) -> Plain:
    architecture, function = fields.get("architecture", _STANDARD, str), _function(fields)
    encoder = stored.take("W_enc", d_in, d_sae).T.contiguous()
    decoder, bias = stored.take("W_dec", d_sae, d_in), stored.take("b_dec", d_in)
    if architecture == _GATED:
        scale = stored.take("r_mag", d_sae).exp()
        offset, gate = stored.take("b_mag", d_sae), stored.take("b_gate", d_sae)
        thresholds = (offset - scale * gate).clamp(min=0)
        return Plain(encoder * scale[:, None], offset, decoder, bias, JumpRelu(), thresholds, ("gates, as thresholds",))
    if (architecture == _STANDARD and function == _TOPK) or architecture == _TOPK:
        inner = fields.inner("activation_fn_kwargs") if "k" not in fields.content else fields
        activation, thresholds = TopK(k=_positive(inner, "k")), None
    elif architecture == _STANDARD and function == "relu":
        activation, thresholds = Relu(), None
    elif architecture == _JUMP:
        activation, thresholds = JumpRelu(), _thresholds(stored, d_sae)
    elif architecture in _BATCH:
        activation, thresholds = Threshold(threshold=max(0.0, float(stored.take("topk_threshold")))), None
    else:
        raise QklensError(
            f"{fields.path}: architecture {architecture!r} with activation {function!r} is not supported; expected "
            f"{[_STANDARD, _TOPK, _JUMP, _GATED, *_BATCH]} with relu or topk"
        )
    return Plain(encoder, stored.take("b_enc", d_sae), decoder, bias, activation, thresholds)


def _function(fields: Fields) -> str:
    key = "activation_fn_str" if "activation_fn_str" in fields.content else "activation_fn"
    return fields.get(key, "relu", str)


def _thresholds(stored: StoredTensors, d_sae: int) -> torch.Tensor:
    if "log_threshold" in stored:
        return stored.take("log_threshold", d_sae).exp()
    return stored.take("threshold", d_sae).clamp(min=0)


def _positive(fields: Fields, key: str) -> int:
    value = fields.need(key, int)
    if value < 1:
        raise QklensError(f"{fields.path}: key {key!r} is {value}, expected at least 1")
    return value


def _finetuned(fields: Fields, stored: StoredTensors, plain: Plain) -> Plain:
    """Factors of the activations that are decoded, stored under either of two names."""
    name = next((n for n in ("finetuning_scaling_factor", "scaling_factor") if n in stored), None)
    if name is None:
        return plain
    factors = stored.take(name, len(plain.encoder_bias))
    if fields.get("finetuning_scaling_factor", False, bool):
        return plain.decoded_with(factors)
    if not torch.allclose(factors, torch.ones_like(factors)):
        raise QklensError(
            f"{stored.path}: tensor {name!r} scales activations, but {fields.path.name} does not set "
            "finetuning_scaling_factor; expected both or neither"
        )
    return plain


def _normalised(fields: Fields, plain: Plain) -> Plain:
    value = fields.content.get("normalize_activations")
    if isinstance(value, bool):  # of the first versions
        value = "expected_average_only_in" if value else "none"
    kind = "none" if value is None and fields.get("normalize_activations", "none", str) == "none" else value
    if kind == "none":
        return plain
    if kind == "constant_scalar_rescale":
        name = "activation_normalization_factor"
        return plain.input_scaled(fields.need(name, float), f"{fields.path}: {name}")
    if kind == "expected_average_only_in":
        raise QklensError(
            f"{fields.path}: normalize_activations is {kind!r}, a scale that these files do not hold; fold it with "
            "SAELens' fold_activation_norm_scaling_factor and save the result"
        )
    raise QklensError(
        f"{fields.path}: normalize_activations is {kind!r}, which depends on each token's vector and cannot be "
        "folded into weights; expected 'none' or 'constant_scalar_rescale'"
    )
