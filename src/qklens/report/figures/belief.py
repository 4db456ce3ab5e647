"""Does the model still represent which option is correct?"""

from __future__ import annotations

import altair as alt

from qklens.report.figures import style
from qklens.report.figures.style import CONDITION_WORDS, CONDITIONS, Drawing
from qklens.report.text import finite, number, shorten
from qklens.studies.results import Condition, Results


def belief(results: Results) -> Drawing | None:
    """Summed activation of the correct-answer feature over each option, and how well it separates them."""
    found = results.belief
    if found is None or not found.by_condition:
        return None
    names: list[Condition] = [name for name in CONDITIONS if name in found.by_condition]
    order = [CONDITION_WORDS[name] for name in names]
    sums = [
        {"condition": CONDITION_WORDS[name], "option": option, "sum": value, "label": number(value)}
        for name in names
        for option, value in (
            ("correct option", found.by_condition[name].sum_correct),
            ("incorrect option", found.by_condition[name].sum_incorrect),
        )
        if finite(value)
    ]
    aucs = [
        {
            "condition": CONDITION_WORDS[name],
            "auc": row.auc,
            "low": row.auc_ci[0],
            "high": row.auc_ci[1],
            "label": number(row.auc),
        }
        for name in names
        if finite((row := found.by_condition[name]).auc)
    ]
    color = alt.Color("condition:N", scale=style.condition_words_scale(), legend=None)
    y = alt.Y("condition:N", sort=order, title=None)
    height = 46 * len(names)
    left = style.chart(sums).encode(y=y)
    x = alt.X("sum:Q", title="activation summed over the option's tokens (mean of prompts)", scale={"nice": True})
    shape = alt.Shape(
        "option:N",
        scale={"domain": ["correct option", "incorrect option"], "range": ["circle", "diamond"]},
        legend=None,
    )
    first = CONDITION_WORDS[names[0]]
    key = style.chart([row for row in sums if row["condition"] == first])
    activation = (
        alt.layer(
            left.mark_line(strokeWidth=2.5, opacity=0.35).encode(x=x, color=color),
            left.transform_filter("datum.option == 'correct option'")
            .mark_point(filled=True, size=95, opacity=1)
            .encode(x=x, color=color, shape=shape),
            left.transform_filter("datum.option == 'incorrect option'")
            .mark_point(filled=True, size=95, opacity=1, fill=style.PAPER, strokeWidth=2)
            .encode(
                x=x, stroke=alt.Stroke("condition:N", scale=style.condition_words_scale(), legend=None), shape=shape
            ),
            left.mark_text(dy=16, fontSize=10.5).encode(x=x, text="label:N"),
            key.mark_text(dy=-13, fontSize=10.5, color=style.MUTED).encode(y=y, x=x, text="option:N"),
        )
    ).properties(width=330, height=height, title=style.heading("Summed activation"))
    right = style.chart(aucs).encode(y=alt.Y("condition:N", sort=order, title=None, axis=None), color=color)
    lowest = min([0.5, *(float(row["low"]) for row in aucs if finite(float(row["low"])))])
    scale = {"domain": [max(0.0, lowest - 0.03), 1.02], "nice": False, "zero": False}
    separation = (
        alt.layer(
            style.rule_at(0.5, dash=(3, 3)),
            right.mark_rule(strokeWidth=3, opacity=0.45).encode(x=alt.X("low:Q", scale=scale), x2="high:Q"),
            right.mark_point(filled=True, size=75, opacity=1).encode(
                x=alt.X("auc:Q", scale=scale, title="AUC; 0.5 is no preference")
            ),
            right.mark_text(dy=-13, fontWeight="bold").encode(x="auc:Q", text="label:N"),
        )
    ).properties(width=215, height=height, title=style.heading("Separation of the options"))
    return style.finish(
        alt.hconcat(activation, separation, spacing=40),
        "Does the correct-answer feature still prefer the correct option?",
        f"Feature {shorten(found.feature, 30)} at layer {found.layer}, chosen on the discovery half without intent. "
        "Bars: bootstrap over items.",
    )
