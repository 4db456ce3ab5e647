"""Exact top lists and moments of many columns at once, from values that come in stretches and are not kept.

A stretch is cut into runs of 64 values. In the first, a column's first k values are at least the k-th largest of the
runs' extremes; later, they beat the k-th value so far. Only runs that reach this are looked into. Of n values in any
order about k ln(n / k) ever beat the k-th so far; they are kept as they come, and sorted once at the end.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
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
        self._extremes = like.new_empty(2, n_columns, n_tiles, tile // RUN)
        self._sum, self._square = (like.new_zeros(n_columns, dtype=torch.float64) for _ in range(2))
        self._n_used = 0
        self.count = 0
        self._lists = TopLists(2 * n_columns, k, like)

    def tile(self, i: int, n: int) -> Float[Tensor, "row n"]:
        """Where the n values of a stretch's i-th tile are written."""
        return self._tiles[i, :, :n]

    def glance(self, i: int, n: int) -> None:
        """Take the moments and the runs' extremes of the i-th tile, which holds n values."""
        full = self._tiles[i, : self._n_columns]
        part, past, runs = full[:, :n], full[:, n:], full.unflatten(1, (-1, RUN))
        past.fill_(torch.inf)
        torch.amin(runs, 2, out=self._extremes[0, :, i]).neg_()
        past.fill_(-torch.inf)
        torch.amax(runs, 2, out=self._extremes[1, :, i])
        past.fill_(torch.nan)  # which no list takes
        self._sum += part.sum(1)
        self._square += torch.linalg.vector_norm(part, dim=1).double().square()
        self.count += n
        self._n_used = i + 1

    def collect(self, index: Int[Tensor, " n"]) -> None:
        """Take the stretch's candidates; `index` says which feature each place is, rising from stretch to stretch."""
        n_runs, n_rows = self._extremes.shape[3], self._tiles.shape[1]
        extremes = self._extremes[:, :, : self._n_used].reshape(2 * self._n_columns, -1)
        least = self._lists.least(extremes)
        row, run = _reaching(extremes, least)
        highest = row >= self._n_columns
        tile, column = run // n_runs, row - highest * self._n_columns
        inside = self._tiles.view(-1, RUN).index_select(0, (tile * (n_rows - 1) + column) * n_runs + run)
        inside *= torch.where(highest, 1, -1).to(inside.dtype)[:, None]  # the lowest are the highest of −value
        hit, place = _reaching(inside, least[row])
        self._lists.add(inside[hit, place], row[hit], index[run[hit] * RUN + place])

    def ranked(self, n_places: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Index and value of the lowest and the highest, most extreme first; −1 and NaN past a column's last."""
        index, value = self._lists.ranked(n_places)
        n = self._n_columns
        return (index[:n], -value[:n]), (index[n:], value[n:])

    def mean(self) -> Float[Tensor, " column"]:
        """Mean over all values; NaN of none."""
        return self._sum / self.count

    def sd(self) -> Float[Tensor, " column"]:
        """Standard deviation with n − 1; NaN of fewer than two. In float32 within 1e-7 (1 + mean²/sd²) of it."""
        if self.count < 2:
            return torch.full_like(self._sum, torch.nan)
        squares = self._square - self._sum.square() / self.count
        return (squares / (self.count - 1)).clamp(min=0).sqrt()


class TopLists:
    """The k largest values so far in every row, among entries that come row by row."""

    def __init__(self, n_rows: int, k: int, like: Tensor) -> None:
        self._n_rows, self._k = n_rows, k
        self._value = [like.new_empty(n_rows, 0)]
        self._index = [torch.empty(n_rows, 0, dtype=torch.long, device=like.device)]
        self._kth: Tensor | None = None
        self._n_late = 0

    def least(self, bounds: Float[Tensor, "row bound"]) -> Float[Tensor, " row"]:
        """What a value to come must reach; at first, the k-th of bounds that a row's coming values attain one each.

        Of equal values those of lower index stay, so later ones must be larger.
        """
        if self._kth is None:
            return _kth(bounds, self._k)
        return self._kth.nextafter(self._kth.new_full((), torch.inf))

    def add(self, value: Float[Tensor, " entry"], row: Int[Tensor, " entry"], index: Int[Tensor, " entry"]) -> None:
        """Take entries, row by row."""
        values, indices = self._table(value, row, index)
        self._value.append(values)
        self._index.append(indices)
        self._n_late += len(value)
        if self._kth is None or self._n_late * 4 > self._n_rows * self._k:
            self._update()

    def _update(self) -> None:
        """Take the k-th values anew, and drop what lies below them once there is much of it.

        Until then values are held against the last ones, which lets a few more in and is no less exact.
        """
        values, indices = torch.cat(self._value, dim=1), torch.cat(self._index, dim=1)
        self._kth, self._n_late = _kth(values, self._k), 0
        if values.shape[1] > 16 * self._k:
            values, indices = self._first(values, indices, self._kth)
        self._value, self._index = [values], [indices]

    def _table(self, value: Tensor, row: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Entries as a table, −∞ and −1 past a row's last."""
        counts = torch.bincount(row, minlength=self._n_rows)
        width = int(counts.max())
        place = row * width + torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        values, indices = value.new_full((self._n_rows, width), -torch.inf), index.new_full((self._n_rows, width), -1)
        values.view(-1)[place], indices.view(-1)[place] = value, index
        return values, indices

    def _first(self, values: Tensor, indices: Tensor, kth: Tensor) -> tuple[Tensor, Tensor]:
        """The first k in order. Entries have come with rising index, and a stable sort leaves equal values so."""
        row, place = _reaching(values, kth)
        values, indices = self._table(values[row, place], row, indices[row, place])
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self._k]
        return values.gather(1, order), indices.gather(1, order)

    def ranked(self, n_places: int) -> tuple[Int[Tensor, "row place"], Float[Tensor, "row place"]]:
        """Index and value, largest first, equal values by rising index; −1 and NaN past a row's last."""
        values, indices = torch.cat(self._value, dim=1), torch.cat(self._index, dim=1)
        values, indices = self._first(values, indices, _kth(values, self._k))
        missing = (0, n_places - values.shape[1])
        indices = torch.nn.functional.pad(indices, missing, value=-1)
        return indices, torch.nn.functional.pad(values, missing).masked_fill(indices < 0, torch.nan)


def _kth(values: Float[Tensor, "row place"], k: int) -> Float[Tensor, " row"]:
    """Each row's k-th largest, −∞ where there are fewer. On a CPU by numpy, which is several times as fast."""
    n = values.shape[1]
    if n < k:
        return values.new_full((len(values),), -torch.inf)
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), n - k, axis=1)[:, n - k].copy())
    return values.topk(k, dim=1).values[:, -1]


def _reaching(
    values: Float[Tensor, "row column"], least: Float[Tensor, " row"]
) -> tuple[Int[Tensor, " hit"], Int[Tensor, " hit"]]:
    """Row and column of the values that are at least so large, row by row."""
    if values.device.type != "cpu":
        row, column = (values >= least[:, None]).nonzero(as_tuple=True)
        return row, column
    hit = np.flatnonzero(values.numpy() >= least[:, None].numpy())  # skips long stretches of nothing
    row = hit // values.shape[1]
    return torch.from_numpy(row), torch.from_numpy(hit - row * values.shape[1])
