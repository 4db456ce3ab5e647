"""Which features play the study's four roles: ranked by contrast, then by what they do at the chosen heads.

A source with a direction of the role's name plays it with that. All choices use the discovery half only. The contrast
says when a feature is active; the interaction says whether it matters where the answer is selected. The final choice of
refuse-and-redirect is causal: of the best candidates the one whose steering on the query side moves the margin most.
Harm-detection is chosen by its contrast alone: chosen by its interaction with refuse-and-redirect, its z against random
pairs would be the smallest of a search, and low by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.contrasts import QUERY_ROLES, ROLES, Role, consistency, contrast, item_means
from qklens.analyses.interactions import HeadLens, Weighting, weights_of
from qklens.data.render import Condition
from qklens.interventions.direction import Direction, feature_direction
from qklens.interventions.steer import Head, Steer
from qklens.studies.harm_pressure.lab import Lab
from qklens.studies.results import RoleCandidate

_BY_CONTRAST, _BY_INTERACTION = 24, 6
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
            w.parts.activations[[p for s in spans for p in prompt.span(s)], feature].abs().max()
            for prompt, w in zip(
                lab.prompts(condition, "discovery"), lab.written(condition, "discovery", layer), strict=True
            )
        ]
        result[layer] = float(torch.stack(values).max())
    return result


def role_direction(lab: Lab, feature: int, role: Role) -> Direction:
    """A role's feature as a direction to steer along."""
    return feature_direction(lab.source, feature, typical_activation(lab, feature, role))


def find_roles(lab: Lab, heads: Sequence[Head]) -> tuple[Roles, list[RoleCandidate]]:
    """Choose a feature for each role at the layer of the first head, with the ranked candidates as evidence."""
    layer = heads[0][0]
    here = [lab.lens(*head) for head in heads if head[0] == layer]
    readings = lab.activation_readings("discovery", layer)
    effects = {role: consistency(item_means(contrast(readings, role))) for role in ROLES}
    sizes: dict[Role, Tensor] = {role: contrast(readings, role).mean(dim=0) for role in ROLES}
    named = {role: [lab.source.labels.index(role)] for role in ROLES if role in lab.source.labels}
    shortlist = {role: named.get(role) or _shortlist(effects[role], sizes[role]) for role in ROLES}
    query_side = {
        "need_answer": _query_effect(lab, here, "none", "contrastive"),
        "refuse_redirect": _query_effect(lab, here, "harm", "share"),
    }
    chosen: dict[Role, int] = {}
    interaction: dict[Role, Tensor] = {}
    signs: tuple[tuple[Role, float], ...] = (("need_answer", 1.0), ("refuse_redirect", -1.0))
    for role, sign in signs:
        effect = query_side[role]
        specific = _specific(role, shortlist[role], sizes)
        finalists = sorted(specific, key=lambda f: -sign * float(effect[f]))[:_BY_INTERACTION]
        chosen[role] = _causal_choice(lab, heads, finalists) if role == "refuse_redirect" else finalists[0]
        interaction[role] = effect
    interaction["correct_answer"] = _key_effect(lab, here, "none", "contrastive", chosen["need_answer"])
    interaction["harm_detection"] = _key_effect(lab, here, "harm", "realised", chosen["refuse_redirect"])
    free = [f for f in shortlist["correct_answer"] if f not in chosen.values()] or shortlist["correct_answer"]
    chosen["correct_answer"] = max(free, key=lambda f: float(interaction["correct_answer"][f]))
    harmful = _specific("harm_detection", shortlist["harm_detection"], sizes)
    chosen["harm_detection"] = next((f for f in harmful if f not in chosen.values()), harmful[0])
    table = [
        RoleCandidate(
            role=name,
            feature=lab.source.labels[feature],
            contrast=float(effects[name][feature]),
            interaction=float(interaction[name][feature]),
            chosen=feature == chosen[name],
            layer=layer,
            top_tokens=top_tokens(lab, layer, feature),
        )
        for name in ROLES
        for feature in _for_the_table(shortlist[name], interaction[name], chosen[name])
    ]
    return Roles(layer, chosen), table


def top_tokens(lab: Lab, layer: int, feature: int, k: int = 5) -> list[str]:
    """The distinct tokens on which a feature is most active in the study's prompts."""
    best: dict[int, float] = {}
    for condition in ("none", "harm", "benign"):
        for prompt, written in zip(
            lab.prompts(condition, "discovery"), lab.written(condition, "discovery", layer), strict=True
        ):
            values = written.parts.activations[:, feature]
            for position in values.topk(min(3, len(values))).indices.tolist():
                token = prompt.tokens[position]
                if values[position] > best.get(token, 0.0):
                    best[token] = float(values[position])
    ordered = sorted(best, key=lambda t: -best[t])[:k]
    return [str(lab.subject.tokenizer.decode([token])).replace("\n", "\\n") for token in ordered]


def _for_the_table(shortlist: Sequence[int], interaction: Tensor, chosen: int) -> list[int]:
    """The chosen feature, then the eight others that interact most."""
    ranked = sorted(shortlist, key=lambda f: -abs(float(interaction[f])))[:8]
    return list(dict.fromkeys([chosen, *ranked]))


def _shortlist(effect: Float[Tensor, " feature"], size: Float[Tensor, " feature"]) -> list[int]:
    """Features with the largest positive contrast, weighted by how steady it is over items."""
    rank = size.clamp(min=0) * effect.clamp(min=0, max=3)
    order = rank.argsort(descending=True, stable=True)[:_BY_CONTRAST].tolist()
    return [f for f in order if rank[f] > 0] or order[:1]


def _specific(role: Role, features: Sequence[int], sizes: dict[Role, Tensor]) -> list[int]:
    """Of a role's features those that do not rather play another one; all of them where none is left.

    Refuse-and-redirect speaks at the answer more than at the tokens that hold the harm; harm-detection tells harm from
    benign more than the correct option from the incorrect one.
    """
    rival: dict[Role, Role] = {"refuse_redirect": "harm_detection", "harm_detection": "correct_answer"}
    if role not in rival:
        return list(features)
    return [f for f in features if sizes[role][f] > sizes[rival[role]][f].abs()] or list(features)


def _query_effect(lab: Lab, lenses: Sequence[HeadLens], condition: Condition, weighting: Weighting) -> Tensor:
    """Each query source's total term with all keys, mean over prompts, summed over heads."""
    total = torch.zeros(len(lab.source.labels))
    prompts = lab.prompts(condition, "discovery")
    written = lab.written(condition, "discovery", lenses[0].layer)
    for lens in lenses:
        for prompt, parts in zip(prompts, written, strict=True):
            position = prompt.spans["answer"][0]
            weights = weights_of(lens, prompt, parts, weighting)
            key = lens.keys(parts, weights).sum(dim=0)
            total += (lens.maps.scale * lens.query(parts, position)[:-2] @ key).cpu() / len(prompts)
    return total


def _key_effect(lab: Lab, lenses: Sequence[HeadLens], condition: Condition, weighting: Weighting, query: int) -> Tensor:
    """Each key source's term with one query feature, mean over prompts, summed over heads."""
    total = torch.zeros(len(lab.source.labels))
    prompts = lab.prompts(condition, "discovery")
    written = lab.written(condition, "discovery", lenses[0].layer)
    for lens in lenses:
        for prompt, parts in zip(prompts, written, strict=True):
            position = prompt.spans["answer"][0]
            weights = weights_of(lens, prompt, parts, weighting)
            total += (
                lens.maps.scale * lens.keys(parts, weights)[:-2] @ lens.query(parts, position)[query]
            ).cpu() / len(prompts)
    return total


def _causal_choice(lab: Lab, heads: Sequence[Head], finalists: Sequence[int]) -> int:
    """The finalist whose negative steering on the heads' query side raises the margin under harm most.

    A prompt's margin counts up to the mean clean one, so that no few prompts decide.
    """
    full = float(lab.attention("none", "discovery").margins.mean().abs())

    def best_margin(feature: int) -> float:
        direction = role_direction(lab, feature, "refuse_redirect")
        if any(layer not in direction.layers for layer, _ in heads) or max(direction.typical.values()) == 0:
            return float("-inf")
        return max(
            float(
                lab.work("harm", "discovery")
                .margins([Steer(direction, s, side="query", heads=tuple(heads), tokens=("answer",))])
                .clamp(min=-full, max=full)
                .mean()
            )
            for s in _TRIALS
        )

    return max(finalists, key=best_margin)
