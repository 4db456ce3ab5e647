"""The interventions: what the edit does at the strength chosen beforehand, and whether a control does it too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qklens.report.figures.steering import Stage, series_name, unit_words, variants
from qklens.report.story.parts import Section, Table, empty
from qklens.report.text import finite, listing, number, percent, percent_interval, printable
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


@dataclass(frozen=True)
class Effect:
    """One variant at the strength that counts, with its controls at the same strength."""

    variant: str
    point: Steering
    was_chosen: bool
    before: float
    controls: dict[str, Steering]

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
            if row.condition == "harm" and gain > 0 and row.accuracy - self.before >= 0.5 * gain
        ]


def _draws(row: Steering) -> str:
    """What a control that was drawn several times ranged over."""
    if row.draws is None:
        return ""
    low, high, n = row.draws
    return f" (mean of {n} draws, {percent(low)} to {percent(high)})"


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
    return Effect(rows[0].variant, point, bool(chosen), before, controls)


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
    paragraphs = tuple(_sentence(one) for one in effects(results, stage)) or ("No point was measured under harm.",)
    table = Table(
        "Every point",
        ("variant", "curve", "strength", "condition", "accuracy", "95% interval", "margin (logits)", "chosen"),
        tuple(
            (
                printable(r.variant),
                series_name(r),
                number(r.strength),
                r.condition,
                percent(r.accuracy),
                f"{percent(r.ci[0])} to {percent(r.ci[1])}",
                number(r.margin),
                "yes" if r.chosen else "",
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
        "the discovery half and every point is measured on the report half. Random direction and unrelated feature: "
        "equal norm, same positions. Benign intent: the same edit where there is nothing to undo.",
        (table,),
    )


def _sentence(one: Effect) -> str:
    point, variant = one.point, printable(one.variant)
    how = "chosen on the discovery half" if one.was_chosen else "the best of the curve, not chosen beforehand"
    verb = "rises to" if one.works else "falls to" if point.ci[1] < one.before else "is"
    text = (
        f"{variant[:1].upper()}{variant[1:]}: at strength {number(point.strength)} ({how}) accuracy under harm {verb} "
        f"{percent(point.accuracy)} ({percent_interval(point.ci)}), against {percent(one.before)} without the edit."
    )
    if verb == "is":
        text += " The interval includes the accuracy without the edit: no effect is shown."
    if one.controls:
        text += (
            " At the same strength: "
            + listing(f"{name} {percent(r.accuracy)}{_draws(r)}" for name, r in one.controls.items())
            + "."
        )
    else:
        text += " No control was measured at this strength."
    if one.works and one.rival_controls:
        text += f" A control also works ({listing(one.rival_controls)}), so the gain is not specific to the feature."
    return text
