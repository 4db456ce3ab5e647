"""The tensors of a .pt file, through a process of its own that can build tensors and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from qklens.dictionaries.formats import unpickle_weights
from qklens.dictionaries.stored import StoredTensors, read_safetensors
from qklens.errors import QklensError

_SECONDS = 3600
_SHOWN = 300


def unpickled(path: Path) -> StoredTensors:
    """Read a .pt file that holds a dictionary of tensors.

    `unpickle_weights` runs isolated from the environment and the user's packages, with `weights_only` and no way around
    it, and hands the tensors over as a safetensors file, which is then read like any other.

    Raises:
        QklensError: a file that holds anything but tensors, or that is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="qklens-") as scratch:
        target = Path(scratch) / "tensors.safetensors"
        command = [sys.executable, "-I", unpickle_weights.__file__, str(path.absolute()), str(target)]
        environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        try:
            ended = subprocess.run(  # noqa: S603
                command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise QklensError(f"{path}: not converted within {_SECONDS} s; check the file") from error
        if ended.returncode != 0 or not target.is_file():
            why = " ".join(ended.stderr.split())[-_SHOWN:] or f"the process ended with {ended.returncode}"
            raise QklensError(
                f"{path}: not opened, for it holds more than tensors or is damaged ({why}); nothing was run"
            )
        held = read_safetensors(target)
        return StoredTensors(path, {name: tensor.clone() for name, tensor in held.tensors.items()})
