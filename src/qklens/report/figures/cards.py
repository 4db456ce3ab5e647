"""How often, and how strongly, is each role's feature active?"""

from __future__ import annotations

import altair as alt

from qklens.analyses.feature_card import Density, FeatureCard
from qklens.report.figures import style
from qklens.report.figures.style import CONDITION_COLOR, CONDITION_WORDS, Drawing, Row
from qklens.report.text import role_words, shorten
from qklens.studies.results import Results

_WORDS = {"text": "neutral text", **CONDITION_WORDS}
_COLOR = {"text": style.INK, **CONDITION_COLOR}
_PANEL, _HEIGHT = 292, 96


def cards(results: Results) -> Drawing | None:
    """Histograms of log activation, one panel a feature and one line a group of tokens."""
    if not results.cards:
        return None
    panels = [_panel(card) for card in results.cards]
    rows = [alt.hconcat(*panels[i : i + 2], spacing=34) for i in range(0, len(panels), 2)]
    return style.finish(
        alt.vconcat(*rows, spacing=20).resolve_scale(color="shared"),
        "How often, and how strongly, are the roles' features active?",
        "Share of all tokens with such an activation; what is missing to 100% is not active.",
    )


def _panel(card: FeatureCard) -> Drawing:
    points = [point for density in card.density for point in _steps(density)]
    groups = [density.group for density in card.density]
    shares = style.chart(points)
    lines = shares.mark_line(interpolate="step-after", strokeWidth=1.8).encode(
        x=alt.X("at:Q", title="log\u2081\u2080 |activation|", scale={"nice": False, "zero": False}),
        y=alt.Y("share:Q", title=None, axis={"format": ".0%", "tickCount": 3}),
        color=alt.Color(
            "group:N",
            scale={"domain": [_WORDS[g] for g in groups], "range": [_COLOR[g] for g in groups]},
            legend={"title": None, "orient": "top", "symbolType": "stroke"},
        ),
    )
    words = " and ".join(map(role_words, card.roles))
    title = words if card.roles == [card.feature] else f"{shorten(card.feature, 16)}: {words}"
    return lines.properties(width=_PANEL, height=_HEIGHT, title=style.heading(shorten(title, 44)))


def _steps(density: Density) -> list[Row]:
    """The outline of a histogram, down to nothing at both ends."""
    if not density.counts:
        return []
    name, width = _WORDS[density.group], density.edges[1] - density.edges[0]
    shares = [0.0, *(n / max(density.tokens, 1) for n in density.counts), 0.0, 0.0]
    ats = [density.edges[0] - width, *density.edges, density.edges[-1] + width]
    return [{"at": at, "share": share, "group": name} for at, share in zip(ats, shares, strict=True)]
