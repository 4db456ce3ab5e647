"""A config's numbers, before a model is built from them: each key that makes no model is refused by name.

Transformers reads `config.json` for the tokenizer too, so what is wrong in it must be said here or it is blamed on
another file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qklens.errors import QklensError, nearest, reason

_LAYERS = ("num_hidden_layers", "n_layer")
_WIDTH = ("hidden_size", "n_embd")
_HEADS = ("num_attention_heads", "n_head")
_COUNTS = (
    *_LAYERS, *_WIDTH, *_HEADS, "num_key_value_heads", "head_dim", "intermediate_size", "n_inner", "vocab_size",
    "max_position_embeddings", "n_positions", "sliding_window",
)  # fmt: skip
_AMOUNTS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct",
    "rotary_emb_base", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "low_freq_factor",
    "high_freq_factor",
)  # fmt: skip
_ROPE = ("rope_parameters", "rope_scaling")
_ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation")
_DTYPES = ("dtype", "torch_dtype")


def check_values(config: dict[str, Any], file: Path) -> int:
    """Check the values that a config states; the number of layers.

    Raises:
        QklensError: a value that makes no model; names the file, the key, what was found and what was expected.
    """
    _check_numbers(config, file)
    _check_names(config, file)
    _check_heads(config, file)
    _check_padding(config, file)
    return _stated(config, _LAYERS)[1] or 0


def check_readable(config: dict[str, Any], file: Path) -> None:
    """Let transformers read the config; call it last, as some families build lists as long as the model is deep.

    Raises:
        QklensError: transformers refuses it; names the file and its reason.
    """
    try:
        AutoConfig.from_pretrained(str(file.parent), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here; its validators keep the plain one as the cause
        raise QklensError(
            f"{file}: makes no {config.get('model_type')} config ({reason(error.__cause__ or error)}); correct the "
            "file, or download it again"
        ) from error


def _check_numbers(config: dict[str, Any], file: Path) -> None:
    key = next((k for k in _LAYERS if k in config), _LAYERS[0])
    if config.get(key) is None:
        raise QklensError(f"{file}: {key} is {config.get(key)!r}, expected a positive integer")
    for key, value in _values(config):
        name = key.rpartition(".")[2]
        if value is None:
            continue
        if name in _COUNTS and (type(value) is not int or value < 1):
            raise QklensError(f"{file}: {key} is {value!r}, expected a positive integer")
        if name in _AMOUNTS and not (type(value) in (int, float) and 0 < value < math.inf):
            raise QklensError(f"{file}: {key} is {value!r}, expected a positive finite number")


def _values(config: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """The config's values and those of its rotary tables, which may hold one table for each kind of layer."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if within or key in _ROPE:
                yield from _values(value, f"{within}{key}.")
        else:
            yield f"{within}{key}", value


def _check_names(config: dict[str, Any], file: Path) -> None:
    for key in _ROPE:
        if not isinstance(config.get(key), Mapping | None):
            raise QklensError(f"{file}: {key} is {config[key]!r}, expected a JSON object")
    rope_types, activations = sorted({*ROPE_INIT_FUNCTIONS, "default"}), sorted(ACT2FN)
    for key, value in _values(config):
        if not isinstance(value, str):
            continue
        if key.endswith(".rope_type") and value not in rope_types:
            raise QklensError(f"{file}: {key} is {value!r}, expected one of {rope_types}{nearest(value, rope_types)}")
        if key in _ACTIVATIONS and value not in activations:
            raise QklensError(
                f"{file}: {key} is {value!r}, expected an activation that transformers has, such as 'silu'"
                f"{nearest(value, activations)}"
            )
        if key in _DTYPES and not isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype):
            raise QklensError(f"{file}: {key} is {value!r}, expected a torch dtype such as 'float32' or 'bfloat16'")


def _check_heads(config: dict[str, Any], file: Path) -> None:
    """Widths and head counts that must divide each other, where the config states both."""
    width_key, width = _stated(config, _WIDTH)
    heads_key, heads = _stated(config, _HEADS)
    kv_key, kv_heads = _stated(config, ("num_key_value_heads",))
    if width and heads and not config.get("head_dim") and width % heads:
        raise QklensError(f"{file}: {width_key} is {width}, expected a multiple of {heads_key}, which is {heads}")
    if heads and kv_heads and heads % kv_heads:
        raise QklensError(f"{file}: {kv_key} is {kv_heads}, expected a divisor of {heads_key}, which is {heads}")


def _check_padding(config: dict[str, Any], file: Path) -> None:
    """The padding token must have a row in the embedding."""
    padding, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(padding, int) and isinstance(rows, int) and not -rows <= padding < rows:
        raise QklensError(f"{file}: pad_token_id is {padding}, expected a token below vocab_size, which is {rows}")


def _stated(config: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, int | None]:
    return next(((key, config[key]) for key in keys if config.get(key) is not None), (keys[0], None))
