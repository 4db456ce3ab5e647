"""Stage `error_terms`: how much of refuse-and-redirect's effect runs through what the dictionary leaves unexplained?

Two answers side by side. The algebra, norms held: the row of refuse-and-redirect in the pair table, split by what it
meets on the key side. And the cause, norms recomputed: the error that the selecting heads read is replaced, in their
query, in their keys at the options, in all their keys, or in both, and refuse-and-redirect is steered on their query
side as in `steer_query`, with and without. What is lost of that steering's effect ran through the error:

    lost = 1 − (steered − unsteered, error replaced) / (steered − unsteered, error as it is)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qklens.analyses.contrasts import Role
from qklens.analyses.interactions import mean_terms
from qklens.analyses.lens import BIAS, ERROR
from qklens.analyses.replaced_error import REPLACEMENTS, Deltas, Replacement, place_means, replaced
from qklens.analyses.statistics import bootstrap_mean, bootstrap_ratio, item_means
from qklens.analyses.weighting import REALISED
from qklens.data.render import Condition
from qklens.dictionaries.source import feature_index
from qklens.interventions.points import Intervention, Point
from qklens.interventions.shift import StreamShift
from qklens.interventions.steer import ALL_TOKENS, Head, Steer
from qklens.studies.harm_pressure.steering import query_steer
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Lab
from qklens.studies.result_types import Estimate
from qklens.studies.results_around import ErrorEffect, ErrorPlace, ErrorTerms
from qklens.studies.roles import role_direction

Array = NDArray[np.float64]
KEY_SPANS: dict[ErrorPlace, tuple[str, ...]] = {"options": ("correct", "incorrect")}
PLACES: tuple[ErrorPlace, ...] = ("query", "options", "prompt", "both")
N_RANDOM = 3
FALLBACK_STRENGTH = -1.0
"""Where no strength of steering helped: the effect of one whole activation taken off is measured then."""


def run(lab: Lab, heads: Sequence[Head], roles: dict[Role, str], strength: float | None) -> StageOutput:
    """Split the refuse-and-redirect row by kind of key source, and replace the error.

    Args:
        lab: the bench.
        heads: the selecting heads.
        roles: the feature of each role.
        strength: of the steering on the query side; None where the task is not solved, and nothing is steered.
    """
    split = [row for head in heads for row in _split(lab, head, roles)]
    effects = [] if strength is None else replace_errors(lab, heads, roles, strength or FALLBACK_STRENGTH)
    return StageOutput(
        results={
            "error_terms": [row.model_dump() for row in split],
            "error_effects": [row.model_dump() for row in effects],
        }
    )


def _split(lab: Lab, head: Head, roles: dict[Role, str]) -> list[ErrorTerms]:
    feature = feature_index(lab.source, roles["refuse_redirect"])
    layer, h = head
    lens, rows = lab.lens(layer, h), []
    conditions: tuple[Condition, ...] = ("harm", "benign")
    for condition in conditions:
        prompts, written = lab.prompts(condition, "report"), lab.written(condition, "report", layer)
        means = mean_terms(lens, prompts, written, REALISED)
        by_prompt = []
        for query, keys in zip(means.query, means.key, strict=True):
            terms = (means.scale * keys.vectors @ query.of(feature)).double().cpu().numpy()
            by_prompt.append([terms[:-2].sum(), terms[-2], terms[-1]])
        by_item = item_means(np.asarray(by_prompt))
        kinds = ("features", BIAS, ERROR)
        rows.append(
            ErrorTerms(
                layer=layer,
                head=h,
                condition=condition,
                through={kind: float(by_item[:, i].mean()) for i, kind in enumerate(kinds)},
                ci={kind: bootstrap_mean(by_item[:, i], lab.seed) for i, kind in enumerate(kinds)},
                total=float(by_item.sum(axis=1).mean()),
            )
        )
    return rows


@dataclass(frozen=True, eq=False)
class _State:
    """The error as it is (no place), or replaced somewhere; several draws of it count as their mean."""

    place: ErrorPlace | None
    kind: Replacement | None
    draws: tuple[dict[int, Deltas], ...]


def replace_errors(lab: Lab, heads: Sequence[Head], roles: dict[Role, str], strength: float) -> list[ErrorEffect]:
    """Every replacement at every place, unsteered and steered, in one sweep; the first row is the error as it is."""
    direction = role_direction(lab, feature_index(lab.source, roles["refuse_redirect"]), "refuse_redirect")
    steer = query_steer(heads)(direction, strength)
    states = _states(lab, heads, "harm", N_RANDOM)
    points: list[Point] = []
    for state in states:
        for deltas in state.draws:
            points += [_point(heads, state.place, deltas, how) for how in (None, steer)]
    swept = lab.work("harm", "report").sweep(points, heads=heads, idle_ok=True)
    measures = {"margin": swept.margins, "attention": swept.attention.mean(dim=-1)}
    calm = _calm_margins(lab, heads)
    rows: list[ErrorEffect] = []
    base: dict[str, tuple[Array, Array]] = {}
    at = 0
    for state in states:
        n = len(state.draws)
        mine: dict[str, tuple[Array, Array]] = {}
        for name, values in measures.items():
            plain, steered = (_by_item(values[at + k : at + 2 * n : 2]) for k in (0, 1))
            mine[name] = plain, steered
        base = base or mine
        rows.append(_row(lab, state, mine, base, calm.get((state.place, state.kind)), _edit_norm(lab, heads, state)))
        at += 2 * n
    return rows


def _states(lab: Lab, heads: Sequence[Head], condition: Condition, draws: int) -> list[_State]:
    layers = sorted({layer for layer, _ in heads})
    prompts = lab.prompts(condition, "report")
    means = {
        m: place_means(lab.prompts(condition, "discovery"), lab.written(condition, "discovery", m)) for m in layers
    }

    def made(kind: Replacement, seed: int) -> dict[int, Deltas]:
        return {m: replaced(kind, prompts, lab.written(condition, "report", m), means[m], seed) for m in layers}

    states = [_State(None, None, ({},))]
    every = {
        kind: tuple(made(kind, lab.seed + i) for i in range(draws if kind == "random" else 1)) for kind in REPLACEMENTS
    }
    return states + [_State(place, kind, every[kind]) for place in PLACES for kind in REPLACEMENTS]


def _point(
    heads: Sequence[Head], place: ErrorPlace | None, deltas: dict[int, Deltas], steer: Steer | None
) -> list[Intervention]:
    """One state of the error, with or without steering; query and keys are edited once each."""
    edits: list[Intervention] = []
    if place in ("options", "prompt", "both"):
        edits.append(StreamShift("error in keys", deltas, tuple(heads), "key", KEY_SPANS.get(place, (ALL_TOKENS,))))
    if place in ("query", "both"):
        plus: dict[int, Tensor] = {}
        if steer is not None:
            d = steer.direction
            plus = {m: steer.strength * d.typical[m] * d.vectors[m] for m in steer.layer_list}
        edits.append(StreamShift("error in query", deltas, tuple(heads), "query", ("answer",), plus))
    elif steer is not None:
        edits.append(steer)
    return edits


def _calm_margins(lab: Lab, heads: Sequence[Head]) -> dict[tuple[ErrorPlace | None, Replacement | None], Array]:
    """The same replacements under benign intent, unsteered: what they do where there is nothing to explain."""
    states = _states(lab, heads, "benign", 1)
    points = [_point(heads, s.place, s.draws[0], None) for s in states]
    margins = lab.work("benign", "report").margins_each(points, idle_ok=True)
    clean = _by_item(margins[:1])
    return {(s.place, s.kind): _by_item(row[None]) - clean for s, row in zip(states, margins, strict=True)}


def _by_item(draws: Tensor) -> Array:
    """The mean over draws, then over both orders of each item."""
    return item_means(draws.double().mean(dim=0).numpy())


def _edit_norm(lab: Lab, heads: Sequence[Head], state: _State) -> float:
    """Mean over the edited tokens of ‖e' − e‖ / ‖x‖, at the first head's layer."""
    if state.place is None:
        return 0.0
    layer = heads[0][0]
    prompts, written = lab.prompts("harm", "report"), lab.written("harm", "report", layer)
    spans = {"query": ("answer",), **KEY_SPANS}.get(state.place)
    shares = []
    for prompt, parts, delta in zip(prompts, written, state.draws[0][layer], strict=True):
        positions = range(len(prompt.tokens)) if spans is None else [p for s in spans for p in prompt.span(s)]
        at = list(positions)
        shares.append(delta[at].norm(dim=-1) / parts.residual[at].norm(dim=-1))
    return float(torch.cat(shares).mean())


def _row(
    lab: Lab,
    state: _State,
    mine: dict[str, tuple[Array, Array]],
    base: dict[str, tuple[Array, Array]],
    calm: Array | None,
    norm: float,
) -> ErrorEffect:
    def estimate(by_item: Array) -> Estimate:
        return float(by_item.mean()), *bootstrap_mean(by_item, lab.seed)

    def lost(name: str) -> Estimate | None:
        whole, left = (steered - plain for plain, steered in (base[name], mine[name]))
        low, high = bootstrap_mean(whole, lab.seed)
        if low <= 0 <= high:  # steering does nothing here, so there is nothing to lose a share of
            return None
        return float((whole - left).sum() / whole.sum()), *bootstrap_ratio(whole - left, whole, lab.seed)

    effects = {name: estimate(steered - plain) for name, (plain, steered) in mine.items()}
    return ErrorEffect(
        place=state.place,
        error=state.kind,
        draws=len(state.draws),
        edit_norm=norm,
        margin=estimate(mine["margin"][0]),
        attention=estimate(mine["attention"][0]),
        margin_change=estimate(mine["margin"][0] - base["margin"][0]),
        attention_change=estimate(mine["attention"][0] - base["attention"][0]),
        benign_margin_change=None if calm is None else estimate(calm),
        steering_margin=effects["margin"],
        steering_attention=effects["attention"],
        lost_margin=lost("margin"),
        lost_attention=lost("attention"),
    )
