"""Does the same circuit act on other kinds of withholding, and which keys does it push away there?"""

from __future__ import annotations

import altair as alt

from qklens.report.figures import style
from qklens.report.figures.pushed_away import pushed_away
from qklens.report.figures.style import CONDITION_WORDS, CONDITIONS, Drawing
from qklens.report.text import finite, shorten
from qklens.studies.results import Results


def transfer(results: Results) -> Drawing | None:
    """Accuracy per set and condition, steered and not; attention difference; the feature's activity; keys below."""
    if not results.transfer:
        return None
    sets = list(dict.fromkeys(row.set for row in results.transfer))
    conditions = [CONDITION_WORDS[n] for n in CONDITIONS if any(row.condition == n for row in results.transfer)]
    rows = [
        {
            "set": shorten(row.set, 22),
            "condition": CONDITION_WORDS[row.condition],
            "accuracy": row.accuracy,
            "low": row.ci[0],
            "high": row.ci[1],
            "attention": row.attention_difference,
            "attention_low": row.attention_ci[0],
            "attention_high": row.attention_ci[1],
            "refuse": row.refuse_activation,
            "refuse_low": row.role_activation["refuse_redirect"][1] if row.role_activation else row.refuse_activation,
            "refuse_high": row.role_activation["refuse_redirect"][2] if row.role_activation else row.refuse_activation,
            "steered": row.steered_accuracy,
            "random": row.steering.random[0] if row.steering is not None and row.steering.random else None,
        }
        for row in results.transfer
    ]
    order = [shorten(name, 22) for name in sets]
    height = (19 * len(conditions) + 16) * len(sets)

    def base(rows: list[dict[str, object]], *, labels: bool) -> alt.Chart:
        return style.chart(rows).encode(
            y=alt.Y(
                "set:N",
                sort=order,
                title=None,
                scale={"domain": order, "paddingInner": 0.3, "paddingOuter": 0.15},
                axis={"labels": labels, "labelFontWeight": "bold"},
            ),
            yOffset=alt.YOffset("condition:N", sort=conditions, scale={"domain": conditions}),
            color=alt.Color(
                "condition:N",
                scale=style.condition_words_scale(),
                legend={"title": None, "symbolType": "circle", "values": conditions, "symbolOpacity": 1},
            ),
        )

    drawn = base([r for r in rows if finite(r["accuracy"])], labels=True)
    x = alt.X("accuracy:Q", scale={"domain": [0, 1]}, axis={"format": "%", "values": [0, 0.5, 1]}, title="accuracy")
    accuracy = (
        alt.layer(
            style.rule_at(0.5, dash=(3, 3)),
            drawn.mark_rule(strokeWidth=3, opacity=0.45).encode(x=alt.X("low:Q"), x2="high:Q"),
            drawn.mark_point(filled=True, size=60, opacity=1).encode(x=x),
            base([r for r in rows if finite(r["random"])], labels=True)
            .mark_point(shape="cross", size=45, filled=True, opacity=1)
            .encode(x="random:Q", color=alt.value(style.FAINT)),
            base([r for r in rows if finite(r["steered"])], labels=True)
            .mark_point(shape="diamond", size=85, strokeWidth=1.8, fill=style.PAPER, opacity=1)
            .encode(x="steered:Q"),
        )
    ).properties(
        width=225, height=height, title=style.heading("Accuracy", "diamond: steered; grey cross: random directions")
    )
    panels: list[Drawing] = [accuracy]
    for field, title, unit in (
        ("attention", "Attention difference", "correct \u2212 incorrect"),
        ("refuse", "Refuse-and-redirect", "activation at the answer"),
    ):
        kept = [r for r in rows if finite(r[field])]
        mark = base(kept, labels=False)
        panels.append(
            (
                alt.layer(
                    mark.mark_bar(height=9, opacity=0.8).encode(
                        x=alt.X(f"{field}:Q", title=unit, axis={"tickCount": 3})
                    ),
                    mark.mark_rule(strokeWidth=1).encode(
                        x=alt.X(f"{field}_low:Q"), x2=f"{field}_high:Q", color=alt.value(style.INK)
                    ),
                    style.rule_at(0, color=style.INK),
                )
            ).properties(width=140, height=height, title=style.heading(title))
        )
    keys = pushed_away(results.pushed_away)
    above = alt.hconcat(*panels, spacing=24)
    return style.finish(
        alt.vconcat(above, keys, spacing=30).resolve_scale(color="independent") if keys is not None else above,
        "Does the same circuit act on other sets?",
        "Heads, feature and strength as found on the main set; nothing is chosen again.",
        "Bars: 95%, Wilson for accuracies, bootstrap over items otherwise.",
    )
