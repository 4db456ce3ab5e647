"""Which features play the study's four roles: each by its own contrast, at its own place.

A source with a direction of the role's name plays it with that. All choices use the discovery half only, and none
looks at the interaction of two roles: pairs chosen by their interaction would be the extremes of a search, and their z
against random pairs extreme by construction.

    rank = contrast · min(its steadiness over items, 3)

Refuse-and-redirect must also speak where the model refuses, at the end of a harmful intent said alone: its rank is the
smaller of the two. Where several features rank alike, the one whose steering on the query side moves the margin most
is taken. Correct-answer is the belief stage's feature where it writes the layer that the heads read. One feature may
play a role on the query side and another on the key side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.contrasts import QUERY_ROLES, ROLES, Role, consistency, contrast
from qklens.analyses.interactions import PairTerms, mean_terms
from qklens.analyses.lens import HeadLens
from qklens.analyses.statistics import item_means
from qklens.analyses.weighting import CONTRASTIVE, REALISED, SHARE, Weighting
from qklens.data.render import Condition
from qklens.dictionaries.source import FeatureSource, feature_index
from qklens.errors import QklensError, nearest
from qklens.interventions.direction import Direction, feature_direction
from qklens.interventions.steer import Head, Steer
from qklens.studies.lab import Lab
from qklens.studies.results import RoleCandidate

_BY_CONTRAST, _FINALISTS, _SHOWN = 24, 6, 8
_TRIALS = (-1.0, -2.0, -4.0)


@dataclass(frozen=True)
class Roles:
    """The chosen feature of each role, at the layer that the main heads read."""

    layer: int
    chosen: dict[Role, int]


def typical_activation(lab: Lab, feature: int, role: Role) -> dict[int, float]:
    """Per layer, the feature's largest activation where its role plays, on the discovery half."""
    condition: Condition = "none" if role in ("need_answer", "correct_answer") else "harm"
    spans = ("answer",) if role in QUERY_ROLES else ("correct", "incorrect")
    result = {}
    for layer in lab.source.layers:
        values = [
            w.active.of(feature)[[p for s in spans for p in prompt.span(s)]].abs().max()
            for prompt, w in zip(
                lab.prompts(condition, "discovery"), lab.written(condition, "discovery", layer), strict=True
            )
        ]
        result[layer] = float(torch.stack(values).max())
    return result


def role_direction(lab: Lab, feature: int, role: Role) -> Direction:
    """A role's feature as a direction to steer along."""
    return feature_direction(lab.source, feature, typical_activation(lab, feature, role))


def find_roles(
    lab: Lab, heads: Sequence[Head], belief: str | None = None, named: Mapping[str, str] = MappingProxyType({})
) -> tuple[Roles, list[RoleCandidate]]:
    """Choose a feature for each role at the layer of the first head, with the ranked candidates as evidence.

    Args:
        lab: the bench.
        heads: the answer-selection heads.
        belief: the belief stage's correct-answer feature.
        named: features that a person chose, by role; they are taken as they are.

    Raises:
        QklensError: an unknown role, an unknown feature, or one that does not write the heads' layer.
    """
    layer = heads[0][0]
    by_person = named_roles(lab.source, layer, named)
    here = [lab.lens(*head) for head in heads if head[0] == layer]
    readings = lab.activation_readings("discovery", layer)
    by_item = {role: item_means(contrast(readings, role)) for role in ROLES}
    ranks = {role: _rank(values) for role, values in by_item.items()}
    ranks["refuse_redirect"] = torch.minimum(ranks["refuse_redirect"], _rank(item_means(readings.refusal)))
    order = {role: _order(lab, role, ranks[role]) for role in ROLES}
    chosen: dict[Role, int] = {role: order[role][0] for role in ROLES}
    if "refuse_redirect" not in by_person:
        chosen["refuse_redirect"] = _causal_choice(
            lab, heads, _near_the_top(order["refuse_redirect"], ranks["refuse_redirect"])
        )
    if belief is not None and "correct_answer" not in lab.source.labels:
        known = lab.source.labels.index(belief)
        if bool(lab.source.directions(layer)[known].any()):
            chosen["correct_answer"] = known
    chosen |= by_person
    calm = _terms(lab, here, "none", CONTRASTIVE)
    interaction: dict[Role, Tensor] = {
        "need_answer": _summed(t.marginal("query") for t in calm),
        "correct_answer": _summed(t.against("key", chosen["need_answer"]) for t in calm),
        "refuse_redirect": _summed(t.marginal("query") for t in _terms(lab, here, "harm", SHARE)),
        "harm_detection": _summed(
            t.against("key", chosen["refuse_redirect"]) for t in _terms(lab, here, "harm", REALISED)
        ),
    }
    refusal = item_means(readings.refusal).mean(dim=0)
    others = lab.activation_readings("report", layer)
    elsewhere = {role: contrast(others, role).mean(dim=0) for role in ROLES}
    table = [
        RoleCandidate(
            role=name,
            feature=lab.source.labels[feature],
            contrast=float(by_item[name].mean(dim=0)[feature]),
            contrast_report=float(elsewhere[name][feature]),
            steadiness=float(consistency(by_item[name])[feature]),
            refusal=float(refusal[feature]),
            interaction=float(interaction[name][feature]),
            chosen=feature == chosen[name],
            named=name in by_person and feature == chosen[name],
            layer=layer,
            top_tokens=top_tokens(lab, layer, feature),
        )
        for name in ROLES
        for feature in dict.fromkeys([chosen[name], *order[name][:_SHOWN]])
    ]
    return Roles(layer, chosen), table


def named_roles(source: FeatureSource, layer: int, named: Mapping[str, str]) -> dict[Role, int]:
    """The features that a person gave roles, checked.

    Raises:
        QklensError: an unknown role or feature, or a feature that writes nothing at the layer.
    """
    found = known_roles(source, named)
    for role, feature in found.items():
        if not bool(source.directions(layer)[feature].any()):
            raise QklensError(
                f"role {role}: feature {source.labels[feature]!r} writes nothing to resid_pre.{layer}, which the "
                "answer-selection heads read; choose a feature that reads this layer or an earlier one"
            )
    return found


def known_roles(source: FeatureSource, named: Mapping[str, str]) -> dict[Role, int]:
    """The features that a person gave roles, by name alone.

    Raises:
        QklensError: an unknown role or feature.
    """
    found: dict[Role, int] = {}
    for name, label in named.items():
        if name not in ROLES:
            raise QklensError(f"role {name!r} is unknown; expected one of {list(ROLES)}{nearest(name, ROLES)}")
        found[ROLES[ROLES.index(name)]] = feature_index(source, label)
    return found


def _rank(by_item: Float[Tensor, "item feature"]) -> Float[Tensor, " feature"]:
    return by_item.mean(dim=0).clamp(min=0) * consistency(by_item).clamp(min=0, max=3)


def _order(lab: Lab, role: Role, rank: Float[Tensor, " feature"]) -> list[int]:
    """Features by rank; a direction of the role's name stands for all."""
    if role in lab.source.labels:
        return [lab.source.labels.index(role)]
    order = rank.argsort(descending=True, stable=True)[:_BY_CONTRAST].tolist()
    return [f for f in order if rank[f] > 0] or order[:1]


def _near_the_top(order: Sequence[int], rank: Float[Tensor, " feature"]) -> list[int]:
    """The first feature and those that rank at least half as high, six at most."""
    return [f for f in order if rank[f] >= 0.5 * rank[order[0]]][:_FINALISTS] or list(order[:1])


def top_tokens(lab: Lab, layer: int, feature: int, k: int = 5) -> list[str]:
    """The distinct tokens on which a feature is most active in the study's prompts."""
    best: dict[int, float] = {}
    for condition in ("none", "harm", "benign"):
        for prompt, written in zip(
            lab.prompts(condition, "discovery"), lab.written(condition, "discovery", layer), strict=True
        ):
            values = written.active.of(feature)
            for position in values.topk(min(3, len(values))).indices.tolist():
                token = prompt.tokens[position]
                if values[position] > best.get(token, 0.0):
                    best[token] = float(values[position])
    ordered = sorted(best, key=lambda t: -best[t])[:k]
    return [str(lab.subject.tokenizer.decode([token])).replace("\n", "\\n") for token in ordered]


def _summed(rows: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(rows)).sum(dim=0)


def _terms(lab: Lab, lenses: Sequence[HeadLens], condition: Condition, weighting: Weighting) -> list[PairTerms]:
    written = lab.written(condition, "discovery", lenses[0].layer)
    return [mean_terms(lens, lab.prompts(condition, "discovery"), written, weighting) for lens in lenses]


def _causal_choice(lab: Lab, heads: Sequence[Head], finalists: Sequence[int]) -> int:
    """The finalist whose negative steering on the heads' query side raises the margin under harm most.

    A prompt's margin counts up to the mean clean one, so that no few prompts decide.
    """
    if len(finalists) == 1:
        return finalists[0]
    full = float(lab.attention("none", "discovery").margins.mean().abs())

    def best_margin(feature: int) -> float:
        direction = role_direction(lab, feature, "refuse_redirect")
        if any(layer not in direction.layers for layer, _ in heads) or max(direction.typical.values()) == 0:
            return float("-inf")
        steers = [Steer(direction, s, side="query", heads=tuple(heads), tokens=("answer",)) for s in _TRIALS]
        margins = lab.work("harm", "discovery").margins_each(steers).clamp(min=-full, max=full)
        return float(margins.mean(dim=1).max())

    return max(finalists, key=best_margin)
