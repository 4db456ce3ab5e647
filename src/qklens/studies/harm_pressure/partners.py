"""Stage `partners`: of all features as keys, which does refuse-and-redirect push away, and which does it draw in?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qklens.analyses.contrasts import QUERY_ROLES, Role
from qklens.analyses.partners import partner_scores
from qklens.data.render import Condition
from qklens.dictionaries.source import feature_index
from qklens.interventions.steer import Head
from qklens.models.scores import score_maps
from qklens.studies.harm_pressure.lab import Lab
from qklens.studies.harm_pressure.roles import top_tokens
from qklens.studies.harm_pressure.transfer import SETS, transfer_lab
from qklens.studies.harm_pressure.zscores import populations
from qklens.studies.journal import StageOutput
from qklens.studies.results import Partner

TOP = 15


def run(lab: Lab, heads: Sequence[Head], roles: dict[Role, str], items: int | None) -> StageOutput:
    """Rank every feature from both ends, and say where each is active."""
    query = feature_index(lab.source, roles["refuse_redirect"])
    layers = sorted({layer for layer, _ in heads})
    directions = {layer: lab.source.directions(layer) for layer in layers}
    alive = {layer: populations(lab, layer)[1].alive for layer in layers}
    for layer in layers:
        if int(alive[layer].sum()) < 2:  # a handful of directions: z against all of them
            alive[layer] = torch.ones_like(alive[layer])
    scores = partner_scores(
        {layer: directions[layer][query] for layer in layers},
        directions,
        [(score_maps(lab.subject, layer), head, lab.mean_turn(layer)) for layer, head in heads],
        alive,
    )
    living = torch.stack([alive[layer] for layer in layers]).any(dim=0).nonzero()[:, 0].tolist()
    order = sorted(living, key=lambda f: float(scores.value[f]))
    ends = [(f, i + 1) for i, f in enumerate(order[:TOP])]
    ends += [(f, -(i + 1)) for i, f in enumerate(order[::-1][:TOP]) if f not in order[:TOP]]
    role_of = {feature_index(lab.source, label): role for role, label in roles.items() if role not in QUERY_ROLES}
    where = _activation_by_set(lab, layers[0], items)
    partners = [
        Partner(
            feature=lab.source.labels[f],
            value=float(scores.value[f]),
            z=float(scores.z[f]),
            rank=rank,
            role=role_of.get(f),
            top_tokens=top_tokens(lab, layers[0], f),
            activation={name: float(values[f]) for name, values in where.items()},
        )
        for f, rank in ends
    ]
    return StageOutput(results={"partners": [p.model_dump() for p in partners]})


def _activation_by_set(lab: Lab, layer: int, items: int | None) -> dict[str, torch.Tensor]:
    """Mean activation of every feature on the intent tokens, per set and condition."""
    labs: dict[str, tuple[Lab, Condition]] = {"harm": (lab, "harm"), "benign": (lab, "benign")}
    labs |= {name: (transfer_lab(lab, name, items), "harm") for name in SETS}
    means = {}
    for name, (one, condition) in labs.items():
        rows = [
            w.active.at(p.span("intent")).mean(dim=0)
            for p, w in zip(one.prompts(condition, "report"), one.written(condition, "report", layer), strict=True)
        ]
        means[name] = torch.stack(rows).mean(dim=0)
    return means
