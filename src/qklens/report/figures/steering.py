"""Does turning the pressure feature down undo the effect, and do the controls do the same?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import altair as alt

from qklens.report.figures import style
from qklens.report.figures.style import CONDITION_COLOR, CONDITION_WORDS, Drawing
from qklens.report.text import finite, shorten
from qklens.studies.results import Results, Steering

Stage: TypeAlias = Literal["steer_all", "steer_query", "steer_key"]

_UNITS = {
    "raw": "in units of the residual",
    "activation_max": "\u00d7 the feature's largest activation",
    "resid_norm": "\u00d7 the residual's norm",
}
_HEIGHT = 128
_WIDTH = 188


def steer_all(results: Results) -> Drawing | None:
    """Dose-response of refuse-and-redirect on the residual stream."""
    return _figure(results, "steer_all", "Does steering refuse-and-redirect on the residual stream undo the effect?")


def steer_query(results: Results) -> Drawing | None:
    """Dose-response on the query side of the selected heads only."""
    return _figure(results, "steer_query", "Is it enough to steer what the selected heads' queries read?")


def steer_key(results: Results) -> Drawing | None:
    """Dose-response of harm-detection on the options' keys, by layer range."""
    return _figure(results, "steer_key", "Does moving harm detection on the options move the answer?")


def series_name(row: Steering) -> str:
    """What a curve is, in words: the edit itself, or which control."""
    if row.control == "benign" or (row.control is None and row.condition == "benign"):
        return "benign intent"
    if row.control is not None:
        return {"random": "random direction", "unrelated": "unrelated feature"}[row.control]
    return "steered" if row.condition == "harm" else "steered, no intent"


def variants(results: Results, stage: Stage) -> list[str]:
    """The stage's variants in the order of the results."""
    return list(dict.fromkeys(row.variant for row in results.steering if row.stage == stage))


def unit_words(rows: Sequence[Steering]) -> str:
    """The strength's unit as an axis prints it."""
    units = {str(row.spec.get("unit", "")) for row in rows}
    unit = units.pop() if len(units) == 1 else ""
    return _UNITS.get(unit, shorten(unit, 28))


_LOOK: dict[str, tuple[str, float, list[int]]] = {
    "steered": (CONDITION_COLOR["harm"], 2.4, []),
    "steered, no intent": (CONDITION_COLOR["none"], 1.4, []),
    "benign intent": (CONDITION_COLOR["benign"], 1.6, []),
    "random direction": (style.MUTED, 1.2, [2, 2]),
    "unrelated feature": (style.MUTED, 1.2, [6, 3]),
}


def _figure(results: Results, stage: Stage, question: str) -> Drawing | None:
    rows = [row for row in results.steering if row.stage == stage]
    if not rows:
        return None
    names = variants(results, stage)
    unit, clean = unit_words(rows), results.behaviour.get("none")
    panels: list[Drawing] = []
    for index, name in enumerate(names):
        chosen = [row for row in rows if row.variant == name]
        title = f"strength, {unit}" if unit else "strength"
        last = title if index == len(names) - 1 else None
        panels.append(
            alt.hconcat(
                panel(clean.accuracy if clean else None, chosen, "accuracy", last),
                panel(clean.margin if clean else None, chosen, "margin", last),
                spacing=12,
            ).properties(title=style.heading(shorten(name, 95)))
        )
    return style.finish(
        alt.vconcat(*panels, spacing=24),
        question,
        "Report half. Band: 95% Wilson interval. Dashed upright: strength chosen on the discovery half; grey bar: "
        "all random draws.",
        "Blue dotted: no intent, no edit.",
    )


def panel(
    level: float | None, rows: Sequence[Steering], measure: Literal["accuracy", "margin"], x_title: str | None
) -> Drawing:
    """One variant's curves beside its controls.

    Args:
        level: the measure without intent and without an edit, if it is known.
        rows: the variant's points, all strengths and controls.
        measure: what is drawn upwards.
        x_title: what the axis of strengths says; None leaves it to the panel below.
    """
    values: list[dict[str, object]] = []
    for row in rows:
        value = row.accuracy if measure == "accuracy" else row.margin
        if finite(value) and finite(row.strength):
            values.append(
                {
                    "series": series_name(row),
                    "strength": row.strength,
                    "value": value,
                    "low": row.ci[0],
                    "high": row.ci[1],
                }
            )
    numbers = [float(str(v["value"])) for v in values] + ([level] if level is not None and finite(level) else [])
    low, high = (0.0, 1.0) if measure == "accuracy" else style.padded(min([0.0, *numbers]), max([0.0, *numbers]))
    present = [name for name in _LOOK if any(v["series"] == name for v in values)]
    color = alt.Color("series:N", legend=None, scale={"domain": present, "range": [_LOOK[name][0] for name in present]})
    # A sweep downwards runs left to right as well, so that every curve starts at no edit and is named at its far end.
    down = max(row.strength for row in rows) <= 0
    x = alt.X("strength:Q", title=x_title, scale={"nice": False, "reverse": down}, axis={"grid": False, "tickCount": 5})
    y = alt.Y(
        "value:Q",
        scale={"domain": [low, high], "nice": False, "clamp": False},
        title="accuracy" if measure == "accuracy" else "margin (logits)",
        axis={"format": "%", "values": [0, 0.5, 1]} if measure == "accuracy" else {"tickCount": 4},
    )
    layers: list[alt.Chart] = []
    if measure == "accuracy":
        layers.append(style.rule_at(0.5, horizontal=True, dash=(1, 3)))
        band = style.chart([v for v in values if v["series"] == "steered"]).mark_area(opacity=0.16)
        layers.append(band.encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=color))
    else:
        layers.append(style.rule_at(0, horizontal=True))
    if level is not None and finite(level):
        layers.append(style.rule_at(level, horizontal=True, dash=(1, 3), color=CONDITION_COLOR["none"]))
    # A choice of strength 0 means that no strength helped; there is then no chosen edit to mark.
    picks = sorted({r.strength for r in rows if r.chosen and r.control is None and finite(r.strength) and r.strength})
    layers += [style.rule_at(pick, dash=(4, 3), color=style.INK) for pick in picks]
    for name in reversed(present):
        mine = [v for v in values if v["series"] == name]
        _, width, dash = _LOOK[name]
        line = style.chart(mine).mark_line(strokeWidth=width, strokeDash=dash)
        layers.append(line.encode(x=x, y=y, color=color))
        if name == "steered":
            layers.append(style.chart(mine).mark_point(filled=True, size=26, opacity=1).encode(x=x, y=y, color=color))
    spans = [
        {"strength": row.strength, "low": row.draws[0], "high": row.draws[1]}
        for row in rows
        if row.draws is not None and measure == "accuracy" and all(map(finite, row.draws))
    ]
    if spans:
        span = style.chart(spans).mark_rule(strokeWidth=4, opacity=0.35, color=style.MUTED)
        layers.append(span.encode(x=x, y=alt.Y("low:Q"), y2="high:Q"))
    layers += _end_labels(values, present, level, (low, high), down=down)
    return alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT)


def _end_labels(
    values: Sequence[dict[str, object]],
    present: Sequence[str],
    level: float | None,
    domain: tuple[float, float],
    *,
    down: bool,
) -> list[alt.Chart]:
    """Each curve's name at its right end, moved apart where the ends meet."""
    ends: list[tuple[str, float]] = []
    for name in present:
        mine = [(float(str(v["strength"])), float(str(v["value"]))) for v in values if v["series"] == name]
        ends.append((name, (min(mine) if down else max(mine))[1]))
    if level is not None and finite(level):
        ends.append((CONDITION_WORDS["none"], level))
    low, high = domain
    gap = (high - low) * 12.5 / _HEIGHT
    placed = style.spread([value for _, value in ends], gap, low - gap / 2, high + gap / 2)
    rows = [
        {"name": name, "y": _HEIGHT * (high - at) / (high - low), "series": name}
        for (name, _), at in zip(ends, placed, strict=True)
    ]
    return [
        style.chart([row])
        .mark_text(
            align="left",
            baseline="middle",
            fontSize=10,
            color=_LOOK[row["name"]][0] if row["name"] in _LOOK else CONDITION_COLOR["none"],
            fontWeight="bold" if row["name"] == "steered" else "normal",
        )
        .encode(x=alt.value(_WIDTH + 5), y=alt.value(row["y"]), text="name:N")
        for row in rows
    ]
