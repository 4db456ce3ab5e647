"""The figure of `organism.model_diff`: whose the latents are, when the refusal latent fires, and what it does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import altair as alt

from qklens.files import atomic_write
from qklens.report.figures import style
from qklens.report.figures.render import to_svg
from qklens.report.figures.style import CONDITION_COLOR, Drawing

BINS = 20
KIND_COLOR = {"harm": CONDITION_COLOR["harm"], "taken back": "#6f4fa0", "benign": CONDITION_COLOR["benign"]}
KIND_WORDS = {"harm": "harmful intent", "taken back": "harm, then taken back", "benign": "benign intent"}
HEIGHT = 190


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the figure as SVG, for the layer whose refusal latent separated best on the choosing half, or the later."""
    row = max(found["layers"], key=lambda one: (one["refusal"]["auc_on_the_choosing_half"], one["layer"]))
    one = row["refusal"]
    other, held = one["on"]["other half"], 100 * one["scaling"]["error"]
    drawing = style.finish(
        alt.hconcat(_whose(row), _fires(one), _does(one), spacing=26).resolve_scale(color="independent"),
        "What has the organism's chat model that its base has not?",
        f"A crosscoder over both at resid_pre.{row['layer']}: {100 * one['relative_norm']:.0f}% of latent "
        f"{one['feature']}'s length is chat's; base's stream holds {held:.0f}% of what it writes.",
        f"Chosen on one half of the items, shown on the other: AUC of harm against benign "
        f"{other['auc_harm_benign']:.2f}, against harm taken back {other['auc_harm_taken_back']:.2f}. {found['date']}.",
    )
    atomic_write(path, to_svg(drawing, "model-diff"))


def _whose(row: dict[str, Any]) -> Drawing:
    counts = [0] * BINS
    for norm in row["relative_norm"]:
        counts[min(int(norm * BINS), BINS - 1)] += 1
    bars = [{"low": i / BINS, "high": (i + 1) / BINS, "count": n} for i, n in enumerate(counts)]
    drawn = (
        style.chart(bars)
        .mark_bar(color=style.MUTED)
        .encode(
            x=alt.X("low:Q", bin="binned", title="base \u2190 relative norm \u2192 chat", scale={"domain": [0, 1]}),
            x2="high:Q",
            y=alt.Y("count:Q", title="latents", scale={"type": "symlog"}, axis={"values": [1, 10, 100]}),
        )
    )
    rule = style.rule_at(row["refusal"]["relative_norm"], color=style.ROLE_COLOR["refuse_redirect"])
    return alt.layer(drawn, rule).properties(width=180, height=HEIGHT, title=style.heading("Whose the latents are"))


def _fires(one: dict[str, Any]) -> Drawing:
    rows, highest = [], 0.0
    for part, measured in one["on"].items():
        for kind, values in measured["activations"].items():
            for n, value in enumerate(values):
                # Dots of one row are spread by their number, so that equal ones do not hide each other.
                rows.append({"on": part, "kind": KIND_WORDS[kind], "value": value, "spread": (n * 0.618) % 1})
                highest = max(highest, value)
    order = [KIND_WORDS[kind] for kind in KIND_COLOR]
    drawn = (
        style.chart(rows)
        .mark_circle(size=16, opacity=0.6)
        .encode(
            x=alt.X("value:Q", title="activation at the answer", scale={"domain": [0, math.ceil(highest)]}),
            y=alt.Y("on:N", title=None, sort=list(one["on"]), axis={"labelLimit": 110}),
            yOffset=alt.YOffset("position:Q", scale={"domain": [0, 3]}),
            color=alt.Color(
                "kind:N",
                scale={"domain": order, "range": list(KIND_COLOR.values())},
                legend={"title": None, "orient": "bottom", "columns": 1, "symbolOpacity": 1},
            ),
        )
        .transform_calculate(position=f"indexof({order!r}, datum.kind) + 0.15 + 0.7 * datum.spread")
    )
    return drawn.properties(width=190, height=HEIGHT, title=style.heading("When the refusal latent fires"))


def _does(one: dict[str, Any]) -> Drawing:
    rows = []
    for name, measured in one["cause"].items():
        rows.append({"edit": name, "what": "clean", "share": measured["clean"]})
        rows.append({"edit": name, "what": "this latent", "share": measured["edited"]})
        rows += [{"edit": name, "what": "random directions", "share": share} for share in measured["random"]]
    colors = {"clean": style.INK, "this latent": style.ROLE_COLOR["refuse_redirect"], "random directions": style.FAINT}
    drawn = (
        style.chart(rows)
        .mark_point(filled=True, size=50, opacity=0.85)
        .encode(
            x=alt.X("share:Q", title="next token opens a refusal", scale={"domain": [0, 1]}, axis={"format": "%"}),
            y=alt.Y("edit:N", title=None, sort=list(one["cause"]), axis={"labelExpr": "split(datum.label, ', ')"}),
            yOffset=alt.YOffset("what:N", sort=list(colors)),
            color=alt.Color(
                "what:N",
                sort=list(colors),
                scale={"domain": list(colors), "range": list(colors.values())},
                legend={"title": None, "orient": "bottom", "columns": 1, "symbolOpacity": 1},
            ),
        )
    )
    return drawn.properties(width=170, height=HEIGHT, title=style.heading("What it does"))
