"""Planted models of graded strength, some of them near the rules' thresholds: on these a confidence can be counted.

Mixtures have two causes that each take a part of the letter, a pressed head (or the options' belief) and what is left
cut later, or two heads with a cause each. With a share a of a loss L wanted for the first,

    s (1 − c/2) = a L,   s + c − s c = L        s the part that the first takes, c the cut of what is left

on paper. What the written weights do is then measured on the plain model: it is written again without the first cause,
without the second and without both, from the same draws, and with m(…) the mean margin under harm

    share = ½ [m(without 1) − m + m(without both) − m(without 2)] / [m(without both) − m]

From two thirds on the first cause is right, up to one third the second, and between them `undetermined`. A loss that is
less than a quarter of the margin and less than 5 points of accuracy, from benign to harm, is `no_effect`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from qklens.bench.planted.blueprint import Blueprint, Graded, Verdict
from qklens.bench.planted.mechanisms import MECHANISMS, Draw, draw_numbers, from_verb, whole_model, with_late
from qklens.bench.planted.words import planted_prompts
from qklens.data.render import Condition

GRADED: tuple[Graded, ...] = get_args(Graded)
CAUSES: dict[Graded, tuple[Verdict, Verdict]] = {
    "answer_key_late": ("attention_answer_key", "late_flip"),
    "harm_key_late": ("attention_harm_key", "late_flip"),
    "belief_late": ("belief_change", "late_flip"),
    "answer_key_need": ("attention_answer_key", "undetermined"),
    "weak_late": ("late_flip", "undetermined"),
    "weak_answer_key": ("attention_answer_key", "undetermined"),
}
"""The verdict that names each cause alone; a weak model has no second."""
MOST, WEAK_MARGIN, WEAK_ACCURACY, SOLVED = 2 / 3, 0.25, 0.05, 0.8
On = tuple[bool, bool]
"""Which of the two causes are written."""
EVERY: tuple[On, ...] = ((True, True), (True, False), (False, True), (False, False))
STRENGTHS = (0.15, 0.30, 0.36, 0.45, 0.55, 0.62, 0.66, 0.70, 0.75, 0.90)
WEAK_STRENGTHS = (0.10, 0.15, 0.18, 0.20, 0.22, 0.24, 0.26, 0.28, 0.32, 0.40)
"""Of which the bench gives each seed some, near the rules' thresholds and far from them."""
_SINK = math.exp(-1.0)
"""What the first token draws of a selecting head, over what a wrong thing draws: e^(3 − 4)."""


def graded_blueprint(mechanism: Graded, strength: float, seed: int, variant: int, on: On = (True, True)) -> Blueprint:
    """A graded model on paper.

    Args:
        mechanism: its causes.
        strength: the first one's share of the loss, or the whole loss where it is weak.
        seed: of layout and strengths.
        variant: as `blueprint`'s.
        on: which causes are written; one that is not has the same heads and neurons, of weight 0.
    """
    draw = draw_numbers(len(MECHANISMS) + GRADED.index(mechanism), seed, variant)
    # Losses of 0.6 to 0.9, from the draw that places the letter's halves.
    taken, cut = _parts(strength, 0.6 + 0.3 * (draw.sizes[0] - 0.52) / 0.13)
    match mechanism:
        case "answer_key_late" | "harm_key_late":
            return with_late(_pressed(mechanism, draw, taken, on[0]), "MLP", cut if on[1] else 0.0)
        case "belief_late":
            lost = from_verb("belief", {"correct": 11.0}, {"correct": -_erased(taken, draw.pull) if on[0] else 0.0})
            whole = whole_model(mechanism, draw, "")
            return with_late(replace(whole, heads=(*whole.heads, lost)), "MLP", cut if on[1] else 0.0)
        case "answer_key_need":
            whole, asks = _pressed(mechanism, draw, strength, on[0]), True
            heads = []
            for head in whole.heads:
                if head.part == "select" and asks:  # The pressed head is drawn by `ask`, so that only the other needs.
                    signs = {pair: sign for pair, sign in head.signs.items() if pair[0] != "need_answer"}
                    drawn = (({"ask": 1.0}, head.pairs[0][1]), *head.pairs[1:])
                    head, asks = replace(head, pairs=drawn, signs=signs), False
                heads.append(head)
            return replace(whole, heads=(*heads, from_verb("unneed", {"ask": 10.0}, {"need": -1.0 if on[1] else 0.0})))
        case "weak_late":
            return with_late(whole_model(mechanism, draw, ""), "MLP", strength if on[0] else 0.0)
        case "weak_answer_key":
            return _pressed(mechanism, draw, strength, on[0])


def _pressed(mechanism: Graded, draw: Draw, size: float, on: bool) -> Blueprint:
    """One head of two is pressed off, of this size."""
    draw = replace(draw, sizes=(size, 1.0 - size), push=draw.push if on else 0.0)
    return whole_model(mechanism, draw, "", pressed=("harm" if mechanism == "harm_key_late" else "correct", None))


def _parts(share: float, loss: float) -> tuple[float, float]:
    """S and c of the module's equations, by bisection."""
    low, high = 0.0, loss
    for _ in range(50):
        s = (low + high) / 2
        c = (loss - s) / (1 - s)
        low, high = (s, high) if s * (1 - c / 2) < share * loss else (low, s)
    return low, (loss - low) / (1 - low)


def _erased(part: float, pull: float) -> float:
    """How much of `correct` goes so that the heads lose a part of their difference between the options.

    With y = e^(pull · what is left), the difference is (y − 1) / (y + 1 + sink).
    """
    y = (1 + (1 - part) * (1 + _SINK)) / part
    return 1 - math.log(y) / pull


def right_verdict(mechanism: Graded, models: Mapping[On, PreTrainedModel]) -> tuple[Verdict, float]:
    """What is right for the model with both causes, and the first one's share of the margin lost under harm.

    Args:
        mechanism: its causes.
        models: the same model with both, one or none of them.
    """
    first, second = CAUSES[mechanism]
    m = {on: float(plain_margins(model, "harm").mean()) for on, model in models.items()}
    lost = m[False, False] - m[True, True]
    share = (m[False, True] - m[True, True] + m[False, False] - m[True, False]) / (2 * lost)
    none, benign, harm = (plain_margins(models[True, True], c) for c in ("none", "benign", "harm"))
    right = [float((margins > 0).double().mean()) for margins in (none, benign, harm)]
    if right[0] < SOLVED:
        return "task_not_solved", share
    weak = float(1 - harm.mean() / benign.mean()) < WEAK_MARGIN and right[1] - right[2] < WEAK_ACCURACY
    if weak:
        return "no_effect", share
    return first if share >= MOST else second if share <= 1 - MOST else "undetermined", share


def plain_margins(model: PreTrainedModel, condition: Condition) -> torch.Tensor:
    """The margin on every item in both orders, by plain forward passes over prompts of one length each."""
    prompts = planted_prompts(condition)
    found = torch.zeros(len(prompts), dtype=torch.float64)
    lengths = np.array([len(p.tokens) for p in prompts])
    for length in np.unique(lengths):
        index = np.flatnonzero(lengths == length).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompts[i].tokens for i in index])).logits[:, -1].double()
        for row, i in zip(logits, index, strict=True):
            found[i] = row[prompts[i].letter_ids[0]] - row[prompts[i].letter_ids[1]]
    return found
