"""One look for every figure: one colour per condition, one per role, text in ink.

Blue and vermillion stay apart for every common kind of colour blindness, and the conditions also differ in lightness.
Controls are grey and dashed wherever they appear.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import altair as alt

from qklens.report.text import printable, role_words
from qklens.studies.results import Condition

Drawing: TypeAlias = alt.Chart | alt.LayerChart | alt.HConcatChart | alt.VConcatChart | alt.FacetChart
Row: TypeAlias = Mapping[str, Any]

INK = "#1f2933"
MUTED = "#5f6b76"
FAINT = "#9aa5b1"
GRID = "#e4e7eb"
PAPER = "#ffffff"

CONDITIONS: tuple[Condition, ...] = ("none", "harm", "benign")
CONDITION_COLOR = {"none": "#2f6db0", "harm": "#cc4b24", "benign": "#667789"}
CONDITION_WORDS = {"none": "no intent", "harm": "harmful intent", "benign": "benign intent"}
ROLE_COLOR = {
    "correct_answer": "#0b7a75",
    "need_answer": "#6f4fa0",
    "harm_detection": "#b0357a",
    "refuse_redirect": "#a86a00",
}
SOURCE_COLOR = {"features": "#0b7a75", "bias": "#9aa5b1", "error": "#a86a00", "total": INK}

# Arial and its metric-compatible relatives come first: the layout was measured with them.
FONT = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'Nimbus Sans', system-ui, sans-serif"
WIDTH = 700


def role_color(role: str | None) -> str:
    """The colour of a role; ink-grey for a feature without one."""
    return ROLE_COLOR.get(role or "", MUTED)


def data(rows: Iterable[Row]) -> alt.Data:
    """Inline data: what a figure shows travels inside it, and an unknown number is a gap.

    The rows go in as one JSON string, because altair deep-copies a list of rows at every step of a composition.
    """
    clean = [
        {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()} for row in rows
    ]
    return alt.Data(values=json.dumps(clean, allow_nan=False), format=alt.JsonDataFormat(type="json"))


def chart(rows: Iterable[Row]) -> alt.Chart:
    """An empty chart over inline rows."""
    return alt.Chart(data(rows))


def heading(text: str, *subtitle: str) -> alt.TitleParams:
    """The small bold title of a panel."""
    if not subtitle:
        return alt.TitleParams(printable(text))
    return alt.TitleParams(printable(text), subtitle=[printable(line) for line in subtitle])


def condition_words_scale(conditions: Sequence[Condition] = CONDITIONS) -> dict[str, list[str]]:
    """Maps a condition's words, as labels print them, to its colour."""
    return {
        "domain": [CONDITION_WORDS[name] for name in conditions],
        "range": [CONDITION_COLOR[name] for name in conditions],
    }


def pair_words(query_role: str | None, key_role: str | None) -> str:
    """A named pair, query first: `refuse-and-redirect x harm detection`."""
    return f"{role_words(query_role)} \u00d7 {role_words(key_role)}"


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """A domain a little wider than its data, never empty."""
    gap = (high - low) * share or max(abs(high), 1.0) * share
    return low - gap, high + gap


def rule_at(value: float, *, horizontal: bool = False, dash: Sequence[int] = (), color: str = FAINT) -> alt.Chart:
    """A reference line at `value` on one axis."""
    mark = alt.Chart(data([{"at": value}])).mark_rule(color=color, strokeWidth=1, strokeDash=list(dash))
    return mark.encode(y="at:Q") if horizontal else mark.encode(x="at:Q")


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves label positions apart to at least `gap`, changing their order nowhere and staying in [low, high]."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [min(max(positions[i], low), high) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    ceiling = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    out = [0.0] * len(positions)
    for slot, i in enumerate(order):
        out[i] = placed[slot]
    return out


def finish(drawing: Drawing, question: str, *subtitle: str) -> Drawing:
    """The figure's title (the question it answers), its one-line key, and the theme."""
    title = alt.TitleParams(
        printable(question),
        subtitle=[printable(line) for line in subtitle],
        anchor="start",
        fontSize=15,
        fontWeight=600,
        subtitleFontSize=11.5,
        subtitlePadding=5,
        subtitleLineHeight=15,
        offset=16,
        limit=WIDTH + 20,
    )
    return drawing.properties(title=title, background="transparent", padding=4, config=_THEME)


# One value for the whole theme: every `configure_*` call would copy the whole drawing once more.
_THEME = alt.Config(
    font=FONT,
    aria=False,
    view=alt.ViewConfig(stroke=None),
    title=alt.TitleConfig(
        color=INK, subtitleColor=MUTED, fontSize=12, fontWeight=600, subtitleFontSize=11, anchor="start", offset=8
    ),
    axis=alt.AxisConfig(
        domain=False,
        ticks=False,
        grid=False,
        gridColor=GRID,
        labelColor=INK,
        titleColor=MUTED,
        labelFontSize=11,
        titleFontSize=11,
        titleFontWeight="normal",
        labelPadding=5,
        titlePadding=7,
        labelLimit=240,
    ),
    axisQuantitative=alt.AxisConfig(grid=True, tickCount=5),
    legend=alt.LegendConfig(
        labelColor=INK, titleColor=MUTED, labelFontSize=11, titleFontSize=11, titleFontWeight="normal", orient="top"
    ),
    text=alt.MarkConfig(color=INK, fontSize=11),
    concat=alt.CompositionConfig(spacing=26),
)
