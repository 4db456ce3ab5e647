"""When in training does the behaviour, and the wiring that would explain it, appear?"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from qklens.report.figures import style
from qklens.report.figures.style import CONDITION_WORDS, CONDITIONS, Drawing
from qklens.report.text import finite, shorten
from qklens.studies.results import Origin, Results

_WIDTH, _HEIGHT = 265, 128
_ACROSS = 55


def origin(results: Results) -> Drawing | None:
    """Accuracy, attention difference, the feature's contrast and its interaction with harm, over checkpoints."""
    rows = sorted(results.origin, key=lambda row: row.step)
    if not rows:
        return None
    names = [f"{index}|{shorten(row.checkpoint, 16)}" for index, row in enumerate(rows)]
    last = {"names": names, "angle": 0 if len(names) * max(len(name) for name in names) <= _ACROSS else -35}
    panels = [
        _conditions(rows, last, "accuracy"),
        _conditions(rows, last, "attention"),
        _single(rows, last, "contrast", "Refuse-and-redirect, harm \u2212 benign", "activation at the answer"),
        _single(rows, last, "z", "Refuse-and-redirect \u00d7 harm detection", "z against random pairs"),
    ]
    return style.finish(
        alt.vconcat(alt.hconcat(*panels[:2], spacing=36), alt.hconcat(*panels[2:], spacing=36), spacing=22),
        "Where in training do the behaviour and its wiring appear?",
        "Checkpoints from base to post-trained. Bands: 95% Wilson intervals. Grey band: |z| < 2.",
    )


def _x(last: dict[str, object]) -> alt.X:
    # The index before the bar keeps two checkpoints of the same name apart; the label shows only the name.
    return alt.X(
        "checkpoint:O",
        sort=last["names"],  # type: ignore[arg-type]
        title=None,
        scale={"type": "point", "padding": 0.2},
        axis={"labelAngle": last["angle"], "labelExpr": "substring(datum.label, indexof(datum.label, '|') + 1)"},  # type: ignore[arg-type]
    )


def _conditions(rows: Sequence[Origin], last: dict[str, object], measure: str) -> Drawing:
    names: list[str] = last["names"]  # type: ignore[assignment]
    values = [
        {
            "checkpoint": names[index],
            "condition": CONDITION_WORDS[name],
            "value": table[name],
            "low": row.ci[name][0] if measure == "accuracy" and name in row.ci else table[name],
            "high": row.ci[name][1] if measure == "accuracy" and name in row.ci else table[name],
        }
        for index, row in enumerate(rows)
        for name in CONDITIONS
        if name in (table := row.accuracy if measure == "accuracy" else row.attention_difference)
        and finite(table[name])
    ]
    base = style.chart(values).encode(
        x=_x(last),
        color=alt.Color(
            "condition:N",
            scale=style.condition_words_scale(),
            legend={"title": None, "symbolType": "stroke", "symbolOpacity": 1, "symbolStrokeWidth": 2.5}
            if measure == "accuracy"
            else None,
        ),
    )
    if measure == "accuracy":
        y = alt.Y("value:Q", title="accuracy", scale={"domain": [0, 1]}, axis={"format": "%", "values": [0, 0.5, 1]})
        reference = style.rule_at(0.5, horizontal=True, dash=(3, 3))
    else:
        y = alt.Y("value:Q", title="attention difference", axis={"tickCount": 4})
        reference = style.rule_at(0, horizontal=True)
    return (
        alt.layer(
            reference,
            base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q"), y2="high:Q"),
            base.mark_line(strokeWidth=2).encode(y=y),
            base.mark_point(filled=True, size=38, opacity=1).encode(y=y),
        )
    ).properties(
        width=_WIDTH,
        height=_HEIGHT,
        title=style.heading("Accuracy" if measure == "accuracy" else "Attention difference of the selected heads"),
    )


def _single(rows: Sequence[Origin], last: dict[str, object], field: str, title: str, unit: str) -> Drawing:
    names: list[str] = last["names"]  # type: ignore[assignment]
    values = [
        {"checkpoint": names[index], "value": value}
        for index, row in enumerate(rows)
        if finite(value := row.refuse_contrast if field == "contrast" else row.refuse_harm_z)
    ]
    color = style.ROLE_COLOR["refuse_redirect"]
    base = style.chart(values).encode(x=_x(last), y=alt.Y("value:Q", title=unit, axis={"tickCount": 4}))
    layers: list[alt.Chart] = [style.rule_at(0, horizontal=True)]
    if field == "z":
        band = style.chart([{"a": -2, "b": 2}]).mark_rect(color=style.GRID, opacity=0.55)
        layers.insert(0, band.encode(y=alt.Y("a:Q"), y2="b:Q"))
    layers += [
        base.mark_line(strokeWidth=2, color=color),
        base.mark_point(filled=True, size=38, opacity=1, color=color),
    ]
    return alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT, title=style.heading(title))
