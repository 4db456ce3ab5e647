"""Which pairs of sources pull the selected heads towards the correct option, and which push them off it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import altair as alt

from qklens.report.figures import ledger, style
from qklens.report.figures.ledger import Column
from qklens.report.figures.style import CONDITION_COLOR, CONDITION_WORDS, Drawing
from qklens.report.text import finite, head_name, mean, role_words, shorten, tick
from qklens.studies.results import InteractionRow, InteractionShare, Results

Kind: TypeAlias = Literal["contrastive", "realised"]

_ENDS = 7
_KIND_WORDS = {
    "contrastive": "Contrastive: correct option minus incorrect option",
    "realised": "Realised: on the correct option",
}
_SOURCES = ("feature", "bias", "error")


def interactions(results: Results) -> Drawing | None:
    """Both ends of the ranking under harm with their values without it, and shares by kind of source."""
    panels = [
        panel for kind in ("contrastive", "realised") if (panel := _pairs(results.interactions, kind)) is not None
    ]
    shares = _shares(results.interaction_shares)
    if shares is not None:
        panels.append(shares)
    if not panels:
        return None
    return style.finish(
        alt.vconcat(*panels, spacing=34).resolve_scale(color="independent"),
        "Which query\u2013key pairs move the selected heads' attention?",
        "Mean term of the score before softmax. Bar: harmful intent; circle: no intent, where it lists the pair too.",
        "Negative lowers attention; a contrastive one favours the incorrect option.",
    )


def ranked(rows: Sequence[InteractionRow], kind: Kind, ends: int) -> list[InteractionRow]:
    """The `ends` most negative and `ends` most positive pairs under harm, by value, most negative first."""
    under = sorted((r for r in rows if r.kind == kind and r.condition == "harm" and finite(r.value)), key=_value)
    low = [r for r in under[:ends] if r.value < 0]
    high = [r for r in under[-ends:] if r.value > 0]
    return low + [r for r in high if r not in low]


def _value(row: InteractionRow) -> tuple[float, int, int, str, str]:
    return (row.value, row.layer, row.head, row.query, row.key)


def _label(name: str, role: str | None) -> str:
    if role is None:
        return shorten(name, 27)
    words = role_words(role)
    return words if name in {role, words} else f"{words} ({shorten(name, 10)})"


def _pairs(rows: Sequence[InteractionRow], kind: Kind) -> Drawing | None:
    chosen = ranked(rows, kind, _ENDS)
    if not chosen:
        return None
    clean = {(r.layer, r.head, r.query, r.key): r.value for r in rows if r.kind == kind and r.condition == "none"}
    drawn = [
        {
            "at": index,
            "head": head_name(row.layer, row.head),
            "query": _label(row.query, row.query_role),
            "query_color": style.role_color(row.query_role),
            "key": _label(row.key, row.key_role),
            "key_color": style.role_color(row.key_role),
            "value": row.value,
            "label": tick(row.value),
            "clean": clean.get((row.layer, row.head, row.query, row.key)),
        }
        for index, row in enumerate(chosen)
    ]
    table = ledger.columns(
        drawn,
        (
            Column("head", "head", 52),
            Column("query", "query source", 155, "query_color"),
            Column("key", "key source", 155, "key_color"),
            Column("label", "value", 56, align="right", bold=True),
        ),
    )
    ends = [float(row["value"]) for row in drawn] + [float(c) for row in drawn if finite(c := row["clean"])]
    low, high = style.padded(min(0.0, *ends), max(0.0, *ends), 0.04)
    y = ledger.rows_axis(drawn)
    x = alt.X("value:Q", scale={"domain": [low, high], "nice": False}, title="term of the score")
    bars = style.chart(drawn).mark_bar(height=10, color=CONDITION_COLOR["harm"], opacity=0.85).encode(x=x, y=y)
    circles = (
        style.chart([row for row in drawn if finite(row["clean"])])
        .mark_point(size=38, filled=True, fill=style.PAPER, stroke=CONDITION_COLOR["none"], strokeWidth=1.8, opacity=1)
        .encode(x="clean:Q", y=y)
    )
    plot = (alt.layer(style.rule_at(0, color=style.INK), bars, circles)).properties(
        width=245, height=ledger.height(drawn)
    )
    return (
        alt.hconcat(table, plot, spacing=10)
        .resolve_scale(color="independent")
        .properties(title=style.heading(_KIND_WORDS[kind]))
    )


def _shares(shares: Sequence[InteractionShare]) -> Drawing | None:
    panels: list[Drawing] = []
    values: list[float] = []
    tables: list[tuple[str, str, float, list[dict[str, object]]]] = []
    for kind in ("contrastive", "realised"):
        for condition in ("none", "harm"):
            rows = [r for r in shares if r.kind == kind and r.condition == condition]
            if not rows:
                continue
            cells: list[dict[str, object]] = []
            for query in _SOURCES:
                for key in _SOURCES:
                    value = mean(r.shares.get(f"{query} x {key}", float("nan")) for r in rows)
                    if finite(value):
                        values.append(abs(value))
                        cells.append({"query": query, "key": key, "value": value, "label": tick(value)})
            if cells:
                tables.append((kind, condition, mean(r.score for r in rows), cells))
    if not tables:
        return None
    limit = max([*values, 1e-9])
    for kind, condition, score, cells in tables:
        base = style.chart(cells).encode(
            x=alt.X("key:N", sort=list(_SOURCES), title=None, axis={"labelAngle": 0, "orient": "bottom"}),
            y=alt.Y("query:N", sort=list(_SOURCES), axis=None),
        )
        panels.append(
            (
                alt.layer(
                    base.mark_rect(stroke=style.PAPER, strokeWidth=1.5).encode(
                        color=alt.Color(
                            "value:Q",
                            legend=None,
                            scale={
                                "domain": [-limit, 0, limit],
                                "range": ["#d9b56a", "#f1f3f4", "#86bdb8"],
                                "interpolate": "rgb",
                            },
                        )
                    ),
                    base.mark_text(fontSize=10.5, color="#1f2934").encode(text="label:N"),
                )
            ).properties(
                width=134,
                height=78,
                title=style.heading(f"{kind.capitalize()}, {CONDITION_WORDS[condition]}", f"score {tick(score)}"),
            )
        )
    # The row names are a panel of their own, because axis labels would push this row out of line with those above.
    names = (
        style.chart([{"query": name, "label": f"{name} \u00d7"} for name in _SOURCES])
        .mark_text(align="left")
        .encode(x=alt.value(0), y=alt.Y("query:N", sort=list(_SOURCES), axis=None), text="label:N")
        .properties(width=52, height=78, title=style.heading("query \u00d7 key", "\u00a0"))
    )
    return alt.hconcat(names, *panels, spacing=14).properties(
        title=style.heading("The whole score by kind of source, mean over the selected heads")
    )
