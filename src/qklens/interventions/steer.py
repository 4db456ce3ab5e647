"""Steering as a value: which direction, how much, where, and on which side of attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qklens.data.render import Prompt
from qklens.dictionaries.source import Stream
from qklens.errors import QklensError, nearest
from qklens.interventions.direction import Direction
from qklens.interventions.own_keys import own_key_edit
from qklens.models.batch import Batch
from qklens.models.edits import Edit, Side, VectorEdit
from qklens.models.subject import Subject

Head = tuple[int, int]
Mode = Literal["add", "scale", "clamp", "ablate"]
Unit = Literal["raw", "activation_max", "resid_norm"]
Norm = Literal["recomputed", "frozen"]
KeyScope = Literal["group", "head"]
ALL_TOKENS = "all"
_CHOICES = {"mode": Mode, "unit": Unit, "side": Side, "norm": Norm, "key_scope": KeyScope}


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
        tokens: span names, and positions counted from the prompt's first token, or from its end when negative; or
            ("all",).
        norm: `recomputed` for causal claims; `frozen` holds the input norm's scale, to check the algebra.
        key_scope: under GQA, `group` edits the key that all heads of a group share; `head` gives the named query heads
            their own copy of it.
    """

    direction: Direction
    strength: float
    mode: Mode = "add"
    unit: Unit = "activation_max"
    side: Side = "residual"
    layers: tuple[int, ...] = ()
    heads: tuple[Head, ...] | None = None
    tokens: tuple[str | int, ...] = (ALL_TOKENS,)
    norm: Norm = "recomputed"
    key_scope: KeyScope = "group"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            given, known = getattr(self, name), get_args(choices)
            if given not in known:
                raise QklensError(f"{name} is {given!r}; expected one of {list(known)}{nearest(str(given), known)}")
        if not math.isfinite(self.strength):
            raise QklensError(f"strength is {self.strength}; expected a finite number")
        self._check_place()
        missing = [layer for layer in self.layer_list if layer not in self.direction.layers]
        if missing:
            raise QklensError(
                f"{self.direction.label!r} has no vector at layer {missing[0]}; it has {list(self.direction.layers)}"
            )
        unknown = [layer for layer in self.layer_list if layer not in self.direction.typical]
        if self.mode in ("add", "clamp") and self.unit == "activation_max" and unknown:
            raise QklensError(
                f"{self.direction.label!r} has no typical activation at layer {unknown[0]}, which unit "
                "'activation_max' counts in; choose unit 'raw' or 'resid_norm'"
            )

    def _check_place(self) -> None:
        """Refuse heads, layers and tokens that contradict each other or the side."""
        if self.side == "residual" and (self.heads is not None or self.norm == "frozen"):
            raise QklensError(
                "side 'residual' edits the stream for all heads with norms recomputed; drop heads and norm"
            )
        if self.heads is not None and self.layers:
            raise QklensError("give either heads or layers, not both: heads name their layers")
        if not self.heads and not self.layers:
            raise QklensError("steering needs layers or heads; both are empty")
        for name, places in (("layer", self.layers), ("head", self.heads or ())):
            twice = [place for place, times in Counter(places).items() if times > 1]
            if twice:
                raise QklensError(f"{name} {twice[0]} is named twice; name each {name} once")
        if self.key_scope == "head" and (self.side != "key" or self.heads is None):
            raise QklensError("key_scope 'head' needs side 'key' and a list of heads")
        if not self.tokens:
            raise QklensError(f"steering needs tokens; expected span names, positions, or {ALL_TOKENS!r}")
        if ALL_TOKENS in self.tokens and len(self.tokens) > 1:
            raise QklensError(f"tokens {list(self.tokens)}: {ALL_TOKENS!r} stands alone; drop it, or the others")

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

    def check(self, subject: Subject, prompts: Sequence[Prompt]) -> None:
        """Refuse what this model and these prompts cannot take, without running the model.

        Raises:
            QklensError: a layer or head that does not exist, a direction of another width, a span or position that a
                prompt lacks, a strength whose step the model's dtype cannot hold.
        """
        for layer, head in self.heads or ((layer, 0) for layer in self.layers):
            subject.check_head(layer, head)
        for layer in self.layer_list:
            vector = self.direction.vectors[layer]
            if len(vector) != subject.d_model:
                raise QklensError(
                    f"{self.direction.label!r} has {len(vector)} dimensions, the residual stream of {subject.name} has "
                    f"{subject.d_model}; it belongs to another model"
                )
            self._refuse_overflow((self._known_factor(layer) * vector.double()).to(subject.dtype), layer)
        for prompt in prompts:
            self._positions(prompt)

    def edits(self, subject: Subject, prompts: Sequence[Prompt], batch: Batch, index: Sequence[int]) -> list[Edit]:
        """The edits of one pass over these prompts; `index` is not needed, all prompts are steered alike."""
        self.check(subject, prompts)
        mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            mask[row, [batch.width - len(prompt.tokens) + p for p in self._positions(prompt)]] = True
        mask = mask.to(batch.input_ids.device)
        return [self._edit(subject, batch, layer, mask) for layer in self.layer_list]

    def _positions(self, prompt: Prompt) -> list[int]:
        """Where a prompt is edited, counted from its first token."""
        n = len(prompt.tokens)
        if ALL_TOKENS in self.tokens:
            return list(range(n))
        found: list[int] = []
        for token in self.tokens:
            if isinstance(token, str):
                found += prompt.span(token)
            elif -n <= token < n:
                found.append(token % n)
            else:
                raise QklensError(f"position {token} is not in a prompt of {n} tokens; expected {-n} to {n - 1}")
        return found

    def _edit(self, subject: Subject, batch: Batch, layer: int, mask: Tensor) -> Edit:
        change, frozen = self._change(layer), self.norm == "frozen"
        sees = () if self.mode == "add" else self.direction.reads(layer)
        heads = None if self.heads is None else tuple(head for where, head in self.heads if where == layer)
        if heads is not None and self.key_scope == "head":
            return own_key_edit(subject, batch, layer, heads, mask, change, sees, frozen_norm=frozen)
        if heads is not None and self.side in ("key", "value"):
            group = subject.n_heads // subject.n_kv_heads
            heads = tuple(sorted({head // group for head in heads}))
        return VectorEdit(layer, self.side, mask, change, heads, frozen, sees)

    def _change(self, layer: int) -> Callable[[Tensor, Stream], Tensor]:
        vector = self.direction.vectors[layer]

        def change(rows: Tensor, stream: Stream) -> Tensor:
            edited = self._edited(layer, rows, vector.to(rows), stream)
            self._refuse_overflow(edited, layer)
            return edited

        return change

    def _edited(self, layer: int, rows: Tensor, d: Tensor, stream: Stream) -> Tensor:
        if self.mode == "add":
            return rows + self.strength * self._unit(layer, rows, d) * d
        active = self.direction.read(layer, stream).to(rows)[:, None]
        if self.mode == "scale":
            return rows + (self.strength - 1) * active * d
        if self.mode == "clamp":
            return rows + (self.strength * self._unit(layer, rows, d) - active) * d
        return rows - active * d

    def _unit(self, layer: int, rows: Tensor, d: Tensor) -> Tensor | float:
        if self.unit == "resid_norm":
            return rows.norm(dim=-1, keepdim=True) / d.norm()
        return self.direction.typical[layer] if self.unit == "activation_max" else 1.0

    def _known_factor(self, layer: int) -> float:
        """What multiplies the vector; zero where that depends on the stream."""
        if self.mode in ("scale", "ablate") or self.unit == "resid_norm":
            return 0.0
        return self.strength * (self.direction.typical[layer] if self.unit == "activation_max" else 1.0)

    def _refuse_overflow(self, values: Tensor, layer: int) -> None:
        """Refuse what the dtype cannot hold, or the norms that follow: they take the sum of squares in float32."""
        if not bool(values.float().pow(2).sum(dim=-1).isfinite().all()):
            kind = str(values.dtype).removeprefix("torch.")
            raise QklensError(
                f"strength {self.strength:g} of {self.direction.label!r} overflows at layer {layer} (mode {self.mode}, "
                f"unit {self.unit}, {kind}); choose a smaller one"
            )
