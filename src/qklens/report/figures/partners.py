"""Which other features does refuse-and-redirect push away, or pull in?"""

from __future__ import annotations

import altair as alt

from qklens.report.figures import ledger, style
from qklens.report.figures.ledger import Column
from qklens.report.figures.style import Drawing
from qklens.report.text import finite, role_words, shorten, source_words, tick, z_value
from qklens.studies.results import Results
from qklens.studies.results_around import Partner

_ENDS = 15
_TOKENS_WIDE = 36
_DIVERGING = ["#b98a3a", "#f1f3f4", "#3f4c5a"]


def both_ends(partners: list[Partner], ends: int) -> list[Partner]:
    """The most negative and the most positive partners by value, most negative first, none twice."""
    rows = sorted((p for p in partners if finite(p.value)), key=lambda p: (p.value, p.feature))
    return rows if len(rows) <= 2 * ends else rows[:ends] + rows[-ends:]


def partners(results: Results) -> Drawing | None:
    """Key features ranked by their interaction with refuse-and-redirect, where they fire, and on which sets."""
    rows = both_ends(results.partners, _ENDS)
    if not rows:
        return None
    left_out = sum(finite(p.value) for p in results.partners) - len(rows)
    drawn = [
        {
            "at": index,
            "feature": source_words(shorten(p.feature, 9 if p.role else 25), p.role)
            if p.feature != p.role
            else role_words(p.role),
            "color": style.role_color(p.role),
            "tokens": _tokens(p),
            "value": p.value,
            "label": tick(p.value, 3) + (f"  z {z_value(p.z)}" if finite(p.z) else ""),
            "edge": max(p.value, 0.0),
        }
        for index, p in enumerate(rows)
    ]
    sets = list(dict.fromkeys(name for p in rows for name in p.activation))[:4]
    table = ledger.columns(
        drawn, (Column("feature", "key feature", 160, "color", bold=True), Column("tokens", "most active on", 205))
    )
    values = [p.value for p in rows]
    low, high = style.padded(min(0.0, *values), max(0.0, *values), 0.05)
    room = (high - low) * 0.55
    y = ledger.rows_axis(drawn)
    x = alt.X(
        "value:Q",
        scale={"domain": [low, high + room], "nice": False},
        title="virtual interaction",
        axis={"tickCount": 4},
    )
    bars = (
        alt.layer(
            style.chart(drawn).mark_bar(height=10).encode(x=x, y=y, color=alt.Color("color:N", scale=None)),
            style.rule_at(0, color=style.INK),
            style.chart(drawn).mark_text(align="left", dx=5, fontSize=10).encode(x="edge:Q", y=y, text="label:N"),
        )
    ).properties(width=205 if sets else 280, height=ledger.height(drawn))
    parts: list[Drawing] = [table, bars]
    if sets:
        cells = [
            {"at": index, "set": shorten(name, 14), "activation": p.activation[name]}
            for index, p in enumerate(rows)
            for name in sets
            if name in p.activation and finite(p.activation[name])
        ]
        largest = max((abs(float(cell["activation"])) for cell in cells), default=0.0) or 1.0
        below = any(float(cell["activation"]) < 0 for cell in cells)
        parts.append(
            style.chart(cells)
            .mark_rect(stroke=style.PAPER, strokeWidth=1)
            .encode(
                x=alt.X("set:N", title=None, sort=None, axis={"labelAngle": -40, "orient": "bottom"}),
                y=y,
                color=alt.Color(
                    "activation:Q",
                    scale={"domain": [-largest, 0, largest], "range": _DIVERGING}
                    if below
                    else {"domain": [0, largest], "range": _DIVERGING[1:]},
                    legend={
                        "title": "mean activation on intents",
                        "orient": "top",
                        "gradientLength": 70,
                        "gradientThickness": 8,
                        "values": [-largest, 0, largest] if below else [0, largest],
                        "format": ".2~f",
                    },
                ),
            )
            .properties(width=22 * len(sets), height=ledger.height(drawn))
        )
    return style.finish(
        alt.hconcat(*parts, spacing=12).resolve_scale(color="independent"),
        "Which features does refuse-and-redirect push the selected heads away from?",
        "Weights only, mean over the selected heads. Negative: attention falls where the feature is active. Colour: "
        "role.",
        *([f"The {len(rows)} at both ends; {left_out} between them are in the table only."] if left_out else []),
    )


def _tokens(partner: Partner) -> str:
    """The tokens that fit into the column, each whole unless it is long itself."""
    text = ""
    for token in partner.top_tokens:
        longer = text + ("  " if text else "") + shorten(token, 14)
        if len(longer) > _TOKENS_WIDE:
            break
        text = longer
    return text
