"""Who does a feature draw in or push away? All features of a dictionary ranked by virtual interaction, from both ends.

With one side held, the interaction of a head is linear in the other side's unit direction: ⟨d̂, r⟩, r the head's
`virtual_reader`. All heads that read one layer's directions, and the mean over heads, are then one product
`head d_model` × `d_model feature`, made in tiles that stay in cache while their extremes are read off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qklens.analyses.top_lists import ColumnLists
from qklens.dictionaries.unit import UnitDirections
from qklens.errors import QklensError

Block = Sequence[UnitDirections]
"""The same features in every group of heads: one member a group."""

_TILE, _STRETCH = 1 << 12, 1 << 14
"""Features whose interactions with all heads are read while they lie in the cache that cores share, and features
whose interactions fit there. Smaller tiles save fewer misses than their calls, each from a cold start, cost."""
_ON_DEVICE = 1 << 17


@dataclass(frozen=True, eq=False)
class Ranked:
    """One end of every column's ranking, most extreme first; equal values by rising index.

    Attributes:
        index: features, counted over all blocks; −1 past a column's last feature.
        value: virtual interaction, score units for unit vectors; NaN past the last.
    """

    index: Int[Tensor, "column place"]
    value: Float[Tensor, "column place"]


@dataclass(frozen=True, eq=False)
class Partners:
    """Partners of one direction; columns are the heads of all groups in order, then the mean over all heads.

    A feature that does not write a group's layer takes no part in that group's columns, counts as 0 in the mean, and is
    no part of the mean's column only where it writes none of the layers.

    Attributes:
        lowest: from the most negative, which lowers attention most.
        highest: from the most positive.
        count: features that took part.
        mean: over all of them.
        sd: their standard deviation with n − 1; NaN for fewer than two.
    """

    lowest: Ranked
    highest: Ranked
    count: Int[Tensor, " column"]
    mean: Float[Tensor, " column"]
    sd: Float[Tensor, " column"]


def rank_partners(blocks: Iterable[Block], readers: Sequence[Float[Tensor, "_head d_model"]], k: int = 50) -> Partners:
    """The k lowest and k highest interactions of every head and of their mean, over a dictionary in blocks.

    Exact: what a dense product and a sort would give, up to rounding of the product. Memory is bounded by a block and
    2¹⁴ features' interactions (2¹⁷ on a device); blocks of at least 2¹⁴ features are fastest. Computes in the readers'
    dtype, where they lie.

    Args:
        blocks: unit directions, a few thousand features at a time or all at once.
        readers: per group of heads that share directions, their `virtual_reader`s.
        k: how many from each end.

    Raises:
        QklensError: no feature, no reader, k below 1, NaN or infinity in a reader, or groups that do not fit together.
    """
    if k < 1 or not sum(len(group) for group in readers):
        raise QklensError(f"k is {k} with {sum(map(len, readers))} readers; expected at least one of each")
    if not all(group.isfinite().all() for group in readers):
        raise QklensError("a reader holds NaN or infinity; check the direction that is held")
    n_heads, like = sum(map(len, readers)), readers[0]
    tile, stretch = (_TILE, _STRETCH) if like.device.type == "cpu" else (_ON_DEVICE, _ON_DEVICE)
    groups = [_Group(group, n_heads, k, tile, stretch) for group in readers]
    mean = ColumnLists(1, k, stretch, 1, like)
    n_features = 0
    for block in blocks:
        _check_block(block, readers)
        for begin in range(0, len(block[0]), stretch):
            units = [member.part(begin, begin + stretch).to(like) for member in block]
            total = like.new_zeros(len(units[0]))
            for group, own in zip(groups, units, strict=True):
                group.add(own, n_features, total)
            where = torch.stack([own.present for own in units]).any(dim=0).nonzero()[:, 0]
            if len(where):
                mean.tile(0, len(where))[0] = total[where]
                mean.glance(0, len(where))
                mean.collect(where + n_features)
            n_features += len(units[0])
    if not n_features:
        raise QklensError("no feature to rank; expected a dictionary with at least one")
    columns = [*(group.columns for group in groups), mean]
    places = min(k, n_features)
    lowest, highest = zip(*(c.ranked(places) for c in columns), strict=True)
    return Partners(
        lowest=Ranked(*map(torch.cat, zip(*lowest, strict=True))),
        highest=Ranked(*map(torch.cat, zip(*highest, strict=True))),
        count=torch.tensor([c.count for c in columns]).repeat_interleave(torch.tensor([*map(len, readers), 1])),
        mean=torch.cat([c.mean() for c in columns]),
        sd=torch.cat([c.sd() for c in columns]),
    )


class _Group:
    """The heads that share directions: their readers, and a last row that adds the group's part of the mean."""

    def __init__(self, readers: Tensor, n_heads: int, k: int, tile: int, stretch: int) -> None:
        self.columns = ColumnLists(len(readers), k, tile, stretch // tile, readers, len(readers) + 1)
        self._readers = torch.cat([readers, readers.sum(dim=0, keepdim=True) / n_heads])
        self._tile = tile

    def add(self, units: UnitDirections, offset: int, total: Float[Tensor, " stretch"]) -> None:
        """Rank a stretch of features of which the first is `offset`; `total` gains their part of the mean."""
        where = units.present.nonzero()[:, 0]
        if not len(where):
            return
        skips = len(where) < len(units)
        rows = units.rows[where] if skips else units.rows
        for i, part in enumerate(rows.split(self._tile)):
            values = self.columns.tile(i, len(part))
            torch.mm(self._readers, part.T, out=values)
            self.columns.glance(i, len(part))
            begin = i * self._tile
            total[where[begin : begin + len(part)] if skips else slice(begin, begin + len(part))] += values[-1]
        self.columns.collect(where + offset)


def _check_block(block: Block, readers: Sequence[Tensor]) -> None:
    sizes, widths = [len(member) for member in block], [member.rows.shape[1] for member in block]
    if len(block) != len(readers) or len(set(sizes)) != 1 or widths != [group.shape[1] for group in readers]:
        raise QklensError(
            f"a block has {len(block)} groups of {sizes} features in {widths} dimensions; expected equally many "
            f"features in {len(readers)} groups, in {[group.shape[1] for group in readers]} dimensions"
        )
