"""How unusual are the named pairs, against nulls drawn at the same head?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from qklens.report.figures import style
from qklens.report.figures.style import Drawing, pair_words
from qklens.report.text import finite, head_name, mean, printable, tick
from qklens.studies.results import NullHistogram, Results, ZScore

_BIN = 0.25
_PANEL = 235
_LABEL: dict[str, Any] = {"dy": -12, "fontWeight": "bold", "fontSize": 10.5}
NULL_ORDER = ("random_pairs", "matched", "fixed_query", "fixed_key", "rotated", "random_dictionary")


def nulls_shown(results: Results) -> list[str]:
    """The nulls that have z-scores, the two that a claim needs first."""
    present = {row.null for row in results.zscores}
    known = [name for name in NULL_ORDER if name in present]
    return known + sorted(present - set(known))


def zscores(results: Results) -> Drawing | None:
    """Each named pair's z at each selected head, above the null in the same units."""
    rows = [row for row in results.zscores if finite(row.z)]
    if not rows:
        return None
    names = list(dict.fromkeys(pair_words(row.query_role, row.key_role) for row in rows))
    names.sort(key=lambda name: mean(r.z for r in rows if pair_words(r.query_role, r.key_role) == name))
    low, high = style.padded(min(-3.2, *(r.z for r in rows)), max(3.2, *(r.z for r in rows)))
    panels = [
        _panel(
            [r for r in rows if r.null == null],
            [h for h in results.null_histograms if h.null == null],
            null,
            names,
            (low, high),
            labelled=index % 2 == 0,
        )
        for index, null in enumerate(nulls_shown(results))
        if any(r.null == null for r in rows)
    ]
    pairs = [alt.hconcat(*panels[i : i + 2], spacing=20) for i in range(0, len(panels), 2)]
    return style.finish(
        alt.vconcat(*pairs, spacing=28),
        "Are the named pairs unusual for these heads?",
        "Virtual interaction (weights only) in standard deviations from the null's mean. One dot per head and feature "
        "pair; the number is their mean.",
    )


def _panel(
    rows: Sequence[ZScore],
    histograms: Sequence[NullHistogram],
    null: str,
    names: Sequence[str],
    domain: tuple[float, float],
    *,
    labelled: bool,
) -> Drawing:
    points = [
        {
            "pair": pair_words(row.query_role, row.key_role),
            "z": row.z,
            "head": head_name(row.layer, row.head),
            "color": style.role_color(row.key_role),
        }
        for row in rows
    ]
    means = [
        {
            "pair": name,
            "z": value,
            "label": tick(value, 1),
            "color": next(p["color"] for p in points if p["pair"] == name),
        }
        for name in names
        if any(p["pair"] == name for p in points)
        and finite(value := mean(float(p["z"]) for p in points if p["pair"] == name))
    ]
    x = alt.X("z:Q", scale={"domain": list(domain), "nice": False}, title=None, axis={"labels": False})
    y = alt.Y(
        "pair:N",
        sort=list(names),
        title=None,
        axis={"labelLimit": 190} if labelled else {"labels": False},
        scale={"domain": list(names)},
    )
    band = style.chart([{"a": -2, "b": 2}]).mark_rect(color=style.GRID, opacity=0.55).encode(x=alt.X("a:Q"), x2="b:Q")
    color = alt.Color("color:N", scale=None)
    drop = (
        style.chart(means)
        .mark_rule(strokeWidth=1.2, opacity=0.45)
        .encode(x=x, y=y, y2=alt.value(26 * len(names)), color=color)
    )
    labels = style.chart(means).encode(x=x, y=y, text="label:N")
    strip = (
        alt.layer(
            band,
            style.rule_at(0),
            drop,
            style.chart(points).mark_point(filled=True, size=34, opacity=0.55).encode(x=x, y=y, color=color),
            style.chart(means).mark_tick(thickness=2.5, height=13).encode(x=x, y=y, color=color),
            labels.mark_text(**_LABEL, stroke=style.PAPER, strokeWidth=3.5),  # a lane through the lines of other pairs
            labels.mark_text(**_LABEL).encode(color=color),
        )
    ).properties(width=_PANEL, height=26 * len(names))
    total = sum(h.n for h in histograms)
    note = next((h.note for h in histograms if h.note), None)
    title = style.heading(
        f"Null: {printable(null).replace('_', ' ')}",
        f"{len(histograms)} head{'' if len(histograms) == 1 else 's'}, {total} draws" + (f"; {note}" if note else ""),
    )
    bins = pooled(histograms, domain)
    if not bins:
        return strip.properties(title=title)
    hist_x = alt.X("from:Q", scale={"domain": list(domain), "nice": False}, title="z (null standard deviations)")
    bars = (
        style.chart(bins)
        .mark_rect(color=style.FAINT, opacity=0.8)
        .encode(
            x=hist_x,
            x2="to:Q",
            y=alt.Y("share:Q", title="null" if labelled else None, axis={"labels": False, "grid": False}),
            y2=alt.datum(0),
        )
    )
    lines = style.chart(means).mark_rule(strokeWidth=1.2).encode(x=alt.X("z:Q"), color=color)
    return alt.vconcat(
        strip.properties(title=title), (alt.layer(bars, lines)).properties(width=_PANEL, height=62), spacing=0
    )


def pooled(histograms: Sequence[NullHistogram], domain: tuple[float, float]) -> list[dict[str, float]]:
    """The heads' nulls on one axis: each in its own standard deviations, then averaged with equal weight."""
    shares: dict[int, float] = {}
    kept = [h for h in histograms if finite(h.mean) and finite(h.sd) and h.sd > 0 and sum(h.counts) > 0]
    for histogram in kept:
        total = sum(histogram.counts) * len(kept)
        for left, right, n in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
            a, b = (left - histogram.mean) / histogram.sd, (right - histogram.mean) / histogram.sd
            if not (math.isfinite(a) and math.isfinite(b) and b > a):
                continue
            # A source bin may straddle several drawn ones: its count is spread evenly over its width.
            for index in range(math.floor(a / _BIN), math.floor(b / _BIN) + 1):
                overlap = min(b, (index + 1) * _BIN) - max(a, index * _BIN)
                if overlap > 0:
                    shares[index] = shares.get(index, 0.0) + n / total * overlap / (b - a)
    return [
        {"from": index * _BIN, "to": (index + 1) * _BIN, "share": share}
        for index, share in sorted(shares.items())
        if domain[0] <= index * _BIN and (index + 1) * _BIN <= domain[1] and share > 0
    ]
