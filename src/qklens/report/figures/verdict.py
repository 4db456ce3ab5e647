"""Which numbers decided, and by how much?"""

from __future__ import annotations

import re

import altair as alt

from qklens.report.figures import ledger, style
from qklens.report.figures.ledger import Column
from qklens.report.figures.style import Drawing
from qklens.report.text import finite, number, printable, shorten
from qklens.studies.results import Evidence, Results

_NUMBER = re.compile(r"[-+\u2212]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?%?")
_HOLDS, _FAILS = "#0b7a75", "#a86a00"


def threshold_value(threshold: str) -> float | None:
    """The number in a rule such as `>= 0.5`, when it has exactly one."""
    found = _NUMBER.findall(threshold)
    if len(found) != 1:
        return None
    text = found[0].replace("\u2212", "-")
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def verdict(results: Results) -> Drawing | None:
    """Every number that a rule read, against its threshold."""
    evidence = results.verdict.evidence
    if not evidence:
        return None
    rows = [
        {
            "at": index,
            "name": shorten(item.name.replace("_", " "), 58),
            "value": number(item.value, 3 if abs(item.value) < 0.1 else 2) if finite(item.value) else "n/a",
            "threshold": shorten(item.threshold, 20),
            "mark": "\u2713 holds" if item.holds else "\u2717 fails",
            "color": _HOLDS if item.holds else _FAILS,
        }
        for index, item in enumerate(evidence)
    ]
    table = ledger.columns(
        rows,
        (
            Column("name", "evidence", 290),
            Column("value", "value", 72, align="right", bold=True),
            Column("threshold", "threshold", 90),
            Column("mark", "", 66, "color", bold=True),
        ),
    )
    marks = [row for index, item in enumerate(evidence) for row in _line(index, item)]
    parts: list[Drawing] = [table]
    if marks:
        y = ledger.rows_axis(rows)
        x = alt.X("x:Q", axis=None, scale={"domain": [-0.06, 1.06], "nice": False})
        by_kind = {kind: [m for m in marks if m["kind"] == kind] for kind in ("value", "threshold", "zero")}
        span = style.chart([{"at": m["at"], "a": 0, "b": 1} for m in by_kind["value"]])
        line = span.mark_rule(color=style.GRID, strokeWidth=2).encode(x=alt.X("a:Q", axis=None), x2="b:Q", y=y)
        zero = style.chart(by_kind["zero"]).mark_tick(thickness=1, height=7, color=style.FAINT).encode(x=x, y=y)
        tick = style.chart(by_kind["threshold"]).mark_tick(thickness=2, height=13, color=style.INK).encode(x=x, y=y)
        dot = (
            style.chart(by_kind["value"])
            .mark_point(filled=True, size=65, opacity=1)
            .encode(x=x, y=y, color=alt.Color("color:N", scale=None))
        )
        parts.append((alt.layer(line, zero, tick, dot)).properties(width=140, height=ledger.height(rows)))
    return style.finish(
        alt.hconcat(*parts, spacing=14),
        f"What decided: {printable(results.verdict.mechanism).replace('_', ' ')}",
        "Dot: value. Dark tick: threshold; grey tick: zero. Each row has its own scale.",
    )


def _line(index: int, item: Evidence) -> list[dict[str, object]]:
    limit = threshold_value(item.threshold)
    if limit is None or not finite(item.value):
        return []
    low, high = min(0.0, limit, item.value), max(0.0, limit, item.value)
    width = (high - low) or 1.0
    color = _HOLDS if item.holds else _FAILS
    return [
        {"at": index, "kind": kind, "x": (value - low) / width, "color": color}
        for kind, value in (("value", item.value), ("threshold", limit), ("zero", 0.0))
    ]
