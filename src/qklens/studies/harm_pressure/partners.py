"""Stage `partners`: of all features as keys, which does refuse-and-redirect push away, and which does it draw in?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qklens.analyses.contrasts import QUERY_ROLES, Role
from qklens.analyses.partners import Ranked, rank_partners
from qklens.data.render import Condition
from qklens.dictionaries.source import feature_index
from qklens.dictionaries.unit import unit_directions
from qklens.interventions.steer import Head
from qklens.models.scores import score_maps, virtual_reader
from qklens.studies.harm_pressure.transfer import SETS, transfer_lab
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Lab
from qklens.studies.populations import populations
from qklens.studies.results_around import Partner
from qklens.studies.roles import top_tokens

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
    centred = lab.subject.family.norm.centred
    units = {layer: unit_directions(directions[layer], centred=centred) for layer in layers}
    readers = {
        layer: torch.stack(
            [
                virtual_reader(
                    score_maps(lab.subject, layer), head, lab.mean_turn(layer), directions[layer][query], "query"
                )
                for at, head in heads
                if at == layer
            ]
        )
        for layer in layers
    }
    living = torch.stack([alive[layer] for layer in layers]).any(dim=0)
    ranked = rank_partners([[units[m].where(living) for m in layers]], [readers[m] for m in layers], TOP)
    index = living.nonzero()[:, 0]
    ends = [(*one, rank + 1) for rank, one in enumerate(_last(ranked.lowest))]
    taken = {place for place, *_ in ends}
    ends += [(*one, -(rank + 1)) for rank, one in enumerate(_last(ranked.highest)) if one[0] not in taken]
    mean, sd = float(ranked.mean[-1]), max(float(ranked.sd[-1]), 1e-12)
    role_of = {feature_index(lab.source, label): role for role, label in roles.items() if role not in QUERY_ROLES}
    where = _activation_by_set(lab, layers[0], items)
    partners = [
        Partner(
            feature=lab.source.labels[f],
            value=value,
            z=(value - mean) / sd,
            rank=rank,
            role=role_of.get(f),
            top_tokens=top_tokens(lab, layers[0], f),
            activation={name: float(values[f]) for name, values in where.items()},
        )
        for place, value, rank in ends
        for f in [int(index[place])]
    ]
    return StageOutput(results={"partners": [p.model_dump() for p in partners]})


def _last(end: Ranked) -> list[tuple[int, float]]:
    """Features and values at one end of the last column, the mean over heads."""
    pairs = zip(end.index[-1].tolist(), end.value[-1].tolist(), strict=True)
    return [(place, value) for place, value in pairs if place >= 0]


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
