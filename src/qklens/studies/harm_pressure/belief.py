"""Stage `belief`: does the correct-answer feature, chosen on the other half, still prefer the correct option?"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from qklens.analyses.belief import BeliefCandidate, option_sums, read_belief
from qklens.data.render import CONDITIONS, Condition
from qklens.studies.choices import belief_candidates
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Lab
from qklens.studies.results import Belief, BeliefCondition, BeliefFeature


def run(lab: Lab) -> StageOutput:
    """Rank the features that separate the options without pressure, then test each under every condition."""
    candidates = belief_candidates(lab)
    read = sorted({layer for c in candidates for layer in (c.layer, *lab.source.reads(c.layer))})
    for condition in CONDITIONS:
        lab.streams(condition, "report", read)  # all layers in one pass
    features = _tested(lab, candidates)
    first = features[0]
    belief = Belief(
        feature=first.feature,
        layer=first.layer,
        auc_none=first.by_condition["none"].auc,
        auc_harm=first.by_condition["harm"].auc,
        sum_correct=first.by_condition["harm"].sum_correct,
        sum_incorrect=first.by_condition["harm"].sum_incorrect,
        by_condition=first.by_condition,
        candidates=features,
    )
    return StageOutput(results={"belief": belief.model_dump()}, state={"layer": first.layer, "feature": first.feature})


def _tested(lab: Lab, candidates: Sequence[BeliefCandidate]) -> list[BeliefFeature]:
    found: list[dict[Condition, BeliefCondition]] = [{} for _ in candidates]
    for layer in sorted({c.layer for c in candidates}):
        for condition in CONDITIONS:
            sums = option_sums(lab.prompts(condition, "report"), lab.written(condition, "report", layer))
            for candidate, row in zip(candidates, found, strict=True):
                if candidate.layer == layer:
                    row[condition] = _condition(lab, *(side[:, candidate.feature] for side in sums))
    return [
        BeliefFeature(
            feature=lab.source.labels[candidate.feature],
            layer=candidate.layer,
            difference=candidate.difference,
            steadiness=candidate.steadiness,
            by_condition=row,
        )
        for candidate, row in zip(candidates, found, strict=True)
    ]


def _condition(lab: Lab, correct: Float[Tensor, " prompt"], wrong: Float[Tensor, " prompt"]) -> BeliefCondition:
    reading = read_belief(correct, wrong, lab.item_index("report"), lab.seed)
    return BeliefCondition(
        auc=reading.auc, auc_ci=reading.auc_ci, sum_correct=reading.sum_correct, sum_incorrect=reading.sum_incorrect
    )
