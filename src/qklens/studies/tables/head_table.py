"""Every head of a model as a candidate answer-selection head, and which ones are chosen whatever items are left out.

Attending, scoring, copying and mattering are four things, so they stand in four columns: attention on the correct minus
the incorrect option (by part of the option), the QK-score of the same, the letter that the head writes, and what the
margin loses when it is ablated, or wins back under harm when its pattern from the bare question is put in.

Cross-validation: on all folds but one, candidates are ranked by what each does alone, and the fewest whose joint effect
is 90% of the best are chosen; their joint effect is then measured on the fold left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from qklens.analyses.heads import (
    candidate_heads,
    clean_pattern_patch,
    effect,
    effects_alone,
    fewest,
    first_heads,
    mean_ablation,
)
from qklens.analyses.on_text import HeadOnText, heads_on_text
from qklens.analyses.readings import OPTION_PARTS, read_patterns
from qklens.analyses.statistics import Array, bootstrap_mean, bootstrap_means, bootstrap_ratio, item_means
from qklens.analyses.text_windows import text_windows
from qklens.data.render import CONDITIONS, Condition
from qklens.errors import QklensError
from qklens.interventions.patch import HeadAblation, PatternPatch
from qklens.interventions.steer import Head
from qklens.strict import Strict
from qklens.studies.lab import Lab, fold_items
from qklens.studies.progress import Tick, silent

Interval = tuple[float, float]
FOLDS = 5


class HeadCandidate(Strict):
    """One head, measured on all items."""

    layer: int
    head: int
    attention_difference: dict[Condition, float] = Field(
        description="attention from the answer position on the correct minus the incorrect option"
    )
    attention_difference_ci: Interval = Field(description="under none, 95% bootstrap over items")
    attention_difference_by_part: dict[str, float | None] = Field(
        description="under none, by part of the option: letter, content, boundary; null where it has no own token"
    )
    score_difference: dict[str, float | None] = Field(
        description="QK-score under none: logsumexp of the scores over the correct minus the incorrect option; `all`, "
        "and by part"
    )
    letter_logit: float = Field(description="direct logit attribution to the margin, under none, in logits")
    letter_logit_harm: float
    ablation_drop: float = Field(description="fall of the margin under none when the head is mean-ablated, in logits")
    ablation_ci: Interval
    patch_gain: float = Field(description="rise of the margin under harm with its pattern from none, in logits")
    patch_ci: Interval
    restores_when_patched: float | None = Field(
        description="patch_gain as a share of the margin lost under harm; null where nothing was lost"
    )
    chosen_in: int = Field(description="in how many folds' training items it is chosen")


class HeldOut(Strict):
    """What the heads chosen on all other folds do on this one."""

    items: int
    heads: list[Head]
    effect: float = Field(description="their joint effect on the margin, in logits")
    share: float | None = Field(description="the same as a share of what there is to win, or to lose; null for nothing")
    attention_difference: float = Field(description="mean over these heads, under none")
    letter_logit: float = Field(description="sum over these heads, under none")


class HeadTable(Strict):
    """The whole of `qklens heads --json`."""

    model: dict[str, Any]
    data: dict[str, Any]
    seed: int
    ranked_by: Literal["patch_gain", "ablation_drop"] = Field(
        description="patch_gain where the margin falls under harm, else ablation_drop"
    )
    margin: dict[Condition, float]
    folds: list[HeldOut]
    held_out_effect: float = Field(description="over all folds left out, in logits")
    held_out_effect_ci: Interval
    held_out_share: float | None = Field(
        description="the same as a share; null where the whole is not clearly above zero (no loss under harm and no "
        "margin without it)"
    )
    held_out_share_ci: Interval | None
    heads: list[HeadCandidate] = Field(description="all heads, by folds and then by effect")
    text: list[dict[str, Any]] = Field(default_factory=list, description="chosen heads on ordinary text (--text)")


@dataclass(eq=False)
class _Effects:
    """What edits of heads do to the margin, in logits; each set of heads is run once.

    Attributes:
        together: the effect of some heads' edit on every prompt.
        alone: the effect of each head's edit, `prompt head`.
        whole: what there is to win back, or to lose.
    """

    together: Callable[[tuple[Head, ...]], Tensor]
    alone: Tensor
    whole: Tensor
    seed: int

    @property
    def worth(self) -> bool:
        """Whether there is anything to win or lose: the whole is clearly above zero."""
        return bootstrap_mean(item_means(self.whole.double().numpy()), self.seed)[0] > 0

    def __post_init__(self) -> None:
        self._known: dict[frozenset[Head], Tensor] = {}

    def joint(self, heads: tuple[Head, ...]) -> Tensor:
        key = frozenset(heads)
        if key not in self._known:
            self._known[key] = self.together(heads)
        return self._known[key]


def heads_on_file(lab: Lab, heads: Sequence[Head], path: Path) -> list[HeadOnText]:
    """Some heads on ordinary text, beside what they do at the answers of the bare questions."""
    items = np.repeat(np.arange(len(lab.dataset.items)), 2).tolist()
    return heads_on_text(lab.work("none", "all"), path, heads, items=items, seed=lab.seed)


def head_table(lab: Lab, *, folds: int = FOLDS, text: Path | None = None, tick: Tick = silent) -> HeadTable:
    """Measure every head and choose with cross-validation over items.

    Args:
        lab: model and items; needs no source.
        folds: how many.
        text: ordinary text to check the chosen heads on.
        tick: given the number of steps, what to call after each.

    Raises:
        QklensError: fewer folds than two, or more than different pairs of options; a text file that cannot be used.
    """
    if text is not None:
        text_windows(lab.subject, text)  # a file that cannot be used is refused before the work
    n_layers, n_heads = lab.subject.n_layers, lab.subject.n_heads
    most = len(np.unique(fold_items(lab.dataset.items, len(lab.dataset.items), lab.seed)))
    if not 2 <= folds <= most:
        raise QklensError(f"--folds {folds}: expected 2 to {most}, as many as there are different pairs of options")
    fold = fold_items(lab.dataset.items, folds, lab.seed)
    every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    readings = {c: lab.attention(c, "all") for c in CONDITIONS}
    step = tick(2 * len(every))
    patch, ablation = _patch(lab, every, step), _ablation(lab, every, step)
    by_patch = patch.worth
    ranking = patch if by_patch else ablation
    held = [_held_out(lab, ranking, fold == number) for number in range(folds)]
    chosen_in = {h: sum(h in row.heads for row in held) for h in every}
    rows = [_row(lab, h, i, patch, ablation, chosen_in[h]) for i, h in enumerate(every)]
    gain: Callable[[HeadCandidate], float] = lambda r: r.patch_gain if by_patch else r.ablation_drop  # noqa: E731
    chosen = [h for h in every if chosen_in[h]]
    effect_items, share, interval = _pooled(lab, ranking, fold, held)
    return HeadTable(
        model=lab.subject.describe(),
        data={**lab.dataset.describe(), "letter_form": lab.form.name},
        seed=lab.seed,
        ranked_by="patch_gain" if by_patch else "ablation_drop",
        margin={c: float(readings[c].margins.mean()) for c in CONDITIONS},
        folds=held,
        held_out_effect=float(effect_items.mean()),
        held_out_effect_ci=bootstrap_mean(effect_items, lab.seed),
        held_out_share=share,
        held_out_share_ci=interval,
        heads=sorted(rows, key=lambda r: (-r.chosen_in, -gain(r))),
        text=[] if text is None else [asdict(row) for row in heads_on_file(lab, chosen, text)],
    )


def _patch(lab: Lab, every: Sequence[Head], step: Callable[[], None]) -> _Effects:
    """Patterns from the bare question under harm: what comes back."""
    harm = lab.work("harm", "all")
    rows = read_patterns(lab.work("none", "all"), every)
    patch = clean_pattern_patch(lab.prompts("none", "all"), rows, lab.prompts("harm", "all"), every)

    def some(heads: Sequence[Head]) -> PatternPatch:
        return PatternPatch({head: patch.rows[head] for head in heads})

    return _Effects(
        together=lambda heads: effect(harm, some(heads)),
        alone=effects_alone(harm, every, lambda head: some([head]), step),
        whole=lab.attention("none", "all").margins - harm.margins(),
        seed=lab.seed,
    )


def _ablation(lab: Lab, every: Sequence[Head], step: Callable[[], None]) -> _Effects:
    """Mean ablation of the bare question's prompts: what is lost, so the sign is turned."""
    calm, reading = lab.work("none", "all"), lab.attention("none", "all")
    means = {head: mean_ablation(reading, head).outputs[head] for head in every}

    def some(heads: Sequence[Head]) -> HeadAblation:
        return HeadAblation({head: means[head] for head in heads})

    return _Effects(
        together=lambda heads: -effect(calm, some(heads)),
        alone=-effects_alone(calm, every, lambda head: some([head]), step),
        whole=calm.margins(),
        seed=lab.seed,
    )


def _held_out(lab: Lab, effects: _Effects, test: np.ndarray) -> HeldOut:
    """Choose on the items that are not under test, measure on those that are."""
    none, n_heads = lab.attention("none", "all"), lab.subject.n_heads
    rows = torch.from_numpy(np.repeat(test, 2))
    train = ~rows
    candidates = candidate_heads(none.difference[train].mean(dim=0), none.letter_logit[train].mean(dim=0))
    alone = effects.alone[train].mean(dim=0)
    ranked = sorted(candidates, key=lambda h: -float(alone[h[0] * n_heads + h[1]]))
    sets = first_heads(ranked)
    chosen = sets[fewest([float(effects.joint(some)[train].mean()) for some in sets]) - 1]
    gained, whole = effects.joint(chosen)[rows], effects.whole[rows]
    layers, heads = ([h[side] for h in chosen] for side in (0, 1))
    return HeldOut(
        items=int(test.sum()),
        heads=list(chosen),
        effect=float(gained.mean()),
        share=_share(float(gained.mean()), float(whole.mean())) if effects.worth else None,
        attention_difference=float(none.difference[rows][:, layers, heads].mean()),
        letter_logit=float(none.letter_logit[rows][:, layers, heads].sum(dim=1).mean()),
    )


def _pooled(
    lab: Lab, effects: _Effects, fold: np.ndarray, held: Sequence[HeldOut]
) -> tuple[Array, float | None, Interval | None]:
    """The effect on each item under the heads chosen without it, and its share of the whole with an interval."""
    gained = torch.zeros_like(effects.whole)
    for number, row in enumerate(held):
        rows = torch.from_numpy(np.repeat(fold == number, 2))
        gained[rows] = effects.joint(tuple(row.heads))[rows]
    above, below = (item_means(values.double().numpy()) for values in (gained, effects.whole))
    if not effects.worth:
        return above, None, None
    return above, _share(above.sum(), below.sum()), bootstrap_ratio(above, below, lab.seed)


def _row(lab: Lab, head: Head, index: int, patch: _Effects, ablation: _Effects, chosen_in: int) -> HeadCandidate:
    layer, h = head
    readings = {c: lab.attention(c, "all") for c in CONDITIONS}
    none = readings["none"]
    gain, drop = (item_means(effects.alone[:, index].double().numpy()) for effects in (patch, ablation))
    parts = dict(zip(OPTION_PARTS, none.part_difference[:, layer, h].T, strict=True))
    scores = dict(zip(OPTION_PARTS, none.score_difference[:, layer, h].T, strict=True))
    lost = patch.whole
    return HeadCandidate(
        layer=layer,
        head=h,
        attention_difference={c: float(readings[c].difference[:, layer, h].mean()) for c in CONDITIONS},
        attention_difference_ci=_interval(item_means(none.difference[:, layer, h].double().numpy()), lab.seed),
        attention_difference_by_part={name: _mean(v) for name, v in parts.items() if name != "all"},
        score_difference={name: _mean(v) for name, v in scores.items()},
        letter_logit=float(none.letter_logit[:, layer, h].mean()),
        letter_logit_harm=float(readings["harm"].letter_logit[:, layer, h].mean()),
        ablation_drop=float(drop.mean()),
        ablation_ci=_interval(drop, lab.seed),
        patch_gain=float(gain.mean()),
        patch_ci=_interval(gain, lab.seed),
        restores_when_patched=_share(float(gain.mean()), float(lost.mean())) if patch.worth else None,
        chosen_in=chosen_in,
    )


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if abs(whole) > 1e-9 else None


def _mean(values: Tensor) -> float | None:
    """The mean of what is there; nothing where nothing is."""
    there = values[~values.isnan()]
    return float(there.mean()) if len(there) else None


def _interval(by_item: Array, seed: int) -> Interval:
    low, high = bootstrap_means(by_item[:, None], seed)
    return float(low[0]), float(high[0])
