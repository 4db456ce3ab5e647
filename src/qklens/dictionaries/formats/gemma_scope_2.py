"""Gemma Scope 2: `config.json` with `params.safetensors` (an SAE) or `params_layer_<i>.safetensors` (a crosscoder).

    z = x_ℓ w_enc + b_enc,   a = max(z, 0) · 1[z > threshold],   x̂_m = Σ_ℓ a_ℓ w_dec[:, m] + b_dec,m

`w_enc: d_model feature`; `w_dec: feature d_model`, or `feature layer d_model` in a crosscoder, whose file i holds the
features that read the i-th of its layers. The sites are `model.layers.<L>.output`, with `{a,b,c}` for several. A weakly
causal crosscoder never writes an earlier layer than it reads; weights that do are refused.

Source: Gemma Scope 2's technical report (section 2.6), its tutorial's JumpReLUMultiLayerSAE, SAELens' `gemma_3` loader.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from qklens.dictionaries.activation import JumpRelu
from qklens.dictionaries.config import FORMAT, DictionaryConfig, Fidelity, Source
from qklens.dictionaries.crosscoder import Crosscoder
from qklens.dictionaries.formats.fields import Fields
from qklens.dictionaries.formats.plain import Plain, native, product
from qklens.dictionaries.formats.sites import agreed_layer, reading_layer
from qklens.dictionaries.stored import StoredTensors, read_safetensors
from qklens.errors import QklensError
from qklens.files import sha256_files

KIND = "gemma-scope-2"
CONFIG, WEIGHTS, SHARD = "config.json", "params.safetensors", "params_layer_{}.safetensors"
LOOKS_LIKE = f"{CONFIG} with {WEIGHTS} or {SHARD.format(0)} (Gemma Scope 2)"

_SEVERAL = re.compile(r"(.*)\{(\d{1,4}(?:,\d{1,4})*)\}(.*)")
_KNOWN = ("hf_hook_point_in", "hf_hook_point_out", "width", "model_name", "architecture", "l0", "type")
_NEGLIGIBLE = 1e-6
"""Share of a decoder's norm that may stand where a weakly causal one has zeros."""


def matches(folder: Path) -> bool:
    """Whether a folder holds this format's files."""
    weights = (folder / WEIGHTS).is_file() or (folder / SHARD.format(0)).is_file()
    return weights and (folder / CONFIG).is_file()


def read(folder: Path, layer: int | None = None) -> Crosscoder:
    """The dictionary of a Gemma Scope 2 directory.

    Raises:
        QklensError: a transcoder or another site than the residual stream, a crosscoder that is not weakly causal, or
            damage.
    """
    fields = Fields.read(folder / CONFIG, _KNOWN)
    hook, out = fields.need("hf_hook_point_in", str), fields.need("hf_hook_point_out", str)
    kind = fields.need("type", str)
    if kind not in ("sae", "crosscoder") or hook != out:
        raise QklensError(
            f"{fields.path}: a {kind} from {hook!r} to {out!r}; expected an sae or crosscoder of one site"
        )
    if (architecture := fields.need("architecture", str)) != "jump_relu":
        raise QklensError(f"{fields.path}: architecture {architecture!r} is not supported; expected 'jump_relu'")
    if fields.get("affine_connection", False, bool):
        raise QklensError(f"{fields.path}: has an affine skip connection, which is no part of a dictionary's features")
    model = fields.need("model_name", str)
    if kind == "crosscoder":
        return _crosscoder(folder, fields.path, hook, layer, model)
    where = agreed_layer(reading_layer(hook, fields.path), layer, fields.path, "")
    stored = read_safetensors(folder / WEIGHTS)
    d_model, n = stored.shape("w_enc", 2)
    plain = Plain(
        decoder=stored.take("w_dec", n, d_model),
        decoder_bias=stored.take("b_dec", d_model),
        **_reading(stored, d_model, n),
    ).bias_subtracted()
    files = (fields.path, folder / WEIGHTS)
    l0 = fields.get("l0", 0.0, float)
    stated = (Fidelity(l0={where: l0}), f"key 'l0' of {CONFIG}") if l0 > 0 else None
    return native(plain, where, folder=folder, kind=KIND, model=model, site=hook, files=files, stated=stated)


def _reading(stored: StoredTensors, d_model: int, n: int) -> dict[str, Any]:
    """The part that reads: encoder, its bias, θ and its thresholds."""
    return {
        "encoder": stored.take("w_enc", d_model, n).T.contiguous(),
        "encoder_bias": stored.take("b_enc", n),
        "activation": JumpRelu(),
        "thresholds": stored.take("threshold", n).clamp(min=0),
    }


def _crosscoder(folder: Path, path: Path, hook: str, layer: int | None, model: str) -> Crosscoder:
    layers = _layers(hook, path)
    if layer is not None:
        raise QklensError(f"{path}: records resid_pre of layers {list(layers)}; leave --layer out")
    files = [folder / SHARD.format(i) for i in range(len(layers))]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise QklensError(f"{missing}: no such file; expected one for each of {len(layers)} layers")
    shards = [read_safetensors(file) for file in files]
    d_model, n = shards[0].shape("w_enc", 2)
    readers = {m: _reading(shard, d_model, n) for m, shard in zip(layers, shards, strict=True)}
    biases = {m: shard.take("b_dec", d_model) for m, shard in zip(layers, shards, strict=True)}
    decoders = [_causal(shard, i, n, len(layers), d_model) for i, shard in enumerate(shards)]
    source = Source(
        format=KIND,
        model=model,
        site=hook,
        sha256=sha256_files([path, *files]),
        folded=("decoder bias, which is not subtracted from the input",),
    )
    return Crosscoder(
        config=DictionaryConfig(
            format=FORMAT,
            name=folder.resolve().name,
            layers=layers,
            features_per_layer=n,
            d_model=d_model,
            activation=JumpRelu(),
            site="resid_pre",
            model_sha256="",
            training={},
            fidelity=None,
            source=source,
        ),
        encoder={m: readers[m]["encoder"] for m in layers},
        encoder_bias={m: readers[m]["encoder_bias"] + product(readers[m]["encoder"], biases[m]) for m in layers},
        decoder={m: torch.cat([decoder[:, i] for decoder in decoders]) for i, m in enumerate(layers)},
        decoder_bias=biases,
        sha256=source.sha256,
        thresholds={m: readers[m]["thresholds"] for m in layers},
    )


def _layers(hook: str, path: Path) -> tuple[int, ...]:
    """The layers of a hook point such as `model.layers.{5,9,12,15}.output`, in rising order."""
    match = _SEVERAL.fullmatch(hook)
    named = [f"{match[1]}{number}{match[3]}" for number in match[2].split(",")] if match else [hook]
    layers = tuple(reading_layer(name, path) for name in named)
    if list(layers) != sorted(set(layers)):
        raise QklensError(f"{path}: names its layers as {hook[:80]!r}, expected distinct layers in rising order")
    return layers


def _causal(shard: StoredTensors, i: int, n: int, n_layers: int, d_model: int) -> torch.Tensor:
    """w_dec of the features that read the i-th layer, with exact zeros at earlier layers."""
    decoder = shard.take("w_dec", n, n_layers, d_model).clone()
    if float(decoder[:, :i].norm()) > _NEGLIGIBLE * float(decoder.norm()):
        raise QklensError(f"{shard.path}: its features write layers before the one they read; it is not weakly causal")
    decoder[:, :i] = 0
    return decoder
