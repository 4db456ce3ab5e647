"""Stage `heads`: the answer-selection heads, by attention, by the letter they carry, and by what a patch restores."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qklens.analyses.attended import attended_tokens, place_mass
from qklens.analyses.heads import (
    candidate_heads,
    clean_pattern_patch,
    fewest,
    first_heads,
    mean_ablation,
    restored_share,
)
from qklens.analyses.readings import SPANS, read_patterns
from qklens.analyses.statistics import bootstrap_mean, bootstrap_ratio, wilson
from qklens.data.render import CONDITIONS, Condition, Prompt
from qklens.interventions.patch import PatternPatch
from qklens.interventions.steer import Head
from qklens.studies.harm_pressure.lab import Half, Lab
from qklens.studies.journal import StageOutput
from qklens.studies.results import AttendedToken, HeadRow, HeadsDetails

N_RANDOM_HEADS = 10
SHOWN_TOKENS = 5
PRESSED: tuple[Literal["harm"], Literal["benign"]] = ("harm", "benign")


def run(lab: Lab) -> StageOutput:
    """Find candidates and select on the discovery half; report every number on the other."""
    calm = lab.attention("none", "discovery")
    candidates = candidate_heads(calm.difference.mean(dim=0), calm.letter_logit.mean(dim=0))
    patch = _patch(lab, "discovery", candidates)
    harm, clean = lab.work("harm", "discovery"), calm.margins
    harmed = harm.margins()
    lost = clean - lab.attention("harm", "discovery").margins
    low, _ = bootstrap_mean(_items(lost), lab.seed)
    ranked = candidates
    if low > 0:  # without a loss there is nothing to restore, and the ranking by attention and letter stands
        alone = {h: restored_share(harm.margins([PatternPatch({h: patch.rows[h]})]), harmed, clean) for h in candidates}
        ranked = sorted(candidates, key=lambda h: -alone[h])
    curve = [
        restored_share(harm.margins([PatternPatch({h: patch.rows[h] for h in some})]), harmed, clean)
        for some in first_heads(ranked)
    ]
    selected = ranked[: fewest(curve)]
    details = _joint(lab, selected, curve)
    patterns = {c: read_patterns(lab.work(c, "report"), ranked) for c in CONDITIONS}
    rows = [_row(lab, head, {c: patterns[c][head] for c in CONDITIONS}, selected=head in selected) for head in ranked]
    return StageOutput(
        results={"heads": [row.model_dump() for row in rows], "heads_details": details.model_dump()},
        state={"selected": [list(head) for head in selected], "ranked": [list(head) for head in ranked]},
    )


def _patch(lab: Lab, half: Half, heads: list[Head]) -> PatternPatch:
    rows = read_patterns(lab.work("none", half), heads)
    return clean_pattern_patch(lab.prompts("none", half), rows, lab.prompts("harm", half), heads)


def _row(lab: Lab, head: Head, patterns: dict[Condition, list[Tensor]], *, selected: bool) -> HeadRow:
    layer, h = head
    prompts: dict[Condition, list[Prompt]] = {c: lab.prompts(c, "report") for c in CONDITIONS}
    tokenizer = lab.subject.tokenizer
    readings = {c: lab.attention(c, "report") for c in CONDITIONS}
    none, harm = readings["none"], readings["harm"]
    difference = {c: readings[c].difference[:, layer, h] for c in CONDITIONS}
    patched = lab.work("harm", "report").margins([_patch(lab, "report", [head])])
    ablated = lab.work("none", "report").margins([mean_ablation(lab.attention("none", "discovery"), head)])
    by_item = {c: _items(difference[c]) for c in CONDITIONS}
    change = {c: by_item[c] - by_item["none"] for c in PRESSED}
    return HeadRow(
        layer=layer,
        head=h,
        attention_difference_none=float(difference["none"].mean()),
        attention_difference_harm=float(difference["harm"].mean()),
        attention_difference_benign=float(difference["benign"].mean()),
        attention_difference_ci=bootstrap_mean(by_item["none"], lab.seed),
        attention={
            c: dict(zip(SPANS, readings[c].mass[:, layer, h].mean(dim=0).tolist(), strict=True)) for c in CONDITIONS
        },
        attention_by_place={c: place_mass(prompts[c], patterns[c]) for c in CONDITIONS},
        attention_change={c: (float(change[c].mean()), *bootstrap_mean(change[c], lab.seed)) for c in PRESSED},
        top_tokens=[
            AttendedToken(token=str(tokenizer.decode([at.token])), span=at.place, attention=at.attention)
            for at in attended_tokens(prompts, patterns, SHOWN_TOKENS)
        ],
        letter_logit=float(none.letter_logit[:, layer, h].mean()),
        letter_logit_harm=float(harm.letter_logit[:, layer, h].mean()),
        ablation_drop=float((none.margins - ablated).mean()),
        restores_when_patched=restored_share(patched, harm.margins, none.margins),
        selected=selected,
    )


def _joint(lab: Lab, selected: list[Head], curve: list[float]) -> HeadsDetails:
    subject = lab.subject
    harm = lab.work("harm", "report")
    clean, harmed = lab.attention("none", "report").margins, lab.attention("harm", "report").margins
    patched = harm.margins([_patch(lab, "report", selected)])
    every = [(layer, head) for layer in range(subject.n_layers) for head in range(subject.n_heads)]
    others = [head for head in every if head not in selected]
    generator = torch.Generator().manual_seed(lab.seed)
    at_random = []
    for _ in range(N_RANDOM_HEADS if others else 0):
        drawn = [others[i] for i in torch.randperm(len(others), generator=generator)[: len(selected)].tolist()]
        at_random.append(restored_share(harm.margins([_patch(lab, "report", drawn)]), harmed, clean))
    right = int((patched > 0).sum())
    return HeadsDetails(
        selected=selected,
        attention_difference_map={c: lab.attention(c, "discovery").difference.mean(dim=0).tolist() for c in CONDITIONS},
        letter_logit_map=lab.attention("none", "discovery").letter_logit.mean(dim=0).tolist(),
        restored=restored_share(patched, harmed, clean),
        restored_ci=bootstrap_ratio(_items(patched - harmed), _items(clean - harmed), lab.seed),
        patched_accuracy=right / len(patched),
        patched_accuracy_ci=wilson(right, len(patched)),
        patched_margin=float(patched.mean()),
        harm_margin=float(harmed.mean()),
        none_margin=float(clean.mean()),
        restored_random_heads=sum(at_random) / max(len(at_random), 1),
        all_heads_restored=restored_share(harm.margins([_patch(lab, "report", every)]), harmed, clean),
        discovery_curve=curve,
    )


def _items(by_prompt: Tensor) -> NDArray[np.float64]:
    return by_prompt.double().numpy().reshape(-1, 2).mean(axis=1)
