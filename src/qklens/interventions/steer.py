"""Steering as a value: which direction, how much, where, and on which side of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qklens.data.render import Prompt
from qklens.dictionaries.source import Stream
from qklens.errors import QklensError
from qklens.interventions.direction import Direction
from qklens.models.batch import Batch
from qklens.models.edits import Edit, ScoreEdit, ScoreView, Side, VectorEdit
from qklens.models.scores import rotation, score_maps
from qklens.models.subject import Subject

Head = tuple[int, int]
ALL_TOKENS = "all"


@dataclass(frozen=True, eq=False)
class Steer:
    """One steering intervention.

    With a the direction's activation at a token, d its vector, s the strength and U the unit:

        add    x' = x + s U d          U = 1 (raw), the typical activation (activation_max), ‖x‖/‖d‖ (resid_norm)
        scale  x' = x + (s − 1) a d
        clamp  x' = x + (s U − a) d
        ablate x' = x − a d            (strength is not used)

    Attributes:
        direction: what is steered.
        strength: s.
        mode: see above.
        unit: U.
        side: `residual` edits the stream; `query | key | value` edit only what that projection of the heads reads.
        layers: resid_pre layers; for a side other than residual they may be left to `heads`.
        heads: (layer, head) pairs, or None for all heads of `layers`.
        tokens: span names, or ("all",).
        norm: `recomputed` for causal claims; `frozen` holds the input norm's scale, to check the algebra.
        key_scope: under GQA, `group` edits the key that all heads of a group share; `head` gives the named query heads
            their own copy of it.
    """

    direction: Direction
    strength: float
    mode: Literal["add", "scale", "clamp", "ablate"] = "add"
    unit: Literal["raw", "activation_max", "resid_norm"] = "activation_max"
    side: Side = "residual"
    layers: tuple[int, ...] = ()
    heads: tuple[Head, ...] | None = None
    tokens: tuple[str, ...] = (ALL_TOKENS,)
    norm: Literal["recomputed", "frozen"] = "recomputed"
    key_scope: Literal["group", "head"] = "group"

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise QklensError(f"strength is {self.strength}; expected a finite number")
        if self.side == "residual" and (self.heads is not None or self.norm == "frozen"):
            raise QklensError(
                "side 'residual' edits the stream for all heads with norms recomputed; drop heads and norm"
            )
        if self.heads is not None and self.layers:
            raise QklensError("give either heads or layers, not both: heads name their layers")
        if not self.heads and not self.layers:
            raise QklensError("steering needs layers or heads; both are empty")
        if self.key_scope == "head" and (self.side != "key" or self.heads is None):
            raise QklensError("key_scope 'head' needs side 'key' and a list of heads")
        missing = [layer for layer in self.layer_list if layer not in self.direction.layers]
        if missing:
            raise QklensError(
                f"{self.direction.label!r} has no vector at layer {missing[0]}; it has {list(self.direction.layers)}"
            )

    @property
    def layer_list(self) -> tuple[int, ...]:
        """The layers that are edited, in order."""
        return tuple(sorted({layer for layer, _ in self.heads})) if self.heads is not None else tuple(self.layers)

    @property
    def is_identity(self) -> bool:
        """Whether the strength says to change nothing."""
        return (self.mode == "add" and self.strength == 0.0) or (self.mode == "scale" and self.strength == 1.0)

    def describe(self) -> dict[str, Any]:
        """The spec as echoed into results."""
        return {
            "direction": self.direction.label,
            "strength": self.strength,
            "mode": self.mode,
            "unit": self.unit,
            "side": self.side,
            "layers": list(self.layer_list),
            "heads": None if self.heads is None else [list(head) for head in self.heads],
            "tokens": list(self.tokens),
            "norm": self.norm,
            "key_scope": self.key_scope,
        }

    def edits(self, subject: Subject, prompts: Sequence[Prompt], batch: Batch, index: Sequence[int]) -> list[Edit]:
        """The edits of one pass over these prompts; `index` is not needed, all prompts are steered alike."""
        for layer, head in self.heads or ():
            subject.check_head(layer, head)
        for layer in self.layer_list:
            subject.check_head(layer, 0)
        mask = self._mask(prompts, batch)
        return [self._edit(subject, batch, layer, mask) for layer in self.layer_list]

    def _mask(self, prompts: Sequence[Prompt], batch: Batch) -> Tensor:
        mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            padding = batch.width - len(prompt.tokens)
            names = self.tokens
            positions = (
                range(len(prompt.tokens)) if ALL_TOKENS in names else [p for name in names for p in prompt.span(name)]
            )
            mask[row, [padding + p for p in positions]] = True
        return mask.to(batch.input_ids.device)

    def _edit(self, subject: Subject, batch: Batch, layer: int, mask: Tensor) -> Edit:
        change = self._change(layer)
        heads = None if self.heads is None else tuple(head for where, head in self.heads if where == layer)
        if self.side == "key" and self.key_scope == "head":
            return ScoreEdit(
                layer, lambda view: self._own_key_bias(subject, batch, layer, mask, heads or (), view), mask
            )
        if heads is not None and self.side in ("key", "value"):
            group = subject.n_heads // subject.n_kv_heads
            heads = tuple(sorted({head // group for head in heads}))
        sees = () if self.mode == "add" else self.direction.reads(layer)
        return VectorEdit(layer, self.side, mask, change, heads, self.norm == "frozen", sees)

    def _change(self, layer: int) -> Callable[[Tensor, Stream], Tensor]:
        vector = self.direction.vectors[layer]

        def change(rows: Tensor, stream: Stream) -> Tensor:
            d = vector.to(rows)
            if self.mode == "add":
                return rows + self.strength * self._unit(layer, rows, d) * d
            active = self.direction.read(layer, stream).to(rows)[:, None]
            if self.mode == "scale":
                return rows + (self.strength - 1) * active * d
            if self.mode == "clamp":
                return rows + (self.strength * self._unit(layer, rows, d) - active) * d
            return rows - active * d

        return change

    def _unit(self, layer: int, rows: Tensor, d: Tensor) -> Tensor | float:
        if self.unit == "resid_norm":
            return rows.norm(dim=-1, keepdim=True) / d.norm()
        return self.direction.typical[layer] if self.unit == "activation_max" else 1.0

    def _own_key_bias(
        self, subject: Subject, batch: Batch, layer: int, mask: Tensor, heads: tuple[int, ...], view: ScoreView
    ) -> Tensor:
        """Score change when only the named query heads see the edited key: c ⟨q_p, k'_j − k_j⟩."""
        if self.mode != "add":
            raise QklensError("key_scope 'head' steers with mode 'add'; use key_scope 'group' for the other modes")
        maps = score_maps(subject, layer)
        here = mask[:, view.start :]
        rows = view.residual[here].to(maps.key_side.weight.dtype)
        edited = self._change(layer)(rows, lambda _: rows)
        scales = maps.scales(rows)
        turn = rotation(subject, layer, batch.position_ids[:, view.start :][here])
        bias = torch.zeros((*view.query.shape[:3], view.key.shape[2]), dtype=view.query.dtype, device=view.query.device)
        for head in heads:
            after = maps.whole_key(edited, head, scales if self.norm == "frozen" else None)
            delta = view.residual.new_zeros((*here.shape, subject.d_head))
            delta[here] = turn(after - maps.whole_key(rows, head, scales)).to(delta)
            bias[:, head, :, view.start :] = view.scale * view.query[:, head] @ delta.transpose(1, 2)
        return bias
