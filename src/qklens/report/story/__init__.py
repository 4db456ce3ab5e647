"""The report in words: every sentence is computed from the results, for any outcome, or says why it is missing."""

from __future__ import annotations

from qklens.report.story import attention, cards, closing, know, steering
from qklens.report.story.error_terms import error_terms
from qklens.report.story.headline import MECHANISM_WORDS, KeyNumber, caveats, headline, key_numbers
from qklens.report.story.origin import origin
from qklens.report.story.partners import partners
from qklens.report.story.parts import Section, Table
from qklens.report.story.transfer import transfer
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
        error_terms(results),
        partners(results),
        transfer(results),
        origin(results),
        closing.verdict(results),
    )


__all__ = ["MECHANISM_WORDS", "KeyNumber", "Section", "Table", "caveats", "headline", "key_numbers", "sections"]
