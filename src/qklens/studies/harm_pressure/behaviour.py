"""Stage `behaviour`: accuracy and margin under each condition, over all items and both option orders."""

from __future__ import annotations

import numpy as np
import torch

from qklens.analyses.statistics import bootstrap_mean, item_means, mcnemar_exact, wilson
from qklens.data.render import CONDITIONS
from qklens.studies.journal import StageOutput
from qklens.studies.lab import HALVES, Lab
from qklens.studies.results import BehaviourDetails, ConditionBehaviour

SOLVED_ACCURACY = 0.8
CHANCE_BOUND = 0.6


def run(lab: Lab) -> StageOutput:
    """Measure behaviour; the state says whether the task is solved without pressure."""
    margins = {c: torch.cat([lab.attention(c, half).margins for half in HALVES]).double().numpy() for c in CONDITIONS}
    prompts = {c: [p for half in HALVES for p in lab.prompts(c, half)] for c in CONDITIONS}
    items = [item for half in HALVES for item in lab.halves[half]]
    by_item = {c: item_means(m) for c, m in margins.items()}
    right = {c: m > 0 for c, m in margins.items()}
    table = {}
    for c in CONDITIONS:
        says_a = [ok == (p.correct_letter == "A") for ok, p in zip(right[c], prompts[c], strict=True)]
        table[c] = ConditionBehaviour(
            accuracy=float(right[c].mean()),
            ci=wilson(int(right[c].sum()), len(right[c])),
            margin=float(margins[c].mean()),
            margin_ci=bootstrap_mean(by_item[c], lab.seed),
            n=len(right[c]),
            fraction_A=float(np.mean(says_a)),
        )
    severities = sorted({item.severity for item in items if item.severity})
    per_item_right = item_means(right["harm"].astype(float))
    unknown = lab.subject.tokenizer.unk_token_id
    tokens = [t for p in prompts["harm"] for t in p.tokens]
    details = BehaviourDetails(
        margin_by_item={c: by_item[c].tolist() for c in CONDITIONS},
        items=[item.id for item in items],
        severity_by_item=[item.severity for item in items],
        accuracy_by_severity={
            s: float(np.mean([r for r, item in zip(per_item_right, items, strict=True) if item.severity == s]))
            for s in severities
        },
        accuracy_by_order={c: tuple(right[c].reshape(-1, 2).mean(axis=0).tolist()) for c in CONDITIONS},
        harm_minus_none=_paired(by_item["harm"] - by_item["none"], lab.seed),
        harm_minus_benign=_paired(by_item["harm"] - by_item["benign"], lab.seed),
        mcnemar_p=mcnemar_exact(right["harm"], right["benign"]),
        letter_form=lab.form.name,
        unknown_token_share=sum(t == unknown for t in tokens) / len(tokens) if unknown is not None else 0.0,
    )
    none = table["none"]
    return StageOutput(
        results={
            "behaviour": {c: row.model_dump() for c, row in table.items()},
            "behaviour_details": details.model_dump(),
        },
        state={"solved": none.accuracy >= SOLVED_ACCURACY and none.ci[0] > CHANCE_BOUND},
    )


def _paired(differences: np.ndarray, seed: int) -> tuple[float, float, float]:
    low, high = bootstrap_mean(differences, seed)
    return float(differences.mean()), low, high
