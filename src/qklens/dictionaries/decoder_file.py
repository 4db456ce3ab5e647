"""The decoder of a saved dictionary, read from disk a block at a time: memory does not grow with the dictionary.

A safetensors file is an 8-byte length, a JSON header with every tensor's type, shape and place, and the tensors.
safetensors' own reader maps the file, and what is read of a mapping counts as the process's memory; so blocks are read
into two buffers in turn, the next one while the last one is used.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.dictionaries.config import WEIGHTS_FILE, DictionaryConfig, n_written, read_config
from qklens.dictionaries.unit import UnitDirections, unit_directions
from qklens.errors import QklensError

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_LONGEST_HEADER = 100 << 20
_AT_ONCE = 1 << 10
"""Rows that are converted while they still lie in cache."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a matrix lies in its file.

    Attributes:
        name: its name there.
        dtype: how its numbers are stored.
        shape: rows and columns.
        offset: bytes from the beginning of the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, int]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[1] * self.dtype.itemsize


@dataclass(frozen=True)
class DecoderFile:
    """A dictionary's decoder on disk; made by `open_decoder`.

    Attributes:
        path: the file of weights.
        config: the dictionary's configuration.
        decoder: per written layer, its rows: features in the order of their labels, as far as they write the layer.
    """

    path: Path
    config: DictionaryConfig
    decoder: dict[int, StoredTensor]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers it writes."""
        return self.config.layers

    @property
    def n_features(self) -> int:
        """Features of all reading layers together."""
        return len(self.layers) * self.config.features_per_layer

    def label(self, feature: int) -> str:
        """`L<reading layer>/<index>`, as `Crosscoder.labels` has it."""
        reader, index = divmod(self._checked(feature), self.config.features_per_layer)
        return f"L{self.layers[reader]}/{index}"

    def find(self, label: str) -> int:
        """The index of a label.

        Raises:
            QklensError: no such feature; names the range.
        """
        match = re.fullmatch(r"L(\d{1,9})/(\d{1,12})", label)
        reader, index = (int(match[1]), int(match[2])) if match else (-1, -1)
        if reader not in self.layers or index >= self.config.features_per_layer:
            raise QklensError(
                f"feature {label!r} is not in dictionary {self.config.name!r}; expected a label from {self.label(0)!r} "
                f"to {self.label(self.n_features - 1)!r}"
            )
        return self.layers.index(reader) * self.config.features_per_layer + index

    def direction(self, feature: int) -> dict[int, Float[Tensor, " d_model"]]:
        """One feature's direction at every layer that it writes.

        Raises:
            QklensError: no such feature, or a damaged file.
        """
        self._checked(feature)
        found = {}
        with _opened(self.path) as file:
            for layer, stored in self.decoder.items():
                if feature < stored.shape[0]:
                    row = torch.empty(1, stored.shape[1])
                    _Rows(self.path, file, stored, 1).read(feature, row)
                    unit_directions(row, f"{self.path}: tensor {stored.name!r}", feature)  # finite, or an error
                    found[layer] = row[0]
        return found

    def blocks(
        self, layers: Sequence[int], size: int = 1 << 14, *, centred: bool = False
    ) -> Iterator[tuple[UnitDirections, ...]]:
        """All features' unit directions at some layers, `size` features at a time, in float32.

        `centred`: for an input norm that centres; see `unit_directions`.

        A block is overwritten when the one after it is asked for. A thread reads ahead while a block is used.

        Raises:
            QklensError: a layer that is not written, a damaged file, NaN or infinity in a row.
        """
        for layer in layers:
            if layer not in self.decoder:
                raise QklensError(f"{self.path}: does not write layer {layer}; it writes layers {list(self.layers)}")
        return self._blocks([self.decoder[layer] for layer in layers], size, centred)

    def _blocks(self, stored: list[StoredTensor], size: int, centred: bool) -> Iterator[tuple[UnitDirections, ...]]:
        size = min(size, self.n_features)
        buffers = [[torch.zeros(size, matrix.shape[1]) for matrix in stored] for _ in range(2)]
        with _opened(self.path) as file, ThreadPoolExecutor(1) as ahead:
            readers = [_Rows(self.path, file, matrix, size) for matrix in stored]

            def load(begin: int) -> tuple[UnitDirections, ...]:
                end = min(begin + size, self.n_features)
                turn = buffers[begin // size % 2]
                pairs = zip(readers, turn, strict=True)
                return tuple(reader.units(begin, rows[: end - begin], centred) for reader, rows in pairs)

            coming = ahead.submit(load, 0)
            for begin in range(size, self.n_features + size, size):
                block = coming.result()
                if begin < self.n_features:
                    coming = ahead.submit(load, begin)
                yield block

    def _checked(self, feature: int) -> int:
        if not 0 <= feature < self.n_features:
            raise QklensError(f"{self.path}: no feature {feature}; expected 0 to {self.n_features - 1}")
        return feature


def open_decoder(folder: Path) -> DecoderFile:
    """Find the decoder of a dictionary directory; reads its configuration and the header of its weights alone.

    Raises:
        QklensError: a missing or damaged file, an unknown config key, a missing tensor, a wrong type or shape.
    """
    config, path = read_config(folder), folder / WEIGHTS_FILE
    header, begin, end = _header(path)
    decoder = {}
    for layer in config.layers:
        name, shape = f"decoder.{layer}", (n_written(config, layer), config.d_model)
        if name not in header:
            raise QklensError(f"{path}: tensor {name!r} is missing")
        entry = header[name]
        try:
            kind, found, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            place = range(first, last)
        except (TypeError, KeyError, ValueError) as error:
            raise _damaged(path, f"the entry of tensor {name!r} is not one of safetensors") from error
        if kind not in list(_DTYPES):
            raise QklensError(f"{path}: tensor {name!r} is stored as {kind!r}, expected one of {sorted(_DTYPES)}")
        if found != shape:
            raise QklensError(f"{path}: tensor {name!r} has shape {found}, expected {shape}")
        if place.start < 0 or begin + place.stop > end or len(place) != prod(shape) * _DTYPES[kind].itemsize:
            raise _damaged(path, f"tensor {name!r} lies at bytes {[first, last]}, which do not hold it")
        decoder[layer] = StoredTensor(name, _DTYPES[kind], shape, begin + first)
    return DecoderFile(path, config, decoder)


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header of a safetensors file, where its tensors begin, and where the file ends."""
    with _opened(path) as file:
        end = os.fstat(file).st_size
        length = int.from_bytes(os.pread(file, 8, 0), "little")
        if end < 8 or length > min(_LONGEST_HEADER, end - 8):
            raise _damaged(path, f"{end} bytes do not hold a header of {length}")
        try:
            header = json.loads(os.pread(file, length, 8))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header, 8 + length, end


def _damaged(path: Path, why: str) -> QklensError:
    return QklensError(f"{path}: damaged ({why}); copy it again")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise QklensError(f"{path}: cannot read ({error.strerror}); check the path") from error
    try:
        yield file
    finally:
        os.close(file)


class _Rows:
    """Reads rows of one stored matrix into float32, through a buffer of its own where they are stored otherwise."""

    def __init__(self, path: Path, file: int, stored: StoredTensor, most: int) -> None:
        self._path, self._file, self._stored = path, file, stored
        same = stored.dtype == torch.float32
        self._raw = None if same else torch.empty(min(most, _AT_ONCE), stored.shape[1], dtype=stored.dtype)

    def read(self, first: int, rows: Float[Tensor, "row d_model"]) -> None:
        """Fill `rows` with the matrix's rows from `first` on."""
        if self._raw is None:
            self._fill(first, rows)
            return
        for part in rows.split(_AT_ONCE):
            raw = self._raw[: len(part)]
            self._fill(first, raw)
            part.copy_(raw)
            first += len(part)

    def _fill(self, first: int, rows: Tensor) -> None:
        waiting = rows.view(torch.uint8).numpy().reshape(-1).data
        offset = self._stored.offset + first * self._stored.row_bytes
        while waiting:
            try:
                done = os.preadv(self._file, [waiting], offset)
            except OSError as error:
                raise QklensError(f"{self._path}: cannot read ({error.strerror}); check the disk") from error
            if not done:
                raise _damaged(self._path, f"it ends inside tensor {self._stored.name!r}")
            waiting, offset = waiting[done:], offset + done

    def units(self, begin: int, rows: Float[Tensor, "row d_model"], centred: bool) -> UnitDirections:
        """Unit directions of the features from `begin` on, written into `rows`; zero past the last that writes."""
        n = min(len(rows), max(0, self._stored.shape[0] - begin))
        self.read(begin, rows[:n])
        rows[n:] = 0
        name = f"{self._path}: tensor {self._stored.name!r}"
        return unit_directions(rows, name, begin, in_place=True, centred=centred)
