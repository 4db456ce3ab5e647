"""The four contrasts that name the roles of the study, as differences between conditions and positions.

    correct_answer   correct − incorrect option tokens, without pressure
    need_answer      answer position of the MCQ − last position of the same question asked openly
    harm_detection   harm − benign, at intent and option tokens
    refuse_redirect  harm − benign, at the answer position

A contrast applies to anything read at every token: residual vectors give directions, activations rank features.
Directions are differences of means, or whitened ones: Σ⁻¹ Δμ, Σ the covariance of tokens within the two classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.data.render import Condition, Prompt
from qklens.dictionaries.directions import Directions
from qklens.dictionaries.whitening import whitened_direction

Role = Literal["need_answer", "correct_answer", "harm_detection", "refuse_redirect"]
ROLES: tuple[Role, ...] = get_args(Role)
QUERY_ROLES: tuple[Role, ...] = ("need_answer", "refuse_redirect")
_WHERE_HARM_SHOWS = ("intent", "correct", "incorrect")


@dataclass(frozen=True)
class Side:
    """One class of a contrast: the tokens of some spans under a condition; no condition is the open question's last."""

    condition: Condition | None
    spans: tuple[str, ...] = ()


SIDES: dict[Role, tuple[Side, Side]] = {
    "need_answer": (Side("none", ("answer",)), Side(None)),
    "correct_answer": (Side("none", ("correct",)), Side("none", ("incorrect",))),
    "harm_detection": (Side("harm", _WHERE_HARM_SHOWS), Side("benign", _WHERE_HARM_SHOWS)),
    "refuse_redirect": (Side("harm", ("answer",)), Side("benign", ("answer",))),
}


@dataclass(frozen=True, eq=False)
class Readings:
    """Some vector at every token of the prompts of one half, aligned over conditions: prompt i is one item and order.

    Attributes:
        prompts: per condition, the prompts.
        read: (condition, prompt, positions) -> the vectors at those tokens.
        open_last: at the last position of the same item's open question, `prompt channel`.
        refusal: at the last position of the item's harmful intent said alone − of its benign intent said alone.
    """

    prompts: dict[Condition, Sequence[Prompt]]
    read: Callable[[Condition, int, Sequence[int]], Float[Tensor, "token channel"]]
    open_last: Float[Tensor, "prompt channel"]
    refusal: Float[Tensor, "prompt channel"]

    def tokens(self, side: Side) -> list[Float[Tensor, "_token channel"]]:
        """The vectors at a class's tokens, prompt by prompt."""
        if side.condition is None:
            return list(self.open_last[:, None])
        return [
            self.read(side.condition, i, [p for name in side.spans for p in prompt.span(name)])
            for i, prompt in enumerate(self.prompts[side.condition])
        ]

    def mean(self, side: Side) -> Float[Tensor, "prompt channel"]:
        """Mean over the class's tokens, one row a prompt."""
        return torch.stack([rows.mean(dim=0) for rows in self.tokens(side)])


def contrast(readings: Readings, role: Role) -> Float[Tensor, "prompt channel"]:
    """The role's contrast, one row a prompt (item and order)."""
    first, second = SIDES[role]
    return readings.mean(first) - readings.mean(second)


def contrast_directions(
    layers: Sequence[int], readings: Callable[[int], Readings], *, whitened: bool = False
) -> Directions:
    """The four directions at each layer, with the mean residual over all tokens of the prompts as bias.

    Raises:
        QklensError: whitened ones of classes within which nothing varies.
    """
    vectors, means, shrinkage = {}, {}, {}
    for layer in layers:
        here = readings(layer)
        rows = [contrast(here, role).mean(dim=0) for role in ROLES]
        if whitened:
            found = [_whiten(here, role, row, layer) for role, row in zip(ROLES, rows, strict=True)]
            rows = [vector for vector, _ in found]
            shrinkage[layer] = tuple(share for _, share in found)
        vectors[layer] = torch.stack(rows)
        everywhere = [here.read(c, i, range(len(p.tokens))) for c, ps in here.prompts.items() for i, p in enumerate(ps)]
        means[layer] = torch.cat(everywhere).mean(dim=0)
    if not whitened:
        return Directions(tuple(ROLES), vectors, means)
    about = {"kind": "whitened directions", "shrinkage": shrinkage}
    return Directions(tuple(ROLES), vectors, means, "whitened directions", about)


def _whiten(
    readings: Readings, role: Role, difference: Float[Tensor, " channel"], layer: int
) -> tuple[Float[Tensor, " channel"], float | None]:
    first, second = (torch.cat(readings.tokens(side)) for side in SIDES[role])
    return whitened_direction(first, second, difference, f"contrast {role} at resid_pre.{layer}")


def consistency(by_item: Float[Tensor, "item channel"]) -> Float[Tensor, " channel"]:
    """Paired effect size over items: mean over standard deviation, zero for a channel that never differs."""
    spread = by_item.std(dim=0) if len(by_item) > 1 else torch.zeros_like(by_item[0])
    floor = 0.05 * by_item.abs().amax(dim=0)
    effect = by_item.mean(dim=0) / torch.maximum(spread, floor).clamp(min=1e-9)
    return torch.where(by_item.abs().amax(dim=0) > 0, effect, torch.zeros_like(effect))
