"""Which keys of a set of prompts does refuse-and-redirect push the selected heads away from?

A candidate is any feature that is active on the set's intents or options under pressure, on a tenth of the prompts or
more. Its term with refuse-and-redirect on a prompt, norms at their observed values, is the mean over those tokens of
c ⟨q_refuse(answer), k_feature(j)⟩ (`realised`). Candidates are ranked by it from the negative end. Where
refuse-and-redirect is active on no prompt of the set nothing is pushed, and the ranking is by the virtual interaction,
weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.contrasts import QUERY_ROLES, Role
from qklens.analyses.nulls import NullName, NullTest, feature_pairs, null_tests, seed_for
from qklens.analyses.statistics import bootstrap_mean, item_means
from qklens.data.render import Condition, Prompt
from qklens.dictionaries.source import feature_index
from qklens.dictionaries.unit import unit_directions
from qklens.interventions.steer import Head
from qklens.models.scores import score_maps, virtual_reader
from qklens.studies.harm_pressure.span_terms import span_terms
from qklens.studies.harm_pressure.zscores import N_DRAWS
from qklens.studies.lab import Lab
from qklens.studies.populations import populations
from qklens.studies.results_around import PushedAway, PushedToken

SHOWN = 8
SHOWN_TOKENS = 5
MIN_SHARE = 0.1
SPANS = ("intent", "correct", "incorrect")
CLAIMED: tuple[NullName, ...] = ("random_pairs", "matched")


def pushed_away(lab: Lab, name: str, heads: Sequence[Head], roles: dict[Role, str]) -> list[PushedAway]:
    """The most negative partners among the features active on a set, and the key roles, most negative first."""
    refuse, layer = feature_index(lab.source, roles["refuse_redirect"]), heads[0][0]
    active = _active_share(lab, layer)
    candidates = (active >= MIN_SHARE).nonzero()[:, 0]
    if not len(candidates):
        return []
    terms = [span_terms(lab, head, "harm", "all", SPANS) for head in heads]
    realised = torch.stack([t.against("key", refuse)[candidates] for t in terms]).mean(dim=0)
    speaks = bool((realised != 0).any())
    order = (realised if speaks else _virtual(lab, heads, refuse, candidates)).argsort(stable=True).tolist()
    key_roles = {feature_index(lab.source, label): role for role, label in roles.items() if role not in QUERY_ROLES}
    named = [i for i in order[SHOWN:] if int(candidates[i]) in key_roles]
    shown = order[:SHOWN] + named
    tested = _tested(lab, heads, refuse, [int(candidates[i]) for i in shown])
    rows = []
    for i, tests in zip(shown, tested, strict=True):
        feature = int(candidates[i])
        by_prompt = torch.stack([t.by_prompt([(refuse, feature)])[:, 0] for t in terms]).mean(dim=0)
        by_item = item_means(by_prompt.numpy())
        rows.append(
            PushedAway(
                set=name,
                feature=lab.source.labels[feature],
                role=key_roles.get(feature),
                rank=order.index(i) + 1,
                of=len(order),
                ranked_by="realised" if speaks else "virtual",
                realised=(float(by_item.mean()), *bootstrap_mean(by_item, lab.seed)),
                heads=list(heads),
                virtual=[t.value for t in tests["random_pairs"]],
                z={null: [t.z for t in by_head] for null, by_head in tests.items()},
                active_share=float(active[feature]),
                activation={c: _on_intents(lab, c, layer, feature) for c in ("harm", "benign")},
                tokens=_tokens(lab, layer, feature),
            )
        )
    return rows


def _positions(prompt: Prompt) -> list[int]:
    return [p for name in SPANS for p in prompt.span(name)]


def _active_share(lab: Lab, layer: int) -> Tensor:
    """Share of the pressed prompts on whose intent or options each feature is active."""
    prompts, written = lab.prompts("harm", "all"), lab.written("harm", "all", layer)
    count = torch.zeros(len(lab.source.labels))
    for prompt, parts in zip(prompts, written, strict=True):
        count[parts.active.features_at(_positions(prompt)).unique().cpu()] += 1
    return count / len(prompts)


def _virtual(lab: Lab, heads: Sequence[Head], refuse: int, features: Tensor) -> Float[Tensor, " feature"]:
    """Virtual interaction of features with refuse-and-redirect, mean over heads."""
    total = torch.zeros(len(features))
    for layer, head in heads:
        directions = lab.source.directions(layer)
        maps, turn = score_maps(lab.subject, layer), lab.mean_turn(layer)
        reader = virtual_reader(maps, head, turn, directions[refuse], "query")
        centred = lab.subject.family.norm.centred
        rows = unit_directions(directions[features.to(directions.device)].clone(), centred=centred).rows
        total += (rows.to(reader) @ reader).float().cpu() / len(heads)
    return total


def _tested(lab: Lab, heads: Sequence[Head], refuse: int, features: list[int]) -> list[dict[NullName, list[NullTest]]]:
    """Each feature's pair with refuse-and-redirect against both nulls: one test a head."""
    found: list[dict[NullName, list[NullTest]]] = [{null: [] for null in CLAIMED} for _ in features]
    for layer, head in heads:
        queries, keys = populations(lab, layer)
        pairs = feature_pairs(queries, keys, [(refuse, f) for f in features])
        for null in CLAIMED:
            seed, turn = seed_for(lab.seed, layer, head, null), lab.mean_turn(layer)
            tests = null_tests(
                null, score_maps(lab.subject, layer), head, turn, queries, keys, pairs, n=N_DRAWS, seed=seed
            )
            for row, test in zip(found, tests, strict=True):
                row[null].append(test)
    return found


def _on_intents(lab: Lab, condition: Condition, layer: int, feature: int) -> float:
    """Mean activation on the intent's tokens."""
    written = lab.written(condition, "all", layer)
    rows = [
        float(parts.active.of(feature)[list(prompt.span("intent"))].mean())
        for prompt, parts in zip(lab.prompts(condition, "all"), written, strict=True)
    ]
    return float(np.mean(rows))


def _tokens(lab: Lab, layer: int, feature: int) -> list[PushedToken]:
    """The distinct tokens of intents and options on which it is most active under pressure, and where and how much."""
    best: dict[int, PushedToken] = {}
    decode = lab.subject.tokenizer.decode
    for prompt, parts in zip(lab.prompts("harm", "all"), lab.written("harm", "all", layer), strict=True):
        values = parts.active.of(feature)
        for span in SPANS:
            for position in prompt.span(span):
                token, value = prompt.tokens[position], float(values[position])
                if value > (best[token].activation if token in best else 0.0):
                    best[token] = PushedToken(
                        token=str(decode([token])), span="intent" if span == "intent" else "option", activation=value
                    )
    return sorted(best.values(), key=lambda at: -at.activation)[:SHOWN_TOKENS]
