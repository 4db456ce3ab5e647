"""One value for every head: a map of layer by head around zero, with some heads outlined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import altair as alt

from qklens.interventions.steer import Head
from qklens.report.figures import style
from qklens.report.figures.style import Drawing

_DIVERGING = ("#8a5a00", "#d9b56a", "#f6f6f4", "#86bdb8", "#0b6b66")


def layer_head_map(
    values: Mapping[Head, float | None], outlined: Iterable[Head], limit: float, legend: Mapping[str, Any] | None
) -> Drawing:
    """A cell a head.

    Args:
        values: of each head; an unknown one stays empty.
        outlined: heads to mark.
        limit: where the colours end, on both sides of zero.
        legend: how the legend differs from altair's; None draws none.
    """
    x = alt.X("head:O", title="head", axis={"labelAngle": 0, "labelOverlap": True})
    y = alt.Y("layer:O", title="layer", sort="descending", axis={"labelOverlap": True})
    color = alt.Color(
        "value:Q",
        scale={
            "domain": [-limit, -limit / 2, 0, limit / 2, limit],
            "range": list(_DIVERGING),
            "interpolate": "rgb",
        },
        legend=None if legend is None else {"values": [-limit, 0, limit], **legend},
    )
    rows = [{"layer": layer, "head": head, "value": value} for (layer, head), value in values.items()]
    marked = [{"layer": layer, "head": head} for layer, head in outlined]
    cells = style.chart(rows).mark_rect(stroke=style.PAPER, strokeWidth=0.6).encode(x=x, y=y, color=color)
    outline = style.chart(marked).mark_rect(fillOpacity=0, stroke=style.INK, strokeWidth=2).encode(x=x, y=y)
    return alt.layer(cells, outline)
