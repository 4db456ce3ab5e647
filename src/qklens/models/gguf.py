"""GGUF files: one file with config, tokenizer and (often quantised) weights, read by transformers' own reader.

Weights are dequantised on loading; the model under study is the dequantised one. What the reader would drop without a
word is refused here.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qklens.errors import QklensError, reason
from qklens.models.checkpoint import Checkpoint
from qklens.models.family import family_of

_MAGIC = b"GGUF"
_ROTARY_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
_READS_SCALING = "gpt-oss"
_SAME_AS = {
    "rope.dimension_count": "head_dim",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "rope.freq_base_swa": "rope_local_base_freq",
}
"""Keys that the reader may drop -> the config's key that must hold the same number."""
_HARMLESS = ("attention.causal", "tensor_data_layout", "expert_weights_scale")


def inspect_gguf(path: Path) -> Checkpoint:
    """Check a GGUF file by its header, without loading its weights.

    Raises:
        QklensError: a package is missing, not a GGUF file, damaged, of an unproven family, or holding something that
            changes scores and transformers' reader drops.
    """
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise QklensError(f"{path}: reading GGUF needs the package {package!r}: pip install 'qklens[gguf]'")
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise QklensError(f"{path}: begins with {magic!r}, expected {_MAGIC!r}; not a GGUF file")
    config, dropped = _read(path)
    family = family_of(config, str(path))
    if dropped:
        raise QklensError(
            f"{path}: the GGUF reader drops {dropped}, so another model would be studied; use the safetensors model"
        )
    return Checkpoint(path, config, family, (path,))


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """The config as transformers reads it, and what of the file it drops."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        reader = GGUFReader(path)
        config: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    except Exception as error:  # the readers raise many kinds on damage; all mean the same to the user
        raise QklensError(f"{path}: cannot be read as GGUF ({reason(error)}); download it again") from error
    return config, _dropped(reader, config)


def _dropped(reader: Any, config: dict[str, Any]) -> str | None:  # noqa: ANN401
    """The first tensor or key of the file that changes scores and is not in the config, or nothing."""
    tensor = next((t.name for t in reader.tensors if t.name.split(".")[0] in _ROTARY_TENSORS), None)
    if tensor:
        return tensor
    blocks = {int(t.name.split(".")[1]) for t in reader.tensors if t.name.startswith("blk.")}
    if blocks != set(range(int(config.get("num_hidden_layers") or config.get("n_layer") or 0))):
        return f"{len(blocks)} layers of tensors, block_count says otherwise"
    architecture = str(reader.fields["general.architecture"].contents())
    own = {k.removeprefix(architecture + "."): f for k, f in reader.fields.items() if k.startswith(architecture + ".")}
    read = {k for k, name in _read_keys(config) if name is not None}
    whole = _with_defaults(config)
    for key, field in own.items():
        if key in read or key in _HARMLESS or (architecture == _READS_SCALING and key.startswith("rope.scaling.")):
            continue
        value = field.contents()
        if key.startswith("rope.scaling."):
            if value not in ("none", 1, 1.0):
                return f"{architecture}.{key}"
        elif key not in _SAME_AS or whole.get(_SAME_AS[key]) != value:
            return f"{architecture}.{key} = {value!r}"
    if whole.get("query_pre_attn_scalar") not in (None, whole.get("head_dim")):
        return "the score scale of this size of Gemma, which the file does not hold"
    return None


def _read_keys(config: dict[str, Any]) -> list[tuple[str, str | None]]:
    """What the reader takes from a file of this family, as (key, config's key)."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    family = str(config["model_type"]).removesuffix("_text")
    return [(key, name) for key, name in GGUF_CONFIG_MAPPING[family].items() if name != -1]


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The config that transformers will build, with the width of a head."""
    from transformers import AutoConfig

    built = AutoConfig.for_model(**config)
    whole = built.to_dict()
    width = getattr(built, "head_dim", None) or built.hidden_size // built.num_attention_heads
    return {**whole, "head_dim": width}
