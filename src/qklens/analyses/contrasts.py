"""The four contrasts that name the roles of the study, as differences between conditions and positions.

    correct_answer   correct − incorrect option tokens, without pressure
    need_answer      answer position of the MCQ − last position of the same question asked openly
    harm_detection   harm − benign, at intent and option tokens
    refuse_redirect  harm − benign, at the answer position

A contrast applies to anything read at every token: residual vectors give directions, activations rank features.
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

Role = Literal["need_answer", "correct_answer", "harm_detection", "refuse_redirect"]
ROLES: tuple[Role, ...] = get_args(Role)
QUERY_ROLES: tuple[Role, ...] = ("need_answer", "refuse_redirect")


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

    def mean(self, condition: Condition, *spans: str) -> Float[Tensor, "prompt channel"]:
        """Mean over the tokens of some spans, one row a prompt."""
        rows = []
        for i, prompt in enumerate(self.prompts[condition]):
            positions = [p for name in spans for p in prompt.span(name)]
            rows.append(self.read(condition, i, positions).mean(dim=0))
        return torch.stack(rows)


def contrast(readings: Readings, role: Role) -> Float[Tensor, "prompt channel"]:
    """The role's contrast, one row a prompt (item and order)."""
    if role == "correct_answer":
        return readings.mean("none", "correct") - readings.mean("none", "incorrect")
    if role == "need_answer":
        return readings.mean("none", "answer") - readings.open_last
    if role == "refuse_redirect":
        return readings.mean("harm", "answer") - readings.mean("benign", "answer")
    spans = ("intent", "correct", "incorrect")
    return readings.mean("harm", *spans) - readings.mean("benign", *spans)


def contrast_directions(layers: Sequence[int], readings: Callable[[int], Readings]) -> Directions:
    """The four directions at each layer, with the mean residual over all tokens of the prompts as bias."""
    vectors, means = {}, {}
    for layer in layers:
        here = readings(layer)
        vectors[layer] = torch.stack([contrast(here, role).mean(dim=0) for role in ROLES])
        everywhere = [here.read(c, i, range(len(p.tokens))) for c, ps in here.prompts.items() for i, p in enumerate(ps)]
        means[layer] = torch.cat(everywhere).mean(dim=0)
    return Directions(tuple(ROLES), vectors, means)


def consistency(by_item: Float[Tensor, "item channel"]) -> Float[Tensor, " channel"]:
    """Paired effect size over items: mean over standard deviation, zero for a channel that never differs."""
    spread = by_item.std(dim=0) if len(by_item) > 1 else torch.zeros_like(by_item[0])
    floor = 0.05 * by_item.abs().amax(dim=0)
    effect = by_item.mean(dim=0) / torch.maximum(spread, floor).clamp(min=1e-9)
    return torch.where(by_item.abs().amax(dim=0) > 0, effect, torch.zeros_like(effect))
