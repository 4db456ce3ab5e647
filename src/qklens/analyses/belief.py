"""Does the model still know? A correct-answer feature chosen on one half, tested on the other, per condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.statistics import Interval, auc, bootstrap_auc
from qklens.data.render import Prompt


@dataclass(frozen=True)
class BeliefReading:
    """How a feature's summed activation separates the options under one condition."""

    auc: float
    auc_ci: Interval
    sum_correct: float
    sum_incorrect: float


def option_sums(
    prompts: Sequence[Prompt], activations: Sequence[Float[Tensor, "_pos feature"]]
) -> tuple[Float[Tensor, "prompt feature"], Float[Tensor, "prompt feature"]]:
    """Activations summed over the tokens of the correct and of the incorrect option."""
    correct = torch.stack([a[list(p.span("correct"))].sum(dim=0) for p, a in zip(prompts, activations, strict=True)])
    wrong = torch.stack([a[list(p.span("incorrect"))].sum(dim=0) for p, a in zip(prompts, activations, strict=True)])
    return correct, wrong


def paired_auc(correct: Float[Tensor, "prompt feature"], wrong: Float[Tensor, "prompt feature"]) -> Tensor:
    """P(correct > incorrect within a prompt) + ½ P(equal), per feature; ranks candidates."""
    return (correct > wrong).float().mean(dim=0) + 0.5 * (correct == wrong).float().mean(dim=0)


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
