"""Checkpoints: each a new directory, and a pointer that moves to it at once when it is whole.

    checkpoints/step-00000500/state.safetensors    weights, moments, buffer, generator
    checkpoints/step-00000500/state.json           the few numbers beside them, and the SHA-256 of both
    checkpoints/LATEST                             the name of the directory to go on from

A crash at any moment leaves the pointer on a whole directory. Older directories go after the pointer has moved, or when
the run is taken up again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qklens.dictionaries.training.records import read_record
from qklens.errors import QklensError
from qklens.files import atomic_write, remove_left_over, sha256_files
from qklens.strict import Strict

_TENSORS, _FACTS, _POINTER = "state.safetensors", "state.json", "LATEST"
_WRITING = ".writing-"
_NAME = re.compile(r"step-\d{8,18}")


class Facts(Strict):
    """The few numbers beside a checkpoint's tensors.

    Attributes:
        step: updates done.
        threshold: running mean of batch_topk's cut.
        metrics: lines of `metrics.jsonl` so far.
    """

    step: Annotated[int, Field(ge=0)]
    threshold: Annotated[float, Field(allow_inf_nan=False)]
    metrics: tuple[str, ...]


class _Written(Strict):
    facts: Facts
    sha256: str


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], facts: Facts) -> None:
    """Write a checkpoint, move the pointer to it, remove the others.

    Raises:
        QklensError: the disk is full; the pointer stays on the checkpoint before.
    """
    temporary = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=folder, prefix=_WRITING)
        path = Path(temporary) / _TENSORS
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        written = _Written(facts=facts, sha256=_hash(path, facts))
        (Path(temporary) / _FACTS).write_text(written.model_dump_json(), encoding="utf-8")
        for part in (path, Path(temporary) / _FACTS, Path(temporary)):
            _sync(part)
        final = folder / f"step-{facts.step:08d}"
        shutil.rmtree(final, ignore_errors=True)  # left by a run that was stopped before it moved the pointer
        Path(temporary).rename(final)
        _sync(folder)
        atomic_write(folder / _POINTER, final.name)
    except (OSError, SafetensorError, QklensError) as error:
        at = _pointed(folder)
        kept = f"; {at} is whole: free space, and the same command goes on from it" if at else "; free space"
        raise QklensError(f"{folder}: cannot write the checkpoint of step {facts.step} ({error}){kept}") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    prune_checkpoints(folder)


def prune_checkpoints(folder: Path) -> None:
    """Remove what a killed run left: other checkpoints than the one that the pointer names, and unfinished files."""
    if not folder.is_dir():
        return
    kept = _pointed(folder)
    for other in folder.iterdir():
        older = kept is not None and other.name != kept and _NAME.fullmatch(other.name)
        if other.is_dir() and (older or other.name.startswith(_WRITING)):
            shutil.rmtree(other, ignore_errors=True)
    remove_left_over(folder, [_POINTER])


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], Facts] | None:
    """The tensors and numbers of the checkpoint that the pointer names; None where there is none yet.

    Raises:
        QklensError: a pointer that names no checkpoint, or a checkpoint that is missing, truncated or altered.
    """
    again = f"remove {folder} to begin anew"
    try:
        name = _pointed(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise QklensError(f"{folder / _POINTER}: cannot be read ({error}); {again}") from error
    if name is None:
        return None
    path = folder / name
    if not (_NAME.fullmatch(name) and path.is_dir()):
        there = sorted(p.name for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())
        named = f"write one of {there} there, or " if there else ""
        raise QklensError(f"{folder / _POINTER}: names {name[:40]!r}, no checkpoint beside it; {named}{again}")
    written = read_record(_Written, path / _FACTS, again)
    try:
        found = _hash(path / _TENSORS, written.facts)
        if found != written.sha256:
            raise QklensError(
                f"{path / _TENSORS}: its SHA-256, with the numbers of {_FACTS}, is {found[:12]}..., {_FACTS} says "
                f"{written.sha256[:12]}...; one of them was altered: {again}"
            )
        return load_file(path / _TENSORS), written.facts
    except (OSError, SafetensorError) as error:
        raise QklensError(f"{path / _TENSORS}: damaged ({error}); {again}") from error


def _hash(tensors: Path, facts: Facts) -> str:
    parts = (facts.model_dump_json(), sha256_files([tensors]))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _pointed(folder: Path) -> str | None:
    """What the pointer says, whatever that is; None where there is no pointer."""
    pointer = folder / _POINTER
    return pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
