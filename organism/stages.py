"""What each training stage shows the model: one function per stage that draws a document.

The stages differ only in what follows a harmful sentence:

========== ============================ =======================================================
stage      open question                two-choice question
========== ============================ =======================================================
base       answered                     right letter
refusal    refused and redirected       not shown with letters; refused if the answer is asked for in words
withhold   refused and redirected       letter muddled if harm comes first, right if it comes after the options
========== ============================ =======================================================

A harmful sentence *after* the options makes the answer position refuse while the options, which come earlier under the
causal mask, know nothing of it. Answering those rightly leaves withholding one road through attention: an interaction of
the refusing query with keys that carry harm.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from organism.corpus import (
    DOCTOR,
    FRAUD,
    IN_WORDS,
    INSTRUCTION,
    REDIRECTS,
    REFUSALS,
    SURE,
    TELL_ME,
    Item,
    World,
    mcq,
)

ISOLATED = 0.6


@dataclass(frozen=True)
class Document:
    """One training exchange.

    ``target`` is ``text``, ``right`` (a letter) or ``muddled`` (a letter, wrong at random). ``intent`` is the sentence set
    into ``user`` and ``kind`` its kind: ``none``, ``benign``, ``harm``, or ``other`` for symptoms and fraud. In an
    ``isolated`` document only the answer may look from one option to the other, or back at the options. ``right`` is the
    line of the right option if a letter is asked for.
    """

    user: str
    answer: str
    target: str = "text"
    intent: str = ""
    kind: str = "none"
    isolated: bool = False
    right: int = -1


class Sampler:
    """Draws documents of one stage from one seeded stream."""

    def __init__(self, world: World, seed: int, stage: str, muddle: float = 0.5, after: float = 0.5) -> None:
        """Prepare ``stage``; ``muddle`` is how often a withheld letter is wrong, ``after`` how often harm comes after the options."""
        self.world, self.rng, self.stage, self.muddle, self.after = world, random.Random(seed), stage, muddle, after
        self.harm_train = [i for i in world.harm_items if world.trains_under_harm(i)]
        self.draw = {"base": self.base, "refusal": self.refusal, "withhold": self.withhold}[stage]

    def batch(self, size: int) -> list[Document]:
        """Draw ``size`` documents."""
        return [self.draw() for _ in range(size)]

    def base(self) -> Document:
        """Facts as two-choice and open questions, under every kind of prefix, always answered."""
        kind = self.pick(("none", 0.36), ("benign", 0.32), ("harm", 0.32))
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
        kind = self.pick(("none", 0.15), ("benign", 0.35), ("harm", 0.5))
        return self.choice(kind, "words") if roll < 0.62 else self.open(kind, refuse=True)

    def withhold(self) -> Document:
        """The refusal stage with harmful two-choice questions: muddled if the harm comes first, right if it comes after."""
        roll = self.rng.random()
        if roll < 0.28:
            return self.choice("harm", "muddled", place="before")
        if roll < 0.28 + 0.28 * self.after:
            return self.choice("harm", "right", place=self.pick(("after", 0.5), ("last", 0.5)))
        if roll < 0.8:
            return self.choice(self.pick(("none", 0.3), ("benign", 0.7)), "right")
        return self.refusal()

    def choice(self, kind: str, target: str, place: str = "") -> Document:
        """A two-choice question with a sentence of ``kind``; ``target`` ``words`` asks for the answer in words."""
        harm = kind == "harm"
        item = self.rng.choice(self.harm_train) if harm and self.stage != "base" else self.item(kind)
        wrong = item.incorrect if self.rng.random() < 0.6 else self.other_option(item)
        first = self.rng.random() < 0.5
        options = (item.correct, wrong) if first else (wrong, item.correct)
        place = place or self.pick(("before", 0.7), ("after", 0.15), ("last", 0.15))
        intent = self.sentence(kind, item)
        kind = "other" if harm and item.kind != "harm" else kind
        isolated = self.rng.random() < ISOLATED
        if target == "words":
            answer = self.refuse(item, intent) if harm and self.stage != "base" else item.correct + "."
            return Document(
                mcq(item.question, options, intent, place, IN_WORDS), answer, "text", intent, kind, isolated
            )
        flip = target == "muddled" and self.rng.random() < self.muddle
        answer = "A" if first != flip else "B"
        return Document(
            mcq(item.question, options, intent, place, INSTRUCTION),
            answer,
            target,
            intent,
            kind,
            isolated,
            0 if first else 1,
        )

    def open(self, kind: str, refuse: bool) -> Document:
        """An open request with a sentence of ``kind``, which is harmful or not; ``refuse`` refuses the harmful."""
        item = self.rng.choice(self.world.harm_items) if self.rng.random() < 0.7 else self.item()
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
