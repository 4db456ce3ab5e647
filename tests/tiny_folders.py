"""Tiny Llama directories on disk, whole or damaged on purpose, and what a folder holds."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from qklens.errors import QklensError
from qklens.models.loading import load_subject

WEIGHTS = "model.safetensors"


def write_tiny_llama(folder: Path, tokenizer: PreTrainedTokenizerBase, **config: Any) -> Path:
    """A random Llama of width 16 with its tokenizer, as transformers writes it."""
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**options, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object; `...` removes a key."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a safetensors file after `change` has had its way with the tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def write_safetensors(file: Path, header: bytes, body: bytes = b"", length: int | None = None) -> None:
    """A safetensors file of any header, and of a header length that may lie."""
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)


def refusal(folder: Path, load: Callable[[Path], object] = load_subject) -> str:
    """The line with which a model directory is refused."""
    with pytest.raises(QklensError) as caught:
        load(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
