"""One figure per stage of the study, in the study's order.

`FIGURES` is the only registry: the page, the run directory and the tests all read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from altair.utils.schemapi import debug_mode

from qklens.files import atomic_write
from qklens.report.figures.behaviour import behaviour
from qklens.report.figures.belief import belief
from qklens.report.figures.cards import cards
from qklens.report.figures.error_terms import error_terms
from qklens.report.figures.heads import heads
from qklens.report.figures.interactions import interactions
from qklens.report.figures.origin import origin
from qklens.report.figures.partners import partners
from qklens.report.figures.render import to_svg
from qklens.report.figures.steering import steer_all, steer_key, steer_query
from qklens.report.figures.style import Drawing
from qklens.report.figures.transfer import transfer
from qklens.report.figures.verdict import verdict
from qklens.report.figures.zscores import zscores
from qklens.studies.results import Results

FIGURES: Mapping[str, Callable[[Results], Drawing | None]] = MappingProxyType(
    {
        "behaviour": behaviour,
        "belief": belief,
        "heads": heads,
        "interactions": interactions,
        "cards": cards,
        "zscores": zscores,
        "steer_all": steer_all,
        "steer_query": steer_query,
        "steer_key": steer_key,
        "error_terms": error_terms,
        "partners": partners,
        "transfer": transfer,
        "origin": origin,
        "verdict": verdict,
    }
)


def draw(results: Results) -> dict[str, str]:
    """Every figure that the results have rows for, as SVG text by stage."""
    # Validating every encoding against the Vega-Lite schema takes ten times as long as drawing; the tests draw with it.
    with debug_mode(False):
        return _draw(results)


def _draw(results: Results) -> dict[str, str]:
    drawn: dict[str, str] = {}
    for stage, figure in FIGURES.items():
        drawing = None if stage in results.skipped else figure(results)
        if drawing is not None:
            drawn[stage] = to_svg(drawing, stage)
    return drawn


def write_figures(results: Results, directory: Path, drawn: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Writes `<stage>.svg` for every stage that has a figure; a skipped stage, or one without rows, has none.

    `drawn` is what `draw(results)` returned, for a caller that also writes the page and need not draw twice.
    """
    paths: dict[str, Path] = {}
    for stage, svg in (drawn if drawn is not None else draw(results)).items():
        paths[stage] = directory / f"{stage}.svg"
        atomic_write(paths[stage], svg)
    return paths


__all__ = ["FIGURES", "Drawing", "draw", "write_figures"]
