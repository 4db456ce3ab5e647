"""GGUF files: one file with config, tokenizer and (often quantised) weights, read by transformers' own reader.

Weights are dequantised on loading; the model under study is the dequantised one. What the reader would drop without a
word is refused here.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qklens.errors import QklensError
from qklens.models.checkpoint import Checkpoint
from qklens.models.family import family_of

_MAGIC = b"GGUF"
_ROTARY_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
_READS_SCALING = "gpt-oss"


def inspect_gguf(path: Path) -> Checkpoint:
    """Check a GGUF file by its header, without loading its weights.

    Raises:
        QklensError: a package is missing, not a GGUF file, damaged, of an unproven family, or with rotary scaling that
            transformers' reader drops.
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
            f"{path}: has scaled rotary positions ({dropped}), which the GGUF reader drops; use the safetensors model"
        )
    return Checkpoint(path, config, family, (path,))


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """The config as transformers reads it, and what of the rotary scaling it does not."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        reader = GGUFReader(path)
        config: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    except Exception as error:  # the readers raise many kinds on damage; all mean the same to the user
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QklensError(f"{path}: cannot be read as GGUF ({reason}); download it again") from error
    tensor = next((t.name for t in reader.tensors if t.name.split(".")[0] in _ROTARY_TENSORS), None)
    keys = [key for key in reader.fields if ".rope.scaling." in key and not key.startswith(_READS_SCALING)]
    scaling = next((key for key in keys if _scales(reader.fields[key].contents())), None)
    return config, tensor or scaling


def _scales(value: Any) -> bool:  # noqa: ANN401
    """Whether a rope.scaling entry changes anything: neither the type `none` nor the factor 1."""
    return value not in ("none", 1, 1.0)
