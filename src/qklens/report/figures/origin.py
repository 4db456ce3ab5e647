"""When in training does the behaviour, and the wiring that would explain it, appear?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from qklens.report.figures import style
from qklens.report.figures.style import CONDITION_WORDS, CONDITIONS, Drawing
from qklens.report.text import finite, shorten
from qklens.studies.results import Results
from qklens.studies.results_around import Milestone, Origin

_WIDTH, _HEIGHT = 265, 128
_ACROSS = 55
_FIRST = {
    "accuracy": "accuracy falls under harm",
    "attention": "attention to the correct option is lost under harm",
    "contrast": "refuse-and-redirect appears",
    "realised": "the pair pushes the options away on prompts",
    "z": "the pair is negative in the weights",
}


def origin(results: Results) -> Drawing | None:
    """Accuracy, attention, the feature's contrast, the pair on prompts and in the weights, and the dictionary's fit."""
    rows = sorted(results.origin, key=lambda row: row.step)
    if not rows:
        return None
    names = [f"{index}|{shorten(row.checkpoint, 16)}" for index, row in enumerate(rows)]
    axis = _Axis(names, 0 if len(names) * max(len(name) for name in names) <= _ACROSS else -35, results.milestones)
    panels = [
        _conditions(rows, axis, "accuracy"),
        _conditions(rows, axis, "attention"),
        _contrast(rows, axis),
        _realised(rows, axis),
        _pair(rows, axis),
        _unexplained(rows, axis),
    ]
    pairs = [alt.hconcat(*panels[i : i + 2], spacing=36) for i in range(0, len(panels), 2)]
    return style.finish(
        alt.vconcat(*pairs, spacing=22).resolve_scale(color="independent"),
        "Where in training do the behaviour and its wiring appear?",
        "Checkpoints from base to post-trained. Bands: 95%, Wilson for accuracies, bootstrap over items otherwise.",
        "Grey band: |z| < 2. Dashed line: the first checkpoint that shows it, by the rule in the table.",
    )


class _Axis:
    """The checkpoints' axis, and where each event is first seen."""

    def __init__(self, names: list[str], angle: int, found: list[Milestone]) -> None:
        self.names, self.angle = names, angle
        self.first = {m.event: m.step for m in found if m.step is not None and m.step < len(names)}

    def x(self) -> alt.X:
        # The index before the bar keeps two checkpoints of the same name apart; the label shows only the name.
        return alt.X(
            "checkpoint:O",
            sort=self.names,
            title=None,
            scale={"type": "point", "padding": 0.2, "domain": self.names},
            axis={"labelAngle": self.angle, "labelExpr": "substring(datum.label, indexof(datum.label, '|') + 1)"},
        )

    def mark(self, panel: str) -> list[alt.Chart]:
        """A dashed line where a panel's event is first seen."""
        step = self.first.get(_FIRST.get(panel, ""))
        if step is None:
            return []
        line = style.chart([{"checkpoint": self.names[step]}]).mark_rule(
            color=style.INK, strokeDash=[4, 3], opacity=0.7
        )
        return [line.encode(x=self.x())]


def _conditions(rows: Sequence[Origin], axis: _Axis, measure: str) -> Drawing:
    values = []
    for index, row in enumerate(rows):
        table, bounds = (
            (row.accuracy, row.ci) if measure == "accuracy" else (row.attention_difference, row.attention_ci)
        )
        values += [
            {
                "checkpoint": axis.names[index],
                "condition": CONDITION_WORDS[name],
                "value": table[name],
                "low": bounds[name][0] if name in bounds else table[name],
                "high": bounds[name][1] if name in bounds else table[name],
            }
            for name in CONDITIONS
            if name in table and finite(table[name])
        ]
    base = style.chart(values).encode(
        x=axis.x(),
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
    title = "Accuracy" if measure == "accuracy" else "Attention difference of the selected heads"
    return alt.layer(
        reference,
        *axis.mark(measure),
        base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_point(filled=True, size=38, opacity=1).encode(y=y),
    ).properties(width=_WIDTH, height=_HEIGHT, title=style.heading(title))


def _contrast(rows: Sequence[Origin], axis: _Axis) -> Drawing:
    estimates = [(row.refuse_contrast, *row.refuse_contrast_ci) for row in rows]
    return _estimates(
        estimates, axis, "contrast", "Refuse-and-redirect, harm \u2212 benign", "activation at the answer"
    )


def _realised(rows: Sequence[Origin], axis: _Axis) -> Drawing:
    estimates = [row.refuse_harm_realised for row in rows]
    return _estimates(
        estimates,
        axis,
        "realised",
        "Refuse-and-redirect \u00d7 harm detection, on prompts",
        "adds to an option's score",
    )


def _estimates(estimates: Sequence[tuple[float, ...]], axis: _Axis, panel: str, title: str, unit: str) -> Drawing:
    values = [
        {"checkpoint": axis.names[index], "value": value, "low": low, "high": high}
        for index, (value, low, high) in enumerate(estimates)
        if finite(value)
    ]
    color = style.ROLE_COLOR["refuse_redirect"]
    base = style.chart(values).encode(x=axis.x())
    y = alt.Y("value:Q", title=unit, axis={"tickCount": 4})
    return alt.layer(
        style.rule_at(0, horizontal=True),
        *axis.mark(panel),
        base.mark_area(opacity=0.15, color=color).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=2, color=color).encode(y=y),
        base.mark_point(filled=True, size=38, opacity=1, color=color).encode(y=y),
    ).properties(width=_WIDTH, height=_HEIGHT, title=style.heading(title))


def _pair(rows: Sequence[Origin], axis: _Axis) -> Drawing:
    nulls = {"random pairs": style.ROLE_COLOR["refuse_redirect"], "matched": style.MUTED}
    values: list[dict[str, Any]] = [
        {"checkpoint": axis.names[index], "null": null, "value": value}
        for index, row in enumerate(rows)
        for null, value in zip(nulls, (row.refuse_harm_z, row.refuse_harm_matched_z), strict=True)
        if finite(value)
    ]
    base = style.chart(values).encode(
        x=axis.x(),
        y=alt.Y("value:Q", title="z, mean over heads", axis={"tickCount": 4}),
        color=alt.Color(
            "null:N",
            scale={"domain": list(nulls), "range": list(nulls.values())},
            legend={"title": None, "symbolType": "stroke", "symbolOpacity": 1, "symbolStrokeWidth": 2.5},
        ),
    )
    band = style.chart([{"a": -2, "b": 2}]).mark_rect(color=style.GRID, opacity=0.55)
    return alt.layer(
        band.encode(y=alt.Y("a:Q"), y2="b:Q"),
        style.rule_at(0, horizontal=True),
        *axis.mark("z"),
        base.mark_line(strokeWidth=2),
        base.mark_point(filled=True, size=38, opacity=1),
    ).properties(width=_WIDTH, height=_HEIGHT, title=style.heading("The same pair in the weights"))


def _unexplained(rows: Sequence[Origin], axis: _Axis) -> Drawing:
    values = [
        {"checkpoint": axis.names[index], "layer": f"layer {layer}", "value": share}
        for index, row in enumerate(rows)
        for layer, share in row.unexplained.items()
        if finite(share)
    ]
    top = max((float(v["value"]) for v in values), default=1.0)
    base = style.chart(values).encode(
        x=axis.x(),
        y=alt.Y(
            "value:Q",
            title="variance unexplained",
            scale={"domain": [0, max(top, 0.1)]},
            axis={"format": "%", "tickCount": 4},
        ),
        detail="layer:N",
    )
    return alt.layer(
        base.mark_line(strokeWidth=2, color=style.MUTED),
        base.mark_point(filled=True, size=38, opacity=1, color=style.MUTED),
    ).properties(width=_WIDTH, height=_HEIGHT, title=style.heading("Does the dictionary still fit?"))
