"""The cards of the roles' features on the page: what is active is marked, and hostile text stays text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from synthetic_results import HOSTILE

from qklens.report.page import render
from qklens.report.story.cards import cards
from qklens.studies.results import Results


def test_tokens_are_marked_by_their_share_of_the_groups_largest_activation(outcomes: dict[str, Results]) -> None:
    section = cards(outcomes["full"])
    assert section.ran
    assert len(section.cards) == len(outcomes["full"].cards) == 4
    first = section.cards[0].parts[0].examples[0]
    assert "".join(t.before + t.word + t.after for t in first.tokens) == "I want to steal a car."
    assert [t.shade for t in first.tokens] == [0, 0, 0, 4, 1, 1, 1]
    weaker = section.cards[0].parts[0].examples[2]
    assert [t.shade for t in weaker.tokens][3] == 3
    assert first.tokens[3].before == " "
    assert first.tokens[3].word == "steal"


def test_each_condition_and_the_text_have_a_part_and_empty_parts_are_left_out(outcomes: dict[str, Results]) -> None:
    titles = [part.title for part in cards(outcomes["full"]).cards[0].parts]
    assert titles == [
        "strongest in neutral text",
        "strongest, no intent",
        "strongest, harmful intent",
        "strongest, benign intent",
        "one at random from each tenth of its active tokens in neutral text",
    ]


def test_a_direction_is_called_by_its_role_and_a_feature_by_both(outcomes: dict[str, Results]) -> None:
    assert cards(outcomes["full"]).cards[0].title == "f17: correct answer"
    titles = [c.title for c in cards(outcomes["directions"]).cards]
    assert "refuse-and-redirect" in titles


def test_foreign_tokens_cannot_write_markup(outcomes: dict[str, Results], manifest: dict[str, Any]) -> None:
    page = render(outcomes["hostile"], manifest, {})
    section = re.search(r'<section id="cards".*?</section>', page, re.S)
    assert section is not None
    inside = section.group(0)
    assert HOSTILE not in inside
    assert inside.count("&lt;script&gt;") > 20
    for bad in ("<script", "<img", "\u202e", "\x00", "{{7*7}}\n"):
        assert bad not in inside
    assert set(re.findall(r'<mark class="([^"]*)"', inside)) <= {"a1", "a2", "a3", "a4"}


def test_without_cards_the_section_says_why(make: Callable[..., Results]) -> None:
    section = cards(make(cards=[], card_text=None, skipped={"cards": "no role's feature writes resid_pre.3"}))
    assert not section.ran
    assert section.paragraphs == ("Not run: no role's feature writes resid_pre.3.",)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_text_of_unknown_words_is_told(make: Callable[..., Results], share: float) -> None:
    text = {"name": "n.txt", "sha256": "", "windows": 1, "tokens": 9, "unknown": share}
    caption = cards(make(card_text=text)).caption
    assert ("20% of its tokens are words unknown" in caption) == (share > 0)
