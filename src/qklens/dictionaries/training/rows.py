"""Where rows come from: chunks by number, the same rows for the same number whenever it is asked for."""

from __future__ import annotations

import hashlib
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.errors import QklensError


@runtime_checkable
class RowSource(Protocol):
    """Rows of activations in chunks."""

    @property
    def n_chunks(self) -> int:
        """How many chunks an epoch has."""
        ...

    @property
    def width(self) -> int:
        """Columns of a row: streams side by side."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when any row changes."""
        ...

    def name(self, index: int) -> str:
        """What an error calls a chunk."""
        ...

    def chunk(self, index: int) -> Float[Tensor, "row column"]:
        """The rows of a chunk, in any dtype."""
        ...


class HeldRows:
    """Rows held in memory, as one chunk or several.

    Raises:
        QklensError: rows of different layers differ in number or width.
    """

    def __init__(self, streams: list[Float[Tensor, "row d_model"]], chunk_rows: int | None = None) -> None:
        shapes = [tuple(stream.shape) for stream in streams]
        if not streams or len(set(shapes)) != 1 or not shapes[0][0]:
            raise QklensError(f"activations have shapes {shapes}; expected at least one row, and the same in each")
        self._rows = torch.cat(streams, dim=1)
        self._size = chunk_rows or len(self._rows)

    @property
    def n_chunks(self) -> int:
        """How many chunks an epoch has."""
        return -(-len(self._rows) // self._size)

    @property
    def width(self) -> int:
        """Columns of a row."""
        return self._rows.shape[1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the numbers."""
        return hashlib.sha256(self._rows.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()

    def name(self, index: int) -> str:
        """Its range of rows."""
        return f"rows {index * self._size} to {min((index + 1) * self._size, len(self._rows)) - 1}"

    def chunk(self, index: int) -> Float[Tensor, "row column"]:
        """The rows of a chunk."""
        return self._rows[index * self._size : (index + 1) * self._size]


def finite_chunk(source: RowSource, index: int) -> Float[Tensor, "row column"]:
    """A chunk whose numbers are all finite.

    Raises:
        QklensError: NaN or infinity, with the chunk and the row.
    """
    rows = source.chunk(index)
    finite = rows.isfinite().all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0, 0])
        raise QklensError(
            f"{source.name(index)}: row {row} holds NaN or infinity; expected finite activations: a wider --dtype, or "
            "another model"
        )
    return rows
