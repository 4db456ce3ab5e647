"""One self-contained page: the verdict, its numbers, and the story stage by stage.

The page fetches nothing and runs nothing; a policy in its head says so to the browser. All foreign text passes through
Jinja2's escaping, and the only markup let through is the figures', which hold no scripts or links by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qklens.files import atomic_write
from qklens.report import story
from qklens.report.figures import draw
from qklens.report.story import closing
from qklens.report.story.gauge import gauge
from qklens.report.text import number, printable
from qklens.studies.results import Results


def render(results: Results, manifest: Mapping[str, Any], figures: Mapping[str, str] | None = None) -> str:
    """The page as HTML text; the same input gives the same text.

    Args:
        results: what the study found.
        manifest: how it was run; printed under provenance.
        figures: what `figures.draw(results)` returned, for a caller that has drawn them already.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = files("qklens.report")
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    # The renderer escapes all text it draws and refuses any element that could act; see figures/render.py.
    drawn = {stage: Markup(svg) for stage, svg in (figures if figures is not None else draw(results)).items()}  # noqa: S704
    words = story.MECHANISM_WORDS[results.verdict.mechanism]
    return template.render(
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),  # noqa: S704
        model=printable(results.model.get("name", "model")),
        headline=story.headline(results),
        mechanism=results.verdict.mechanism if words != results.verdict.mechanism else "",
        mechanism_words=words,
        confidence=number(results.verdict.confidence),
        caveats=story.caveats(results),
        numbers=story.key_numbers(results),
        sections=story.sections(results),
        figures=drawn,
        completeness=closing.completeness(results),
        gauge=gauge(results),
        methods=closing.METHODS,
        provenance=closing.provenance(results, manifest),
    )


def write_report(
    results: Results, manifest: Mapping[str, Any], path: Path, figures: Mapping[str, str] | None = None
) -> None:
    """Writes the page whole or not at all; see `render` for the arguments.

    Raises:
        QklensError: the folder cannot be written.
    """
    atomic_write(path, render(results, manifest, figures))
