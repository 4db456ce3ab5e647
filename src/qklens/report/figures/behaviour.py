"""Does stated harm lower accuracy, and on which items?"""

from __future__ import annotations

import altair as alt

from qklens.report.figures import style
from qklens.report.figures.style import CONDITION_WORDS, CONDITIONS, Drawing
from qklens.report.text import finite, mean, percent, shorten
from qklens.studies.results import Results

_SLOPE_HEIGHT = 214
_SEVERITY = {"mild": 0, "severe": 1}


def behaviour(results: Results) -> Drawing | None:
    """Accuracy with its interval per condition, position bias, and every item's margin without and with harm."""
    if not results.behaviour:
        return None
    left = alt.vconcat(_accuracy(results), _order(results), spacing=22)
    slopes = _slopes(results)
    drawing = alt.hconcat(left, slopes, spacing=30).resolve_scale(color="independent") if slopes is not None else left
    return style.finish(
        drawing,
        "Does a harmful intent change the answers, and on which items?",
        "Right: one line per item, mean of both option orders. Red lines cross to the wrong letter; black: mean.",
    )


def _accuracy(results: Results) -> Drawing:
    rows = [
        {
            "condition": CONDITION_WORDS[name],
            "accuracy": row.accuracy,
            "low": row.ci[0],
            "high": row.ci[1],
            "label": percent(row.accuracy),
        }
        for name in CONDITIONS
        if (row := results.behaviour.get(name)) is not None and finite(row.accuracy)
    ]
    present = [str(row["condition"]) for row in rows]
    base = style.chart(rows).encode(
        y=alt.Y("condition:N", sort=present, title=None),
        color=alt.Color("condition:N", scale=style.condition_words_scale(), legend=None),
    )
    x = alt.X("accuracy:Q", scale={"domain": [0, 1]}, axis={"format": "%", "title": None, "values": [0, 0.5, 1]})
    return (
        (
            alt.layer(
                style.rule_at(0.5, dash=(3, 3)),
                base.mark_rule(strokeWidth=3, opacity=0.45).encode(x=alt.X("low:Q"), x2="high:Q"),
                base.mark_point(filled=True, size=75, opacity=1).encode(x=x),
                base.mark_text(dy=-12, fontWeight="bold").encode(x="accuracy:Q", text="label:N"),
            )
        )
        .properties(width=180, height=32 * len(rows) + 14)
        .properties(title=style.heading("Accuracy", "both orders; chance is 50%", "bar: 95% Wilson interval"))
    )


def _order(results: Results) -> Drawing:
    rows = [
        {"condition": CONDITION_WORDS[name], "order": order, "accuracy": value}
        for name in CONDITIONS
        if name in results.behaviour_details.accuracy_by_order
        for order, value in zip(("A", "B"), results.behaviour_details.accuracy_by_order[name], strict=True)
        if finite(value)
    ]
    present = [CONDITION_WORDS[name] for name in CONDITIONS if name in results.behaviour_details.accuracy_by_order]
    base = style.chart(rows).encode(
        y=alt.Y("condition:N", sort=present, title=None),
        color=alt.Color("condition:N", scale=style.condition_words_scale(), legend=None),
    )
    x = alt.X("accuracy:Q", scale={"domain": [0, 1]}, axis={"format": "%", "title": "accuracy", "values": [0, 0.5, 1]})
    return (
        (
            alt.layer(
                style.rule_at(0.5, dash=(3, 3)),
                base.mark_line(strokeWidth=1, opacity=0.5).encode(x=x),
                base.transform_filter("datum.order == 'A'").mark_text(dy=-6, fontSize=10).encode(x=x, text="order:N"),
                base.transform_filter("datum.order == 'B'").mark_text(dy=7, fontSize=10).encode(x=x, text="order:N"),
                base.mark_tick(thickness=2, height=7).encode(x=x),
            )
        )
        .properties(width=180, height=28 * len(present))
        .properties(title=style.heading("By place of the correct option"))
    )


def _slopes(results: Results) -> Drawing | None:
    details = results.behaviour_details
    none, harm = details.margin_by_item.get("none", []), details.margin_by_item.get("harm", [])
    pairs = list(zip(none, harm, details.severity_by_item, range(len(none)), strict=False))
    pairs = [pair for pair in pairs if finite(pair[0]) and finite(pair[1])]
    if not pairs:
        return None
    low, high = style.padded(min(min(p[:2]) for p in pairs), max(max(p[:2]) for p in pairs))
    groups = sorted({p[2] for p in pairs}, key=lambda name: (name is None, _SEVERITY.get(name or "", 2), name or ""))[
        :3
    ]
    width = {1: 190, 2: 135}.get(len(groups), 92)
    y = alt.Y("margin:Q", scale={"domain": [low, high]}, title="margin (logits)")
    panels: list[Drawing] = []
    for index, group in enumerate(groups):
        members = [p for p in pairs if p[2] == group]
        rows = [
            {"item": i, "where": CONDITION_WORDS[name], "margin": value, "flips": "yes" if b < 0 <= a else "no"}
            for a, b, _, i in members
            for name, value in (("none", a), ("harm", b))
        ]
        means = [
            {"where": CONDITION_WORDS["none"], "margin": mean(p[0] for p in members)},
            {"where": CONDITION_WORDS["harm"], "margin": mean(p[1] for p in members)},
        ]
        x = alt.X(
            "where:O",
            sort=[CONDITION_WORDS["none"], CONDITION_WORDS["harm"]],
            title=None,
            scale={"type": "point", "padding": 0.25},
            axis={"labelAngle": 0, "labelExpr": "split(datum.label, ' ')"},
        )
        side = y if index == 0 else alt.Y("margin:Q", scale={"domain": [low, high]}, title=None)
        lines = (
            style.chart(rows)
            .mark_line(strokeWidth=0.9, opacity=0.4)
            .encode(
                x=x,
                y=side,
                detail="item:N",
                color=alt.Color(
                    "flips:N",
                    legend=None,
                    scale={"domain": ["yes", "no"], "range": [style.CONDITION_COLOR["harm"], style.FAINT]},
                ),
            )
        )
        middle = style.chart(means).mark_line(
            strokeWidth=2.5, color=style.INK, point=alt.OverlayMarkDef(color=style.INK, size=55, filled=True)
        )
        accuracy = details.accuracy_by_severity.get(str(group))
        flipped = sum(b < 0 <= a for a, b, _, _ in members)
        subtitle = f"{flipped} of {len(members)} cross 0"
        name = shorten(group, 14) if group else ""
        panels.append(
            (alt.layer(style.rule_at(0, horizontal=True), lines, middle.encode(x=x, y="margin:Q")))
            .properties(width=width, height=_SLOPE_HEIGHT)
            .properties(
                title=style.heading(
                    f"{name} harm" if group else "Margin by item",
                    subtitle,
                    *([f"{percent(accuracy)} correct"] if accuracy is not None else []),
                )
            )
        )
    return alt.hconcat(*panels, spacing=14)
