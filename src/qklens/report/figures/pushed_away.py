"""Which keys of another set does refuse-and-redirect push away? A ledger for each set."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from qklens.report.figures import ledger, style
from qklens.report.figures.ledger import Column
from qklens.report.figures.style import Drawing
from qklens.report.text import finite, mean, role_words, shorten, source_words, z_value
from qklens.studies.results_around import PushedAway

_SHOWN = 6
_TOKENS_WIDE = 31


def pushed_away(rows: Sequence[PushedAway]) -> Drawing | None:
    """The strongest of each set, with the tokens on which they are active and their z against both nulls."""
    tables = [
        _table(name, some)
        for name in dict.fromkeys(row.set for row in rows)
        if (some := [r for r in rows if r.set == name and finite(_value(r))])
    ]
    return alt.vconcat(*tables, spacing=26) if tables else None


def _value(row: PushedAway) -> float:
    return row.realised[0] if row.ranked_by == "realised" else mean(row.virtual)


def _table(name: str, rows: list[PushedAway]) -> Drawing:
    ordered = sorted(rows, key=lambda row: row.rank)
    chosen = [*ordered[:_SHOWN], *(row for row in ordered[_SHOWN:] if row.role)]
    drawn = [
        {
            "at": f"{name}{index}",
            "feature": role_words(r.role)
            if r.feature == r.role
            else source_words(shorten(r.feature, 9 if r.role else 25), r.role),
            "color": style.role_color(r.role),
            "tokens": _tokens(r),
            "value": _value(r),
            "low": r.realised[1] if r.ranked_by == "realised" else _value(r),
            "high": r.realised[2] if r.ranked_by == "realised" else _value(r),
            "z": ", ".join(z_value(mean(values)) for values in r.z.values()),
        }
        for index, r in enumerate(chosen)
    ]
    silent = ordered[0].ranked_by == "virtual"
    low = min(0.0, *(float(row["low"]) for row in drawn))
    high = max(0.0, *(float(row["high"]) for row in drawn))
    text = ledger.columns(
        drawn,
        (
            Column("feature", "key feature", 155, "color", bold=True),
            Column("tokens", "most active on", 190),
            Column("z", "z random, matched", 105),
        ),
    )
    y = ledger.rows_axis(drawn)
    base = style.chart(drawn)
    x = alt.X(
        "value:Q",
        scale={"domain": list(style.padded(low, high, 0.05)), "nice": False},
        axis={"tickCount": 3, "format": "~g"},
        title="virtual interaction" if silent else "adds to a token's score",
    )
    bars = alt.layer(
        base.mark_bar(height=9).encode(x=x, y=y, color=alt.Color("color:N", scale=None)),
        base.mark_rule(strokeWidth=1, color=style.INK).encode(x=alt.X("low:Q"), x2="high:Q", y=y),
        style.rule_at(0, color=style.INK),
    ).properties(width=130, height=ledger.height(drawn))
    note = (
        "refuse-and-redirect is silent here, so nothing is pushed: ranked by the weights alone"
        if silent
        else "ranked by what the pair with refuse-and-redirect adds under pressure"
    )
    return alt.hconcat(text, bars, spacing=12).properties(
        title=style.heading(f"Keys pushed away: {shorten(name, 30)}", note)
    )


def _tokens(row: PushedAway) -> str:
    """The tokens that fit into the column, each whole unless it is long itself."""
    text = ""
    for at in row.tokens:
        longer = text + ("  " if text else "") + shorten(at.token, 14)
        if len(longer) > _TOKENS_WIDE:
            break
        text = longer
    return text
