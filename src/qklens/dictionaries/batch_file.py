"""The fixed batch of tokens on which a dictionary's fidelity was measured, stored beside it.

Token ids, not text: the batch is then the same under any version of a tokenizer or of a text. With them lie the largest
activations at a few of the tokens (`peaks`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from qklens.dictionaries.config import BATCH_FILE, CONFIG_FILE, Batch, Tolerance
from qklens.dictionaries.peaks import Peaks
from qklens.dictionaries.stored import read_safetensors
from qklens.errors import QklensError
from qklens.files import atomic_write

_FEATURE, _ACTIVATION = "peak_feature", "peak_activation"
_PEAK_NAME = re.compile(rf"{_FEATURE}\.([0-9]{{1,6}})")


@dataclass(frozen=True, eq=False)
class RecordedBatch:
    """What lies beside a dictionary.

    Attributes:
        sequences: token ids.
        peaks: the largest activations at some of them.
    """

    sequences: list[list[int]]
    peaks: Peaks


def save_batch(folder: Path, sequences: Sequence[Sequence[int]], peaks: Peaks, tolerance: Tolerance) -> Batch:
    """Write the batch atomically; what the configuration says of it."""
    tensors = {
        "tokens": torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32),
        "lengths": torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32),
    }
    for layer, feature in peaks.feature.items():
        tensors[f"{_FEATURE}.{layer}"] = feature.to("cpu", torch.int32)
        tensors[f"{_ACTIVATION}.{layer}"] = peaks.activation[layer].to("cpu", torch.float32)
    atomic_write(folder / BATCH_FILE, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    n_tokens = len(tensors["tokens"])
    return Batch(sha256=_digest(tensors), sequences=len(sequences), tokens=n_tokens, tolerance=tolerance)


def load_batch(folder: Path, batch: Batch, vocabulary: int) -> RecordedBatch:
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
    stored = read_safetensors(path).tensors
    held = [stored.get(name) for name in ("tokens", "lengths")]
    if any(tensor is None or tensor.dtype != torch.int32 or tensor.dim() != 1 for tensor in held):
        raise QklensError(f"{path}: expected tensors 'tokens' and 'lengths' of whole numbers; copy it again")
    features = {int(found[1]): name for name in stored if (found := _PEAK_NAME.fullmatch(name))}
    kinds = {f"{_FEATURE}.{layer}": torch.int32 for layer in features} | {
        f"{_ACTIVATION}.{layer}": torch.float32 for layer in features
    }
    for name in {*stored, *kinds} - {"tokens", "lengths"}:
        if name not in stored or name not in kinds or stored[name].dtype != kinds[name] or stored[name].dim() != 2:
            raise QklensError(
                f"{path}: tensor {name!r} is unknown, missing or of another kind; expected '{_FEATURE}.L' of int32 and "
                f"'{_ACTIVATION}.L' of float32 for each layer L; copy it again"
            )
    if not features:
        raise QklensError(
            f"{path}: holds no activations at fixed tokens; set 'batch' and 'fidelity' to null in {CONFIG_FILE}, and "
            "record them with `qklens dict check --record`"
        )
    tokens, lengths = stored["tokens"], stored["lengths"]
    if _digest(stored) != batch.sha256 or int(lengths.sum()) != len(tokens) or bool((lengths < 1).any()):
        raise QklensError(f"{path}: not the batch that the configuration records ({batch.sha256[:12]}); copy it again")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise QklensError(
            f"{path}: its token ids reach {int(tokens.max())}, the model knows 0 to {vocabulary - 1}; the dictionary "
            "belongs to another model"
        )
    ids, ends = tokens.tolist(), list(accumulate(lengths.tolist()))
    return RecordedBatch(
        [ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False)],
        Peaks(
            {layer: stored[name].long() for layer, name in features.items()},
            {layer: stored[f"{_ACTIVATION}.{layer}"] for layer in features},
        ),
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {list(tensors[name].shape)}".encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()
