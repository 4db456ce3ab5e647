"""Does the model still know? A correct-answer feature chosen on one half, tested on the other, per condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.contrasts import consistency
from qklens.analyses.statistics import Interval, auc, bootstrap_auc, item_means
from qklens.analyses.written import WrittenPrompt
from qklens.data.render import Prompt


@dataclass(frozen=True)
class BeliefReading:
    """How a feature's summed activation separates the options under one condition."""

    auc: float
    auc_ci: Interval
    sum_correct: float
    sum_incorrect: float


def option_sums(
    prompts: Sequence[Prompt], written: Sequence[WrittenPrompt]
) -> tuple[Float[Tensor, "prompt feature"], Float[Tensor, "prompt feature"]]:
    """Activations summed over the tokens of the correct and of the incorrect option."""

    def sums(name: str) -> Tensor:
        return torch.stack([w.active.at(p.span(name)).sum(dim=0) for p, w in zip(prompts, written, strict=True)])

    return sums("correct"), sums("incorrect")


def paired_auc(correct: Float[Tensor, "prompt feature"], wrong: Float[Tensor, "prompt feature"]) -> Tensor:
    """P(correct > incorrect within a prompt) + ½ P(equal), per feature; ranks candidates."""
    return (correct > wrong).float().mean(dim=0) + 0.5 * (correct == wrong).float().mean(dim=0)


@dataclass(frozen=True)
class BeliefCandidate:
    """A feature that may say which option is correct, as it looks on the half where it is chosen.

    Attributes:
        layer: where it is read.
        feature: its index.
        paired_auc: P(more active on the correct than on the incorrect option of the same prompt), ties half.
        difference: mean over prompts of its activation summed over the correct less over the incorrect option.
        steadiness: that difference's mean over its standard deviation, over items.
    """

    layer: int
    feature: int
    paired_auc: float
    difference: float
    steadiness: float


def rank_belief(
    layer: int, correct: Float[Tensor, "prompt feature"], wrong: Float[Tensor, "prompt feature"], k: int
) -> list[BeliefCandidate]:
    """The k features whose paired activation difference is positive most often; equal ones by its steadiness."""
    separation, by_item = paired_auc(correct, wrong), item_means(correct - wrong)
    steady, difference = consistency(by_item), by_item.mean(dim=0)
    contenders = separation.argsort(descending=True, stable=True).tolist()
    floor = separation[contenders[min(k, len(contenders)) - 1]]
    found = [
        BeliefCandidate(layer, f, round(float(separation[f]), 6), float(difference[f]), float(steady[f]))
        for f in contenders
        if separation[f] >= floor
    ]
    return best_belief(found, k)


def best_belief(candidates: Sequence[BeliefCandidate], k: int) -> list[BeliefCandidate]:
    """The k best candidates of several layers, best first; one that reads alike in several layers stands once."""
    ordered = sorted(candidates, key=lambda c: (-c.paired_auc, -c.steadiness, c.layer, c.feature))
    once: dict[tuple[int, float, float], BeliefCandidate] = {}
    for candidate in ordered:
        once.setdefault((candidate.feature, candidate.paired_auc, candidate.difference), candidate)
    return list(once.values())[:k]


def read_belief(
    correct: Float[Tensor, " prompt"], wrong: Float[Tensor, " prompt"], items: np.ndarray, seed: int
) -> BeliefReading:
    """AUC over all option activations (not only within prompts), with an interval over items."""
    positive, negative = correct.double().numpy(), wrong.double().numpy()
    return BeliefReading(
        auc(positive, negative),
        bootstrap_auc(positive, negative, items, seed),
        float(positive.mean()),
        float(negative.mean()),
    )
