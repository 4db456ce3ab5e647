"""Layer x head maps of a head table: attending, scoring, copying and mattering, one map each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import altair as alt
from altair.utils.schemapi import debug_mode

from qklens.files import atomic_write
from qklens.report.figures import style
from qklens.report.figures.layer_head import layer_head_map
from qklens.report.figures.render import to_svg
from qklens.report.figures.style import Drawing
from qklens.report.text import finite
from qklens.studies.tables.head_table import HeadCandidate, HeadTable

MAPS: dict[str, Callable[[HeadCandidate], float | None]] = {
    "attends: correct \u2212 incorrect": lambda r: r.attention_difference["none"],
    "attends under harm": lambda r: r.attention_difference["harm"],
    "QK-score: correct \u2212 incorrect": lambda r: r.score_difference["all"],
    "copies: logits to the letter": lambda r: r.letter_logit,
    "ablated: margin lost": lambda r: r.ablation_drop,
    "clean pattern under harm: margin won": lambda r: r.patch_gain,
}


def head_map(table: HeadTable) -> Drawing:
    """Six maps around zero, those of one unit on one scale; heads chosen in any fold are outlined."""
    panels = [_map(table, title, value) for title, value in MAPS.items()]
    rows = [
        alt.hconcat(*panels[i : i + 2], spacing=40).resolve_scale(color="shared" if same_unit else "independent")
        for i, same_unit in ((0, True), (2, False), (4, True))
    ]
    return style.finish(
        alt.vconcat(*rows, spacing=26).resolve_scale(color="independent"),
        "Which heads attend to the answer, which copy it, and which matter?",
        f"{table.model['name']}, {table.data['n_items']} items. Outlined: heads chosen when part of the items is left "
        "out.",
    )


def write_head_map(table: HeadTable, path: Path) -> None:
    """The maps as one SVG file.

    Raises:
        QklensError: the file cannot be written.
    """
    with debug_mode(False):
        atomic_write(path, to_svg(head_map(table), "heads"))


def _map(table: HeadTable, title: str, value: Callable[[HeadCandidate], float | None]) -> Drawing:
    values = {(r.layer, r.head): value(r) for r in table.heads}
    limit = max([abs(v) for v in values.values() if finite(v) and v is not None] or [1e-9])
    n_layers = max(r.layer for r in table.heads) + 1
    n_heads = max(r.head for r in table.heads) + 1
    legend = {"title": None, "gradientLength": 150, "gradientThickness": 8, "format": ".2~g"}
    chosen = [(r.layer, r.head) for r in table.heads if r.chosen_in]
    return layer_head_map(values, chosen, limit, legend).properties(
        width=min(300.0, max(26.0 * n_heads, 180.0)),
        height=max(6.0, min(24.0, 260 / n_layers)) * n_layers,
        title=style.heading(title),
    )
