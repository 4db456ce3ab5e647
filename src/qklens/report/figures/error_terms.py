"""How much of refuse-and-redirect's pull runs through what the dictionary does not explain?"""

from __future__ import annotations

import altair as alt

from qklens.report.figures import style
from qklens.report.figures.style import CONDITION_WORDS, CONDITIONS, Drawing
from qklens.report.text import finite, head_name, signed
from qklens.studies.results import Results

_PARTS = ("features", "bias", "error", "total")
_SHOWN = 6


def error_terms(results: Results) -> Drawing | None:
    """Refuse-and-redirect's effect on each head's score, by what it meets on the key side."""
    rows = [
        {
            "head": head_name(row.layer, row.head),
            "condition": CONDITION_WORDS[row.condition],
            "part": part,
            "value": value,
            "low": row.ci[part][0] if part in row.ci and all(map(finite, row.ci[part])) else value,
            "high": row.ci[part][1] if part in row.ci and all(map(finite, row.ci[part])) else value,
            "label": signed(value),
        }
        for row in results.error_terms
        for part, value in [*row.through.items(), ("total", row.total)]
        if finite(value)
    ]
    if not rows:
        return None
    heads = list(dict.fromkeys(str(row["head"]) for row in rows))[:_SHOWN]
    conditions = [CONDITION_WORDS[n] for n in CONDITIONS if any(r["condition"] == CONDITION_WORDS[n] for r in rows)]
    parts = list(dict.fromkeys([*(p for p in _PARTS if p != "total"), *(str(r["part"]) for r in rows)]))
    parts = [p for p in parts if p != "total" and any(r["part"] == p for r in rows)] + ["total"]
    low, high = style.padded(min(0.0, *(float(r["low"]) for r in rows)), max(0.0, *(float(r["high"]) for r in rows)))
    across = min(3, len(heads))
    width = {1: 420, 2: 265}.get(across, 170)
    panels: list[Drawing] = []
    for index, head in enumerate(heads):
        mine = [row for row in rows if row["head"] == head]
        base = style.chart(mine).encode(
            y=alt.Y(
                "part:N",
                sort=parts,
                title=None,
                axis={"labels": index % across == 0},
                scale={"domain": parts, "paddingInner": 0.35},
            ),
            yOffset=alt.YOffset("condition:N", sort=conditions, scale={"domain": conditions}),
            color=alt.Color(
                "condition:N",
                scale=style.condition_words_scale(),
                legend={"title": None, "symbolType": "square", "values": conditions, "symbolOpacity": 1}
                if index == 0
                else None,
            ),
        )
        x = alt.X("value:Q", scale={"domain": [low, high], "nice": False}, title="part of the score")
        panels.append(
            (
                alt.layer(
                    base.mark_bar(opacity=0.75).encode(x=x),
                    base.mark_rule(color=style.INK, strokeWidth=1).encode(
                        x=alt.X("low:Q"), x2="high:Q", color=alt.value(style.INK)
                    ),
                    style.rule_at(0, color=style.INK),
                )
            ).properties(width=width, height=(12 * len(conditions) + 10) * len(parts), title=style.heading(head))
        )
    grid = [alt.hconcat(*panels[i : i + across], spacing=16) for i in range(0, len(panels), across)]
    return style.finish(
        alt.vconcat(*grid, spacing=22),
        "Does refuse-and-redirect act through named features or through the dictionary's error?",
        "Its effect on the head's score, split by what it meets on the key side. Whiskers: 95% bootstrap over items.",
    )
