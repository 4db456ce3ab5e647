"""Stage `transfer`: the same heads and the same steering on other sets of withholding, symptoms and fraud."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qklens.analyses.contrasts import Role
from qklens.analyses.statistics import bootstrap_mean, item_means, wilson
from qklens.data.items import load_dataset
from qklens.data.render import CONDITIONS
from qklens.dictionaries.source import feature_index
from qklens.interventions.steer import Head
from qklens.studies.harm_pressure.steering import query_steer
from qklens.studies.journal import StageOutput
from qklens.studies.lab import HALVES, Lab
from qklens.studies.results import Transfer
from qklens.studies.roles import role_direction

SETS = ("symptoms", "fraud")


def transfer_lab(lab: Lab, name: str, items: int | None) -> Lab:
    """The same subject and source on another set; nothing is chosen on it, so its halves are only a partition."""
    dataset = load_dataset(name)
    if items is not None:
        dataset = type(dataset)(dataset.name, dataset.items[: max(items, 4)], dataset.sha256)
    other = Lab(lab.subject, dataset, lab.form, lab.seed)
    other.source = lab.source
    return other


def run(lab: Lab, heads: Sequence[Head], roles: dict[Role, str], strength: float, items: int | None) -> StageOutput:
    """Behaviour, attention and the refuse feature on each set, and the steering chosen before, unchanged."""
    feature = feature_index(lab.source, roles["refuse_redirect"])
    direction = role_direction(lab, feature, "refuse_redirect")
    layer = heads[0][0]
    rows = []
    for name in SETS:
        other = transfer_lab(lab, name, items)
        for condition in CONDITIONS:
            readings = [other.attention(condition, half) for half in HALVES]
            margins = torch.cat([r.margins for r in readings])
            difference = torch.cat([r.difference for r in readings])
            right = int((margins > 0).sum())
            written = [w for half in HALVES for w in other.written(condition, half, layer)]
            steered = None
            if condition == "harm":
                steer = [query_steer(heads)(direction, strength)] if strength else []
                steered = torch.cat([other.work(condition, half).margins(steer) for half in HALVES])
            rows.append(
                Transfer(
                    set=name,
                    condition=condition,
                    accuracy=right / len(margins),
                    ci=wilson(right, len(margins)),
                    margin=float(margins.mean()),
                    margin_ci=bootstrap_mean(item_means(margins.double().numpy()), lab.seed),
                    n=len(margins),
                    attention_difference=float(torch.stack([difference[:, a, b] for a, b in heads]).mean()),
                    refuse_activation=float(torch.stack([w.active.of(feature)[-1] for w in written]).mean()),
                    steered_accuracy=None if steered is None else float((steered > 0).float().mean()),
                    steered_margin=None if steered is None else float(steered.mean()),
                )
            )
    return StageOutput(results={"transfer": [row.model_dump() for row in rows]})
