"""The gauge section says of a family what the measured table says, and nothing of gauges that it does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qklens.analyses.gauge import QUANTITIES, Gauge, gauges_of
from qklens.models.families import FAMILIES
from qklens.report.page import render
from qklens.report.story.gauge import gauge
from qklens.report.story.parts import Section
from qklens.studies.results import Results

WORDS = {
    "z against random_pairs": "z against random pairs",
    "z against matched": "z against matched pairs",
    "steering in raw units": "steering by a fixed multiple of a direction",
    "steering in activation_max units": "steering by a feature's largest activation",
    "steering in resid_norm units": "steering by the residual stream's length",
}


@pytest.fixture(scope="session")
def section(make: Callable[..., Results]) -> Callable[[str | None], Section]:
    def of(model_type: str | None) -> Section:
        return gauge(make(model={"name": "m"} if model_type is None else {"name": "m", "model_type": model_type}))

    return of


@pytest.mark.parametrize("model_type", [*FAMILIES, None])
def test_every_quantity_stands_in_one_row_with_its_fate(section: Callable[[str | None], Section], model_type) -> None:
    by_number, by_rewriting = section(model_type).tables
    gauges = gauges_of(model_type)
    assert [row[0] for row in by_rewriting.rows] == [g.name.replace("_", " ") for g in gauges]
    for quantity in QUANTITIES:
        words = WORDS.get(quantity, quantity).lower()
        (row,) = [r for r in by_number.rows if words in r[0].lower().split(", ")]
        for cell, of_dictionary in zip(row[1:], (False, True), strict=True):
            names = [g.name for g in gauges if g.of_dictionary == of_dictionary and quantity in g.changes]
            assert (cell == "kept") == (not names)
            assert all(name.replace("_", " ") in cell for name in names)


def test_no_family_s_claims_depend_on_the_weights_and_what_does_is_named(
    section: Callable[[str | None], Section],
) -> None:
    for family in FAMILIES:
        assert "No rewriting of the model listed here changes any of them" in section(family).paragraphs[1]
    llama, gpt2 = section("llama").paragraphs[1], section("gpt2").paragraphs[1]
    assert "does change" not in llama
    assert "realised bias terms, realised error share and score (key shift)" in gpt2
    assert "virtual interaction (projection scale)" in section("qwen3").paragraphs[1]


def test_a_claim_that_a_rewriting_of_the_model_would_change_is_named(
    section: Callable[[str | None], Section], monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = Gauge("other_pattern", "made up", "A \u21a6 B", ("llama",), ("pattern patching", "z against matched"))
    monkeypatch.setattr("qklens.report.story.gauge.gauges_of", lambda _: (loose, *gauges_of("llama")))
    text = section("llama").paragraphs[1]
    assert "No rewriting" not in text
    assert "can change z against matched pairs and pattern patching (other pattern)" in text


def test_the_dictionary_is_said_to_matter_for_pairs_and_not_for_patches(
    section: Callable[[str | None], Section],
) -> None:
    for model_type in ("llama", "gpt2"):
        text = section(model_type).paragraphs[2]
        assert "Rewriting the dictionary can change contrastive feature pairs" in text
        assert "It cannot change pattern patching;" in text


def test_all_pair_terms_are_told_as_one_only_where_all_of_them_change(section: Callable[[str | None], Section]) -> None:
    told = {row[0]: row[3] for row in section("gpt2").tables[1].rows}
    assert [name for name, text in told.items() if "all pair terms" in text] == ["bias split", "feature mix"]
    assert "contrastive" not in told["feature mix"]
    assert "realised bias terms, realised marginals and realised error share" in told["key shift"]


def test_a_run_without_a_family_is_told_all_of_them(section: Callable[[str | None], Section]) -> None:
    for unknown in (None, "<b>other</b>"):
        found = section(unknown)
        assert "this run does not name its own" in found.paragraphs[0]
        assert len(found.tables[1].rows) == len(gauges_of(None))


def test_the_page_prints_the_section_between_completeness_and_methods(
    make: Callable[..., Results], manifest: dict[str, Any]
) -> None:
    text = render(make(model={"name": "m", "model_type": "llama"}), manifest, figures={})
    at = [text.index(f'<section id="{name}"') for name in ("completeness", "gauge", "methods")]
    assert at == sorted(at)
    assert "W_Q \u21a6 A W_Q" in text[at[1] : at[2]]
    assert "No rewriting of the model listed here" in text[at[1] : at[2]]
