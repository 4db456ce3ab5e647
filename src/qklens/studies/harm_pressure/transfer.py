"""Stage `transfer`: the same heads, roles and steering on other sets of withholding, symptoms and fraud.

Nothing is chosen again: heads, features and strength are the main set's, so no half of the others is held back. All
their items are measured, or a seeded sample of each, drawn as the main set's is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qklens.analyses.contrasts import QUERY_ROLES, ROLES, Role
from qklens.analyses.statistics import bootstrap_mean, item_means, wilson
from qklens.data.items import load_dataset
from qklens.data.render import CONDITIONS, Condition
from qklens.dictionaries.source import feature_index
from qklens.interventions.steer import Head
from qklens.studies.controls import find_controls
from qklens.studies.harm_pressure.pushed_away import pushed_away
from qklens.studies.harm_pressure.steering import N_RANDOM, query_steer
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Lab
from qklens.studies.opening import sample_items
from qklens.studies.result_types import Estimate
from qklens.studies.results_around import Transfer, TransferSteering
from qklens.studies.roles import role_direction

SETS = ("symptoms", "fraud")
PRESSED: tuple[Condition, ...] = ("harm", "benign")
Array = NDArray[np.float64]


def transfer_lab(lab: Lab, name: str, items: int | None) -> Lab:
    """The same subject and source on another set; nothing is chosen on it, so its halves are only a partition."""
    dataset = sample_items(load_dataset(name), items, lab.seed)
    other = Lab(lab.subject, dataset, lab.form, lab.seed)
    other.source = lab.source
    return other


def run(lab: Lab, heads: Sequence[Head], roles: dict[Role, str], strength: float, items: int | None) -> StageOutput:
    """Behaviour, attention, the roles' activations, steering with its controls, and which keys are pushed away."""
    labs = {name: transfer_lab(lab, name, items) for name in SETS}
    steered = {name: _steered(lab, other, heads, roles, strength) for name, other in labs.items()}
    rows = [row for name, other in labs.items() for row in _rows(other, name, heads, roles, steered[name])]
    pushed = [row for name, other in labs.items() for row in pushed_away(other, name, heads, roles)]
    return StageOutput(
        results={
            "transfer": [row.model_dump() for row in rows],
            "pushed_away": [row.model_dump() for row in pushed],
        }
    )


def _rows(
    lab: Lab, name: str, heads: Sequence[Head], roles: dict[Role, str], steered: dict[Condition, TransferSteering]
) -> list[Transfer]:
    layer = heads[0][0]
    readings = {c: lab.attention(c, "all") for c in CONDITIONS}
    margins = {c: _by_item(readings[c].margins) for c in CONDITIONS}
    attention = {
        c: _by_item(torch.stack([readings[c].difference[:, a, b] for a, b in heads]).mean(dim=0)) for c in CONDITIONS
    }

    def estimate(by_item: Array) -> Estimate:
        return float(by_item.mean()), *bootstrap_mean(by_item, lab.seed)

    rows = []
    for condition in CONDITIONS:
        right, n = int((readings[condition].margins > 0).sum()), len(readings[condition].margins)
        active = {role: estimate(_activation(lab, condition, layer, role, roles[role])) for role in ROLES}
        done = steered.get(condition)
        rows.append(
            Transfer(
                set=name,
                condition=condition,
                accuracy=right / n,
                ci=wilson(right, n),
                margin=float(margins[condition].mean()),
                margin_ci=bootstrap_mean(margins[condition], lab.seed),
                n=n,
                attention_difference=float(attention[condition].mean()),
                attention_ci=bootstrap_mean(attention[condition], lab.seed),
                margin_change=estimate(margins[condition] - margins["none"]) if condition in PRESSED else None,
                margin_minus_benign=estimate(margins["harm"] - margins["benign"]) if condition == "harm" else None,
                attention_change=estimate(attention[condition] - attention["none"]) if condition in PRESSED else None,
                refuse_activation=active["refuse_redirect"][0],
                role_activation=dict(active),
                steered_accuracy=done.accuracy if done else None,
                steered_margin=done.margin if done else None,
                steering=done,
            )
        )
    return rows


def _by_item(by_prompt: Tensor) -> Array:
    return item_means(by_prompt.double().numpy())


def _activation(lab: Lab, condition: Condition, layer: int, role: Role, label: str) -> Array:
    """A role's feature where it plays, one number an item.

    At the answer for the query roles; correct-answer on the correct less the incorrect option; harm-detection on both.
    """
    feature, values = feature_index(lab.source, label), []
    for prompt, parts in zip(lab.prompts(condition, "all"), lab.written(condition, "all", layer), strict=True):
        active = parts.active.of(feature)
        if role in QUERY_ROLES:
            values.append(active[list(prompt.spans["answer"])].mean())
        else:
            correct, incorrect = (active[list(prompt.span(name))].mean() for name in ("correct", "incorrect"))
            values.append(correct - incorrect if role == "correct_answer" else (correct + incorrect) / 2)
    return _by_item(torch.stack(values).cpu())


def _steered(
    lab: Lab, other: Lab, heads: Sequence[Head], roles: dict[Role, str], strength: float
) -> dict[Condition, TransferSteering]:
    """The main set's steering, unchanged, under pressure and under its benign twin, beside its controls."""
    feature = feature_index(lab.source, roles["refuse_redirect"])
    direction = role_direction(lab, feature, "refuse_redirect")
    taken = {feature_index(lab.source, label) for label in roles.values()}
    controls = find_controls(lab, direction, feature, "refuse_redirect", taken=taken, draws=N_RANDOM)
    make = query_steer(heads)
    found: dict[Condition, TransferSteering] = {}
    for condition in PRESSED:
        others = (controls.unrelated, *controls.random) if condition == "harm" else ()
        swept = other.work(condition, "all").sweep([make(d, strength) for d in (direction, *others)], heads)
        accuracy = (swept.margins > 0).float().mean(dim=1).tolist()
        by_item, n = _by_item(swept.margins[0]), swept.margins.shape[1]
        at_random = accuracy[2:]
        found[condition] = TransferSteering(
            strength=strength,
            accuracy=accuracy[0],
            ci=wilson(round(accuracy[0] * n), n),
            margin=float(by_item.mean()),
            margin_change=_change(other, condition, by_item),
            attention_difference=float(swept.attention[0].mean()),
            unrelated=accuracy[1] if others else None,
            random=(sum(at_random) / len(at_random), min(at_random), max(at_random)) if at_random else None,
        )
    return found


def _change(lab: Lab, condition: Condition, steered: Array) -> Estimate:
    by_item = steered - _by_item(lab.attention(condition, "all").margins)
    return float(by_item.mean()), *bootstrap_mean(by_item, lab.seed)
