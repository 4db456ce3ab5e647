"""The features that play the roles, each with what it is active on and what it writes."""

from __future__ import annotations

from qklens.analyses.feature_card import Example, FeatureCard
from qklens.report.story.parts import Card, CardPart, MarkedExample, MarkedToken, Section, Table, empty
from qklens.report.story.pull import place_words
from qklens.report.text import count, listing, number, percent, printable, role_words, signed
from qklens.studies.results import Results

GROUP_WORDS = {
    "text": "neutral text",
    "none": "no intent",
    "harm": "harmful intent",
    "benign": "benign intent",
}
_SHADES = 4
_SHOWN = 4
_MOSTLY_UNKNOWN = 0.05


def cards(results: Results) -> Section:
    """What each role's feature responds to."""
    title = "Cards of the roles' features"
    question = "What are the features that play the roles: where are they active, and what do they write?"
    if not results.cards or "cards" in results.skipped:
        return empty(results, "cards", title, question)
    text = results.card_text
    unknown = (
        f" {percent(text.unknown)} of its tokens are words unknown to the tokenizer."
        if text is not None and text.unknown > _MOSTLY_UNKNOWN
        else ""
    )
    about = "" if text is None else f" Neutral text: {printable(text.name)}, {count(text.tokens, 'token')}.{unknown}"
    return Section(
        "cards",
        title,
        question,
        tuple(map(_sentence, results.cards)),
        "Share of tokens by activation, first tokens of texts and prompts left out; prompts of the report half. Direct "
        "logits: the feature's unit direction through the final norm's linear part and the unembedding, past all later "
        "layers, less the vocabulary's mean, the norm's scale held at its mean; positive promotes the token." + about,
        (_places(results), _written(results)),
        tuple(map(_card, results.cards)),
    )


def card_title(card: FeatureCard) -> str:
    """The feature with its roles."""
    name = printable(card.feature)
    words = listing(map(role_words, card.roles))
    return words if card.roles == [card.feature] else f"{name}: {words}"


def _sentence(card: FeatureCard) -> str:
    shares = listing(f"{percent(d.share)} ({GROUP_WORDS[d.group]})" for d in card.density)
    strengths = listing(f"{number(d.mean)} ({GROUP_WORDS[d.group]})" for d in card.density if d.mean is not None)
    text = f"{card_title(card)}. At layer {card.layer} it is active on {shares} of the tokens"
    text += f", with a mean of {strengths} where it is." if strengths else "."
    if card.promoted and card.suppressed:
        up, down = (
            listing(f"\u201c{printable(p.token)}\u201d" for p in some[:3]) for some in (card.promoted, card.suppressed)
        )
        text += f" Written straight to the logits it promotes {up} and suppresses {down}."
    return text


def _places(results: Results) -> Table:
    return Table(
        "Where in the prompts the roles' features are active",
        ("feature", "condition", "place", "tokens", "active on", "mean activation"),
        tuple(
            (
                printable(c.feature),
                GROUP_WORDS[p.condition],
                place_words(p.place),
                str(p.tokens),
                percent(p.share),
                number(p.mean),
            )
            for c in results.cards
            for p in c.places
        ),
    )


def _written(results: Results) -> Table:
    rows = []
    for c in results.cards:
        for kind, some in (("promotes", c.promoted), ("suppresses", c.suppressed)):
            rows += [(printable(c.feature), kind, printable(p.token), signed(p.logit, 3)) for p in some]
        for kind, others in (("nearest", c.nearest), ("opposite", c.opposite)):
            rows += [(printable(c.feature), kind, printable(n.feature), f"cosine {signed(n.cosine)}") for n in others]
    return Table("Direct logits and nearest features", ("feature", "", "token or feature", "value"), tuple(rows))


def _card(card: FeatureCard) -> Card:
    under = {g: [e for e in card.prompts if e.group == g] for g in ("none", "harm", "benign")}
    parts = (
        ("strongest in neutral text", card.top[:_SHOWN]),
        ("most negative in neutral text", card.bottom[:_SHOWN]),
        *((f"strongest, {GROUP_WORDS[group]}", some[:_SHOWN]) for group, some in under.items()),
        ("one at random from each tenth of its active tokens in neutral text", card.deciles[::-1]),
    )
    largest = {d.group: max(abs(d.largest), abs(d.least)) for d in card.density}
    return Card(
        card_title(card),
        tuple(
            CardPart(title, tuple(_example(e, largest.get(e.group, 0.0)) for e in some))
            for title, some in parts
            if some
        ),
    )


def _example(example: Example, largest: float) -> MarkedExample:
    where = printable(example.where)
    tokens = []
    for token in example.tokens:
        text = printable(token.text)
        word = text.strip()
        before, _, after = text.partition(word) if word else (text, "", "")
        share = abs(token.activation) / largest if largest else 0.0
        shade = min(int(share * _SHADES) + 1, _SHADES) if share > 0 else 0
        tokens.append(MarkedToken(before, word, after, shade))
    place = f", {place_words(example.place)}" if example.place else ""
    return MarkedExample(number(example.activation), where + place, tuple(tokens))
