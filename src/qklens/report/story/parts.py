"""The pieces of a section, as values: what the template prints and the tests read."""

from __future__ import annotations

from dataclasses import dataclass, field

from qklens.report.text import printable
from qklens.studies.results import Results


@dataclass(frozen=True)
class Table:
    """A table of printed values; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class MarkedToken:
    """A token of an example: white space around it, itself, and how strongly it is marked, 0 not at all to 4."""

    before: str
    word: str
    after: str
    shade: int


@dataclass(frozen=True)
class MarkedExample:
    """A stretch of text with the tokens on which a feature is active."""

    strength: str
    where: str
    tokens: tuple[MarkedToken, ...]


@dataclass(frozen=True)
class CardPart:
    """Some examples of one feature under a title."""

    title: str
    examples: tuple[MarkedExample, ...]


@dataclass(frozen=True)
class Card:
    """A feature's examples, part by part."""

    title: str
    parts: tuple[CardPart, ...]


@dataclass(frozen=True)
class Section:
    """One stage: the question, what was measured in words, and what the figure's terms mean."""

    stage: str
    title: str
    question: str
    paragraphs: tuple[str, ...]
    caption: str = ""
    tables: tuple[Table, ...] = field(default=())
    cards: tuple[Card, ...] = field(default=())
    ran: bool = True


def not_run(results: Results, stage: str) -> str:
    """Why a stage has nothing to show, as one sentence."""
    reason = results.skipped.get(stage)
    if reason is None:
        return "Not measured: the results hold no rows for this stage and give no reason."
    return f"Not run: {printable(reason).rstrip('.')}."


def empty(results: Results, stage: str, title: str, question: str) -> Section:
    """The section of a stage that was skipped or has no rows."""
    return Section(stage, title, question, (not_run(results, stage),), ran=False)
