"""What the page says of error terms, other sets and training follows the numbers, whichever way they point."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qklens.report.story import sections
from qklens.studies.results import Results


def said(results: Results, stage: str) -> str:
    section = next(s for s in sections(results) if s.stage == stage)
    return " ".join(section.paragraphs)


def test_the_loss_is_told_with_its_control_and_its_upper_end(outcomes: dict[str, Results]) -> None:
    text = said(outcomes["full"], "error_terms")
    assert "31% [27, 35] with nothing in its place, 27% [23, 31] with its mean in its place and 22% [18, 26]" in text
    assert "at most 35% of it runs through the error" in text
    assert "As much noise beside the error takes away 3% [\u22121, 7]." in text


def test_a_steering_without_effect_has_nothing_to_lose(
    make: Callable[..., Results], outcomes: dict[str, Results]
) -> None:
    rows = [{**r.model_dump(), "lost_margin": None} for r in outcomes["full"].error_effects]
    text = said(make(error_effects=rows), "error_terms")
    assert "On the margin steering does nothing that could be lost: its interval includes zero." in text
    assert "runs through the error" in text, "the attention's share is still told"


def test_without_replacements_only_the_split_is_told(make: Callable[..., Results]) -> None:
    text = said(make(error_effects=[]), "error_terms")
    assert "through features" in text
    assert "The cause" not in text


def test_keys_pushed_away_are_named_by_how_they_were_ranked(outcomes: dict[str, Results]) -> None:
    text = said(outcomes["full"], "transfer")
    assert "On symptoms refuse-and-redirect is active on no prompt, so it pushes nothing away there." in text
    assert (
        "On fraud the keys that refuse-and-redirect pushes away most are f500 (active on fever, rash, \u21b5)" in text
    )
    assert "Of the 8 listed, 2 have z at most \u22122 against both nulls, mean over heads: f500 and f501." in text


@pytest.mark.parametrize(
    ("margin", "does"), [((-0.2, -0.3, -0.1), "more"), ((-0.1, -0.3, 0.1), "no more"), ((0.2, 0.1, 0.3), "less")]
)
def test_the_pressure_is_held_against_its_twin(
    make: Callable[..., Results], outcomes: dict[str, Results], margin: tuple[float, ...], does: str
) -> None:
    rows = [r.model_dump() for r in outcomes["full"].transfer]
    for row in rows:
        row["margin_minus_benign"] = row["margin_minus_benign"] and margin
    assert f"by it the pressure does {does} than its benign twin" in said(make(transfer=rows), "transfer")


def test_a_pair_that_comes_late_does_not_explain_the_fall(
    make: Callable[..., Results], outcomes: dict[str, Results]
) -> None:
    text = said(outcomes["full"], "origin")
    assert "accuracy falls under harm at step-400, refuse-and-redirect appears at step-200" in text
    assert "At none, because the last checkpoint does not show it: the pair is negative in the weights." in text
    assert "(step-800): this pair does not explain the first fall." in text
    rows = [m.model_dump() for m in outcomes["full"].milestones]
    for row in rows:
        if row["event"].startswith("the pair pushes"):
            row.update(checkpoint="step-400", step=2)
    text = said(make(milestones=rows), "origin")
    assert "The pair is there no later than the fall of the accuracy" in text
    assert "does not explain" not in text


def test_a_dictionary_that_no_longer_fits_is_said(make: Callable[..., Results], outcomes: dict[str, Results]) -> None:
    assert "At base that is more than twice" in said(outcomes["full"], "origin")
    rows = [{**r.model_dump(), "unexplained": {"2": 0.06}} for r in outcomes["full"].origin]
    text = said(make(origin=rows), "origin")
    assert "The dictionary leaves unexplained" in text
    assert "more than twice" not in text
