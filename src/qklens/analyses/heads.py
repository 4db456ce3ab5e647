"""Answer-selection heads: attend to the correct option without pressure, carry its letter, and matter causally.

Attending and copying are scored apart (Lieberum et al. 2023): a head is a candidate when it does both, by

    score = max(attention difference, 0) · max(letter logit, 0)

on the discovery half; or when it attends and its letter may be carried on by a later layer. What decides is causal: the
heads are ranked by how much of the margin without pressure goes when their output is mean-ablated. What harm costs then
plays no part in the choice, and how much of it runs through these heads' patterns is a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qklens.analyses.readings import AttentionReading
from qklens.data.render import Prompt
from qklens.errors import NothingChangedError
from qklens.interventions.engine import Workset
from qklens.interventions.patch import HeadAblation, PatternPatch, align_rows
from qklens.interventions.points import Intervention
from qklens.interventions.steer import Head

MAX_CANDIDATES = 12
MIN_SCORE = 0.02
MIN_ATTENTION = 0.5
MAX_SELECTED = 8
_TOGETHER = 32


def candidate_heads(difference: Float[Tensor, "layer head"], letter_logit: Float[Tensor, "layer head"]) -> list[Head]:
    """Heads that may select the answer, twelve at most: those that attend and copy, then those that attend alone.

    The first come by score, none below 2% of the best. The others attend at least half as much as the head that attends
    most; the letter may reach the output through a later head or MLP. Where no head copies what it attends to, the
    twelve with the largest attention difference stand in, so that there is a table.

    Args:
        difference: mean attention on the correct minus the incorrect option, without pressure.
        letter_logit: mean direct logit attribution to the margin, without pressure.
    """
    score = difference.clamp(min=0) * letter_logit.clamp(min=0)
    floor = MIN_SCORE * float(score.max())
    n_heads = difference.shape[1]

    def by(rank: Tensor, least: float) -> list[Head]:
        order = rank.flatten().argsort(descending=True, stable=True)[:MAX_CANDIDATES].tolist()
        return [(i // n_heads, i % n_heads) for i in order if float(rank.flatten()[i]) >= least]

    if floor <= 0:
        return by(difference, float("-inf"))
    most = max(float(difference.max()), 0.0)
    return list(dict.fromkeys([*by(score, floor), *by(difference, MIN_ATTENTION * most)]))[:MAX_CANDIDATES]


def clean_pattern_patch(
    donors: Sequence[Prompt],
    rows: Mapping[Head, Sequence[Float[Tensor, "_k_pos"]]],
    receivers: Sequence[Prompt],
    heads: Sequence[Head],
) -> PatternPatch:
    """The patch that gives heads, on each receiver, the answer row of its donor."""
    return PatternPatch(
        {
            head: [align_rows(d, r, row) for d, r, row in zip(donors, receivers, rows[head], strict=True)]
            for head in heads
        }
    )


def mean_ablation(reading: AttentionReading, head: Head) -> HeadAblation:
    """Ablate a head by its mean output over the reading's prompts (both orders, so the letter averages out)."""
    return HeadAblation.mean(reading.outputs, [head])


def restored_share(patched: Tensor, harmed: Tensor, clean: Tensor) -> float:
    """(patched − harm) / (clean − harm) of the mean margins; 0 when nothing was lost."""
    lost = float(clean.mean() - harmed.mean())
    return float(patched.mean() - harmed.mean()) / lost if abs(lost) > 1e-6 else 0.0


def effects_alone(
    work: Workset, heads: Sequence[Head], edit: Callable[[Head], Intervention], tick: Callable[[], None] = lambda: None
) -> Float[Tensor, "prompt head"]:
    """The margin with one head edited less the margin without, for each head by itself; `tick` after each.

    Zero for a head whose edit changes nothing, as of one without output.
    """
    clean, rows = work.margins(), []
    for begin in range(0, len(heads), _TOGETHER):
        some = heads[begin : begin + _TOGETHER]
        rows.append(work.margins_each([edit(head) for head in some], idle_ok=True) - clean)
        for _ in some:
            tick()
    return torch.cat(rows).T


def effect(work: Workset, edit: Intervention) -> Float[Tensor, " prompt"]:
    """The margin with an edit less the margin without; zero where it changes nothing, as of a head without output."""
    try:
        return work.margins([edit]) - work.margins()
    except NothingChangedError:
        return torch.zeros(len(work))


def first_heads(ranked: Sequence[Head]) -> list[tuple[Head, ...]]:
    """The first one, two, ... of ranked heads, eight at most."""
    return [tuple(ranked[:k]) for k in range(1, min(MAX_SELECTED, len(ranked)) + 1)]


def fewest(curve: Sequence[float]) -> int:
    """How many of the first heads do 90% of what the best number of them does; one where none does anything.

    Args:
        curve: the effect of the first k heads together, for k = 1, 2, ...
    """
    best = max(curve)
    return next(k for k, share in enumerate(curve, start=1) if share >= 0.9 * best) if best > 0 else 1
