"""The tensors of a file, taken by name with their shape and values checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qklens.errors import QklensError, nearest, reason

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class StoredTensors:
    """What a file of tensors holds; made by `read_safetensors` or by another reader.

    Attributes:
        path: the file.
        tensors: by name, as they are stored.
    """

    path: Path
    tensors: Mapping[str, Tensor]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str, n_axes: int) -> tuple[int, ...]:
        """The shape of a tensor of so many axes.

        Raises:
            QklensError: no such tensor, or another number of axes.
        """
        shape = tuple(self._named(name).shape)
        if len(shape) != n_axes or 0 in shape:
            raise QklensError(f"{self.path}: tensor {name!r} has shape {shape}, expected {n_axes} axes, none empty")
        return shape

    def take(self, name: str, *shape: int) -> Float[Tensor, "..."]:
        """A tensor in float32.

        Raises:
            QklensError: no such tensor, another shape or dtype, or NaN or infinity in it.
        """
        stored = self._named(name)
        if tuple(stored.shape) != shape:
            raise QklensError(f"{self.path}: tensor {name!r} has shape {tuple(stored.shape)}, expected {shape}")
        tensor = as_float32(stored, f"{self.path}: tensor {name!r}")
        if not torch.isfinite(tensor).all():
            raise QklensError(f"{self.path}: tensor {name!r} holds NaN or infinity; copy it again")
        return tensor

    def _named(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise QklensError(f"{self.path}: tensor {name!r} is missing{nearest(name, self.tensors)}")
        return self.tensors[name]


def as_float32(tensor: Tensor, where: str) -> Tensor:
    """A stored tensor in float32.

    Raises:
        QklensError: a dtype that weights are not stored in.
    """
    if tensor.dtype not in _DTYPES:
        found = str(tensor.dtype).removeprefix("torch.")
        raise QklensError(f"{where} is {found}; expected float16, bfloat16, float32 or float64; save it again")
    return tensor.to(torch.float32)


def read_safetensors(path: Path) -> StoredTensors:
    """Every tensor of a safetensors file, in memory.

    Raises:
        QklensError: a file that is missing or damaged.
    """
    try:
        return StoredTensors(path, load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise QklensError(f"{path}: damaged ({reason(error)}); copy it again") from error
