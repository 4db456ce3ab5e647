"""What a pass may change, as values: readings of the stream, scores, patterns, head outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

Side = Literal["residual", "query", "key", "value"]


@dataclass(frozen=True, eq=False)
class VectorEdit:
    """Change what is read at some tokens of a layer: the residual stream itself, or only one projection's input.

    Attributes:
        layer: the layer L; the edited vector is resid_pre.L.
        side: `residual` edits the stream; `query | key | value` edit only that projection's reading of it.
        mask: tokens to edit.
        change: rows of resid_pre.L -> edited rows; the second argument gives the same rows of another layer's stream.
        heads: for a projection, which heads (key/value heads for `key` and `value`); None is all.
        frozen_norm: hold the scales of the input norm and of a norm on queries or keys at their unedited values.
        sees: other layers whose stream `change` asks for.
    """

    layer: int
    side: Side
    mask: Bool[Tensor, "batch pos"]
    change: Callable[[Float[Tensor, "row d_model"], Callable[[int], Tensor]], Float[Tensor, "row d_model"]]
    heads: tuple[int, ...] | None = None
    frozen_norm: bool = False
    sees: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ScoreView:
    """What a score edit may look at.

    Attributes:
        query: queries of the columns that run.
        key: keys of all columns.
        rows: (layer) -> that layer's stream at the tokens of the edit's mask.
        scale: the model's own score scale c.
        start: the first column that runs.
    """

    query: Float[Tensor, "batch head q_pos d_head"]
    key: Float[Tensor, "batch kv_head k_pos d_head"]
    rows: Callable[[int], Tensor]
    scale: float
    start: int


@dataclass(frozen=True, eq=False)
class ScoreEdit:
    """Add to a layer's scores, after scaling, before the soft cap and the softmax.

    Attributes:
        layer: the layer.
        bias: what to add, `batch head q_pos k_pos`, over the columns that run.
        mask: tokens whose stream `bias` reads, if any; they must be among the columns that run.
        sees: other layers whose stream `bias` asks for.
        keys_of: heads that `bias` gives keys of their own, at the tokens of `mask`.
    """

    layer: int
    bias: Callable[[ScoreView], Tensor]
    mask: Bool[Tensor, "batch pos"] | None = None
    sees: tuple[int, ...] = ()
    keys_of: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class PatternEdit:
    """Replace a layer's pattern: `batch head q_pos k_pos` -> the same shape; the second argument is `start`.

    `first` is the first column whose row it replaces, where that is not the last one alone.
    """

    layer: int
    replace: Callable[[Tensor, int], Tensor]
    first: int | None = None


@dataclass(frozen=True, eq=False)
class OutputEdit:
    """Replace the heads' outputs before W_O: `batch q_pos head d_head` -> the same shape; then `start`."""

    layer: int
    replace: Callable[[Tensor, int], Tensor]


Edit = VectorEdit | ScoreEdit | PatternEdit | OutputEdit
