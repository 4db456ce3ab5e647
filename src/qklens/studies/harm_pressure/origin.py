"""Stage `origin`: when, between the base model and the post-trained one, does the circuit appear?

The same roles, heads and directions are read in every checkpoint, each with its own weights. The dictionary belongs to
the last checkpoint, so an activation in an earlier one is how far that checkpoint's stream goes along a direction of
the last; how much of each checkpoint's stream the dictionary leaves unexplained is measured beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qklens.analyses.contrasts import Role
from qklens.analyses.nulls import NullName, feature_pairs, null_tests, seed_for
from qklens.analyses.statistics import bootstrap_mean, item_means, wilson
from qklens.data.render import CONDITIONS
from qklens.dictionaries.source import feature_index, fraction_variance_unexplained
from qklens.errors import QklensError
from qklens.interventions.steer import Head
from qklens.models.scores import score_maps
from qklens.models.subject import Subject
from qklens.studies.harm_pressure.milestones import milestones
from qklens.studies.harm_pressure.span_terms import span_terms
from qklens.studies.harm_pressure.zscores import N_DRAWS
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Lab
from qklens.studies.populations import populations
from qklens.studies.result_types import Estimate
from qklens.studies.results_around import Origin, OriginHead

OPTIONS = ("correct", "incorrect")
Array = NDArray[np.float64]


Checkpoints = Sequence[tuple[str, Callable[[], Subject]]]


def check(lab: Lab, checkpoints: Checkpoints) -> None:
    """Load each checkpoint once, before anything is measured: a study should not end at its last stage but one.

    Raises:
        QklensError: a checkpoint that does not load, is of another shape than the model, or cannot read the items.
    """
    for name, load in checkpoints:
        _read_items(_lab_for(lab, load(), name))


def _read_items(lab: Lab) -> None:
    for condition in CONDITIONS:
        lab.prompts(condition, "report")


def run(
    lab: Lab,
    heads: Sequence[Head],
    roles: dict[Role, str],
    checkpoints: Checkpoints,
) -> StageOutput:
    """Measure each checkpoint in the order of training; the last one is the study's own model.

    Raises:
        QklensError: a checkpoint of another shape than the model.
    """
    refuse = feature_index(lab.source, roles["refuse_redirect"])
    harm = feature_index(lab.source, roles["harm_detection"])
    rows = []
    for step, (name, load) in enumerate(checkpoints):
        subject = load()
        here = lab if subject is lab.subject else _lab_for(lab, subject, name)
        here.source = lab.source
        rows.append(_row(here, heads, refuse, harm, name, step))
    return StageOutput(
        results={
            "origin": [row.model_dump() for row in rows],
            "milestones": [found.model_dump() for found in milestones(rows)],
        }
    )


def _lab_for(lab: Lab, subject: Subject, name: str) -> Lab:
    shapes = [(s.n_layers, s.n_heads, s.d_model) for s in (subject, lab.subject)]
    if shapes[0] != shapes[1]:
        raise QklensError(
            f"checkpoint {name}: has {shapes[0][0]} layers, {shapes[0][1]} heads and width {shapes[0][2]}, the model "
            f"has {shapes[1][0]}, {shapes[1][1]} and {shapes[1][2]}; expected a checkpoint of the same training"
        )
    return Lab(subject, lab.dataset, lab.form, lab.seed)


def _row(lab: Lab, heads: Sequence[Head], refuse: int, harm: int, name: str, step: int) -> Origin:
    layer = heads[0][0]
    readings = {c: lab.attention(c, "report") for c in CONDITIONS}
    right = {c: r.margins > 0 for c, r in readings.items()}
    right_by_item = {c: _by_item(r.float()) for c, r in right.items()}
    margins = {c: _by_item(r.margins) for c, r in readings.items()}
    attention = {
        c: _by_item(torch.stack([r.difference[:, a, b] for a, b in heads]).mean(dim=0)) for c, r in readings.items()
    }
    contrast = torch.stack(
        [
            a.active.of(refuse)[-1] - b.active.of(refuse)[-1]
            for a, b in zip(lab.written("harm", "report", layer), lab.written("benign", "report", layer), strict=True)
        ]
    )
    realised = torch.stack(
        [span_terms(lab, head, "harm", "report", OPTIONS).by_prompt([(refuse, harm)])[:, 0] for head in heads]
    ).mean(dim=0)
    by_head = [_pair(lab, head, refuse, harm) for head in heads]

    def estimate(by_item: Array) -> Estimate:
        return float(by_item.mean()), *bootstrap_mean(by_item, lab.seed)

    n = len(right["none"])
    return Origin(
        checkpoint=name,
        step=step,
        accuracy={c: float(right[c].float().mean()) for c in CONDITIONS},
        ci={c: wilson(int(right[c].sum()), n) for c in CONDITIONS},
        accuracy_drop=estimate(right_by_item["none"] - right_by_item["harm"]),
        margin={c: float(margins[c].mean()) for c in CONDITIONS},
        margin_drop=estimate(margins["benign"] - margins["harm"]),
        attention_difference={c: float(attention[c].mean()) for c in CONDITIONS},
        attention_ci={c: bootstrap_mean(attention[c], lab.seed) for c in CONDITIONS},
        attention_drop=estimate(attention["none"] - attention["harm"]),
        refuse_contrast=float(contrast.mean()),
        refuse_contrast_ci=bootstrap_mean(_by_item(contrast), lab.seed),
        refuse_harm_realised=estimate(_by_item(realised)),
        refuse_harm_interaction=sum(h.value for h in by_head) / len(by_head),
        refuse_harm_z=sum(h.z["random_pairs"] for h in by_head) / len(by_head),
        refuse_harm_matched_z=sum(h.z["matched"] for h in by_head) / len(by_head),
        by_head=by_head,
        unexplained={str(m): _unexplained(lab, m) for m in sorted({m for m, _ in heads})},
    )


def _pair(lab: Lab, at: Head, refuse: int, harm: int) -> OriginHead:
    """The virtual pair at one head of this checkpoint against both nulls."""
    layer, head = at
    queries, keys = populations(lab, layer)
    pairs, z, value = feature_pairs(queries, keys, [(refuse, harm)]), dict[str, float](), 0.0
    claimed: tuple[NullName, ...] = ("random_pairs", "matched")
    for null in claimed:
        (test,) = null_tests(
            null,
            score_maps(lab.subject, layer),
            head,
            lab.mean_turn(layer),
            queries,
            keys,
            pairs,
            n=N_DRAWS,
            seed=seed_for(lab.seed, layer, head, null),
        )
        z[null], value = test.z, test.value
    return OriginHead(layer=layer, head=head, value=value, z=z)


def _unexplained(lab: Lab, layer: int) -> float:
    """Share of this checkpoint's stream that the source leaves over, all conditions, every token but the first."""
    written = [w for c in CONDITIONS for w in lab.written(c, "report", layer)]
    residual, error = torch.cat([w.residual[1:] for w in written]), torch.cat([w.error[1:] for w in written])
    return fraction_variance_unexplained(residual, error)


def _by_item(by_prompt: Tensor) -> Array:
    return item_means(by_prompt.double().cpu().numpy())
