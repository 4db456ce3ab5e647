"""Arrays of a .npz file, read one by one without ever unpickling.

A .npz is a zip of .npy files; each is read with numpy's own reader of that format, which refuses objects when told to.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy

from qklens.dictionaries.stored import StoredTensors
from qklens.errors import QklensError, reason


def read_npz(path: Path, names: tuple[str, ...]) -> StoredTensors:
    """The named arrays of a .npz file; others are not looked at.

    Raises:
        QklensError: a damaged file, an array that is missing, holds objects or is no array of numbers.
    """
    tensors = {}
    try:
        with zipfile.ZipFile(path) as archive:
            held = set(archive.namelist())
            for name in names:
                if f"{name}.npy" not in held:
                    raise QklensError(f"{path}: array {name!r} is missing; it holds {sorted(held)[:8]}")
                with archive.open(f"{name}.npy") as member:
                    array = npy.read_array(member, allow_pickle=False)
                if array.dtype.kind != "f":
                    raise QklensError(f"{path}: array {name!r} is of {array.dtype}, expected floating-point numbers")
                tensors[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    except (OSError, ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise QklensError(f"{path}: damaged, or not only numbers ({reason(error)}); copy it again") from error
    return StoredTensors(path, tensors)
