"""Which heads select the answer, where do they look under pressure, and is that enough to explain the answers?"""

from __future__ import annotations

import altair as alt

from qklens.report.figures import style
from qklens.report.figures.layer_head import layer_head_map
from qklens.report.figures.style import CONDITION_COLOR, CONDITION_WORDS, CONDITIONS, Drawing
from qklens.report.text import finite, head_name, mean, number
from qklens.studies.results import Condition, HeadRow, HeadsDetails, Results

SPANS = {
    "correct": "#0b7a75",
    "incorrect": "#d8a03a",
    "intent": "#b0357a",
    "question": "#c3ccd5",
    "instruction": "#8fb3a9",
    "template before": "#4a5a8a",
    "template after": "#93a1cc",
    "between": "#eceff1",
}
_PLACES = {"template before": "template_before", "template after": "template_after"}
_SHOWN = 6


def heads(results: Results) -> Drawing | None:
    """Maps of the attention difference, where the selected heads look, and what giving back their patterns restores."""
    details = results.heads_details
    if details is None:
        return None
    panels = [part for part in (_maps(details), _mass(results), _patch(details)) if part is not None]
    return style.finish(
        alt.vconcat(*panels, spacing=30).resolve_scale(color="independent"),
        "Where do the answer-selection heads look, and does their attention decide the answer?",
        "Attention difference: mass from the answer position on the correct option minus the incorrect one. Outlined: "
        "selected heads.",
    )


def _maps(details: HeadsDetails) -> Drawing | None:
    both: tuple[Condition, ...] = ("none", "harm")
    shown: list[Condition] = [name for name in both if details.attention_difference_map.get(name)]
    values = [v for name in shown for row in details.attention_difference_map[name] for v in row if finite(v)]
    if not values:
        return None
    limit = max(max(abs(v) for v in values), 1e-9)
    n_layers = max(len(details.attention_difference_map[name]) for name in shown)
    n_heads = max(len(row) for name in shown for row in details.attention_difference_map[name])
    cell = max(5.0, min(26.0, 280 / n_layers))
    width = min(290.0, max(26.0 * n_heads, 180.0))
    legend = {
        "title": "\u2190 incorrect \u00b7 correct \u2192",
        "gradientLength": 190,
        "gradientThickness": 9,
        "format": ".2~f",
        "titleAnchor": "middle",
    }
    panels: list[Drawing] = []
    for name in shown:
        differences = {
            (layer, head): value
            for layer, row in enumerate(details.attention_difference_map[name])
            for head, value in enumerate(row)
            if finite(value)
        }
        drawn = layer_head_map(differences, details.selected, limit, legend if name == shown[0] else None)
        panels.append(
            drawn.properties(
                width=width, height=cell * n_layers, title=style.heading(f"Every head, {CONDITION_WORDS[name]}")
            )
        )
    return alt.hconcat(*panels, spacing=30).resolve_scale(color="shared")


def _mass(results: Results) -> Drawing | None:
    chosen = [row for row in results.heads if row.selected]
    if not chosen:
        return None
    present: list[Condition] = [name for name in CONDITIONS if all(name in row.attention for row in chosen)]
    blocks: list[tuple[str, Condition, list[dict[str, float]]]] = []
    if len(chosen) > 1:
        blocks.extend(("mean of selected", name, [_shares(row, name) for row in chosen]) for name in present)
    for row in chosen[:_SHOWN]:
        blocks.extend((head_name(row.layer, row.head), name, [_shares(row, name)]) for name in present)
    bars = [
        {
            "group": group,
            "condition": CONDITION_WORDS[name],
            "span": span,
            "order": index,
            "mass": mean(r.get(span, 0.0) for r in rows),
        }
        for group, name, rows in blocks
        for index, span in enumerate(SPANS)
    ]
    order = list(dict.fromkeys(str(bar["group"]) for bar in bars))
    more = (f"first {_SHOWN} of {len(chosen)} heads",) if len(chosen) > _SHOWN else ()
    return (
        style.chart(bars)
        .mark_bar(height=11)
        .encode(
            x=alt.X(
                "mass:Q",
                stack="zero",
                title="share of attention from the answer position",
                scale={"domain": [0, 1]},
                axis={"format": "%", "grid": False},
            ),
            y=alt.Y("condition:N", sort=[CONDITION_WORDS[n] for n in CONDITIONS], title=None),
            row=alt.Row(
                "group:N",
                sort=order,
                title=None,
                spacing=8,
                header={"labelAngle": 0, "labelAlign": "left", "labelFontSize": 11, "labelColor": style.INK},
            ),
            color=alt.Color(
                "span:N",
                sort=list(SPANS),
                scale={"domain": list(SPANS), "range": list(SPANS.values())},
                legend={"title": None, "symbolType": "square", "direction": "horizontal", "columns": 4},
            ),
            order="order:Q",
        )
        .properties(width=430, height=44)
        .properties(title=style.heading("What the selected heads attend to", *more))
    )


def _shares(row: HeadRow, condition: Condition) -> dict[str, float]:
    """One head's attention by span: the options by role, all other tokens by place."""
    by_role, by_place = row.attention[condition], row.attention_by_place.get(condition, {})
    return {span: by_role.get(span, by_place.get(_PLACES.get(span, span), 0.0)) for span in SPANS}


def _patch(details: HeadsDetails) -> Drawing | None:
    if not details.selected:
        return None
    lost = details.none_margin - details.harm_margin
    rows: list[dict[str, object]] = []
    for label, value, color, bounds in (
        ("no intent", details.none_margin, CONDITION_COLOR["none"], None),
        ("harmful intent", details.harm_margin, CONDITION_COLOR["harm"], None),
        ("+ clean pattern, selected heads", details.patched_margin, style.INK, details.restored_ci),
        (
            "+ clean pattern, random heads",
            details.harm_margin + details.restored_random_heads * lost,
            style.MUTED,
            None,
        ),
        ("+ clean pattern, every head", details.harm_margin + details.all_heads_restored * lost, style.MUTED, None),
    ):
        if finite(value):
            low, high = [details.harm_margin + b * lost for b in bounds] if bounds else (value, value)
            rows.append(
                {"what": label, "margin": value, "color": color, "low": low, "high": high, "label": number(value)}
            )
    if not rows:
        return None
    base = style.chart(rows).encode(
        y=alt.Y("what:N", sort=[str(row["what"]) for row in rows], title=None),
        color=alt.Color("color:N", scale=None),
    )
    x = alt.X("margin:Q", title="mean margin (logits)")
    margins = (
        alt.layer(
            style.rule_at(0),
            base.mark_rule(strokeWidth=3, opacity=0.45).encode(x=alt.X("low:Q"), x2="high:Q"),
            base.mark_point(filled=True, size=75, opacity=1).encode(x=x),
            base.mark_text(dy=-11, fontSize=10.5).encode(x=x, text="label:N"),
        )
    ).properties(
        width=230, height=30 * len(rows), title=style.heading("Patching in the pattern from the bare question")
    )
    curve = [{"k": k, "restored": v} for k, v in enumerate(details.discovery_curve, start=1) if finite(v)]
    if len(curve) < 2:
        return margins
    line = (
        alt.layer(
            style.rule_at(1, horizontal=True, dash=(3, 3)),
            style.chart(curve)
            .mark_line(color=style.INK, strokeWidth=1.5, point=alt.OverlayMarkDef(color=style.INK, size=28))
            .encode(
                x=alt.X(
                    "k:Q",
                    title="first k ranked heads",
                    scale={"domain": [1, len(details.discovery_curve)], "nice": False},
                    axis={"values": list(range(1, len(details.discovery_curve) + 1)), "grid": False, "format": "d"},
                ),
                y=alt.Y("restored:Q", title="margin restored", axis={"format": "%"}),
            ),
            style.chart([{"k": len(details.selected)}]).mark_rule(color=style.FAINT, strokeDash=[3, 3]).encode(x="k:Q"),
        )
    ).properties(width=165, height=30 * len(rows), title=style.heading("How many heads (discovery half)"))
    return alt.hconcat(margins, line, spacing=40)
