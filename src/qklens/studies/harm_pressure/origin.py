"""Stage `origin`: when, between the base model and the post-trained one, does the circuit appear?

The same roles, heads and directions are read in every checkpoint. The dictionary belongs to the last checkpoint, so an
activation in an earlier one is how far that checkpoint's stream goes along a direction of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qklens.analyses.contrasts import Role
from qklens.analyses.nulls import feature_pairs, null_tests, seed_for
from qklens.analyses.statistics import wilson
from qklens.data.render import CONDITIONS
from qklens.dictionaries.source import feature_index
from qklens.interventions.steer import Head
from qklens.models.scores import score_maps
from qklens.models.subject import Subject
from qklens.studies.harm_pressure.zscores import N_DRAWS
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Lab
from qklens.studies.populations import populations
from qklens.studies.results import Origin


def run(
    lab: Lab,
    heads: Sequence[Head],
    roles: dict[Role, str],
    checkpoints: Sequence[tuple[str, Callable[[], Subject]]],
) -> StageOutput:
    """Measure each checkpoint in the order of training; the last one is the study's own model."""
    refuse = feature_index(lab.source, roles["refuse_redirect"])
    harm = feature_index(lab.source, roles["harm_detection"])
    layer = heads[0][0]
    rows = []
    for step, (name, load) in enumerate(checkpoints):
        subject = load()
        here = lab if subject is lab.subject else _lab_for(lab, subject)
        rows.append(_row(here, heads, layer, refuse, harm, name, step))
    return StageOutput(results={"origin": [row.model_dump() for row in rows]})


def _lab_for(lab: Lab, subject: Subject) -> Lab:
    other = Lab(subject, lab.dataset, lab.form, lab.seed)
    other.source = lab.source
    return other


def _row(lab: Lab, heads: Sequence[Head], layer: int, refuse: int, harm: int, name: str, step: int) -> Origin:
    readings = {c: lab.attention(c, "report") for c in CONDITIONS}
    right = {c: int((r.margins > 0).sum()) for c, r in readings.items()}
    contrast = [
        (a.active.of(refuse)[-1] - b.active.of(refuse)[-1])
        for a, b in zip(lab.written("harm", "report", layer), lab.written("benign", "report", layer), strict=True)
    ]
    values, scores = [], []
    for where, head in heads:
        queries, keys = populations(lab, where)
        (test,) = null_tests(
            "random_pairs",
            score_maps(lab.subject, where),
            head,
            lab.mean_turn(where),
            queries,
            keys,
            feature_pairs(queries, keys, [(refuse, harm)]),
            n=N_DRAWS,
            seed=seed_for(lab.seed, where, head, "random_pairs"),
        )
        values.append(test.value)
        scores.append(test.z)
    n = len(readings["none"].margins)
    return Origin(
        checkpoint=name,
        step=step,
        accuracy={c: right[c] / n for c in CONDITIONS},
        ci={c: wilson(right[c], n) for c in CONDITIONS},
        margin={c: float(readings[c].margins.mean()) for c in CONDITIONS},
        attention_difference={
            c: float(torch.stack([readings[c].difference[:, a, b] for a, b in heads]).mean()) for c in CONDITIONS
        },
        refuse_contrast=float(torch.stack(contrast).mean()),
        refuse_harm_interaction=sum(values) / len(values),
        refuse_harm_z=sum(scores) / len(scores),
    )
