"""Stage `belief`: does the correct-answer feature, chosen on the other half, still prefer the correct option?"""

from __future__ import annotations

from qklens.analyses.belief import option_sums, paired_auc, read_belief
from qklens.analyses.contrasts import consistency, item_means
from qklens.data.render import CONDITIONS
from qklens.studies.harm_pressure.lab import Lab
from qklens.studies.journal import StageOutput
from qklens.studies.results import Belief, BeliefCondition


def run(lab: Lab) -> StageOutput:
    """Choose the feature and layer that best separate the options without pressure, then test every condition."""
    layer, feature = _choose(lab)
    items = lab.item_index("report")
    rows = {}
    for c in CONDITIONS:
        activations = [w.parts.activations[:, [feature]] for w in lab.written(c, "report", layer)]
        correct, wrong = option_sums(lab.prompts(c, "report"), activations)
        reading = read_belief(correct[:, 0], wrong[:, 0], items, lab.seed)
        rows[c] = BeliefCondition(
            auc=reading.auc, auc_ci=reading.auc_ci, sum_correct=reading.sum_correct, sum_incorrect=reading.sum_incorrect
        )
    label = lab.source.labels[feature]
    belief = Belief(
        feature=label,
        layer=layer,
        auc_none=rows["none"].auc,
        auc_harm=rows["harm"].auc,
        sum_correct=rows["harm"].sum_correct,
        sum_incorrect=rows["harm"].sum_incorrect,
        by_condition=rows,
    )
    return StageOutput(results={"belief": belief.model_dump()}, state={"layer": layer, "feature": label})


def _choose(lab: Lab) -> tuple[int, int]:
    """The feature with the highest paired AUC under `none` on the discovery half; ties go to the steadier effect."""
    best: tuple[float, float, int, int] | None = None
    for layers in lab.few_at_once(lab.source.layers):
        lab.streams("none", "discovery", layers)
        for layer in layers:
            activations = [w.parts.activations for w in lab.written("none", "discovery", layer)]
            correct, wrong = option_sums(lab.prompts("none", "discovery"), activations)
            separation = paired_auc(correct, wrong)
            steadiness = consistency(item_means(correct - wrong))
            top = separation.max()
            for feature in (separation == top).nonzero()[:, 0].tolist():
                candidate = (round(float(top), 6), float(steadiness[feature]), layer, feature)
                best = candidate if best is None or candidate[:2] > best[:2] else best
        if len(layers) < len(lab.source.layers):
            lab.drop_streams()
    if best is None:
        raise AssertionError("a source has at least one layer and one feature")
    return best[2], best[3]
