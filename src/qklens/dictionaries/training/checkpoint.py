"""Checkpoints: each a new directory, and a pointer that moves to it at once when it is whole.

    checkpoints/step-00000500/state.safetensors    weights, moments, buffer, generator
    checkpoints/step-00000500/state.json           the few numbers beside them, and the SHA-256 of the tensors
    checkpoints/LATEST                             the name of the directory to go on from

A crash at any moment leaves the pointer on a whole directory. Older directories go after the pointer has moved.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qklens.errors import QklensError
from qklens.files import atomic_write, read_json, sha256_files

_TENSORS, _FACTS, _POINTER = "state.safetensors", "state.json", "LATEST"


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a checkpoint, move the pointer to it, remove the others.

    Raises:
        QklensError: the disk is full; the pointer stays on the checkpoint before.
    """
    temporary = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=folder, prefix=".writing-")
        path = Path(temporary) / _TENSORS
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        written = {**facts, "step": step, "sha256": sha256_files([path])}
        (Path(temporary) / _FACTS).write_text(json.dumps(written), encoding="utf-8")
        for part in (path, Path(temporary) / _FACTS, Path(temporary)):
            _sync(part)
        final = folder / f"step-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)  # left by a run that was stopped before it moved the pointer
        Path(temporary).rename(final)
        _sync(folder)
        atomic_write(folder / _POINTER, final.name)
    except (OSError, SafetensorError, QklensError) as error:
        at = _latest(folder)
        kept = f"; {at} is whole: free space, and the same command goes on from it" if at else "; free space"
        raise QklensError(f"{folder}: cannot write the checkpoint of step {step} ({error}){kept}") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    for other in folder.iterdir():
        if other.is_dir() and other.name != final.name:
            shutil.rmtree(other, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and numbers of the checkpoint that the pointer names; None where there is none yet.

    Raises:
        QklensError: a checkpoint that is missing, truncated or altered.
    """
    name = _latest(folder)
    if name is None:
        return None
    path = folder / Path(name).name
    facts = read_json(path / _FACTS)
    again = f"remove {folder} to begin anew"
    try:
        found = sha256_files([path / _TENSORS])
        if not isinstance(facts, dict) or found != facts.get("sha256"):
            said = str(facts.get("sha256"))[:12] if isinstance(facts, dict) else "nothing"
            raise QklensError(
                f"{path / _TENSORS}: its SHA-256 is {found[:12]}..., {_FACTS} says {said}...; it was altered: {again}"
            )
        return load_file(path / _TENSORS), facts
    except (OSError, SafetensorError) as error:
        raise QklensError(f"{path / _TENSORS}: damaged ({error}); {again}") from error


def _latest(folder: Path) -> str | None:
    pointer = folder / _POINTER
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
