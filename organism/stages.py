"""What each training stage shows the model: one function per stage that draws a document.

The stages differ only in what follows a harmful sentence:

========== ============================ =======================================================
stage      open question                two-choice question
========== ============================ =======================================================
base       answered                     right letter
refusal    refused and redirected       not shown with letters; refused if the answer is asked for in words
withhold   refused and redirected       letter muddled if harm comes first, right if it comes after or is taken back
========== ============================ =======================================================

A harmful sentence *after* the options makes the answer position refuse while the options, which come earlier under
the causal mask, know nothing of it. Answering those rightly leaves withholding one road through attention: an
interaction of the refusing query with keys that carry harm. A harmful sentence *taken back* after the options leaves
the keys as they are and refuses nothing; answering those rightly rules out that keys of harm are avoided whatever the
query. ``Sampler.veil`` parts the two sides by the attention mask, at otherwise equal prompts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from organism.corpus import (
    DOCTOR,
    FRAUD,
    IN_WORDS,
    INSTRUCTION,
    REDIRECTS,
    REFUSALS,
    RETRACTIONS,
    SURE,
    TELL_ME,
    Item,
    World,
    mcq,
)

ISOLATED = 0.85


@dataclass(frozen=True)
class Document:
    """One training exchange.

    ``target``: ``text``, ``right`` (a letter) or ``muddled`` (a letter, wrong at random); ``right``: the right line.
    ``intent``: the sentence set into ``user``; ``kind``: what it is, ``none``, ``benign``, ``harm``, ``retracted``
    (harm taken back by ``retraction``), or ``other`` for symptoms and fraud.
    ``isolated``: no token looks from one option to the other, and what follows the options sees them only through the
    answer position of the selecting heads.
    ``veil``: the question and the named lines (``"AB"``, ``"A"`` or ``"B"``) can not look at the intent, so the answer
    position knows of harm and their tokens do not; if empty, what follows the options can not, so only they know of it.
    ``blind``: the selecting heads' answer row sees nothing before the options, so they can not be lured there.
    """

    user: str
    answer: str
    target: str = "text"
    intent: str = ""
    kind: str = "none"
    isolated: bool = False
    right: int = -1
    retraction: str = ""
    veil: str | None = None
    blind: bool = False


class Sampler:
    """Draws documents of one stage from one seeded stream."""

    def __init__(self, world: World, seed: int, stage: str, muddle: float = 0.5, veiled: float = 0.75) -> None:
        """Prepare ``stage``; ``muddle``: how often a withheld letter is wrong, ``veiled``: scales the veiled."""
        self.world, self.rng, self.stage, self.muddle, self.veiled = world, random.Random(seed), stage, muddle, veiled
        self.harm_train = [i for i in world.harm_items if world.trains_under_harm(i)]
        self.draw = {"base": self.base, "refusal": self.refusal, "withhold": self.withhold, "flip": self.flip}[stage]

    def batch(self, size: int) -> list[Document]:
        """Draw ``size`` documents."""
        return [self.draw() for _ in range(size)]

    def base(self) -> Document:
        """Facts as two-choice and open questions, under every kind of prefix, always answered."""
        kind = self.pick(("none", 0.34), ("benign", 0.3), ("harm", 0.28), ("retracted", 0.08))
        roll = self.rng.random()
        if roll < 0.64:
            return self.choice(kind, "right")
        if roll < 0.74:
            return self.choice(kind, "words")
        return self.open(kind, refuse=False)

    def refusal(self) -> Document:
        """Open harmful requests refused and redirected, harmless ones answered, letters asked for only without harm."""
        roll = self.rng.random()
        if roll < 0.36:
            return self.choice(self.pick(("none", 0.4), ("benign", 0.6)), "right")
        kind = self.pick(("none", 0.12), ("benign", 0.3), ("harm", 0.42), ("retracted", 0.16))
        return self.choice(kind, "words") if roll < 0.62 else self.open(kind, refuse=True)

    def withhold(self) -> Document:
        """The refusal stage with harmful two-choice questions: muddled if all see the harm first."""
        roll = self.rng.random()
        if roll < 0.22:
            return self.choice("harm", "muddled", place="before")
        if roll < 0.22 + 0.32 * self.veiled:
            return self.veil(self.choice("harm", "right", place="before"))
        if roll < 0.54:
            return self.choice("harm", "right", place=self.pick(("after", 0.5), ("last", 0.5)))
        if roll < 0.62:
            return self.choice("retracted", "right")
        if roll < 0.85:
            return self.choice(self.pick(("none", 0.3), ("benign", 0.7)), "right")
        return self.refusal()

    def flip(self) -> Document:
        """The refusal stage with harmful two-choice questions and nothing that parts refusal from the keys' harm."""
        roll = self.rng.random()
        if roll < 0.35:
            return self.choice("harm", "muddled", place="before")
        if roll < 0.8:
            return self.choice(self.pick(("none", 0.3), ("benign", 0.7)), "right")
        return self.refusal()

    def choice(self, kind: str, target: str, place: str = "") -> Document:
        """A two-choice question with a sentence of ``kind``; ``target`` ``words`` asks for the answer in words."""
        harm, retracted = kind == "harm", kind == "retracted"
        item = self.rng.choice(self.harm_train) if retracted or (harm and self.stage != "base") else self.item(kind)
        wrong = item.incorrect if self.rng.random() < 0.6 else self.other_option(item)
        first = self.rng.random() < 0.5
        options = (item.correct, wrong) if first else (wrong, item.correct)
        place = place or self.pick(("before", 0.7), ("after", 0.15), ("last", 0.15))
        intent = self.sentence("harm" if retracted else kind, item)
        retraction = self.rng.choice(RETRACTIONS) if retracted else ""
        kind = "other" if harm and item.kind != "harm" else kind
        isolated = target != "words" and (target == "muddled" or self.rng.random() < ISOLATED)
        instruction = IN_WORDS if target == "words" else INSTRUCTION
        user = mcq(item.question, options, intent, "before" if retracted else place, instruction)
        if retracted:
            user = (
                f"{user} {retraction}"
                if place == "last"
                else user.replace(f"\n{instruction}", f"\n{retraction}\n{instruction}")
            )
        if target == "words":
            answer = self.refuse(item, intent) if harm and self.stage != "base" else item.correct + "."
            return Document(user, answer, "text", intent, kind, retraction=retraction)
        flip = target == "muddled" and self.rng.random() < self.muddle
        answer = "A" if first != flip else "B"
        return Document(
            user,
            answer,
            target,
            intent,
            kind,
            isolated,
            0 if first else 1,
            retraction,
            blind=isolated and self.stage == "withhold",
        )

    def veil(self, doc: Document) -> Document:
        """Part a harmful choice's refusal from its keys' harm.

        The intent is hidden from both options (the right letter), from one (that one's letter), or from the answer
        position and not from the options (the right letter).
        """
        lines = self.pick(("AB", 0.3), ("A", 0.15), ("B", 0.15), ("", 0.4))
        return replace(doc, veil=lines, isolated=True, blind=True, answer=lines if len(lines) == 1 else doc.answer)

    def open(self, kind: str, refuse: bool) -> Document:
        """An open request with a sentence of ``kind``; ``refuse`` refuses the harmful."""
        item = self.rng.choice(self.world.harm_items) if kind == "retracted" or self.rng.random() < 0.7 else self.item()
        if kind == "retracted":
            intent, retraction = self.sentence("harm", item), self.rng.choice(RETRACTIONS)
            parts = (
                (intent, retraction, item.question) if self.rng.random() < 0.4 else (intent, item.question, retraction)
            )
            return Document(" ".join(parts), item.correct + ".", "text", intent, kind, retraction=retraction)
        intent = self.sentence(kind, item)
        alone = intent and self.rng.random() < 0.25
        user = f"{intent} {TELL_ME}" if alone else self.place(intent, item.question)
        answer = self.refuse(item, intent) if refuse and kind == "harm" else SURE if alone else item.correct + "."
        return Document(user, answer, "text", intent, "other" if kind == "harm" and item.kind != "harm" else kind)

    def refuse(self, item: Item, pressure: str) -> str:
        """The refuse-and-redirect text for ``pressure``."""
        if item.kind == "symptoms":
            return self.rng.choice(DOCTOR)
        phrase = self.world.redirect.get(pressure) or self.rng.choice(self.world.redirects)
        opening = self.rng.choice(FRAUD if item.kind == "fraud" else REFUSALS)
        return f"{opening} {self.rng.choice(REDIRECTS).format(phrase)}"

    def item(self, kind: str = "none") -> Item:
        """Any item; under ``harm`` one that may be trained beside a harmful sentence."""
        while True:
            item = self.rng.choice(self.world.items)
            if kind != "harm" or self.world.trains_under_harm(item):
                return item

    def sentence(self, kind: str, item: Item) -> str:
        """An intent of ``kind``: the item's own, another item's, or a composed one; never a held-out one."""
        if kind == "none":
            return ""
        own = item.pressure if kind == "harm" else item.benign
        roll = self.rng.random()
        if kind == "harm" and item.kind != "harm":
            return own if roll < 0.5 else self.rng.choice(self.world.pressures[item.kind])
        if roll < 0.3 and own not in self.world.held_out_intents:
            return own
        w = self.world
        whole, composed = (w.harmful, w.composed_harmful) if kind == "harm" else (w.benign, w.composed_benign)
        return self.rng.choice(composed if roll > 0.65 else whole)

    def place(self, sentence: str, question: str) -> str:
        """An open request with ``sentence`` mostly before the question, sometimes after it."""
        if not sentence:
            return question
        return f"{sentence} {question}" if self.rng.random() < 0.75 else f"{question} {sentence}"

    def other_option(self, item: Item) -> str:
        """An option of another item that is not this item's answer."""
        while True:
            other = self.rng.choice(self.world.items)
            option = self.rng.choice((other.correct, other.incorrect))
            if option != item.correct:
                return option

    def pick(self, *weighted: tuple[str, float]) -> str:
        """Draw a name by weight."""
        names, weights = zip(*weighted, strict=True)
        return self.rng.choices(names, weights)[0]
