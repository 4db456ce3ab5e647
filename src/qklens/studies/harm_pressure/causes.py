"""What the verdict's rules read beside behaviour: each possible cause's share of the margin that harm costs.

Everything is measured on the report half, at heads and along a direction chosen on the other half.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qklens.analyses.before_answer import share_before_answer
from qklens.analyses.contrasts import contrast
from qklens.analyses.factorial import Term, TermRows, option_pulls, removal, shapley_values, term_rows
from qklens.analyses.heads import restored_share
from qklens.analyses.mediation import (
    OPTIONS,
    Runs,
    Share,
    answer_direction,
    component_patch,
    first_that_suffice,
    late_restored,
    option_amounts,
    output_patches,
    pattern_patches,
    query_shifts,
)
from qklens.analyses.readings import read_patterns
from qklens.analyses.statistics import auc
from qklens.data.render import ORDERS
from qklens.interventions.patch import ScoreShift
from qklens.interventions.steer import Head
from qklens.strict import Strict
from qklens.studies.harm_pressure.thresholds import THRESHOLDS
from qklens.studies.lab import Lab


class CauseShare(Strict):
    """A part's share of the lost margin: given back alone, taken away alone, their mean, and its 95% interval.

    `accuracy` is that of the harmed run with the part given back.
    """

    restored: float
    caused: float
    through: float
    ci: tuple[float, float]
    accuracy: float


class Causes(Strict):
    """The shares, and what else the rules read.

    Attributes:
        pattern: the selected heads' patterns.
        output: their whole outputs.
        before_answer: all heads' attention on the options before the answer, from the first option's own tokens on.
        belief: the options' amount of the correct-answer direction, at the layers that the heads read.
        separation_kept: how far that direction sets the options apart under harm, over the same without it.
        auc_none: how well it tells the options apart without pressure.
        auc_harm: the same under harm.
        late_restored: all that is written after the heads.
        attention_kept: the heads' attention on the correct less the incorrect option under harm, over the same without.
        query_added: restored, from benign to harm, by taking out of the origin's queries the direction that harm
            changed in the mean, but for need-answer, each prompt its own amount.
        query_need: restored by giving them their amount of that direction back.
        query_pull: how far the change of the origin's queries raises the score of the correct option, over the median
            of other tokens, in score units; mean over prompts and heads, of the two orders the higher. Negative repels.
        query_scale: restored, from benign to harm, by giving the origin's queries the benign run's norm scales.
        query_spared: the share of it that the incorrect option is spared, of the two orders the smaller, within ±1; 0
            where the correct one is not repelled.
        origin: of the heads, those of the earliest layers that restore what all do.
        removal: at these, the Shapley share of each kind of score term in what was lost from benign to harm.
    """

    pattern: CauseShare
    output: CauseShare
    before_answer: CauseShare
    belief: CauseShare
    separation_kept: float
    auc_none: float
    auc_harm: float
    late_restored: float
    attention_kept: float
    query_added: float
    query_need: float
    query_pull: float
    query_scale: float
    query_spared: float
    origin: list[Head]
    removal: dict[str, float]


def measure_causes(lab: Lab, heads: Sequence[Head]) -> Causes:
    """Measure every cause's share at the selected heads."""
    runs = Runs(lab.work("none", "report"), lab.work("harm", "report"), lab.seed)
    readings = lab.attention("none", "report"), lab.attention("harm", "report")
    layers = sorted({layer for layer, _ in heads})
    clean, harmed = (read_patterns(work, heads) for work in (runs.clean, runs.harm))
    streams = lab.streams("none", "report", layers), lab.streams("harm", "report", layers)
    attention = [sum(float(r.difference[:, at, h].mean()) for at, h in heads) for r in readings]
    directions = _answer_directions(lab, layers)
    margins = runs.harm.margins(), runs.clean.margins()
    up_to = {
        layer: restored_share(
            runs.harm.margins_each(
                [pattern_patches(runs, clean, harmed, [h for h in heads if h[0] <= layer])[0]], idle_ok=True
            )[0],
            *margins,
        )
        for layer in layers
    }
    origin = first_that_suffice(heads, up_to, THRESHOLDS["suffices"])
    origin_rows = harm_rows(lab, origin)
    return Causes(
        pattern=_share(runs.share(*pattern_patches(runs, clean, harmed, heads))),
        output=_share(runs.share(*output_patches(*readings, heads))),
        before_answer=_share(share_before_answer(runs)),
        belief=_share(
            runs.share(
                component_patch(directions, runs.harm.prompts, runs.clean.prompts, streams[0]),
                component_patch(directions, runs.clean.prompts, runs.harm.prompts, streams[1]),
            )
        ),
        **_discrimination(lab, directions[layers[0]], layers[0]),
        late_restored=late_restored(lab.subject, runs, layers[-1], streams, readings),
        attention_kept=attention[1] / attention[0] if attention[0] > 1e-6 else 0.0,
        **_query_parts(lab, origin),
        origin=origin,
        **_query_pull(lab, origin_rows),
        query_scale=_query_scale(lab, origin_rows),
        removal=measure_removals(lab, origin_rows),
    )


def harm_rows(lab: Lab, heads: Sequence[Head]) -> TermRows:
    """Every factorial term of harm against benign at some heads, report half."""
    layers = sorted({layer for layer, _ in heads})
    return term_rows(
        lab.subject,
        heads,
        lab.prompts("harm", "report"),
        lab.prompts("benign", "report"),
        lab.streams("harm", "report", layers),
        lab.streams("benign", "report", layers),
    )


def _query_pull(lab: Lab, rows: TermRows) -> dict[str, float]:
    """In either order by itself: a pull at one letter, whichever option has it, is no pull at the correct one."""
    options = [[p.span(name) for name in OPTIONS] for p in lab.prompts("harm", "report")]
    pulls = option_pulls(rows, options).mean(dim=1)
    by_order = [pulls[at :: len(ORDERS)].mean(dim=0).tolist() for at in range(len(ORDERS))]
    spared = [min((correct - incorrect) / correct, 1.0) if correct < 0 else 0.0 for correct, incorrect in by_order]
    return {"query_pull": max(correct for correct, _ in by_order), "query_spared": max(min(spared), -1.0)}


def _query_scale(lab: Lab, rows: TermRows) -> float:
    """Do the heads let go because something that nobody reads makes the norm shrink their whole query?"""
    harmed, clean = (lab.attention(c, "report").margins for c in ("harm", "benign"))
    given = lab.work("harm", "report").margins_each([ScoreShift(rows.rescaled)], idle_ok=True)[0]
    return restored_share(given, harmed, clean)


def measure_removals(lab: Lab, rows: TermRows) -> dict[str, float]:
    """Each factorial term's Shapley share of the margin lost from benign to harm, at the rows' heads.

    The terms are differences between these two conditions, so that is the loss they can account for; report half.
    """
    harmed, clean = lab.attention("harm", "report").margins, lab.attention("benign", "report").margins
    work = lab.work("harm", "report")

    def restored(terms: frozenset[Term]) -> float:
        shift = removal(rows, sorted(terms)) if terms else None
        if shift is None or not any(bool(row.any()) for by_prompt in shift.shifts.values() for row in by_prompt):
            return 0.0
        return restored_share(work.margins([shift]), harmed, clean)

    return {str(term): value for term, value in shapley_values(restored).items()}


def _query_parts(lab: Lab, heads: Sequence[Head]) -> dict[str, float]:
    """Do the heads let go because of what harm adds to their queries, or because these no longer ask for the answer?"""
    layers = sorted({layer for layer, _ in heads})
    need = {
        layer: _seen(lab, layer, contrast(lab.residual_readings("discovery", layer), "need_answer").mean(dim=0))
        for layer in layers
    }
    sides = [(lab.prompts(c, "report"), lab.streams(c, "report", layers)) for c in ("harm", "benign")]
    harmed, clean = (lab.attention(c, "report").margins for c in ("harm", "benign"))
    margins = lab.work("harm", "report").margins_each(query_shifts(lab.subject, heads, need, *sides), idle_ok=True)
    along, across = (restored_share(given, harmed, clean) for given in margins)
    return {"query_added": across, "query_need": along}


def _answer_directions(lab: Lab, layers: Sequence[int]) -> dict[int, Tensor]:
    streams = lab.streams("none", "discovery", layers)
    prompts = lab.prompts("none", "discovery")
    return {layer: _seen(lab, layer, answer_direction(prompts, streams, layer)) for layer in layers}


def _seen(lab: Lab, layer: int, direction: Tensor) -> Tensor:
    """What the layer's norm lets through of a direction: of a mean that LayerNorm takes away nothing reads."""
    return lab.subject.input_norm(layer, direction.dtype).centre(direction)


def _discrimination(lab: Lab, w: Tensor, layer: int) -> dict[str, float]:
    """How the direction sets the options apart at the first layer that the heads read."""
    found: dict[str, float] = {}
    gaps = []
    for condition in ("none", "harm"):
        correct, wrong = option_amounts(
            lab.prompts(condition, "report"), lab.streams(condition, "report", [layer]), layer, w
        )
        found[f"auc_{condition}"] = auc(correct.double().numpy(), wrong.double().numpy())
        gaps.append(float((correct - wrong).mean()))
    return {**found, "separation_kept": gaps[1] / gaps[0] if abs(gaps[0]) > 1e-6 else 0.0}


def _share(share: Share) -> CauseShare:
    return CauseShare(
        restored=share.restored, caused=share.caused, through=share.through, ci=share.ci, accuracy=share.accuracy
    )
