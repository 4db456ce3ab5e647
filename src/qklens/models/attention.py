"""The one attention function that qklens registers with transformers: it delegates to the family's own eager code.

Between the model's queries and keys and its output it lets the running pass (`passes.py`) read the score's ingredients,
add to the scores, or replace pattern rows and head outputs. Without a running pass it is the family's eager attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from qklens.models.family import Family


@dataclass(frozen=True, eq=False)
class AttentionRead:
    """One layer's attention as it met: queries and keys after rotary, pattern, and head outputs before W_O.

    Attributes:
        layer: the layer.
        query: queries as they meet the keys.
        key: keys, with those of a prefix before the columns that ran.
        pattern: the weights that were used.
        output: what each head read, before W_O.
        scale: the model's own score scale c.
        mask: what the model added to the scores to hide keys, or nothing.
        bias: what score edits added before the cap, or nothing.
    """

    layer: int
    query: Float[Tensor, "batch head q_pos d_head"]
    key: Float[Tensor, "batch kv_head k_pos d_head"]
    pattern: Float[Tensor, "batch head q_pos k_pos"]
    output: Float[Tensor, "batch q_pos head d_head"]
    scale: float
    mask: Float[Tensor, "#batch #head q_pos k_pos"] | None = None
    bias: Float[Tensor, "batch head q_pos k_pos"] | None = None

    def of(self, heads: Sequence[int]) -> AttentionRead:
        """A copy of some heads alone, each with its own key; they are counted from 0 in their new order."""
        at = torch.tensor(list(heads), device=self.query.device)
        group = self.query.shape[1] // self.key.shape[1]
        return replace(
            self,
            query=self.query[:, at],
            key=self.key[:, at // group],
            pattern=self.pattern[:, at],
            output=self.output[:, :, at],
            bias=None if self.bias is None else self.bias[:, at],
        )

    def products(
        self, heads: Int[Tensor, " some"] | None = None, columns: Int[Tensor, "batch n"] | None = None
    ) -> Float[Tensor, "batch some n k_pos"]:
        """Scores u(p, j) = c ⟨q_p, k_j⟩ (+ edits) of some heads at some query columns, or of all, hidden keys too.

        In float32 or better. u comes before a soft cap; `ScoreMaps.capped` gives what meets the softmax.
        """
        group = self.query.shape[1] // self.key.shape[1]
        which = torch.arange(self.query.shape[1], device=self.query.device) if heads is None else heads
        exact = torch.promote_types(self.query.dtype, torch.float32)
        query, key = pick(self.query, heads, columns).to(exact), self.key[:, which // group].to(exact)
        score = self.scale * (query @ key.transpose(2, 3))
        return score if self.bias is None else score + pick(self.bias, heads, columns)

    def score(
        self, heads: Int[Tensor, " some"] | None = None, columns: Int[Tensor, "batch n"] | None = None
    ) -> Float[Tensor, "batch some n k_pos"]:
        """The same with −∞ where the mask hides the key."""
        score = self.products(heads, columns)
        if self.mask is None:
            return score
        mask = self.mask[..., : score.shape[-1]].expand(len(score), 1, -1, -1)
        hidden = pick(mask, None, columns) <= torch.finfo(torch.float16).min
        return score.masked_fill_(hidden, float("-inf"))


def pick(
    whole: Float[Tensor, "batch head pos last"],
    heads: Int[Tensor, " some"] | None,
    columns: Int[Tensor, "batch n"] | None,
) -> Float[Tensor, "batch some n last"]:
    """Some heads at some columns of each row, copied; all of them, uncopied, where nothing is named."""
    if heads is not None:
        whole = whole[:, heads]
    if columns is None:
        return whole
    rows = torch.arange(len(whole), device=whole.device)[:, None]
    return whole.transpose(1, 2)[rows, columns].transpose(1, 2)


@runtime_checkable
class AttentionTap(Protocol):
    """What a running pass does around one layer's attention."""

    def mask(self, allowed: Callable[..., Tensor], dtype: torch.dtype) -> Tensor | None:
        """What hides keys, `batch 1 q_pos k_pos`, by a layer's rule `allowed(batch, head, q, k)`; or nothing."""
        ...

    def score_bias(
        self,
        layer: int,
        query: Float[Tensor, "batch head q_pos d_head"],
        key: Float[Tensor, "batch kv_head k_pos d_head"],
        scale: float,
    ) -> Float[Tensor, "batch head q_pos k_pos"] | None:
        """What to add to the scores (after scaling, before the cap and the softmax), or nothing."""
        ...

    def new_pattern(
        self, layer: int, pattern: Float[Tensor, "batch head q_pos k_pos"]
    ) -> Float[Tensor, "batch head q_pos k_pos"] | None:
        """The pattern to use instead of the model's, or nothing."""
        ...

    def new_output(
        self, layer: int, output: Float[Tensor, "batch q_pos head d_head"]
    ) -> Float[Tensor, "batch q_pos head d_head"] | None:
        """The heads' outputs (before W_O) to use instead, or nothing."""
        ...

    def read(self, read: AttentionRead) -> None:
        """Look at the finished attention of a layer."""
        ...


ACTIVE_TAP: ContextVar[AttentionTap | None] = ContextVar("qklens_active_tap", default=None)


def attention_name(family: Family) -> str:
    """Register the family's tapped eager attention (once) and return its name."""
    name = f"qklens_{family.model_type}"
    AttentionInterface.register(name, _tapped(family))
    AttentionMaskInterface.register(name, _mask)
    return name


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:  # noqa: ANN401
    """The running pass's mask where it has one; else the eager mask of transformers, with float64's minimum raised.

    The families' softmax runs in float32, where float64's minimum is −∞ and a padding row would become NaN.
    """
    tap = ACTIVE_TAP.get()
    own = None if tap is None else tap.mask(kwargs["mask_function"], kwargs["dtype"])
    if own is not None:
        return own
    mask = eager_mask(*args, **kwargs)
    if mask is None or mask.dtype != torch.float64:
        return mask
    return mask.clamp(min=torch.finfo(torch.float32).min)


def _tapped(family: Family) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        tap = ACTIVE_TAP.get()
        if tap is None:
            return family.eager(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
        mask, added = attention_mask, tap.score_bias(layer, query, key, scaling)
        if added is not None:
            bias = added
            cap = family.score_cap(module)
            if cap is not None:
                # The mask is added after the cap, so a shift of the score is carried through it.
                score = scaling * query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(2, 3)
                bias = cap * (torch.tanh((score + bias) / cap) - torch.tanh(score / cap))
            attention_mask = bias if attention_mask is None else attention_mask + bias
        output, pattern = family.eager(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        if pattern is None:
            raise RuntimeError(f"layer {layer}: the eager attention returned no pattern")
        replaced = tap.new_pattern(layer, pattern)
        if replaced is not None:
            pattern = replaced
            groups = query.shape[1] // value.shape[1]
            output = torch.matmul(pattern, value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous()
        edited = tap.new_output(layer, output)
        if edited is not None:
            output = edited
        tap.read(AttentionRead(layer, query, key, pattern, output, scaling, mask, added))
        return output, pattern

    return attention
