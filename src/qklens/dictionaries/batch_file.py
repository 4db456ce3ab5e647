"""The fixed batch of tokens on which a dictionary's fidelity was measured, stored beside it.

Token ids, not text: the batch is then the same under any version of a tokenizer or of a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import save
from torch import Tensor

from qklens.dictionaries.config import BATCH_FILE, Batch, Tolerance
from qklens.dictionaries.stored import read_safetensors
from qklens.errors import QklensError
from qklens.files import atomic_write


def save_batch(folder: Path, sequences: Sequence[Sequence[int]], tolerance: Tolerance) -> Batch:
    """Write the batch atomically; what the configuration says of it."""
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32)
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32)
    atomic_write(folder / BATCH_FILE, save({"tokens": tokens, "lengths": lengths}))
    return Batch(sha256=_digest(tokens, lengths), sequences=len(sequences), tokens=len(tokens), tolerance=tolerance)


def load_batch(folder: Path, batch: Batch, vocabulary: int) -> list[list[int]]:
    """The batch that a configuration records.

    Args:
        folder: the dictionary's directory.
        batch: what the configuration says of it.
        vocabulary: how many tokens the model knows.

    Raises:
        QklensError: a file that is missing or damaged, another batch than the recorded one, or tokens that the model
            does not know.
    """
    path = folder / BATCH_FILE
    if not path.is_file():
        raise QklensError(f"{path}: no such file, but the configuration records the batch in it; copy it again")
    stored = read_safetensors(path)
    held = [stored.tensors.get(name) for name in ("tokens", "lengths")]
    if any(tensor is None or tensor.dtype != torch.int32 or tensor.dim() != 1 for tensor in held):
        raise QklensError(f"{path}: expected tensors 'tokens' and 'lengths' of whole numbers; copy it again")
    tokens, lengths = (stored.tensors[name] for name in ("tokens", "lengths"))
    if _digest(tokens, lengths) != batch.sha256 or int(lengths.sum()) != len(tokens) or bool((lengths < 1).any()):
        raise QklensError(f"{path}: not the batch that the configuration records ({batch.sha256[:12]}); copy it again")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise QklensError(
            f"{path}: its token ids reach {int(tokens.max())}, the model knows 0 to {vocabulary - 1}; the dictionary "
            "belongs to another model"
        )
    ids, ends = tokens.tolist(), list(accumulate(lengths.tolist()))
    return [ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _digest(tokens: Int[Tensor, " token"], lengths: Int[Tensor, " sequence"]) -> str:
    return hashlib.sha256(lengths.numpy().tobytes() + b"/" + tokens.numpy().tobytes()).hexdigest()
