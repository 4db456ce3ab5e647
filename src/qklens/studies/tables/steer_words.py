"""Where a row of a steering table steers, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qklens.studies.head_names import head_name

if TYPE_CHECKING:
    from qklens.studies.tables.steer_rows import SteerRow


def place_words(side: str, layers: Sequence[int], heads: Sequence[tuple[int, int]] | None) -> str:
    """`query side of L2H4, L2H6`; `key side of all heads, layers 0, 1`; `residual stream, layer 2`."""
    if heads is not None:
        return f"{side} side of {', '.join(map(head_name, heads))}"
    where = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
    return f"residual stream, {where}" if side == "residual" else f"{side} side of all heads, {where}"


def curve_words(row: SteerRow) -> str:
    """The place and the condition."""
    return f"{place_words(row.side, row.layers, row.heads)}; {row.condition}"
