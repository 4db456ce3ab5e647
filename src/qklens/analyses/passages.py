"""Passages: tokens with their characters and places, from a text file's windows or from the study's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from qklens.analyses.text_windows import TextWindow
from qklens.data.render import Condition, Order, Prompt

Group = Literal["text", "none", "harm", "benign"]
GROUPS: tuple[Group, ...] = get_args(Group)
PLACES = ("intent", "question", "correct", "incorrect", "instruction", "template_before", "template_after", "answer")


@dataclass(frozen=True)
class Passage:
    """One stretch of tokens that a feature is read on.

    Attributes:
        group: the text, or the condition of a prompt.
        where: what a reader calls it.
        tokens: token ids.
        texts: each token's own characters, raw: whoever prints them escapes them.
        places: for each token of a prompt the part of the prompt that it belongs to.
        item: the prompt's item.
        order: the prompt's option order.
    """

    group: Group
    where: str
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    places: tuple[str | None, ...]
    item: str | None = None
    order: Order | None = None


def text_passages(windows: Sequence[TextWindow]) -> list[Passage]:
    """The windows of a text."""
    return [
        Passage(
            group="text",
            where=f"window {number}",
            tokens=window.tokens,
            texts=tuple(window.piece(i, i + 1) for i in range(len(window.tokens))),
            places=(None,) * len(window.tokens),
        )
        for number, window in enumerate(windows)
    ]


def prompt_passage(prompt: Prompt, condition: Condition, item: str, order: Order) -> Passage:
    """A rendered prompt; the last token is the answer, though the template wrote it."""
    places: list[str | None] = [None] * len(prompt.tokens)
    for name in PLACES:
        for position in prompt.spans.get(name, ()):
            places[position] = name
    ends = (*prompt.starts[1:], len(prompt.text))
    return Passage(
        group=condition,
        where=f"{item}, {order.replace('_', ' ')}",
        tokens=prompt.tokens,
        texts=tuple(prompt.text[a:b] for a, b in zip(prompt.starts, ends, strict=True)),
        places=tuple(places),
        item=item,
        order=order,
    )
