"""Activations on disk: safetensors shards beside a manifest.

    manifest.json       written first: model, corpus, layers, dtype, width, number of shards
    shard-00000.safetensors, shard-00000.json    rows, and the mark that they are whole: rows, bytes, SHA-256
    DONE                written last

A shard is written to a temporary file, synced and renamed, and its mark after it; one without a mark is written again.
So a run that was stopped goes on at the next shard, and several processes may write different ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qklens.dictionaries.training.parallel import Ranks
from qklens.dictionaries.training.records import read_record
from qklens.errors import QklensError
from qklens.files import atomic_write, foreign_entry, remove_left_over, write_json
from qklens.strict import Strict

_FORMAT = "qklens-activations-1"
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Manifest(Strict):
    """What a folder of shards holds.

    Attributes:
        models: SHA-256 of the weights of each model that was read, in the order of a row's streams.
        corpus: SHA-256 of the tokens.
        layers: whose resid_pre was read.
        dtype: of the numbers.
        width: columns of a row.
        shards: how many.
    """

    format: Literal["qklens-activations-1"] = _FORMAT
    models: tuple[str, ...]
    corpus: str
    layers: tuple[int, ...]
    dtype: str
    width: PositiveInt
    shards: PositiveInt


class Mark(Strict):
    """That a shard is whole."""

    rows: int
    bytes: int
    sha256: str


class ShardStore:
    """A folder of shards that is whole; a `RowSource`."""

    def __init__(self, folder: Path) -> None:
        """Open it.

        Raises:
            QklensError: no manifest, or a shard without a mark.
        """
        self.folder = folder
        self.manifest = read_record(Manifest, folder / _MANIFEST, _OTHER)
        if not (folder / _DONE).is_file():
            raise QklensError(f"{folder}: activations are not complete; run the same command again to go on")
        again = "remove it, and run the same command again"
        self.marks = [read_record(Mark, _mark(folder, i), again) for i in range(self.manifest.shards)]
        self._checked: set[int] = set()

    @property
    def n_chunks(self) -> int:
        """Shards."""
        return self.manifest.shards

    @property
    def width(self) -> int:
        """Columns of a row."""
        return self.manifest.width

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the manifest and the shards' hashes."""
        parts = [self.manifest.model_dump_json(), *(mark.sha256 for mark in self.marks)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def n_rows(self) -> int:
        """Rows of all shards."""
        return sum(mark.rows for mark in self.marks)

    def name(self, index: int) -> str:
        """Its file."""
        return str(_shard(self.folder, index))

    def chunk(self, index: int) -> Float[Tensor, "row column"]:
        """A shard's rows; its hash is compared when it is first read.

        Raises:
            QklensError: a shard that is missing, truncated or altered, with both sides.
        """
        path, mark = _shard(self.folder, index), self.marks[index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise QklensError(f"{path}: cannot read ({error.strerror}); {_AGAIN}") from error
        if len(data) != mark.bytes:
            raise QklensError(f"{path}: is {len(data)} bytes, its mark says {mark.bytes}; it is truncated: {_AGAIN}")
        if index not in self._checked:
            found = hashlib.sha256(data).hexdigest()
            if found != mark.sha256:
                raise QklensError(
                    f"{path}: its SHA-256 is {found[:12]}..., its mark says {mark.sha256[:12]}...; it was altered: "
                    f"{_AGAIN}"
                )
            self._checked.add(index)
        try:
            rows = load(data)["rows"]
        except (SafetensorError, KeyError) as error:
            raise QklensError(f"{path}: not a shard ({error}); {_AGAIN}") from error
        expected = (mark.rows, self.width), _DTYPES.get(self.manifest.dtype)
        if (tuple(rows.shape), rows.dtype) != expected:
            raise QklensError(
                f"{path}: holds {tuple(rows.shape)} {rows.dtype}, mark and manifest say {expected[0]} {expected[1]}; "
                f"{_AGAIN}"
            )
        return rows


_AGAIN = "remove it and its .json, and run the same command again"
_OTHER = "remove the folder, or choose another"
_MANIFEST, _DONE = "manifest.json", "DONE"


def write_shards(
    folder: Path,
    manifest: Manifest,
    rows: Callable[[int], Tensor],
    ranks: Ranks,
    tick: Callable[[], None] = lambda: None,
) -> ShardStore:
    """Write the shards that are not there yet, and open the store.

    Args:
        folder: made if missing.
        manifest: what the shards are of; a folder of others is refused.
        rows: gives a shard's rows by its number.
        ranks: the processes; each writes every world-th shard.
        tick: called after each shard.

    Raises:
        QklensError: the folder holds other activations (names both sides) or no activations at all, a row that is not
            finite, or a full disk; shards that are whole stay.
    """
    path = folder / _MANIFEST
    begun = path.is_file()
    if begun:
        differs(read_record(Manifest, path, _OTHER), manifest, f"--cache {folder}")
    elif (other := foreign_entry(folder, _MANIFEST)) is not None:
        raise QklensError(
            f"--cache {folder}: holds {other.name!r} and no {_MANIFEST}; expected a new or empty folder, or one that "
            "an earlier --cache filled; choose another"
        )
    ranks.wait()
    if ranks.first:
        if not begun:
            write_json(path, manifest.model_dump(mode="json"))
        written = [part.name for i in range(manifest.shards) for part in (_shard(folder, i), _mark(folder, i))]
        remove_left_over(folder, [_MANIFEST, _DONE, *written])
    ranks.wait()
    for index in range(ranks.rank, manifest.shards, ranks.world):
        # A mark whose shard was removed, or cut short, says that the shard is to be written again.
        mark, shard = _mark(folder, index), _shard(folder, index)
        if not (mark.is_file() and shard.is_file()):
            mark.unlink(missing_ok=True)
            _write_shard(folder, index, rows(index))
        tick()
    ranks.wait()
    if ranks.first:
        atomic_write(folder / _DONE, "")
    ranks.wait()
    return ShardStore(folder)


def differs(there: Strict, here: Strict, where: str) -> None:
    """Refuse a folder that holds something else.

    Raises:
        QklensError: the first key that differs, with both values.
    """
    before, now = there.model_dump(mode="json"), here.model_dump(mode="json")
    refuse_difference(before, now, where)


def refuse_difference(before: dict[str, object], now: dict[str, object], where: str, above: str = "") -> None:
    """Refuse the first key whose value is another, also within nested mappings.

    Raises:
        QklensError: names the key and both values.
    """
    for key in [*before, *(key for key in now if key not in before)]:
        there, here = before.get(key), now.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            refuse_difference(there, here, where, f"{above}{key}.")
        elif there != here:
            shown = [json.dumps(value) for value in (there, here)]
            raise QklensError(
                f"{where}: was begun with {above}{key} {shown[0]}, this command has {shown[1]}; go on with the first, "
                "or choose another folder"
            )


def _write_shard(folder: Path, index: int, rows: Tensor) -> None:
    finite = rows.isfinite().all(dim=1)
    if not finite.all():
        raise QklensError(
            f"{_shard(folder, index)}: not written: row {int((~finite).nonzero()[0, 0])} holds NaN or infinity; "
            "expected finite activations: a wider --dtype, or another model"
        )
    data = save({"rows": rows.contiguous()})
    atomic_write(_shard(folder, index), data)
    mark = Mark(rows=len(rows), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_json(_mark(folder, index), mark.model_dump(mode="json"))


def _shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def _mark(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.json"
