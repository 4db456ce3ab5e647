"""Exact top lists and moments of many columns at once, from values that come in stretches and are not kept.

A stretch is cut into runs of 64 values. In the first, a column's first k values lie in the k runs with the largest
extremes, or in a run that equals the last of these; later, in a run that beats the k-th value so far. Only such runs
are looked into. Of n values in any order about k ln(n / k) ever beat the k-th so far.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RUN = 64


class ColumnLists:
    """Both ends' top lists, count, mean and standard deviation of each column.

    Values are written into `tile(i, n)`, glanced at while they still lie in cache, and collected a stretch at a time.
    Each tile is one piece of memory: as columns of a wide matrix its rows would compete for the same cache sets.

    Args:
        n_columns: columns to rank.
        k: how many from each end.
        tile: values of a tile, a multiple of 64; all tiles of a stretch but the last are full.
        n_tiles: tiles of the longest stretch.
        like: a tensor of the dtype and device.
        n_rows: rows of a tile, if it has more than are ranked.
    """

    def __init__(self, n_columns: int, k: int, tile: int, n_tiles: int, like: Tensor, n_rows: int = 0) -> None:
        self._n_columns = n_columns
        self._tiles = like.new_empty(n_tiles, n_rows or n_columns, tile)
        self._low, self._high = (like.new_empty(n_columns, n_tiles, tile // RUN) for _ in range(2))
        self._sum, self._square = (like.new_zeros(n_columns, dtype=torch.float64) for _ in range(2))
        self._n_used = 0
        self.count = 0
        self.lowest, self.highest = TopList(n_columns, k, -1, like), TopList(n_columns, k, 1, like)

    def tile(self, i: int, n: int) -> Float[Tensor, "row n"]:
        """Where the n values of a stretch's i-th tile are written."""
        return self._tiles[i, :, :n]

    def glance(self, i: int, n: int) -> None:
        """Take the moments and the runs' extremes of the i-th tile, which holds n values."""
        part, whole = self._tiles[i, : self._n_columns, :n], n // RUN
        if n < self._tiles.shape[2]:  # NaN and the far ends are what no list takes
            self._tiles[i, :, n:] = torch.nan
            self._low[:, i, whole:], self._high[:, i, whole:] = torch.inf, -torch.inf
        if whole:
            runs = part[:, : whole * RUN].unflatten(1, (whole, RUN))
            torch.amin(runs, 2, out=self._low[:, i, :whole])
            torch.amax(runs, 2, out=self._high[:, i, :whole])
        if whole * RUN < n:
            rest = part[:, whole * RUN :]
            self._low[:, i, whole], self._high[:, i, whole] = rest.amin(1), rest.amax(1)
        self._sum += part.sum(1)
        self._square += torch.linalg.vector_norm(part, dim=1).double().square()
        self.count += n
        self._n_used = i + 1

    def collect(self, index: Int[Tensor, " n"]) -> None:
        """Take the stretch's candidates; `index` says which feature each place is, rising from stretch to stretch."""
        tiles = self._tiles[: self._n_used]
        self.lowest.add(tiles, self._low[:, : self._n_used], index)
        self.highest.add(tiles, self._high[:, : self._n_used], index)

    def mean(self) -> Float[Tensor, " column"]:
        """Mean over all values; NaN of none."""
        return self._sum / self.count

    def sd(self) -> Float[Tensor, " column"]:
        """Standard deviation with n − 1; NaN of fewer than two. In float32 within 1e-7 (1 + mean²/sd²) of it."""
        if self.count < 2:
            return torch.full_like(self._sum, torch.nan)
        squares = self._square - self._sum.square() / self.count
        return (squares / (self.count - 1)).clamp(min=0).sqrt()


class TopList:
    """The k largest of sign × value so far in every column."""

    def __init__(self, n_columns: int, k: int, sign: int, like: Tensor) -> None:
        self._k, self._sign = k, sign
        self._value = like.new_empty(n_columns, 0)
        self._index = torch.empty(n_columns, 0, dtype=torch.long, device=like.device)

    def add(
        self,
        tiles: Float[Tensor, "tile row place"],
        extremes: Float[Tensor, "column tile run"],
        index: Int[Tensor, " n"],
    ) -> None:
        """Take what belongs to the first k; of equal values those of lower index stay, so later ones must be larger."""
        n_columns, _, n_runs = extremes.shape
        best = extremes.reshape(n_columns, -1) * self._sign
        if self._value.shape[1] == self._k:
            least = self._value[:, -1].nextafter(best.new_full((), torch.inf))
        elif best.shape[1] >= self._k:
            least = best.topk(self._k, sorted=False).values.amin(1)
        else:
            least = best.new_full((n_columns,), -torch.inf)
        hit = _where(best >= least[:, None])
        column, run = hit // best.shape[1], hit % best.shape[1]
        memory = (run // n_runs * tiles.shape[1] + column) * n_runs + run % n_runs
        inside = tiles.view(-1, RUN).index_select(0, memory)
        inside = inside if self._sign > 0 else inside.neg_()
        found = _where(inside >= least[column][:, None])
        row = found // RUN
        self._merge(inside.view(-1)[found], column[row], index[run[row] * RUN + found % RUN])

    def _merge(self, value: Tensor, column: Int[Tensor, " entry"], index: Tensor) -> None:
        """Entries come column by column with rising index, and a stable sort leaves equal values in that order."""
        n_columns, old = self._value.shape
        counts = torch.bincount(column, minlength=n_columns)
        place = old + torch.arange(len(column), device=column.device) - (counts.cumsum(0) - counts)[column]
        new = int(counts.max())
        values = torch.cat([self._value, self._value.new_full((n_columns, new), -torch.inf)], dim=1)
        indices = torch.cat([self._index, self._index.new_full((n_columns, new), -1)], dim=1)
        values[column, place], indices[column, place] = value, index
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self._k]
        self._value, self._index = values.gather(1, order), indices.gather(1, order)

    def ranked(self, n_places: int) -> tuple[Int[Tensor, "column place"], Float[Tensor, "column place"]]:
        """Index and value, most extreme first, equal values by rising index; −1 and NaN past a column's last."""
        missing = (0, n_places - self._value.shape[1])
        index = torch.nn.functional.pad(self._index, missing, value=-1)
        value = torch.nn.functional.pad(self._value * self._sign, missing, value=torch.nan)
        return index, value.masked_fill(index < 0, torch.nan)


def _where(mask: Bool[Tensor, "row column"]) -> Int[Tensor, " hit"]:
    """Flat places of what is true. On a CPU by numpy, which skips long stretches of nothing."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero()[:, 0]


def _places(column: Int[Tensor, " entry"], n_columns: int) -> Int[Tensor, " entry"]:
    """Each entry's place within its column; entries lie column by column."""
    counts = torch.bincount(column, minlength=n_columns)
    return torch.arange(len(column), device=column.device) - (counts.cumsum(0) - counts)[column]
