"""The interventions: what the edit does at the strength chosen beforehand, and whether a control does it too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qklens.report.figures.steering import Stage, series_name, unit_words, variants
from qklens.report.story.parts import Section, Table, empty
from qklens.report.text import dose, finite, listing, number, percent, percent_interval, printable
from qklens.studies.results import Results, Steering

_TITLES: dict[Stage, tuple[str, str]] = {
    "steer_all": (
        "Steering refuse-and-redirect on the residual stream",
        "Does removing the refuse-and-redirect feature restore the correct answer?",
    ),
    "steer_query": (
        "Steering only what the heads' queries read",
        "Is it enough that the selected heads' queries do not see the feature?",
    ),
    "steer_key": (
        "Steering harm detection on the options' keys",
        "Does making one option look less, or the other more, harmful move the answer?",
    ),
}

_RIVAL = 0.5


@dataclass(frozen=True)
class Effect:
    """One variant at the strength that counts, with its controls at the same strength."""

    variant: str
    point: Steering
    was_chosen: bool
    before: float
    controls: dict[str, Steering]
    curve: tuple[Steering, ...]

    @property
    def no_edit(self) -> bool:
        """The choice fell on strength 0: no strength helped on the discovery half."""
        return self.point.strength == 0

    @property
    def random(self) -> Steering | None:
        """The random control at this strength."""
        return next((row for row in self.controls.values() if row.control == "random"), None)

    @property
    def best_control(self) -> tuple[str, float] | None:
        """The control under harm with the highest accuracy; of several random draws the best one counts."""
        found: list[tuple[str, float]] = []
        for name, row in self.controls.items():
            if row.condition == "harm":
                best = row.accuracy if row.draws is None else row.draws[1]
                found.append((name if row.draws is None else f"best of {row.draws[2]} random directions", best))
        return max(found, key=lambda pair: pair[1], default=None)

    @property
    def works(self) -> bool:
        """The interval lies wholly above the accuracy without the edit."""
        return self.point.ci[0] > self.before

    @property
    def rival_controls(self) -> list[str]:
        """Controls under harm whose gain is at least half of the edit's gain."""
        gain = self.point.accuracy - self.before
        return [
            name
            for name, row in self.controls.items()
            if row.condition == "harm" and gain > 0 and row.accuracy - self.before >= _RIVAL * gain
        ]


def effect(results: Results, rows: Sequence[Steering]) -> Effect | None:
    """The variant's chosen point; without one, its best point, marked as not chosen beforehand."""
    own = [r for r in rows if r.control is None and r.condition == "harm" and finite(r.accuracy)]
    if not own:
        return None
    chosen = [r for r in own if r.chosen]
    point = chosen[0] if chosen else max(own, key=lambda r: r.accuracy)
    start = next((r for r in own if r.strength == 0), None)
    harm = results.behaviour.get("harm")
    before = start.accuracy if start else harm.accuracy if harm else math.nan
    controls = {
        series_name(r): r
        for r in rows
        if r.strength == point.strength and series_name(r) != "steered" and finite(r.accuracy)
    }
    return Effect(rows[0].variant, point, bool(chosen), before, controls, tuple(own))


def effects(results: Results, stage: Stage) -> list[Effect]:
    """Every variant of the stage that has a point under harm."""
    rows = [row for row in results.steering if row.stage == stage]
    found = (effect(results, [r for r in rows if r.variant == name]) for name in variants(results, stage))
    return [one for one in found if one is not None]


def section(results: Results, stage: Stage) -> Section:
    """One stage of steering in words."""
    title, question = _TITLES[stage]
    rows = [row for row in results.steering if row.stage == stage]
    if not rows or stage in results.skipped:
        return empty(results, stage, title, question)
    paragraphs = tuple(map(_sentence, alike(effects(results, stage)))) or ("No point was measured under harm.",)
    table = Table(
        "Every point",
        ("variant", "curve", "strength", "condition", "accuracy", "95% interval", "margin (logits)", "chosen"),
        tuple(
            (
                printable(r.variant),
                series_name(r),
                dose(r.strength),
                r.condition,
                percent(r.accuracy),
                f"{percent(r.ci[0])} to {percent(r.ci[1])}",
                number(r.margin),
                ("yes" if r.strength else "no strength helped") if r.chosen else "",
            )
            for r in rows
        ),
    )
    unit = unit_words(rows)
    return Section(
        stage,
        title,
        question,
        paragraphs,
        f"Strength: {unit or 'as in the table'}; negative turns the feature down. The strength was chosen on "
        "the discovery half and every point is measured on the report half; none is chosen where no strength that "
        "spares the benign accuracy clearly beats no edit. Random direction and unrelated feature: equal norm, same "
        "positions. A random curve is one draw; at the chosen strength it is the mean of several, and the bar spans "
        "them. "
        "Benign intent: the same edit where there is nothing to undo.",
        (table,),
    )


def alike(found: Sequence[Effect]) -> list[list[Effect]]:
    """Effects that read the same, told once: equal strength and accuracy, or no strength that helped."""
    groups: dict[tuple[object, ...], list[Effect]] = {}
    for one in found:
        outcome = None if one.no_edit else (percent(one.point.accuracy), one.was_chosen)
        groups.setdefault((one.point.strength, percent(one.before), outcome), []).append(one)
    return list(groups.values())


def _sentence(group: Sequence[Effect]) -> str:
    one = group[0]
    names = "; ".join(printable(each.variant) for each in group)
    where = names[:1].upper() + names[1:]
    return f"{where}: {_no_edit(group)}" if one.no_edit else f"{where}: {_edit(one, group)}"


def _no_edit(group: Sequence[Effect]) -> str:
    curve = [row for one in group for row in one.curve]
    strengths, accuracies = [row.strength for row in curve], [row.accuracy for row in curve]
    helped = "in none of these cases did a strength help" if len(group) > 1 else "no strength helped"
    low, high = min(accuracies), max(accuracies)
    lies = f"is {percent(low)}" if percent(low) == percent(high) else f"lies between {percent(low)} and {percent(high)}"
    return (
        f"{helped} on the discovery half, so none is chosen. On the report half, over strengths from "
        f"{dose(min(strengths))} to {dose(max(strengths))}, accuracy under harm {lies}; without the edit it is "
        f"{percent(group[0].before)}."
    )


def _edit(one: Effect, group: Sequence[Effect]) -> str:
    point = one.point
    how = "chosen on the discovery half" if one.was_chosen else "the best of the curve, not chosen beforehand"
    verb = "rises to" if one.works else "falls to" if point.ci[1] < one.before else "is"
    text = (
        f"at strength {dose(point.strength)} ({how}) accuracy under harm {verb} "
        f"{percent(point.accuracy)} ({percent_interval(point.ci)}), against {percent(one.before)} without the edit."
    )
    if verb == "is":
        text += " The interval includes the accuracy without the edit: no effect is shown."
    if one.controls:
        told = (_control(name, [e.controls[name] for e in group if name in e.controls]) for name in one.controls)
        text += f" At the same strength: {listing(told)}."
    else:
        text += " No control was measured at this strength."
    if one.works and one.rival_controls:
        text += f" A control also works ({listing(one.rival_controls)}), so the gain is not specific to the feature."
    elif one.works and (best := one.best_control) and best[1] - one.before >= _RIVAL * (point.accuracy - one.before):
        text += f" The {best[0]} gains at least half as much, which the mean over the draws hides."
    return text


def _control(name: str, rows: Sequence[Steering]) -> str:
    """A control's accuracy, over the variants told together, and what its draws ranged over."""
    accuracies = [row.accuracy for row in rows]
    text = f"{name} {_range(min(accuracies), max(accuracies))}"
    draws = [row.draws for row in rows if row.draws is not None]
    if not draws:
        return text
    low, high = min(d[0] for d in draws), max(d[1] for d in draws)
    spread = "all the same" if percent(low) == percent(high) else f"which range from {percent(low)} to {percent(high)}"
    return f"{text} (mean of {draws[0][2]} draws, {spread})"


def _range(low: float, high: float) -> str:
    return percent(low) if percent(low) == percent(high) else f"{percent(low)} to {percent(high)}"
