"""Answer-selection heads: attend to the correct option without pressure, carry its letter, and matter causally.

Attending and copying are scored apart (Lieberum et al. 2023): a head is a candidate when it does both, by

    score = max(attention difference, 0) · max(letter logit, 0)

on the discovery half. What decides is causal: the heads are ranked by how much of the margin lost under harm comes back
when their pattern is patched from the same item without pressure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from qklens.analyses.readings import AttentionReading
from qklens.data.render import Prompt
from qklens.interventions.engine import Workset
from qklens.interventions.patch import HeadAblation, PatternPatch, align_rows
from qklens.interventions.steer import Head

MAX_CANDIDATES = 12
MIN_SCORE = 0.02
MAX_SELECTED = 8


def candidate_heads(reading: AttentionReading) -> list[Head]:
    """Heads that attend and copy, by score: at most 12, none below 2% of the best.

    Where no head does both, the twelve with the largest attention difference stand in, so that there is a table.
    """
    difference = reading.difference.mean(dim=0)
    score = difference.clamp(min=0) * reading.letter_logit.mean(dim=0).clamp(min=0)
    floor = MIN_SCORE * float(score.max())
    rank = score if floor > 0 else difference
    n_heads = difference.shape[1]
    flat = rank.flatten().argsort(descending=True, stable=True)[:MAX_CANDIDATES].tolist()
    return [(i // n_heads, i % n_heads) for i in flat if floor == 0 or float(score.flatten()[i]) >= floor]


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
    return HeadAblation({head: reading.outputs[:, head[0], head[1]].mean(dim=0)})


def restored_share(patched: Tensor, harmed: Tensor, clean: Tensor) -> float:
    """(patched − harm) / (clean − harm) of the mean margins; 0 when nothing was lost."""
    lost = float(clean.mean() - harmed.mean())
    return float(patched.mean() - harmed.mean()) / lost if abs(lost) > 1e-6 else 0.0


def select_heads(
    harm: Workset, clean_margins: Tensor, patch: PatternPatch, ranked: Sequence[Head]
) -> tuple[list[Head], list[float]]:
    """The fewest heads, in rank order, whose joint patch restores 90% of what the best such set does.

    Returns:
        The heads, and the curve of shares restored by the first k heads.
    """
    harmed = harm.margins()
    curve = []
    for k in range(1, min(MAX_SELECTED, len(ranked)) + 1):
        rows = {head: patch.rows[head] for head in ranked[:k]}
        curve.append(restored_share(harm.margins([PatternPatch(rows)]), harmed, clean_margins))
    best = max(curve)
    enough = next(k for k, share in enumerate(curve, start=1) if share >= 0.9 * best) if best > 0 else 1
    return list(ranked[:enough]), curve
