"""The report in words: every sentence is computed from the results, for any outcome, or says why it is missing."""

from __future__ import annotations

from qklens.report.story import attention, beyond, cards, closing, know, steering
from qklens.report.story.headline import MECHANISM_WORDS, KeyNumber, caveats, headline, key_numbers
from qklens.report.story.parts import Section, Table
from qklens.studies.results import Results


def sections(results: Results) -> tuple[Section, ...]:
    """One section per stage, in the study's order."""
    return (
        know.behaviour(results),
        know.belief(results),
        attention.heads(results),
        attention.interactions(results),
        cards.cards(results),
        attention.zscores(results),
        steering.section(results, "steer_all"),
        steering.section(results, "steer_query"),
        steering.section(results, "steer_key"),
        beyond.error_terms(results),
        beyond.partners(results),
        beyond.transfer(results),
        beyond.origin(results),
        closing.verdict(results),
    )


__all__ = ["MECHANISM_WORDS", "KeyNumber", "Section", "Table", "caveats", "headline", "key_numbers", "sections"]
