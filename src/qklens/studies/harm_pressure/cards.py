"""Stage `cards`: what are the features that play the roles, on neutral text and under each condition?"""

from __future__ import annotations

from collections.abc import Mapping

from qklens.dictionaries.source import feature_index
from qklens.studies.cards import make_cards
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Lab

EXAMPLES = 6


def run(lab: Lab, layer: int, roles: Mapping[str, str]) -> StageOutput:
    """One card a feature, at the layer that the main heads read; prompts of the report half."""
    held: dict[str, list[str]] = {}
    for role, label in roles.items():
        held.setdefault(label, []).append(role)
    directions = lab.source.directions(layer)
    features = [f for label in held if bool(directions[f := feature_index(lab.source, label)].any())]
    if not features:
        return StageOutput(skipped=f"no role's feature writes resid_pre.{layer}")
    cards, text = make_cards(lab, layer, features, half="report", written=True, roles=held, k=EXAMPLES)
    return StageOutput(results={"cards": [card.model_dump() for card in cards], "card_text": text.model_dump()})
