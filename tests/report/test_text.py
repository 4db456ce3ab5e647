"""Numbers and foreign strings as the report prints them."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qklens.report.text import (
    MISSING,
    dose,
    includes,
    listing,
    number,
    p_value,
    percent,
    printable,
    shorten,
    signed,
    source_words,
    tick,
    z_value,
)


@given(st.text(alphabet=st.characters()))
def test_printable_text_survives_xml(text: str) -> None:
    escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    ET.fromstring(f"<t>{escaped}</t>")


@given(st.text(), st.integers(min_value=4, max_value=40))
def test_shortened_text_fits(text: str, limit: int) -> None:
    assert len(shorten(text, limit)) <= limit


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.001234, "0.0012"),
        (-3.4, "\u22123.40"),
        (0.0023, "0.0023"),
        (3.1e-6, "3.1e\u22126"),
        (math.nan, MISSING),
        (math.inf, MISSING),
        (None, MISSING),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_shares() -> None:
    assert [percent(v) for v in (1.0, 0.481, 0.0, 0.9996, -0.001)] == ["100%", "48.1%", "0%", "100%", "\u22120.1%"]


def test_signs() -> None:
    assert (signed(2.0), signed(-2.0), tick(-0.001), tick(0.5)) == ("+2.00", "\u22122.00", "0.00", "+0.50")


def test_strengths_and_z_scores_print_as_they_were_set() -> None:
    assert [dose(v) for v in (-1.0, 0.0, 1.5, math.nan)] == ["\u22121", "0", "1.5", MISSING]
    assert [z_value(v) for v in (0.025, -3.42, 2.0, math.nan)] == ["0.0", "\u22123.4", "+2.0", MISSING]


def test_a_source_named_after_its_role_is_named_once() -> None:
    assert source_words("harm_detection", "harm_detection") == "harm detection"
    assert source_words("L2/271", "harm_detection") == "harm detection (L2/271)"
    assert source_words("L2/70", None) == "L2/70"


def test_an_unknown_bound_excludes_nothing() -> None:
    assert includes((math.nan, 1.0), 5.0)
    assert not includes((0.1, 1.0), 0.0)


def test_small_p_values_are_not_zero() -> None:
    assert p_value(0.00001) == "p < 0.001"
    assert p_value(0.0312) == "p = 0.031"


def test_lists() -> None:
    assert [listing(w) for w in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
