"""A model in which no head is selected gets a page that says so, and no number of heads that are not there."""

from __future__ import annotations

from collections.abc import Callable

from qklens.report.figures import FIGURES
from qklens.report.figures.render import to_svg
from qklens.report.story import headline, key_numbers, sections
from qklens.studies.results import Results


def test_no_number_is_told_of_heads_that_are_not_there(
    make: Callable[..., Results], outcomes: dict[str, Results]
) -> None:
    full = outcomes["full"]
    assert full.heads_details is not None
    none = make(
        heads=[{**row.model_dump(), "selected": False} for row in full.heads],
        heads_details={**full.heads_details.model_dump(), "selected": []},
    )
    assert "clean patterns put back" in headline(full)
    assert "clean patterns put back" not in headline(none)
    assert [n.detail for n in key_numbers(none)].count("no head is selected") == 2
    heads = next(s for s in sections(none) if s.stage == "heads")
    assert heads.paragraphs == (
        "No head is selected: on the discovery half the answers without pressure are no better than chance, so there "
        "is no answer that a head could select.",
    )
    assert "selected head" not in " ".join(p for s in sections(none) if s.stage == "interactions" for p in s.paragraphs)
    drawn = [FIGURES["heads"](results) for results in (full, none)]
    assert ["clean pattern" in to_svg(one, "heads") for one in drawn if one is not None] == [True, False]
