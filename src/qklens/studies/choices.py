"""What the discovery half chooses: the answer-selection heads, and the features that tell the options apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence

from qklens.analyses.belief import BeliefCandidate, best_belief, option_sums, rank_belief
from qklens.analyses.heads import candidate_heads, clean_pattern_patch, fewest, first_heads, restored_share
from qklens.analyses.readings import read_patterns
from qklens.analyses.statistics import wilson
from qklens.errors import QklensError
from qklens.interventions.patch import HeadAblation, PatternPatch
from qklens.interventions.steer import Head
from qklens.studies.lab import Half, Lab

MAX_LENS_HEADS = 6
SHOWN_BELIEF = 8


def choose_heads(lab: Lab) -> tuple[list[Head], list[Head], list[float]]:
    """The selected heads, all candidates by rank, and the share restored by the first k of them; discovery half.

    Ranked by what their mean ablation costs without pressure; selected are the fewest first ones that cost 90% of what
    the best number of them does. Heads of earlier layers that cost as much by themselves are selected before them: the
    later ones pass on what these choose. None is selected where the model's answers without pressure are no better than
    chance (Wilson's 95% interval holds one half): there is no answer that a head could select.
    """
    calm = lab.attention("none", "discovery")
    candidates = candidate_heads(calm.difference.mean(dim=0), calm.letter_logit.mean(dim=0))
    work, harm = lab.work("none", "discovery"), lab.work("harm", "discovery")

    def cost(sets: Sequence[Sequence[Head]]) -> list[float]:
        margins = work.margins_each([HeadAblation.mean(calm.outputs, some) for some in sets], idle_ok=True)
        return [float((calm.margins - m).mean()) for m in margins]

    alone = dict(zip(candidates, cost([[h] for h in candidates]), strict=True))
    ranked = sorted(candidates, key=lambda h: -alone[h])
    costs = cost(first_heads(ranked))
    right = int((calm.margins > 0).sum())
    answers = wilson(right, len(calm.margins))[0] > 0.5
    selected = _with_earlier(ranked, ranked[: fewest(costs)], max(costs), cost) if answers else []
    patch = clean_patch(lab, "discovery", ranked)
    patches = [PatternPatch({h: patch.rows[h] for h in some}) for some in first_heads(ranked)]
    harmed = harm.margins()
    curve = [restored_share(m, harmed, calm.margins) for m in harm.margins_each(patches, idle_ok=True)]
    return selected, ranked, curve


_Effect = Callable[[Sequence[Sequence[Head]]], list[float]]


def _with_earlier(ranked: Sequence[Head], selected: list[Head], best: float, effect: _Effect) -> list[Head]:
    """The selected heads, and before them those of earlier layers that have 90% of their effect by themselves."""
    last = max(layer for layer, _ in selected)
    earlier = [head for head in ranked if head[0] < last]
    curve = effect(first_heads(earlier)) if earlier and best > 0 else [0.0]
    if best <= 0 or max(curve) < 0.9 * best:
        return selected
    return list(dict.fromkeys([*_with_earlier(ranked, earlier[: fewest(curve)], best, effect), *selected]))


def default_heads(lab: Lab, written: Collection[int], source: str) -> tuple[Head, ...]:
    """The heads that a table reads when none is named, with a note where none of them is an answer-selection head.

    Args:
        lab: model, items and source.
        written: layers that the source writes.
        source: its name.

    Raises:
        QklensError: the source writes no candidate's input.
    """
    selected, ranked, _ = choose_heads(lab)
    heads = heads_to_read(selected, ranked, written, source)
    if not set(heads) & set(selected):
        names = ", ".join(f"L{layer}H{head}" for layer, head in selected)
        found = (
            f"the answer-selection heads {names} read layers that {source!r} does not write"
            if selected
            else ("no answer-selection head was found, as the answers without pressure are no better than chance")
        )
        warnings.warn(f"{found}; reading L{heads[0][0]}H{heads[0][1]}, the best other head", stacklevel=2)
    return tuple(heads)


def heads_to_read(
    selected: Sequence[Head], ranked: Sequence[Head], written: Collection[int], source: str
) -> list[Head]:
    """The heads to look through: selected ones whose input a source writes, best first, or else the best other.

    Args:
        selected: the answer-selection heads.
        ranked: all candidates.
        written: layers that the source writes.
        source: its name.

    Raises:
        QklensError: the source writes no candidate's input.
    """
    chosen = [h for h in selected if h[0] in written] or [h for h in ranked if h[0] in written][:1]
    if not chosen:
        raise QklensError(
            f"dictionary {source!r} writes layers {sorted(written)}, the answer-selection heads are in layers "
            f"{sorted({h[0] for h in ranked})}; choose a dictionary for those layers, or --dictionary directions"
        )
    return chosen[:MAX_LENS_HEADS]


def clean_patch(lab: Lab, half: Half, heads: list[Head]) -> PatternPatch:
    """The patch that gives heads under harm their patterns from the bare question."""
    rows = read_patterns(lab.work("none", half), heads)
    return clean_pattern_patch(lab.prompts("none", half), rows, lab.prompts("harm", half), heads)


def belief_candidates(lab: Lab) -> list[BeliefCandidate]:
    """The best separating features of all layers on the discovery half, best first."""
    best: list[BeliefCandidate] = []
    for layers in lab.few_at_once(lab.source.layers):
        lab.streams("none", "discovery", layers)
        for layer in layers:
            sums = option_sums(lab.prompts("none", "discovery"), lab.written("none", "discovery", layer))
            best = best_belief([*best, *rank_belief(layer, *sums, SHOWN_BELIEF)], SHOWN_BELIEF)
        if len(layers) < len(lab.source.layers):
            lab.drop_streams()
    return best
