"""Stage `heads`: the answer-selection heads, by attention, by the letter they carry, and by what a patch restores."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.attended import attended_tokens, place_mass
from qklens.analyses.heads import (
    mean_ablation,
    restored_share,
)
from qklens.analyses.readings import SPANS, read_patterns
from qklens.analyses.statistics import bootstrap_mean, bootstrap_ratio, item_means, wilson
from qklens.data.render import CONDITIONS, Condition, Prompt
from qklens.interventions.patch import PatternPatch
from qklens.interventions.steer import Head
from qklens.studies.choices import choose_heads, clean_patch
from qklens.studies.journal import StageOutput
from qklens.studies.lab import Lab
from qklens.studies.results import AttendedToken, HeadRow, HeadsDetails

N_RANDOM_HEADS = 10
SHOWN_TOKENS = 5
PRESSED: tuple[Literal["harm"], Literal["benign"]] = ("harm", "benign")


def run(lab: Lab) -> StageOutput:
    """Find candidates and select on the discovery half; report every number on the other."""
    selected, ranked, curve = choose_heads(lab)
    details = _joint(lab, selected, curve)
    patterns = {c: read_patterns(lab.work(c, "report"), ranked) for c in CONDITIONS}
    whole = clean_patch(lab, "report", ranked)
    patches = [PatternPatch({head: whole.rows[head]}) for head in ranked]
    ablations = [mean_ablation(lab.attention("none", "discovery"), head) for head in ranked]
    patched = lab.work("harm", "report").margins_each(patches, idle_ok=True)
    ablated = lab.work("none", "report").margins_each(ablations, idle_ok=True)
    rows = [
        _row(lab, head, {c: patterns[c][head] for c in CONDITIONS}, one, without, selected=head in selected)
        for head, one, without in zip(ranked, patched, ablated, strict=True)
    ]
    return StageOutput(
        results={"heads": [row.model_dump() for row in rows], "heads_details": details.model_dump()},
        state={"selected": [list(head) for head in selected], "ranked": [list(head) for head in ranked]},
    )


def _row(
    lab: Lab,
    head: Head,
    patterns: dict[Condition, list[Tensor]],
    patched: Float[Tensor, " prompt"],
    ablated: Float[Tensor, " prompt"],
    *,
    selected: bool,
) -> HeadRow:
    """A head's row; `patched` are the margins under harm with its clean pattern, `ablated` those without it."""
    layer, h = head
    prompts: dict[Condition, list[Prompt]] = {c: lab.prompts(c, "report") for c in CONDITIONS}
    tokenizer = lab.subject.tokenizer
    readings = {c: lab.attention(c, "report") for c in CONDITIONS}
    none, harm = readings["none"], readings["harm"]
    difference = {c: readings[c].difference[:, layer, h] for c in CONDITIONS}
    by_item = {c: item_means(difference[c].double().numpy()) for c in CONDITIONS}
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
    every = [(layer, head) for layer in range(subject.n_layers) for head in range(subject.n_heads)]
    # Heads before the selected ones write what these read: to restore by them is no sign of chance.
    first = min((layer for layer, _ in selected), default=subject.n_layers)
    others = [head for head in every if head not in selected and head[0] >= first]
    generator = torch.Generator().manual_seed(lab.seed)
    drawn = [
        [others[i] for i in torch.randperm(len(others), generator=generator)[: len(selected)].tolist()]
        for _ in range(N_RANDOM_HEADS if others else 0)
    ]
    whole = clean_patch(lab, "report", every)
    patches = [
        PatternPatch({h: whole.rows[h] for h in some}) for some in (every, *drawn, *([selected] if selected else []))
    ]
    all_patched, *at_random = harm.margins_each(patches, idle_ok=True)
    patched = at_random.pop() if selected else harm.margins()
    shares = [restored_share(margins, harmed, clean) for margins in at_random]
    right = int((patched > 0).sum())
    return HeadsDetails(
        selected=selected,
        attention_difference_map={c: lab.attention(c, "discovery").difference.mean(dim=0).tolist() for c in CONDITIONS},
        letter_logit_map=lab.attention("none", "discovery").letter_logit.mean(dim=0).tolist(),
        restored=restored_share(patched, harmed, clean),
        restored_ci=bootstrap_ratio(
            item_means((patched - harmed).double().numpy()), item_means((clean - harmed).double().numpy()), lab.seed
        ),
        patched_accuracy=right / len(patched),
        patched_accuracy_ci=wilson(right, len(patched)),
        patched_margin=float(patched.mean()),
        harm_margin=float(harmed.mean()),
        none_margin=float(clean.mean()),
        restored_random_heads=sum(shares) / max(len(shares), 1),
        all_heads_restored=restored_share(all_patched, harmed, clean),
        discovery_curve=curve,
    )
