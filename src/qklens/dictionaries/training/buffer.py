"""Rows in random order: a pool of rows, drawn from without repetition and filled up when half of it is gone.

Chunks come in an order drawn anew for each epoch. The pool, what is left to draw, and the generator are the state; with
it the rows that follow are the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.dictionaries.training.rows import RowSource, finite_chunk
from qklens.errors import QklensError


class ShuffleBuffer:
    """Draws batches from a `RowSource`.

    Attributes:
        epoch: how often the source was begun.
    """

    def __init__(self, source: RowSource, capacity: int, seed: int) -> None:
        self.source, self.capacity = source, capacity
        self._generator = torch.Generator().manual_seed(seed)
        self._pool: Tensor | None = None
        self._order = torch.empty(0, dtype=torch.long)
        self._drawn = 0
        self._filled = 0
        self._chunks = torch.empty(0, dtype=torch.long)
        self._next = 0
        self.epoch = 0

    def waiting(self) -> Float[Tensor, "row column"]:
        """The rows that wait to be drawn, in the order in which they will be."""
        self._fill(1)
        assert self._pool is not None
        return self._pool[self._order[self._drawn :]]

    def take(self, n: int) -> Float[Tensor, "row column"]:
        """The next n rows.

        Raises:
            QklensError: a chunk that holds NaN or infinity, or that cannot be read.
        """
        self._fill(n)
        assert self._pool is not None
        rows = self._pool[self._order[self._drawn : self._drawn + n]]
        self._drawn += n
        return rows

    def _fill(self, n: int) -> None:
        left = len(self._order) - self._drawn
        if left >= n and left > self._filled // 2:
            return
        parts = [] if self._pool is None else [self._pool[self._order[self._drawn :]]]
        self._pool = None  # its room is free before the next one is made
        have, began = left, self.epoch
        while have < max(self.capacity, n):
            # A source smaller than the pool is added to it once, unless a batch needs more.
            if self._next == len(self._chunks):
                if self.epoch > began and have >= n:
                    break
                self._chunks = torch.randperm(self.source.n_chunks, generator=self._generator)
                self._next = 0
                self.epoch += 1
            part = finite_chunk(self.source, int(self._chunks[self._next]))
            self._next += 1
            parts.append(part)
            have += len(part)
        self._pool = torch.cat(parts)
        self._order = torch.randperm(have, generator=self._generator)
        self._drawn, self._filled = 0, have

    @property
    def _place(self) -> tuple[int, int, int]:
        return self._next, self.epoch, self._filled

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        pool = torch.empty(0, self.source.width) if self._pool is None else self._pool[self._order[self._drawn :]]
        return {
            "pool": pool.contiguous(),
            "chunks": self._chunks,
            "generator": self._generator.get_state(),
            "place": torch.tensor(self._place),
        }

    def restore(self, state: dict[str, Tensor], where: str = "checkpoint") -> None:
        """Go on from a state. The pool is held in the order in which it will be drawn.

        Raises:
            QklensError: a state of another source, or one that lacks a part.
        """
        kinds = {"pool": 2, "chunks": 1, "generator": 1, "place": 1}
        fits = kinds == {name: tensor.ndim for name, tensor in state.items()}
        fits = fits and state["pool"].shape[1] == self.source.width and len(state["place"]) == len(self._place)
        fits = fits and state["generator"].shape == self._generator.get_state().shape
        if not fits:
            raise QklensError(
                f"{where}: the buffer's tensors do not fit rows of {self.source.width} columns; remove {where} to "
                "begin anew"
            )
        self._pool = state["pool"]
        self._order = torch.arange(len(self._pool))
        self._drawn = 0
        self._chunks = state["chunks"]
        self._generator.set_state(state["generator"])
        self._next, self.epoch, self._filled = (int(number) for number in state["place"])
