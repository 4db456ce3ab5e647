"""What the selected heads look at instead: the tokens that gain their attention, by name and place."""

from __future__ import annotations

from qklens.report.story.parts import Table
from qklens.report.text import finite, head_name, listing, mean, percent, printable, shorten, signed
from qklens.studies.results import AttendedToken, Condition, HeadRow, Results

PLACE_WORDS = {
    "template_before": "chat template before the user's text",
    "intent": "stated intent",
    "question": "question",
    "option_A": "option A",
    "option_B": "option B",
    "instruction": "instruction",
    "template_after": "chat template after the user's text",
    "between": "between the parts",
}
_OPTIONS = frozenset({"option_A", "option_B"})
_TEMPLATE = ("template_before", "template_after")
_DRAWS = 0.1
_NAMED_TOKENS = 2
_MOSTLY = 0.5


def place_words(span: str) -> str:
    """A place in the prompt as prose."""
    return PLACE_WORDS.get(span, printable(span))


def quoted(token: str) -> str:
    """A token as text quotes it, cut to a length that a sentence can hold."""
    return f"\u201c{shorten(token, 24)}\u201d"


def gain(token: AttendedToken) -> float:
    """How much more attention the token gets under harm than with no intent."""
    return token.attention.get("harm", 0.0) - token.attention.get("none", 0.0)


def drawn_to(row: HeadRow) -> list[AttendedToken]:
    """The tokens outside the options that gain at least a tenth of the head's attention under harm, most first."""
    risen = [t for t in row.top_tokens if t.span not in _OPTIONS and finite(gain(t)) and gain(t) >= _DRAWS]
    return sorted(risen, key=lambda t: -gain(t))


def strongest(results: Results) -> tuple[HeadRow, AttendedToken] | None:
    """Of all selected heads, the one that a token outside the options draws most, and that token."""
    found = [(row, tokens[0]) for row in results.heads if row.selected and (tokens := drawn_to(row))]
    return max(found, key=lambda pair: gain(pair[1]), default=None)


def tokens_sentence(chosen: list[HeadRow]) -> str:
    """Per head, the tokens that draw it under harm; then how much of the attention lies on the chat template."""
    parts: list[str] = []
    for row in chosen:
        name, tokens = head_name(row.layer, row.head), drawn_to(row)[:_NAMED_TOKENS]
        if not tokens:
            parts.append(f"No single token outside the options gains a tenth of {name}'s attention under harm.")
            continue
        told = (
            f"{percent(t.attention.get('harm'))} of its attention on {quoted(t.token)} ({place_words(t.span)}; "
            f"{percent(t.attention.get('none'))} with no intent, {percent(t.attention.get('benign'))} with a benign "
            "one)"
            for t in tokens
        )
        parts.append(f"Under harm {name} puts {listing(told)}.")
    none, harm, benign = (_template(chosen, condition) for condition in ("none", "harm", "benign"))
    parts.append(
        f"Mean over the selected heads, the chat template's tokens take {percent(none)} of the attention with no "
        f"intent, {percent(harm)} under harm and {percent(benign)} with a benign intent; the stated intent takes "
        f"{percent(_place(chosen, 'harm', 'intent'))} under harm."
    )
    return " ".join(parts)


def benign_sentence(chosen: list[HeadRow]) -> str:
    """How much of each head's loss a harmless sentence before the question causes as well."""
    falls: list[str] = []
    unspecific: list[str] = []
    for row in chosen:
        change, _, high = row.attention_change["benign"]
        under_harm, _, harm_high = row.attention_change["harm"]
        if not (finite(high) and high < 0):
            continue
        name, text = head_name(row.layer, row.head), signed(change)
        if finite(harm_high) and harm_high < 0:
            text += f", {percent(change / under_harm, 0)} of the change under harm"
            if change / under_harm >= _MOSTLY:
                unspecific.append(name)
        falls.append(f"at {name} ({text})")
    if not falls:
        return "A benign intent is not shown to lower the attention difference of any selected head."
    text = f"A benign intent lowers the attention difference too: {listing(falls)}."
    if unspecific:
        text += f" At {listing(unspecific)} most of the change is therefore not specific to harm."
    return text


def tables(chosen: list[HeadRow]) -> tuple[Table, ...]:
    """The named tokens, and the attention by place, of the selected heads."""
    conditions: tuple[Condition, ...] = ("none", "harm", "benign")
    return (
        Table(
            "Tokens that the selected heads attend to",
            ("head", "token", "place", *conditions),
            tuple(
                (
                    head_name(row.layer, row.head),
                    printable(t.token),
                    place_words(t.span),
                    *(percent(t.attention.get(c)) for c in conditions),
                )
                for row in chosen
                for t in row.top_tokens
            ),
        ),
        Table(
            "Attention of the selected heads by place",
            ("head", "condition", *PLACE_WORDS.values()),
            tuple(
                (
                    head_name(row.layer, row.head),
                    c,
                    *(percent(row.attention_by_place.get(c, {}).get(place)) for place in PLACE_WORDS),
                )
                for row in chosen
                for c in conditions
            ),
        ),
    )


def _place(chosen: list[HeadRow], condition: Condition, place: str) -> float:
    return mean(row.attention_by_place.get(condition, {}).get(place, 0.0) for row in chosen)


def _template(chosen: list[HeadRow], condition: Condition) -> float:
    return sum(_place(chosen, condition, place) for place in _TEMPLATE)
